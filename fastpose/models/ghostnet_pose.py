"""GhostNet as a pose network: K. Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, with the head
of SimpleBaseline (`_deconv_head.DeconvHead`).

The classification network (1.0x) without its classifier but with its last 1x1 convolution (160 to 960 channels), down
to 1/32 resolution, three transposed convolutions back to 1/4 and a 1x1 heatmap layer.

No code or weights of this pose network were published, only its size in the HR-LiteNet paper, 8.71 M and 1.68 G at
256x256. This arrangement fits both: with 16 keypoints 8,706,388 parameters and 1,791,236,928 multiply-accumulates,
counted as in `mobilenetv2_pose` 1.684. Without the last 1x1 convolution it would be 5.27 M.
"""

# no `from __future__ import annotations` here: TorchScript must see the annotations themselves, not their text

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastpose.layers import ConvBNAct, GhostModule, SqueezeExcite
from fastpose.models._deconv_head import DeconvPose, DeconvPoseConfig, check_strides
from fastpose.models._registry import Published, register_model

# One row of Table 1: depthwise kernel, expansion width, output width, squeeze-and-excitation, stride.
Row = tuple[int, int, int, bool, int]

TABLE_1: tuple[Row, ...] = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)


@dataclass(frozen=True)
class GhostNetPoseConfig(DeconvPoseConfig):
    """Shape: rows of Table 1, ratio of squeeze-and-excitation; the rest as `DeconvPoseConfig`."""

    rows: tuple[Row, ...] = TABLE_1
    se_ratio: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strides(self.rows)
        if any(row[1] % 2 != 0 or row[2] % 2 != 0 for row in self.rows):
            raise ValueError("the widths of all rows must be even, since ghost modules make half of each")


class GhostBottleneck(nn.Module):
    """Ghost module to `width`, depthwise k x k if strided, squeeze-and-excitation, linear ghost module; plus shortcut.

    [B, I, H, W] -> [B, O, H/s, W/s]. The shortcut is x, or depthwise k x k and 1x1 where the shape changes.
    """

    def __init__(self, in_channels: int, row: Row, se_ratio: int) -> None:
        super().__init__()
        k, width, out_channels, se, stride = row
        self.expand = GhostModule(in_channels, width, act="relu")
        self.depthwise = ConvBNAct(width, width, k, stride, groups=width) if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(width, se_ratio, divisor=4) if se else nn.Identity()
        self.project = GhostModule(width, out_channels, act="none")
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            depthwise = ConvBNAct(in_channels, in_channels, k, stride, groups=in_channels)
            self.shortcut = nn.Sequential(depthwise, ConvBNAct(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.project(self.se(self.depthwise(self.expand(x))))


class GhostNetPose(DeconvPose):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: GhostNetPoseConfig) -> None:
        def block(in_channels: int, row: Row) -> nn.Module:
            return GhostBottleneck(in_channels, row, config.se_ratio)

        super().__init__(config, "GhostNetPose", config.rows, block, "relu")


@register_model(
    input_size=(256, 256),
    num_keypoints=16,
    published=(Published("Cai et al. 2024 (HR-LiteNet)", (256, 256), 8.71, 1.68, "2^30", "PCKh@0.5 85.428 MPII val"),),
)
def ghostnet_pose(**changes: Any) -> GhostNetPose:
    """GhostNet (1.0x) pose: 8,706,388 parameters, 1.791 G multiply-accumulates at 256x256, 16 keypoints."""
    return GhostNetPose(replace(GhostNetPoseConfig(), **changes))
