"""Lite-HRNet: C. Yu et al., "Lite-HRNet: A Lightweight High-Resolution Network", CVPR 2021.

HRNet's parallel branches with shuffle blocks in place of residual blocks. The stem is a strided convolution and a
strided shuffle block (1/4 resolution); three stages follow, each of which adds a branch of half the resolution; the
iterative head carries the lower branches up into the first, from which a 1x1 convolution makes the heatmaps.

* Naive Lite-HRNet (``block="naive"``): the shuffle block of ShuffleNetV2, 1x1, depthwise 3x3, 1x1 on half of the
  channels, in every branch.
* Lite-HRNet (``block="lite"``): the costly 1x1 convolutions become channel weightings, first one over all branches
  together on their smallest grid (cross-resolution), then one per branch over the whole map (called *spatial* weighting
  because it pools over space).

``legacy_fuse``. In the exchange every branch shall receive the sum of all others, ``y_i = relu(sum_j link_ij(x_j))``.
The published code adds in place onto the list entry of branch 1 and begins every sum with branch 1, so that it computes

    s_1 = 2 x_1 + sum_{j>1} link_1j(x_j),    s_i = 2 link_i1(s_1) + x_i + sum_{j>1, j!=i} link_ij(x_j) for i > 1

and ``y_i = relu(s_i)``: branch 1 counts twice, and the other branches see it after its own exchange, before its ReLU.
All published weights were trained so; they give wrong heatmaps without ``legacy_fuse=True``. New networks take the
plain sum (the default). Parameters and cost are the same. In training the published code evaluates each link of branch
1 twice, which moves its running statistics twice; here it is evaluated once and doubled.

Attribute names are those of the published checkpoints (the original repository and OpenMMLab). Multiply-accumulates at
256x192: 198.6 M (Lite-HRNet-18) and 309.5 M (-30). The repository prints 205.2 M and 319.2 M, as its counter adds
element-wise work such as batch norm. It prints 0.7 M parameters for naive Lite-HRNet-18, where we count 760,365 with
the widths of its configuration, 30, 60, 120, 240. Initialisation is PyTorch's default.

The frame (stem, transitions, exchange, head) is `LiteFrame`, which the networks derived from Lite-HRNet share: they
differ from it in what they hand to it as `layers`.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.layers import ConvAct, ConvBNAct, DepthwiseSeparable, channel_shuffle, check_images, check_num_keypoints
from fastpose.models._registry import Published, register_model
from fastpose.models.hrnet import Exchange


@dataclass(frozen=True)
class LiteFrameConfig:
    """Shape of the frame: widths of the four branches, and for the three stages the numbers of modules and of blocks
    per module. `legacy_fuse` is explained at the top of the file."""

    num_keypoints: int = 17
    widths: tuple[int, ...] = (40, 80, 160, 320)
    modules: tuple[int, ...] = (2, 4, 2)
    blocks: tuple[int, ...] = (2, 2, 2)
    stem_width: int = 32
    legacy_fuse: bool = False

    def __post_init__(self) -> None:
        check_num_keypoints(self.num_keypoints)
        if len(self.widths) != 4:
            raise ValueError(f"widths must have four entries, one per branch, got {self.widths}")
        if any(w < 2 or w % 2 != 0 for w in (*self.widths, self.stem_width)):
            raise ValueError(f"widths and stem_width must be even, got {self.widths} and {self.stem_width}")
        for name, values in (("modules", self.modules), ("blocks", self.blocks)):
            if len(values) != 3 or min(values) < 1:
                raise ValueError(f"{name} must be three positive numbers, one per stage, got {values}")


@dataclass(frozen=True)
class LiteHRNetConfig(LiteFrameConfig):
    """`block` is ``"lite"`` (channel weightings) or ``"naive"`` (shuffle blocks). `reduce_ratio`: that of the
    cross-resolution weighting (8 in the published networks); that of the spatial weighting is `spatial_ratio`."""

    block: str = "lite"
    reduce_ratio: int = 8
    spatial_ratio: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in ("lite", "naive"):
            raise ValueError(f"block must be 'lite' or 'naive', got {self.block!r}")
        # the narrowest weighting of each kind must keep a hidden channel
        for name, ratio, width in (
            ("reduce_ratio", self.reduce_ratio, sum(self.widths[:2]) // 2),
            ("spatial_ratio", self.spatial_ratio, min(self.widths) // 2),
        ):
            if not 1 <= ratio <= width:
                raise ValueError(f"{name} must be between 1 and {width} for widths {self.widths}, got {ratio}")


# ---- the blocks ----------------------------------------------------------------------------------------------------


def split_halves(x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """First and second half of the channels of every branch."""
    first: list[Tensor] = []
    second: list[Tensor] = []
    for s in x:
        a, b = s.chunk(2, 1)
        first.append(a)
        second.append(b)
    return first, second


def shuffle_halves(first: list[Tensor], second: list[Tensor], training: bool) -> list[Tensor]:
    """Every branch put together again from its halves, channels of the two interleaved."""
    return [channel_shuffle(torch.cat([a, b], 1), 2, training) for a, b in zip(first, second)]  # noqa: B905 (TorchScript)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2 block of stride 1: half of the channels through `branch2`, then both halves interleaved."""

    def __init__(self, branch2: nn.Module) -> None:
        super().__init__()
        self.branch2 = branch2

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return channel_shuffle(torch.cat([a, self.branch2(b)], 1), 2, self.training)


def naive_block(width: int) -> ShuffleUnit:
    """The naive network's block: 1x1, depthwise 3x3, 1x1 on half of the channels."""
    c = width // 2
    parts = (ConvBNAct(c, c, act="relu"), ConvBNAct(c, c, 3, groups=c), ConvBNAct(c, c, act="relu"))
    return ShuffleUnit(nn.Sequential(*parts))


class ToSmallestGrid(nn.Module):
    """Branches [B, C_j, h * 2^(n-1-j), w * 2^(n-1-j)] -> all of them averaged to the last one's grid, [B, sum C, h, w].

    The cells are whole numbers of pixels, so constant windows give what adaptive pooling would.
    """

    def __init__(self, branches: int) -> None:
        super().__init__()
        cells = [2 ** (branches - 1 - j) for j in range(branches)]
        self.pools = nn.ModuleList([nn.AvgPool2d(k) if k > 1 else nn.Identity() for k in cells])

    def forward(self, x: list[Tensor]) -> Tensor:
        pooled: list[Tensor] = []
        for j, pool in enumerate(self.pools):
            pooled.append(pool(x[j]))
        return torch.cat(pooled, 1)


class GateBranches(nn.Module):
    """Multiply every branch by its part of a gate [B, sum C, h, w] on the smallest grid, repeated to the branch's."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = list(widths)
        scales = [float(2 ** (len(widths) - 1 - j)) for j in range(len(widths))]
        self.ups = nn.ModuleList([nn.Upsample(scale_factor=s) if s > 1 else nn.Identity() for s in scales])

    def forward(self, x: list[Tensor], gate: Tensor) -> list[Tensor]:
        gates = torch.split(gate, self.widths, 1)
        outputs: list[Tensor] = []
        for j, up in enumerate(self.ups):
            outputs.append(x[j] * up(gates[j]))
        return outputs


class CrossResolutionWeighting(nn.Module):
    """Gate of every branch, from all branches on the smallest grid through two 1x1 convolutions."""

    def __init__(self, widths: tuple[int, ...], ratio: int) -> None:
        super().__init__()
        total = sum(widths)
        self.gather = ToSmallestGrid(len(widths))
        self.conv1 = ConvBNAct(total, total // ratio, act="relu")
        self.conv2 = ConvBNAct(total // ratio, total, act="sigmoid")
        self.gate = GateBranches(widths)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return self.gate(x, self.conv2(self.conv1(self.gather(x))))


class SpatialWeighting(nn.Module):
    """Squeeze-and-excitation: ``x * sigmoid(W2 relu(W1 mean(x) + b1) + b2)``, the mean over the whole map."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.conv1 = ConvAct(channels, channels // ratio, act="relu")
        self.conv2 = ConvAct(channels // ratio, channels, act="sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(x.mean((2, 3), keepdim=True)))


class ChannelWeightingBlock(nn.Module):
    """Shuffle blocks of all branches: second halves through `cross` weighting, depthwise 3x3, `single` weighting.

    `cross` takes and returns the list of second halves; `single` has one module per branch.
    """

    def __init__(self, widths: tuple[int, ...], cross: nn.Module, single: list[nn.Module]) -> None:
        super().__init__()
        self.cross_resolution_weighting = cross
        self.depthwise_convs = nn.ModuleList([ConvBNAct(w // 2, w // 2, 3, groups=w // 2) for w in widths])
        self.spatial_weighting = nn.ModuleList(single)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        kept, y = split_halves(x)
        y = self.cross_resolution_weighting(y)
        for j, depthwise in enumerate(self.depthwise_convs):
            y[j] = depthwise(y[j])
        for j, weighting in enumerate(self.spatial_weighting):
            y[j] = weighting(y[j])
        return shuffle_halves(kept, y, self.training)


def lite_block(widths: tuple[int, ...], config: LiteHRNetConfig) -> ChannelWeightingBlock:
    """Lite-HRNet's block for branches of these widths."""
    halves = tuple(w // 2 for w in widths)
    single: list[nn.Module] = [SpatialWeighting(c, config.spatial_ratio) for c in halves]
    return ChannelWeightingBlock(widths, CrossResolutionWeighting(halves, config.reduce_ratio), single)


# ---- the frame -----------------------------------------------------------------------------------------------------


class JointBlocks(nn.ModuleList):
    """Blocks that take all branches at once, one after the other."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for block in self:
            x = block(x)
        return x


class BranchBlocks(nn.ModuleList):
    """A chain of blocks for every branch on its own."""

    def __init__(self, widths: tuple[int, ...], blocks: int, block: Callable[[int], nn.Module]) -> None:
        super().__init__([nn.Sequential(*[block(w) for _ in range(blocks)]) for w in widths])

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        for j, branch in enumerate(self):
            outputs.append(branch(x[j]))
        return outputs


# From the widths of the branches and the number of blocks to a module that maps the list of branches to such a list.
Layers = Callable[[tuple[int, ...], int], nn.Module]


def separable(in_channels: int, out_channels: int, stride: int, relu: bool = True) -> nn.Sequential:
    """Depthwise 3x3 and 1x1 convolution, a batch norm after each, ReLU at the end, as a plain Sequential."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def separable_link(in_channels: int, out_channels: int, steps: int) -> nn.Sequential:
    """To a lower resolution: a chain of strided separable convolutions, the last to the new width and without ReLU."""
    chain = [separable(in_channels, in_channels, 2) for _ in range(steps - 1)]
    return nn.Sequential(*chain, separable(in_channels, out_channels, 2, relu=False))


class LegacyExchange(Exchange):
    """The exchange as the published code computes it (top of the file), one output per branch.

    With `inplace_relu` the other branches see branch 1 after its ReLU too.
    """

    inplace_relu: Final[bool]

    def __init__(self, widths: tuple[int, ...], inplace_relu: bool) -> None:
        super().__init__(widths, len(widths), down=separable_link)
        self.inplace_relu = inplace_relu

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        first = x[0]
        outputs: list[Tensor] = []
        for i, row in enumerate(self):
            total = first
            for j, link in enumerate(row):  # type: ignore
                if j == 0:
                    total = link(first)
                    total = total + total
                else:
                    total = total + link(x[j])
            outputs.append(F.relu(total))
            if i == 0:
                first = outputs[0] if self.inplace_relu else total
        return outputs


class LiteHRModule(nn.Module):
    """Blocks, then the exchange, between branches [B, C_j, H / 2^j, W / 2^j]."""

    def __init__(self, layers: nn.Module, exchange: Exchange) -> None:
        super().__init__()
        self.layers = layers
        self.fuse_layers = exchange

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return self.fuse_layers(self.layers(x))


def stem_branches(width: int) -> tuple[nn.Sequential, list[ConvBNAct]]:
    """The two halves of the stem's strided shuffle block."""
    c = width // 2
    branch1 = nn.Sequential(ConvBNAct(c, c, 3, 2, groups=c), ConvBNAct(c, c, act="relu"))
    expand, linear = ConvBNAct(c, width, act="relu"), ConvBNAct(width, c, act="relu")
    return branch1, [expand, ConvBNAct(width, width, 3, 2, groups=width), linear]


class LiteStem(nn.Module):
    """Strided 3x3 convolution, then the strided shuffle block: [B, 3, H, W] -> [B, width, H / 4, W / 4]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvBNAct(3, width, 3, 2, act="relu")
        self.branch1, (self.expand_conv, self.depthwise_conv, self.linear_conv) = stem_branches(width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x).chunk(2, 1)
        b = self.linear_conv(self.depthwise_conv(self.expand_conv(b)))
        return channel_shuffle(torch.cat([self.branch1(a), b], 1), 2, self.training)


class SplitStem(nn.Module):
    """The same stem with the second half of the block in one piece, `branch2`, and both halves left to the caller."""

    def __init__(self, width: int, branch1: nn.Module, branch2: nn.Module) -> None:
        super().__init__()
        self.conv1 = ConvBNAct(3, width, 3, 2, act="relu")
        self.branch1 = branch1
        self.branch2 = branch2

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x).chunk(2, 1)
        return channel_shuffle(torch.cat([self.branch1(a), self.branch2(b)], 1), 2)


class IterativeHead(nn.Module):
    """From the lowest resolution up: separable convolution to the next width, bilinear upsampling, addition.

    Returns what the first branch becomes, [B, C_1, H, W].
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        up = widths[::-1]
        self.projects = nn.ModuleList([DepthwiseSeparable(i, o) for i, o in zip(up, (*up[1:], up[-1]), strict=True)])

    def forward(self, x: list[Tensor]) -> Tensor:
        y = x[-1]
        for i, project in enumerate(self.projects):
            if i > 0:
                y = x[-1 - i] + F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=True)
            y = project(y)
        return y


class LiteFrame(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4].

    What the networks of this family share. They hand over their `stem`, their `layers`, whether a transition ends with
    ReLU, and whether the ReLU of the exchange in their published code is in place (matters to ``legacy_fuse`` alone).
    """

    input_multiple: Final[int]
    name: Final[str]

    def __init__(
        self,
        config: LiteFrameConfig,
        name: str,
        stem: nn.Module,
        layers: Layers,
        transition_relu: bool = True,
        inplace_relu: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.inplace_relu = inplace_relu
        w = config.widths

        def stage(branches: int) -> nn.ModuleList:
            modules: list[nn.Module] = []
            for _ in range(config.modules[branches - 2]):
                if config.legacy_fuse:
                    exchange: Exchange = LegacyExchange(w[:branches], inplace_relu)
                else:
                    exchange = Exchange(w[:branches], branches, down=separable_link)
                modules.append(LiteHRModule(layers(w[:branches], config.blocks[branches - 2]), exchange))
            return nn.ModuleList(modules)

        def transition(branches: int) -> nn.ModuleList:
            """Appends the branch number `branches`, of half the resolution of the one before."""
            new = nn.Sequential(separable(w[branches - 2], w[branches - 1], 2, transition_relu))
            return nn.ModuleList([nn.Identity() for _ in range(branches - 1)] + [new])

        self.stem = stem
        c = config.stem_width
        first = separable(c, w[0], 1, transition_relu) if c != w[0] else nn.Identity()
        self.transition0 = nn.ModuleList([first, nn.Sequential(separable(c, w[1], 2, transition_relu))])
        self.stage0 = stage(2)
        self.transition1 = transition(3)
        self.stage1 = stage(3)
        self.transition2 = transition(4)
        self.stage2 = stage(4)
        self.head_layer = IterativeHead(w)
        self.final_layer = nn.Conv2d(w[0], config.num_keypoints, 1)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, self.name)
        x = self.stem(x)
        branches = [self.transition0[0](x), self.transition0[1](x)]
        for module in self.stage0:
            branches = module(branches)
        branches = [branches[0], branches[1], self.transition1[2](branches[1])]
        for module in self.stage1:
            branches = module(branches)
        branches = [branches[0], branches[1], branches[2], self.transition2[3](branches[2])]
        for module in self.stage2:
            branches = module(branches)
        return self.final_layer(self.head_layer(branches))

    def as_published(self) -> None:
        """Compute from now on, with the same parameters, what the published code does: as with `legacy_fuse`."""
        for module in self.modules():
            if isinstance(module, LiteHRModule):
                rows = module.fuse_layers
                module.fuse_layers = LegacyExchange(self.config.widths[: len(rows)], self.inplace_relu)
                for i, row in enumerate(rows):
                    module.fuse_layers[i] = row
        self.config = replace(self.config, legacy_fuse=True)


class LiteHRNet(LiteFrame):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: LiteHRNetConfig) -> None:
        def layers(widths: tuple[int, ...], blocks: int) -> nn.Module:
            if config.block == "naive":
                return BranchBlocks(widths, blocks, naive_block)
            return JointBlocks([lite_block(widths, config) for _ in range(blocks)])

        super().__init__(config, "LiteHRNet", LiteStem(config.stem_width), layers)


REPOSITORY = "Yu et al. 2021, repository"


@register_model(
    of_others={"legacy_fuse": True},
    published=(
        Published(REPOSITORY, (256, 192), 1.1, 0.2052, "1e9", "AP 64.8 COCO val"),
        Published(REPOSITORY, (384, 288), 1.1, 0.4616, "1e9", "AP 67.6 COCO val"),
        Published(REPOSITORY, (256, 256), 1.1, 0.2734, "1e9", "PCKh@0.5 85.4 MPII val"),
    ),
)
def lite_hrnet_18(**changes: Any) -> LiteHRNet:
    """Lite-HRNet-18: 1,130,769 parameters, 198.6 M multiply-accumulates at 256x192, 17 keypoints."""
    return LiteHRNet(replace(LiteHRNetConfig(), **changes))


@register_model(
    of_others={"legacy_fuse": True},
    published=(
        Published(REPOSITORY, (256, 192), 1.8, 0.3192, "1e9", "AP 67.2 COCO val"),
        Published(REPOSITORY, (384, 288), 1.8, 0.7178, "1e9", "AP 70.4 COCO val"),
        Published(REPOSITORY, (256, 256), 1.8, 0.4253, "1e9", "PCKh@0.5 87.0 MPII val"),
    ),
)
def lite_hrnet_30(**changes: Any) -> LiteHRNet:
    """Lite-HRNet-30: 1,763,717 parameters, 309.5 M multiply-accumulates at 256x192, 17 keypoints."""
    return LiteHRNet(replace(LiteHRNetConfig(modules=(3, 8, 3)), **changes))


@register_model(
    of_others={"legacy_fuse": True},
    published=(
        Published(REPOSITORY, (256, 192), 0.7, 0.1948, "1e9", "AP 62.8 COCO val"),
        Published(REPOSITORY, (256, 256), 0.7, 0.2596, "1e9", "PCKh@0.5 85.3 MPII val"),
    ),
)
def naive_lite_hrnet_18(**changes: Any) -> LiteHRNet:
    """Naive Lite-HRNet-18: 760,365 parameters, 185.5 M multiply-accumulates at 256x192, 17 keypoints."""
    return LiteHRNet(replace(LiteHRNetConfig(block="naive", widths=(30, 60, 120, 240)), **changes))


@register_model(
    of_others={"legacy_fuse": True},
    published=(
        Published(REPOSITORY, (256, 192), 1.3, 0.3111, "1e9", "AP 66.0 COCO val"),
        Published(REPOSITORY, (256, 256), 1.3, 0.4187, "1e9", "PCKh@0.5 86.8 MPII val"),
    ),
)
def wider_naive_lite_hrnet_18(**changes: Any) -> LiteHRNet:
    """Naive Lite-HRNet-18 of Lite-HRNet's widths: 1,318,625 parameters, 302.3 M multiply-accumulates at 256x192."""
    return LiteHRNet(replace(LiteHRNetConfig(block="naive"), **changes))
