"""Dite-HRNet: Q. Li et al., "Dite-HRNet: Dynamic Lightweight High-Resolution Network for Human Pose Estimation", 2022.

Lite-HRNet's frame (`lite_hrnet.LiteFrame`) with dynamic blocks. Convolutions whose kernel is a mix of several, the
mixing weights computed from the input, in groups of growing kernel size (*dynamic split convolution*); and channel
weightings whose pooling is itself weighted by a learned mask (*adaptive context modeling*), once over all branches on
their smallest grid (dense) and once per branch over the whole map (global).

The parameters have the names of the authors' code, with two differences: it has a mask convolution for the lowest
branch, ``dcm.conv_mask.<last>``, which it never uses and which does not exist here; and its mixed kernels
``aggregation.weight`` are [kernels, O, I, k, k], here [kernels, O, I * k * k], because a module with a parameter of
five dimensions cannot be converted to channels-last.

Two points of that code look unintended; each has a flag that reproduces it:

* ``legacy_fuse``, explained in `lite_hrnet`. Here the ReLU is in place too: the other branches see branch 1 after it.
* ``legacy_pool``. The dense pooling takes the features of every branch to the smallest grid, weighted by a softmax of
  the mask. The code takes the softmax over the whole map and reshapes [C, cells * pixels] to [cells, C, pixels], which
  mixes up channels and places: what a cell receives as channel c comes from another channel and another place of the
  map. Our default is, in every cell, the mean of its pixels weighted by the softmax over the cell; where the grid is a
  single cell, that is exactly the code's global pooling.

To reproduce the authors' network (68.3 AP) set both.

Parameters 1,860,041 (published 1.8 M, cut off rather than rounded); multiply-accumulates at 256x192 317,658,664
(published 329.8 M, what ours are too if batch norm counts one per element). Initialisation is PyTorch's default,
for mixed kernels Kaiming's uniform.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.layers import ConvBNAct, activation, channel_shuffle
from fastpose.models._registry import Published, register_model
from fastpose.models.lite_hrnet import (
    GateBranches,
    JointBlocks,
    LiteFrame,
    LiteFrameConfig,
    SplitStem,
    shuffle_halves,
    split_halves,
)


@dataclass(frozen=True)
class DiteHRNetConfig(LiteFrameConfig):
    """Per branch: number of `groups` of the split convolution, of `kernels` mixed (1: a plain convolution) and ratio of
    the global weighting; `dense_ratio` is that of the dense one. `legacy_pool` is explained at the top of the file."""

    groups: tuple[int, ...] = (1, 1, 2, 4)
    kernels: tuple[int, ...] = (4, 4, 2, 1)
    global_ratios: tuple[int, ...] = (4, 4, 8, 8)
    dense_ratio: int = 8
    stem_kernels: int = 4
    legacy_pool: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("groups", "kernels", "global_ratios"):
            values = getattr(self, name)
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"{name} must be four positive numbers, one per branch, got {values}")
        for width, groups in zip(self.widths, self.groups, strict=True):
            if width // 2 % groups != 0:
                raise ValueError(
                    f"half of each width must be a multiple of its groups {self.groups}, got {self.widths}"
                )
        if self.stem_kernels < 1 or self.dense_ratio < 1:
            raise ValueError(
                f"stem_kernels and dense_ratio must be positive, got {self.stem_kernels} and {self.dense_ratio}"
            )


class KernelAttention(nn.Module):
    """Mixing weights of the kernels from the image's mean features: [B, C, H, W] -> [B, kernels] in (0, 1)."""

    def __init__(self, channels: int, kernels: int, ratio: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // ratio, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels // ratio)
        self.conv2 = nn.Conv2d(channels // ratio, kernels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv1(x.mean((2, 3), keepdim=True))))
        return self.conv2(y).flatten(1).sigmoid()


class KernelAggregation(nn.Module):
    """Convolution of every image with its own mix of `kernels` kernels, all images in one grouped convolution."""

    kernel_size: Final[int]
    stride: Final[int]
    groups: Final[int]

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, kernels: int
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.weight = nn.Parameter(torch.empty(kernels, out_channels, in_channels // groups * kernel_size**2))
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel)

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        b, c, h, w = x.shape
        out, k = self.weight.shape[1], self.kernel_size
        weight = torch.mm(mix, self.weight.flatten(1)).view(b * out, c // self.groups, k, k)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, None, self.stride, k // 2, 1, self.groups * b)
        return y.view(b, out, y.shape[2], y.shape[3])


class DynamicConv(nn.Module):
    """Convolution without bias whose kernel is a mix that depends on the image."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, kernels: int
    ) -> None:
        super().__init__()
        self.attention = KernelAttention(in_channels, kernels)
        self.aggregation = KernelAggregation(in_channels, out_channels, kernel_size, stride, groups, kernels)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregation(x, self.attention(x))


class DynamicConvBNAct(nn.Sequential):
    """`layers.ConvBNAct` with a dynamic convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: str = "none",
        kernels: int = 4,
    ) -> None:
        super().__init__()
        self.conv = DynamicConv(in_channels, out_channels, kernel_size, stride, groups, kernels)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = activation(act)


def conv_bn_act(in_channels: int, out_channels: int, kernels: int, **options: Any) -> nn.Module:
    """Dynamic convolution, batch norm, activation; a plain convolution where there is a single kernel to mix."""
    if kernels == 1:
        return ConvBNAct(in_channels, out_channels, **options)
    return DynamicConvBNAct(in_channels, out_channels, kernels=kernels, **options)


class DynamicSplitConv(nn.Module):
    """Depthwise convolution of equal channel groups with kernels 3, 5, 7, ..., whose outputs are interleaved."""

    groups: Final[int]

    def __init__(self, channels: int, groups: int, kernels: int) -> None:
        super().__init__()
        c = channels // groups
        self.conv = nn.ModuleList([conv_bn_act(c, c, kernels, kernel_size=2 * i + 3, groups=c) for i in range(groups)])
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(self.groups, 1)
        outputs: list[Tensor] = []
        for i, conv in enumerate(self.conv):
            outputs.append(conv(parts[i]))
        if self.groups == 1:  # neither concatenation nor shuffle would change anything
            return outputs[0]
        return channel_shuffle(torch.cat(outputs, 1), self.groups, self.training)


def channel_attention(channels: int, ratio: int) -> nn.Sequential:
    """Gate from pooled features: 1x1 convolution, batch norm, ReLU, 1x1 convolution with bias, sigmoid."""
    return nn.Sequential(
        nn.Conv2d(channels, channels // ratio, 1, bias=False),
        nn.BatchNorm2d(channels // ratio),
        nn.ReLU(),
        nn.Conv2d(channels // ratio, channels, 1),
        nn.Sigmoid(),
    )


class GlobalContext(nn.Module):
    """``bn(x * gate(context))``, the context being the mean of x over the map weighted by the softmax of a mask."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.channel_attention = channel_attention(channels, ratio)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.conv_mask(x).flatten(2).softmax(2)
        context = torch.matmul(x.flatten(2), mask.transpose(1, 2)).unsqueeze(3)
        return self.bn(x * self.channel_attention(context))


class CellPool(nn.Module):
    """Features and mask -> weighted mean of every cell of `size` x `size` pixels, [B, C, H / size, W / size]."""

    size: Final[int]

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = F.pixel_unshuffle(mask, self.size).softmax(1).unsqueeze(1)
        pixels = F.pixel_unshuffle(x, self.size)
        return (pixels.unflatten(1, [x.shape[1], self.size * self.size]) * weight).sum(2)


class LegacyCellPool(CellPool):
    """The published code's dense pooling (top of the file)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows, columns, pixels = h // self.size, w // self.size, self.size * self.size
        weight = mask.flatten(1).softmax(1).view(b, rows * columns, pixels, 1)
        y = torch.matmul(x.reshape(b, rows * columns, c, pixels), weight)
        return y.transpose(1, 2).reshape(b, c, rows, columns)


class DenseContext(nn.Module):
    """Gate of every branch, from the contexts of all branches on the smallest grid."""

    def __init__(self, widths: tuple[int, ...], ratio: int, legacy_pool: bool) -> None:
        super().__init__()
        n, pool = len(widths), LegacyCellPool if legacy_pool else CellPool
        self.conv_mask = nn.ModuleList([nn.Conv2d(c, 1, 1) for c in widths[:-1]])
        self.pools = nn.ModuleList([pool(2 ** (n - 1 - j)) for j in range(n - 1)])
        self.channel_attention = channel_attention(sum(widths), ratio)
        self.gate = GateBranches(widths)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        masks: list[Tensor] = []
        for j, conv in enumerate(self.conv_mask):
            masks.append(conv(x[j]))
        contexts: list[Tensor] = []
        for j, pool in enumerate(self.pools):
            contexts.append(pool(x[j], masks[j]))
        contexts.append(x[-1])
        return self.gate(x, self.channel_attention(torch.cat(contexts, 1)))


class DynamicMultiScaleContextBlock(nn.Module):
    """Shuffle blocks of all branches: second halves through dense context, split convolution, global context."""

    def __init__(self, widths: tuple[int, ...], config: DiteHRNetConfig) -> None:
        super().__init__()
        halves = tuple(w // 2 for w in widths)
        self.dcm = DenseContext(halves, config.dense_ratio, config.legacy_pool)
        self.conv = nn.ModuleList(
            [DynamicSplitConv(c, config.groups[j], config.kernels[j]) for j, c in enumerate(halves)]
        )
        self.gcm = nn.ModuleList([GlobalContext(c, config.global_ratios[j]) for j, c in enumerate(halves)])

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        kept, y = split_halves(x)
        y = self.dcm(y)
        for j, conv in enumerate(self.conv):
            y[j] = conv(y[j])
        for j, context in enumerate(self.gcm):
            y[j] = context(y[j])
        return shuffle_halves(kept, y, self.training)


def dite_stem(width: int, kernels: int) -> SplitStem:
    """The stem with dynamic convolutions and global contexts, [B, 3, H, W] -> [B, width, H / 4, W / 4]."""
    c = width // 2
    branch1 = nn.Sequential(
        conv_bn_act(c, c, kernels, kernel_size=3, stride=2, groups=c),
        GlobalContext(c, 4),
        conv_bn_act(c, c, kernels, act="relu"),
    )
    branch2 = nn.Sequential(
        conv_bn_act(c, c, kernels, kernel_size=3, groups=c),
        GlobalContext(c, 4),
        conv_bn_act(c, c // 4, kernels, act="relu"),
        conv_bn_act(c // 4, c, kernels),
        conv_bn_act(c, c, kernels, kernel_size=3, stride=2, groups=c, act="relu"),
    )
    return SplitStem(width, branch1, branch2)


class DiteHRNet(LiteFrame):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: DiteHRNetConfig) -> None:
        def layers(widths: tuple[int, ...], blocks: int) -> nn.Module:
            return JointBlocks([DynamicMultiScaleContextBlock(widths, config) for _ in range(blocks)])

        stem = dite_stem(config.stem_width, config.stem_kernels)
        super().__init__(config, "DiteHRNet", stem, layers, inplace_relu=True)

    def as_published(self) -> None:
        """As with `legacy_fuse` and `legacy_pool`."""
        super().as_published()
        for module in self.modules():
            if isinstance(module, DenseContext):
                n = len(module.pools)
                module.pools = nn.ModuleList([LegacyCellPool(2 ** (n - j)) for j in range(n)])
        assert isinstance(self.config, DiteHRNetConfig)
        self.config = replace(self.config, legacy_pool=True)


REPOSITORY = "Li et al. 2022, repository"


@register_model(
    of_others={"legacy_fuse": True, "legacy_pool": True},
    published=(
        Published(REPOSITORY, (256, 192), 1.8, 0.3298, "1e9", "AP 68.3 COCO val"),
        Published(REPOSITORY, (384, 288), 1.8, 0.7417, "1e9", "AP 71.5 COCO val"),
        Published(REPOSITORY, (256, 256), 1.8, 0.4395, "1e9", "PCKh@0.5 87.6 MPII val"),
    ),
)
def dite_hrnet_30(**changes: Any) -> DiteHRNet:
    """Dite-HRNet-30: 1,860,041 parameters, 317,658,664 multiply-accumulates at 256x192, 17 keypoints."""
    return DiteHRNet(replace(DiteHRNetConfig(modules=(3, 8, 3)), **changes))
