"""ShuffleNetV2 as a pose network: N. Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design", ECCV 2018, with the head of SimpleBaseline (`_deconv_head.DeconvHead`).

The classification network (1x) without its classifier, down to 1/32 resolution, three transposed convolutions back to
1/4 and a 1x1 heatmap layer.

Attribute names are those of the published OpenMMLab checkpoints without their ``backbone.``.

At 256x256 with 16 keypoints it has 7,550,708 parameters (published 7.55 M) and 1,815,320,064 multiply-accumulates.
The published costs are in units of 2^30 and count two for each output of a batch norm and one for each of an activation
beside: by that rule 1.701 (published 1.70), at 256x192 1.276 (1.28), at 384x288 2.871 (2.87).
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.layers import ConvBNAct, channel_shuffle, check_images
from fastpose.models._deconv_head import DeconvHead, DeconvPoseConfig
from fastpose.models._registry import Published, register_model
from fastpose.models.lite_hrnet import naive_block


@dataclass(frozen=True)
class ShuffleNetV2PoseConfig(DeconvPoseConfig):
    """Shape: widths of the three stages and of the last 1x1 convolution (Table 5), blocks per stage; the rest as
    `DeconvPoseConfig`."""

    widths: tuple[int, ...] = (116, 232, 464)
    last_width: int = 1024
    blocks: tuple[int, ...] = (4, 8, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) != 3 or any(w < 2 or w % 2 != 0 for w in self.widths):
            raise ValueError(f"widths must be three even numbers, one per stage, got {self.widths}")
        if len(self.blocks) != 3 or min(self.blocks) < 1:
            raise ValueError(f"blocks must be three positive numbers, one per stage, got {self.blocks}")


class StridedUnit(nn.Module):
    """Block of stride 2 (Figure 3d): both branches see all channels; [B, I, H, W] -> [B, O, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        i, c = in_channels, out_channels // 2
        self.branch1 = nn.Sequential(ConvBNAct(i, i, 3, 2, groups=i), ConvBNAct(i, c, act="relu"))
        self.branch2 = nn.Sequential(
            ConvBNAct(i, c, act="relu"), ConvBNAct(c, c, 3, 2, groups=c), ConvBNAct(c, c, act="relu")
        )

    def forward(self, x: Tensor) -> Tensor:
        return channel_shuffle(torch.cat([self.branch1(x), self.branch2(x)], 1), 2, self.training)


class ShuffleNetV2Pose(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    input_multiple: Final[int]

    def __init__(self, config: ShuffleNetV2PoseConfig) -> None:
        super().__init__()
        self.config = config
        channels = 24
        self.conv1 = ConvBNAct(3, channels, 3, 2, act="relu")
        layers: list[nn.Module] = []
        for width, blocks in zip(config.widths, config.blocks, strict=True):
            layers.append(nn.Sequential(StridedUnit(channels, width), *[naive_block(width) for _ in range(blocks - 1)]))
            channels = width
        layers.append(ConvBNAct(channels, config.last_width, act="relu"))
        self.layers = nn.Sequential(*layers)
        self.head = DeconvHead(config.last_width, config.num_keypoints, config.deconv_width)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, "ShuffleNetV2Pose")
        return self.head(self.layers(F.max_pool2d(self.conv1(x), 3, 2, 1)))


@register_model(
    input_size=(256, 256),
    num_keypoints=16,
    published=(
        Published("Cai et al. 2024 (HR-LiteNet)", (256, 256), 7.55, 1.70, "2^30", "PCKh@0.5 84.065 MPII val"),
        Published("Niu et al. 2021 (MobilePoseNet)", (256, 256), 7.6, 1.70, "2^30", "PCKh@0.5 82.8 MPII val"),
        Published("Niu et al. 2021 (MobilePoseNet)", (256, 192), 7.6, 1.28, "2^30", "AP 59.9 COCO val"),
        Published("Niu et al. 2021 (MobilePoseNet)", (384, 288), 7.6, 2.87, "2^30", "AP 63.6 COCO val"),
    ),
)
def shufflenetv2_pose(**changes: Any) -> ShuffleNetV2Pose:
    """ShuffleNetV2 (1x) pose: 7,550,708 parameters, 1.815 G multiply-accumulates at 256x256, 16 keypoints."""
    return ShuffleNetV2Pose(replace(ShuffleNetV2PoseConfig(), **changes))
