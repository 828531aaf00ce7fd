"""Lite CSW-HRNet: Y. Xi et al., "Lite CSW-HRNet: Lightweight High-Resolution Human Pose Estimation Based on Channel
Spatial Weighting", 2024.

Lite-HRNet-18 whose two channel weightings become *channel spatial weightings* (Section 3.2): a channel gate ``M_c`` and
a spatial gate ``M_s``, each from average and maximum, with hardly any parameters (at most 11 and 98). Everything else
is `lite_hrnet.LiteFrame`; attribute names follow Lite-HRNet's, so that its weights fit all layers but the weightings.

The paper published no code and leaves these points open. What we chose, and why:

* Modules and blocks. Table 1 prints "number of layers" 2, 4, 2 and "repeat" 2, 2, 1. Modules 2, 4, 2 of two blocks each
  are Lite-HRNet-18's and give 892,481 parameters, the published 0.9 M; ``blocks=(2, 2, 1)`` gives 885 k. With the two
  columns swapped it would be 531 k.
* The iterative head of Lite-HRNet is not mentioned and kept; without it there would be 816 k parameters.
* Order of the gates. Eq. 3, Figure 3 and the abstract have them in parallel, ``x * M_c(x) * M_s(x)``; Eq. 12 has
  ``M_s`` after ``M_c``. Parallel; ``order="serial"`` is the other.
* Kernel of ``M_c`` (Eq. 8): the odd number nearest to (log2 C + b) / y. The text has "1 and 2" for y and b, which with
  the usual y = 2, b = 1 gives kernels 3 and 5, and literally (``gamma=1, offset=2``) 7 to 11. Usual values; neither
  shows in the parameters or cost.
* Cross-resolution weight (Eq. 15): the product of the two gates of the pooled features Z, which is bounded. Read
  literally the weight is Z times its gates (``cross_weight="features"``).
* Exchange: the plain sum. ``legacy_fuse`` (see `lite_hrnet`) is for warm starts from published Lite-HRNet weights.

Multiply-accumulates at 256x192: 191,145,536 (published 0.20 G, 0.203 G if batch norm is counted as two per element);
at 384x288 430.0 M (0.45 G). Initialisation is not stated; PyTorch's default is kept.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastpose.layers import SpatialAttention, largest_pixel
from fastpose.models._registry import Published, register_model
from fastpose.models.lite_hrnet import (
    ChannelWeightingBlock,
    GateBranches,
    JointBlocks,
    LiteFrame,
    LiteFrameConfig,
    LiteStem,
    ToSmallestGrid,
)


@dataclass(frozen=True)
class LiteCSWHRNetConfig(LiteFrameConfig):
    """`order` of the gates is ``"parallel"`` or ``"serial"``; `gamma` and `offset` are y and b of Eq. 8; `cross_weight`
    is ``"gates"`` or ``"features"`` (gates times pooled features)."""

    order: str = "parallel"
    gamma: float = 2.0
    offset: float = 1.0
    cross_weight: str = "gates"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("parallel", "serial"):
            raise ValueError(f"order must be 'parallel' or 'serial', got {self.order!r}")
        if self.cross_weight not in ("gates", "features"):
            raise ValueError(f"cross_weight must be 'gates' or 'features', got {self.cross_weight!r}")
        if not (self.gamma > 0 and self.offset >= 0):
            raise ValueError(f"gamma must be positive and offset not negative, got {self.gamma} and {self.offset}")


def kernel_size(channels: int, gamma: float, offset: float) -> int:
    """Odd number nearest to (log2 C + offset) / gamma, the larger of two (Eq. 8)."""
    return 2 * int((math.log2(channels) + offset) / gamma / 2) + 1


class ChannelGate(nn.Module):
    """``M_c(x) = sigmoid(conv1d(mean(x)) + conv1d(max(x)))`` along the channels (Eq. 9), [B, C, 1, 1].

    One kernel without bias serves both vectors.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, largest = x.mean((2, 3)).unsqueeze(1), largest_pixel(x, self.training).unsqueeze(1)
        return torch.sigmoid(self.conv(mean) + self.conv(largest)).transpose(1, 2).unsqueeze(3)


class ChannelSpatialGate(nn.Module):
    """Product of the channel gate and the spatial gate, [B, C, H, W] -> the same shape.

    Both see x (parallel), or the spatial gate sees x times the channel gate (serial).
    """

    serial: Final[bool]

    def __init__(self, channels: int, config: LiteCSWHRNetConfig) -> None:
        super().__init__()
        self.channel = ChannelGate(kernel_size(channels, config.gamma, config.offset))
        self.spatial = SpatialAttention()
        self.serial = config.order == "serial"

    def forward(self, x: Tensor) -> Tensor:
        gate = self.channel(x)
        return gate * self.spatial(x * gate if self.serial else x)


class SingleResolutionCSW(nn.Module):
    """Eq. 3: x times its gates."""

    def __init__(self, channels: int, config: LiteCSWHRNetConfig) -> None:
        super().__init__()
        self.gate = ChannelSpatialGate(channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class CrossResolutionCSW(nn.Module):
    """Eqs. 13 to 15: every branch times its part of the weight computed from all of them on the smallest grid."""

    features: Final[bool]

    def __init__(self, widths: tuple[int, ...], config: LiteCSWHRNetConfig) -> None:
        super().__init__()
        self.gather = ToSmallestGrid(len(widths))
        self.gate = ChannelSpatialGate(sum(widths), config)
        self.apply_gate = GateBranches(widths)
        self.features = config.cross_weight == "features"

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        z = self.gather(x)
        weight = self.gate(z)
        return self.apply_gate(x, z * weight if self.features else weight)


def csw_block(widths: tuple[int, ...], config: LiteCSWHRNetConfig) -> ChannelWeightingBlock:
    """Figure 2: the block of Lite-HRNet with channel spatial weightings."""
    halves = tuple(w // 2 for w in widths)
    single: list[nn.Module] = [SingleResolutionCSW(c, config) for c in halves]
    return ChannelWeightingBlock(widths, CrossResolutionCSW(halves, config), single)


class LiteCSWHRNet(LiteFrame):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: LiteCSWHRNetConfig) -> None:
        def layers(widths: tuple[int, ...], blocks: int) -> nn.Module:
            return JointBlocks([csw_block(widths, config) for _ in range(blocks)])

        super().__init__(config, "LiteCSWHRNet", LiteStem(config.stem_width), layers)

    def as_published(self) -> None:
        """Nobody has published code: weights are of this one."""


@register_model(
    published=(
        Published("Xi et al. 2024", (256, 192), 0.9, 0.20, "?", "AP 64.2 COCO val"),
        Published("Xi et al. 2024", (384, 288), 0.9, 0.45, "?", "AP 67.2 COCO val"),
    )
)
def lite_csw_hrnet(**changes: Any) -> LiteCSWHRNet:
    """Lite CSW-HRNet: 892,481 parameters, 191,145,536 multiply-accumulates at 256x192, 17 keypoints."""
    return LiteCSWHRNet(replace(LiteCSWHRNetConfig(), **changes))
