"""MobileNetV3 as a pose network: A. Howard et al., "Searching for MobileNetV3", ICCV 2019, with the head of
SimpleBaseline (`_deconv_head.DeconvHead`).

The large classification network without its classifier but with its last 1x1 convolution (160 to 960 channels), down to
1/32 resolution, three transposed convolutions back to 1/4 and a 1x1 heatmap layer.

No code or weights of this pose network were published, only its size in the MobilePoseNet paper, 8.7 M and 1.82 G at
256x256. What fits, with 16 keypoints, in millions and units of 2^30, counted as in `mobilenetv2_pose`:

* Blocks 13 and 14 both 672 wide, the stride in the second: 8.669 and 1.820, the published figures. The default,
  `POSE_ROWS`; it is also how the MobileNetV3 of OpenMMLab's pose package is written.
* The table of the MobileNetV3 paper, `PAPER_ROWS`, with the stride in block 13 and block 14 960 wide: 9.005 and 1.784.
* Without the last 1x1 convolution: 5.237 M, far off.

Two details of the backbone have no effect on these figures: the first block has a 1x1 convolution (16 to 16) that the
original leaves out, and the hidden widths of the squeeze-and-excitations are exact quarters, not rounded to multiples
of 8. Multiply-accumulates: 1,931,879,008.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastpose.models._deconv_head import DeconvPose, DeconvPoseConfig, check_strides
from fastpose.models._registry import Published, register_model
from fastpose.models.mobileposenet import TABLE_1, InvertedResidual, Row

# MobileNetV3-Large, Table 1 of its paper, and as the published pose network has it. Both differ from MobilePoseNet's
# table, which stays at 1/16 resolution, in blocks 13 and 14 alone.
PAPER_ROWS: tuple[Row, ...] = (
    *TABLE_1[:12],
    (5, 672, 160, True, "hardswish", 2),
    (5, 960, 160, True, "hardswish", 1),
    TABLE_1[14],
)
POSE_ROWS: tuple[Row, ...] = (*TABLE_1[:13], (5, 672, 160, True, "hardswish", 2), TABLE_1[14])


@dataclass(frozen=True)
class MobileNetV3PoseConfig(DeconvPoseConfig):
    """Shape: rows (`POSE_ROWS` or `PAPER_ROWS`), ratio of squeeze-and-excitation; the rest as `DeconvPoseConfig`."""

    rows: tuple[Row, ...] = POSE_ROWS
    se_ratio: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strides(self.rows)


class MobileNetV3Pose(DeconvPose):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: MobileNetV3PoseConfig) -> None:
        def block(in_channels: int, row: Row) -> nn.Module:
            return InvertedResidual(in_channels, row, "expand", config.se_ratio)

        super().__init__(config, "MobileNetV3Pose", config.rows, block, "hardswish")


@register_model(
    input_size=(256, 256),
    num_keypoints=16,
    published=(Published("Niu et al. 2021 (MobilePoseNet)", (256, 256), 8.7, 1.82, "2^30", "PCKh@0.5 84.3 MPII val"),),
)
def mobilenetv3_pose(**changes: Any) -> MobileNetV3Pose:
    """MobileNetV3 pose: 8,669,486 parameters, 1.932 G multiply-accumulates at 256x256, 16 keypoints."""
    return MobileNetV3Pose(replace(MobileNetV3PoseConfig(), **changes))
