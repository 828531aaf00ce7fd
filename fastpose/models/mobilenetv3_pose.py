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

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from fastpose.layers import ConvBNAct, check_images
from fastpose.models._deconv_head import DeconvHead
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
class MobileNetV3PoseConfig:
    """Shape: rows (`POSE_ROWS` or `PAPER_ROWS`), ratio of the squeeze-and-excitation, width of the last 1x1 convolution
    and of the transposed convolutions."""

    num_keypoints: int = 17
    rows: tuple[Row, ...] = POSE_ROWS
    se_ratio: int = 4
    last_width: int = 960
    deconv_width: int = 256

    def __post_init__(self) -> None:
        if self.num_keypoints < 1:
            raise ValueError(f"num_keypoints must be at least 1, got {self.num_keypoints}")
        if sum(row[5] == 2 for row in self.rows) != 4 or any(row[5] not in (1, 2) for row in self.rows):
            raise ValueError(f"four rows must have stride 2 and the others 1, got {[row[5] for row in self.rows]}")
        if min(self.last_width, self.deconv_width) < 1:
            raise ValueError(f"widths must be positive, got {self.last_width} and {self.deconv_width}")


class MobileNetV3Pose(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    input_multiple: Final[int]

    def __init__(self, config: MobileNetV3PoseConfig) -> None:
        super().__init__()
        self.config = config
        channels = 16
        self.stem = ConvBNAct(3, channels, 3, 2, act="hardswish")
        blocks: list[nn.Module] = []
        for row in config.rows:
            blocks.append(InvertedResidual(channels, row, "expand", config.se_ratio))
            channels = row[2]
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvBNAct(channels, config.last_width, act="hardswish")
        self.head = DeconvHead(config.last_width, config.num_keypoints, config.deconv_width)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, "MobileNetV3Pose")
        return self.head(self.last(self.blocks(self.stem(x))))


@register_model(
    input_size=(256, 256),
    num_keypoints=16,
    published=(Published("Niu et al. 2021 (MobilePoseNet)", (256, 256), 8.7, 1.82, "2^30", "PCKh@0.5 84.3 MPII val"),),
)
def mobilenetv3_pose(**changes: Any) -> MobileNetV3Pose:
    """MobileNetV3 pose: 8,669,486 parameters, 1.932 G multiply-accumulates at 256x256, 16 keypoints."""
    return MobileNetV3Pose(replace(MobileNetV3PoseConfig(), **changes))
