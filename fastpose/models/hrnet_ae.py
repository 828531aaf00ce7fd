"""Bottom-up pose estimation on the body of HRNet, with associative embedding.

Associative embedding (A. Newell et al., "Associative Embedding: End-to-End Learning for Joint Detection and Grouping",
NeurIPS 2017) predicts for every keypoint a heatmap for all people at once and a tag map, whose values are alike where
keypoints belong to the same person. Two networks:

* HRNet with a 1x1 convolution to 2K maps (K heatmaps, then K tag maps) at 1/4 resolution. Keys are those of OpenMMLab's
  `ae_hrnet` checkpoints without the prefixes ``backbone.`` and ``head.``.
* HigherHRNet: B. Cheng et al., "HigherHRNet: Scale-Aware Representation Learning for Bottom-Up Human Pose Estimation",
  CVPR 2020. The same maps at 1/4 resolution; then features and maps together go through a transposed convolution and
  residual blocks to heatmaps, without tags, at 1/2 resolution. Keys are those of the authors' checkpoints.

Costs at 512x512 and 17 keypoints. HigherHRNet-W32 needs 46.203e9 multiply-accumulates; the published 47.9 is 47.864e9,
where the weights of the transposed convolution count once per output position, four times too often. HRNet-W32 with
2K maps needs 40.782e9, 37.98 times 2^30; the published 38.9 is neither.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastpose.models._registry import Published, register_model
from fastpose.models.hrnet import BasicBlock, HRNet, HRNetConfig


class HRNetAE(HRNet):
    """Images [B, 3, H, W] with H, W multiples of 32 -> (maps,): K heatmaps and K tag maps, [B, 2K, H/4, W/4].

    A tuple of one, so that all bottom-up networks return their maps alike: the coarsest first, with the tags.
    """

    def __init__(self, config: HRNetConfig) -> None:
        super().__init__(config, "HRNetAE")
        self.final_layer = nn.Conv2d(config.widths[0], 2 * config.num_keypoints, 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (self.final_layer(self.features(x)),)


def higher_head(channels: int, num_keypoints: int, width: int, blocks: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The two layers that end in maps, and the one that doubles the resolution between them.

    For features x [B, channels, h, w]: ``maps = final[0](x)`` is [B, 2K, h, w]; ``y = deconv[0](cat(x, maps))`` is
    [B, width, 2h, 2w], by a transposed 4x4 convolution and `blocks` residual blocks; ``final[1](y)`` is [B, K, 2h, 2w].
    """
    maps = 2 * num_keypoints
    final = nn.ModuleList([nn.Conv2d(channels, maps, 1), nn.Conv2d(width, num_keypoints, 1)])
    conv = nn.ConvTranspose2d(channels + maps, width, 4, 2, 1, bias=False)
    upsample = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
    residual = [nn.Sequential(BasicBlock(width)) for _ in range(blocks)]
    return final, nn.ModuleList([nn.Sequential(upsample, *residual)])


@dataclass(frozen=True)
class HigherHRNetConfig(HRNetConfig):
    """An HRNet and the number of residual blocks after the transposed convolution."""

    head_blocks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_blocks < 0:
            raise ValueError(f"head_blocks must not be negative, got {self.head_blocks}")


class HigherHRNet(HRNet):
    """Images [B, 3, H, W] with H, W multiples of 32 -> (maps [B, 2K, H/4, W/4], heatmaps [B, K, H/2, W/2]).

    The maps are K heatmaps, then K tag maps.
    """

    def __init__(self, config: HigherHRNetConfig) -> None:
        super().__init__(config, "HigherHRNet")
        width = config.widths[0]
        self.final_layer = nn.Identity()  # type: ignore[assignment]  # the layers below instead
        self.final_layers, self.deconv_layers = higher_head(width, config.num_keypoints, width, config.head_blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.features(x)
        maps = self.final_layers[0](x)
        return maps, self.final_layers[1](self.deconv_layers[0](torch.cat([x, maps], 1)))


PAPER = "Cheng et al. 2020 (HigherHRNet)"


@register_model((512, 512), published=(Published(PAPER, (512, 512), 28.5, 38.9, "?", "AP 64.1 COCO test-dev"),))
def hrnet_w32_ae(**changes: Any) -> HRNetAE:
    """HRNet-W32 with associative embedding: 28,536,674 parameters, 40.782 G multiply-accumulates at 512x512."""
    return HRNetAE(replace(HRNetConfig(), **changes))


@register_model((512, 512), published=(Published(PAPER, (512, 512), 28.6, 47.9, "1e9", "AP 66.4 COCO test-dev"),))
def higher_hrnet_w32(**changes: Any) -> HigherHRNet:
    """HigherHRNet-W32: 28,645,331 parameters, 46.203 G multiply-accumulates at 512x512, 17 keypoints."""
    return HigherHRNet(replace(HigherHRNetConfig(), **changes))
