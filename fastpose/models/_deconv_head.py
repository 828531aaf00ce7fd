"""Heatmap head of SimpleBaseline: B. Xiao et al., "Simple Baselines for Human Pose Estimation and Tracking", ECCV 2018.

It also stands behind the classification networks that are compared as pose networks (MobileNetV2 and others).
"""

# no `from __future__ import annotations` here: TorchScript must see the annotations themselves, not their text

from torch import Tensor, nn


class DeconvHead(nn.Module):
    """Features [B, I, h, w] -> heatmaps [B, K, 8h, 8w]: three transposed convolutions and a 1x1 heatmap layer.

    Each transposed convolution is dense, 4x4, stride 2, `width` channels wide, without bias, then batch norm and ReLU.
    The attribute names are those of the published checkpoints: ``deconv_layers.0`` ... ``deconv_layers.7`` and
    ``final_layer``.
    """

    def __init__(self, in_channels: int, num_keypoints: int, width: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            conv = nn.ConvTranspose2d(in_channels if i == 0 else width, width, 4, 2, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(width, num_keypoints, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_layer(self.deconv_layers(x))
