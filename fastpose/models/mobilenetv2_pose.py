"""MobileNetV2 as a pose network: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR
2018, with the head of SimpleBaseline (`_deconv_head.DeconvHead`).

The classification network without its classifier, down to 1/32 resolution, three transposed convolutions back to 1/4
and a 1x1 heatmap layer.

Attribute names are those of the published OpenMMLab checkpoints without their ``backbone.``.

At 256x256 with 16 keypoints it has 9,569,552 parameters (published 9.57 M) and 2,085,675,008 multiply-accumulates.
The published costs are in units of 2^30 and count two for each output of a batch norm and one for each of an activation
beside: by that rule 1.970 (published 1.97), at 256x192 1.478 (1.48), at 384x288 3.324 (3.33; one paper prints 3.38).
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from fastpose.layers import ConvBNAct, check_images
from fastpose.models._deconv_head import DeconvHead, DeconvPoseConfig, check_strides
from fastpose.models._registry import Published, register_model

# One row of Table 2: expansion factor, output width, number of blocks, stride of the first.
Row = tuple[int, int, int, int]

TABLE_2: tuple[Row, ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@dataclass(frozen=True)
class MobileNetV2PoseConfig(DeconvPoseConfig):
    """Shape: rows of Table 2; the rest as `DeconvPoseConfig`."""

    rows: tuple[Row, ...] = TABLE_2
    last_width: int = 1280

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rows) != 7:
            raise ValueError(f"rows must be the seven of Table 2, got {len(self.rows)}")
        check_strides(self.rows)


class InvertedResidual(nn.Module):
    """1x1 expand, depthwise 3x3, linear 1x1; plus x where the shape is kept. [B, I, H, W] -> [B, O, H/s, W/s]."""

    identity: Final[bool]

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand: int) -> None:
        super().__init__()
        width = expand * in_channels
        self.conv = nn.Sequential(
            # a factor of one needs no expansion
            *([ConvBNAct(in_channels, width, act="relu6")] if expand != 1 else []),
            ConvBNAct(width, width, 3, stride, groups=width, act="relu6"),
            ConvBNAct(width, out_channels),
        )
        self.identity = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


class MobileNetV2Pose(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    input_multiple: Final[int]

    def __init__(self, config: MobileNetV2PoseConfig) -> None:
        super().__init__()
        self.config = config
        channels = 32
        self.conv1 = ConvBNAct(3, channels, 3, 2, act="relu6")
        rows: list[nn.Module] = []
        for expand, width, blocks, stride in config.rows:
            first = InvertedResidual(channels, width, stride, expand)
            rows.append(nn.Sequential(first, *[InvertedResidual(width, width, 1, expand) for _ in range(blocks - 1)]))
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5, self.layer6, self.layer7 = rows
        self.conv2 = ConvBNAct(channels, config.last_width, act="relu6")
        self.head = DeconvHead(config.last_width, config.num_keypoints, config.deconv_width)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, "MobileNetV2Pose")
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.layer7(self.layer6(self.layer5(self.layer4(x))))
        return self.head(self.conv2(x))


@register_model(
    input_size=(256, 256),
    num_keypoints=16,
    published=(
        Published("Cai et al. 2024 (HR-LiteNet)", (256, 256), 9.57, 1.97, "2^30", "PCKh@0.5 81.194 MPII val"),
        Published("Niu et al. 2021 (MobilePoseNet)", (256, 256), 9.6, 1.97, "2^30", "PCKh@0.5 85.4 MPII val"),
        Published("Niu et al. 2021 (MobilePoseNet)", (256, 192), 9.6, 1.48, "2^30", "AP 64.6 COCO val"),
        Published("Niu et al. 2021 (MobilePoseNet)", (384, 288), 9.6, 3.33, "2^30", "AP 67.3 COCO val"),
    ),
)
def mobilenetv2_pose(**changes: Any) -> MobileNetV2Pose:
    """MobileNetV2 pose: 9,569,552 parameters, 2.086 G multiply-accumulates at 256x256, 16 keypoints."""
    return MobileNetV2Pose(replace(MobileNetV2PoseConfig(), **changes))
