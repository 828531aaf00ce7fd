"""Heatmap head of SimpleBaseline: B. Xiao et al., "Simple Baselines for Human Pose Estimation and Tracking", ECCV 2018.

It also stands behind the classification networks that are compared as pose networks (MobileNetV2 and others), which
share what is here.
"""

# no `from __future__ import annotations` here: TorchScript must see the annotations themselves, not their text

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from fastpose.layers import ConvBNAct, check_images, check_num_keypoints


@dataclass(frozen=True)
class DeconvPoseConfig:
    """Width of the last 1x1 convolution of a classification network, and of the transposed convolutions behind it."""

    num_keypoints: int = 17
    last_width: int = 960
    deconv_width: int = 256

    def __post_init__(self) -> None:
        check_num_keypoints(self.num_keypoints)
        if min(self.last_width, self.deconv_width) < 1:
            raise ValueError(f"widths must be positive, got {self.last_width} and {self.deconv_width}")


def check_strides(rows: Sequence[tuple[Any, ...]]) -> None:
    """Raise ValueError unless the strides, the last entries of the rows of a network's table, lead to 1/32."""
    strides = [row[-1] for row in rows]
    if strides.count(2) != 4 or any(s not in (1, 2) for s in strides):
        raise ValueError(f"four rows must have stride 2 and the others 1, got {strides}")


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


class DeconvPose(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4].

    A stem of stride 2, a block per row of a table, a 1x1 convolution and `DeconvHead`. The third entry of a row is the
    output width of its block, which `block(in_channels, row)` builds; `act` stands behind stem and 1x1 convolution and
    `name` in error messages.
    """

    input_multiple: Final[int]
    name: Final[str]

    def __init__(
        self,
        config: DeconvPoseConfig,
        name: str,
        rows: Sequence[tuple[Any, ...]],
        block: Callable[[int, Any], nn.Module],
        act: str,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = name
        channels = 16
        self.stem = ConvBNAct(3, channels, 3, 2, act=act)
        blocks: list[nn.Module] = []
        for row in rows:
            blocks.append(block(channels, row))
            channels = row[2]
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvBNAct(channels, config.last_width, act=act)
        self.head = DeconvHead(config.last_width, config.num_keypoints, config.deconv_width)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, self.name)
        return self.head(self.last(self.blocks(self.stem(x))))
