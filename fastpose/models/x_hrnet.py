"""X-HRNet: Y. Zhou et al., "X-HRNet: Towards Lightweight Human Pose Estimation with Spatially Unidimensional
Self-Attention", ICME 2022.

Lite-HRNet's frame (`lite_hrnet.LiteFrame`, its transitions without ReLU) whose blocks replace the 1x1 convolutions of
the shuffle block by *spatially unidimensional self-attention* (SUSA): a gate for every row and channel from all
columns, or for every column from all rows. On half of the channels the block does attention, depthwise 3x3, attention:

* ``attention="sequential"``: the first gates columns, the second rows, of all its channels. 2,117,657 parameters and
  300.4 M multiply-accumulates at 256x192 are the published 2.1 M and 0.3 G, so this is the default.
* ``attention="parallel"``: each attention gates the rows of one half of its channels and the columns of the other;
  1,781,369 parameters, 295.4 M.

Names and shapes of the parameters are those of the authors' code. Two of their properties are worth knowing: the bias
of ``mean_conv`` stands before a softmax over places and changes nothing; and ``group_weight``, a weight for each row or
column of the map, has 96 rows or 72 columns in every branch, so that images may not be larger than 384x288
(`max_rows`, `max_columns`), and a smaller map uses the first ones alone. ``legacy_fuse``, explained in `lite_hrnet`, is
what the authors' code does.

Initialisation is PyTorch's default.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastpose.layers import ConvAct, ConvBNAct, channel_shuffle
from fastpose.models._registry import Published, register_model
from fastpose.models.lite_hrnet import BranchBlocks, LiteFrame, LiteFrameConfig, ShuffleUnit, SplitStem, stem_branches


@dataclass(frozen=True)
class XHRNetConfig(LiteFrameConfig):
    """`attention` is ``"sequential"`` or ``"parallel"``; `max_rows` and `max_columns`: of the map at 1/4 resolution."""

    attention: str = "sequential"
    max_rows: int = 96
    max_columns: int = 72

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in ("sequential", "parallel"):
            raise ValueError(f"attention must be 'sequential' or 'parallel', got {self.attention!r}")
        if self.attention == "parallel" and any(w % 4 != 0 for w in self.widths):
            raise ValueError(f"widths must be multiples of 4 for parallel attention, got {self.widths}")
        if self.max_rows < 8 or self.max_columns < 8:
            raise ValueError(f"max_rows and max_columns must be at least 8, got {self.max_rows} and {self.max_columns}")


class SUSA(nn.Module):
    """Spatially unidimensional self-attention, [B, C, H, W] -> the same shape.

    For every row: x is averaged over the rows (weighted), the softmax of it over the columns says how much each column
    counts, and the so weighted sum of every row becomes, through a 1x1 convolution and layer norm over the channels,
    the row's gate. For columns the same with rows and columns exchanged.
    """

    columns: Final[bool]
    size: Final[int]

    def __init__(self, channels: int, size: int, columns: bool) -> None:
        super().__init__()
        self.columns, self.size = columns, size
        self.conv = ConvAct(channels, channels)
        self.mean_conv = ConvAct(channels, channels, groups=channels)
        self.group_weight = nn.Parameter(torch.ones(1, 1, 1, size) if columns else torch.ones(1, 1, size, 1))
        self.ln = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(2, 3) if self.columns else x
        rows = y.shape[2]
        if rows > self.size:
            name = "columns" if self.columns else "rows"
            raise ValueError(f"XHRNet: the map at 1/4 resolution may have at most {self.size} {name}, got {rows}")
        weight = self.group_weight.view(1, 1, self.size, 1)[:, :, :rows]
        query = self.mean_conv((y * weight).mean(2, keepdim=True)).softmax(3)
        context = torch.matmul(y, query.transpose(2, 3))
        gate = self.ln(self.conv(context).transpose(1, 3)).transpose(1, 3).sigmoid()
        return x * (gate.transpose(2, 3) if self.columns else gate)


class ParallelSUSA(nn.Module):
    """Rows of the first half of the channels, columns of the second, then the halves interleaved."""

    def __init__(self, channels: int, config: XHRNetConfig) -> None:
        super().__init__()
        self.hconv = SUSA(channels // 2, config.max_rows, columns=False)
        self.wconv = SUSA(channels // 2, config.max_columns, columns=True)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return channel_shuffle(torch.cat([self.hconv(a), self.wconv(b)], 1), 2, self.training)


def x_block(width: int, config: XHRNetConfig) -> ShuffleUnit:
    """The shuffle block with attention in place of its 1x1 convolutions."""
    c = width // 2
    if config.attention == "parallel":
        first, last = (ParallelSUSA(c, config) for _ in range(2))
        return ShuffleUnit(nn.Sequential(first, ConvBNAct(c, c, 3, groups=c), last))
    columns, rows = SUSA(c, config.max_columns, columns=True), SUSA(c, config.max_rows, columns=False)
    return ShuffleUnit(nn.Sequential(columns, ConvBNAct(c, c, 3, groups=c), rows))


class XHRNet(LiteFrame):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: XHRNetConfig) -> None:
        def layers(widths: tuple[int, ...], blocks: int) -> nn.Module:
            return BranchBlocks(widths, blocks, lambda width: x_block(width, config))

        branch1, branch2 = stem_branches(config.stem_width)
        stem = SplitStem(config.stem_width, branch1, nn.Sequential(*branch2))
        super().__init__(config, "XHRNet", stem, layers, transition_relu=False)


@register_model(
    of_others={"legacy_fuse": True},
    published=(
        Published("Liu et al. (LE-HRNet)", (256, 192), 2.1, 0.3, "?", "AP 67.4 COCO val"),
        Published("Liu et al. (LE-HRNet)", (256, 256), 2.1, 0.4, "?", "PCKh 87.3 MPII val"),
    ),
)
def x_hrnet_30(**changes: Any) -> XHRNet:
    """X-HRNet-30: 2,117,657 parameters, 300,362,368 multiply-accumulates at 256x192, 17 keypoints."""
    return XHRNet(replace(XHRNetConfig(modules=(3, 8, 3)), **changes))
