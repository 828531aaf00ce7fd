"""HRNet: K. Sun et al., "Deep High-Resolution Representation Learning for Human Pose Estimation", CVPR 2019.

Two strided convolutions, then four stages that keep the 1/4 resolution and add a branch of half the resolution each
time. A stage is some modules; a module is some residual blocks per branch and an exchange in which every branch
receives all others. Heatmaps come from a 1x1 convolution on the first branch.

Attribute names are those of the published checkpoints (the original repository and OpenMMLab), which therefore load as
they are. `HRNet` itself, `BasicBlock`, `Bottleneck`, `Exchange` and `HRModule` also serve the networks derived from it.

Small HRNet-W16 is in the Lite-HRNet paper (C. Yu et al., CVPR 2021), without a description, with 1.3 M parameters and
0.54 / 1.21 / 0.72 G at 256x192 / 384x288 / 256x256. The small configuration that HRNet's authors published for
classification ("HRNet-W18 small v1", which is 16 wide) fits: one module per stage, two blocks per branch, and stage 1
a single block of width 32. It has 1.285 M parameters and 0.532 / 1.196 / 0.709 times 2^30 multiply-accumulates; with
batch norm and ReLU counted, 0.537 / 1.209 / 0.716, the printed figures. Stage 1 of width 64 has 1.391 M and 0.754 at
256x192, two blocks in stage 1 have 1.303 M and 0.581, a stem of 32 channels has 1.251 M and 0.428.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.layers import check_images, check_num_keypoints
from fastpose.models._registry import Published, register_model


@dataclass(frozen=True)
class HRNetConfig:
    """Shape of an HRNet: branch widths, and per stage 2, 3, 4 the number of modules; `blocks` per branch and module."""

    num_keypoints: int = 17
    widths: tuple[int, ...] = (32, 64, 128, 256)
    modules: tuple[int, ...] = (1, 4, 3)
    blocks: int = 4
    stem_width: int = 64
    stage1_width: int = 64
    stage1_blocks: int = 4

    def __post_init__(self) -> None:
        check_num_keypoints(self.num_keypoints)
        if len(self.widths) != 4:
            raise ValueError(f"widths must have 4 entries, one per branch, got {self.widths}")
        if len(self.modules) != 3 or min(self.modules) < 1:
            raise ValueError(f"modules must have 3 positive entries, for stages 2, 3 and 4, got {self.modules}")


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm and (unless `relu` is false) ReLU as a plain Sequential."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Bottleneck(nn.Module):
    """Residual block 1x1, 3x3 (strided), 1x1 with four times `width` output channels, [B, 4 width, H / s, W / s]."""

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != 4 * width:
            conv = nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def upsample_link(in_channels: int, out_channels: int, factor: int) -> nn.Sequential:
    """To a higher resolution: 1x1 convolution, batch norm, nearest-neighbour upsampling."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.Upsample(scale_factor=float(factor), mode="nearest"),
    )


def downsample_link(in_channels: int, out_channels: int, steps: int) -> nn.Sequential:
    """To a lower resolution: a chain of strided 3x3 convolutions, the last to the new width and without ReLU."""
    chain = [conv_bn(in_channels, in_channels, 3, 2) for _ in range(steps - 1)]
    return nn.Sequential(*chain, conv_bn(in_channels, out_channels, 3, 2, relu=False))


Link = Callable[[int, int, int], nn.Module]


class Exchange(nn.ModuleList):
    """``y_i = relu(sum_j link_ij(x_j))`` for the first `outputs` branches i; the identity where i = j.

    `up` and `down` build a link from its input width, output width and factor (up) or number of halvings (down).
    """

    def __init__(
        self, widths: tuple[int, ...], outputs: int, up: Link = upsample_link, down: Link = downsample_link
    ) -> None:
        rows: list[nn.Module] = []
        for i in range(outputs):
            row: list[nn.Module] = []
            for j, width in enumerate(widths):
                if j > i:
                    row.append(up(width, widths[i], 2 ** (j - i)))
                elif j < i:
                    row.append(down(width, widths[i], i - j))
                else:
                    row.append(nn.Identity())
            rows.append(nn.ModuleList(row))
        super().__init__(rows)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        for row in self:
            total = x[0]
            for j, link in enumerate(row):  # type: ignore
                total = link(x[0]) if j == 0 else total + link(x[j])
            outputs.append(F.relu(total))
        return outputs


class HRModule(nn.Module):
    """Residual blocks on every branch, then the exchange, which leaves the first `outputs` branches.

    `block(width)` builds a block, `fuse(widths, outputs)` the exchange.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        blocks: int,
        outputs: int,
        block: Callable[[int], nn.Module] = BasicBlock,
        fuse: Callable[[tuple[int, ...], int], nn.Module] = Exchange,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(*[block(w) for _ in range(blocks)]) for w in widths])
        self.fuse_layers = fuse(widths, outputs)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        x: list[Tensor] = []
        for j, branch in enumerate(self.branches):
            x.append(branch(inputs[j]))
        return self.fuse_layers(x)


def stage(widths: tuple[int, ...], modules: int, blocks: int, outputs: int, **parts: Any) -> nn.ModuleList:
    """The modules of a stage, to be run one after the other; the last one feeds `outputs` branches."""
    n = len(widths)
    return nn.ModuleList(
        [HRModule(widths, blocks, outputs if m == modules - 1 else n, **parts) for m in range(modules)]
    )


def transition_conv(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """From one stage to the next: 3x3 convolution, batch norm, ReLU."""
    return conv_bn(in_channels, out_channels, 3, stride)


class HRNet(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4].

    Networks derived from it replace its parts: `first(in_channels, width)` builds a block of stage 1 with 4 * width
    output channels, `transition(in_channels, out_channels, stride)` what leads to a new branch or width, and `parts`
    are the `block` and `fuse` of :class:`HRModule`. `name` stands in error messages.
    """

    input_multiple: Final[int]
    name: Final[str]

    def __init__(
        self,
        config: HRNetConfig,
        name: str = "HRNet",
        first: Callable[[int, int], nn.Module] = Bottleneck,
        transition: Callable[[int, int, int], nn.Module] = transition_conv,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = name
        c, w, m, blocks = config.stem_width, config.widths, config.modules, config.blocks
        s = config.stage1_width
        self.conv1 = nn.Conv2d(3, c, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.layer1 = nn.Sequential(*[first(c if i == 0 else 4 * s, s) for i in range(config.stage1_blocks)])
        # a transition changes the widths and appends the branch of the next lower resolution
        self.transition1 = nn.ModuleList([transition(4 * s, w[0], 1), nn.Sequential(transition(4 * s, w[1], 2))])
        self.stage2 = stage(w[:2], m[0], blocks, 2, **parts)
        self.transition2 = nn.ModuleList([nn.Identity()] * 2 + [nn.Sequential(transition(w[1], w[2], 2))])
        self.stage3 = stage(w[:3], m[1], blocks, 3, **parts)
        self.transition3 = nn.ModuleList([nn.Identity()] * 3 + [nn.Sequential(transition(w[2], w[3], 2))])
        self.stage4 = stage(w, m[2], blocks, 1, **parts)
        self.final_layer = nn.Conv2d(w[0], config.num_keypoints, 1)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> Tensor:
        return self.final_layer(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The first branch after the last exchange, [B, widths[0], H/4, W/4]."""
        check_images(x, self.input_multiple, self.name)
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = self.layer1(x)
        branches = [self.transition1[0](x), self.transition1[1](x)]
        for module in self.stage2:
            branches = module(branches)
        branches = [branches[0], branches[1], self.transition2[2](branches[1])]
        for module in self.stage3:
            branches = module(branches)
        branches = [branches[0], branches[1], branches[2], self.transition3[3](branches[2])]
        for module in self.stage4:
            branches = module(branches)
        return branches[0]


@register_model(
    published=(
        Published("Sun et al. 2019", (256, 192), 28.5, 7.10, "2^30", "AP 74.4 COCO val"),
        Published("Sun et al. 2019", (384, 288), 28.5, 16.0, "2^30", "AP 75.8 COCO val"),
        Published("Sun et al. 2019", (256, 256), 28.5, 9.5, "2^30", "PCKh@0.5 90.3 MPII val"),
    )
)
def hrnet_w32(**changes: Any) -> HRNet:
    """HRNet-W32: 28,536,113 parameters, 7.645 G multiply-accumulates at 256x192, 17 keypoints."""
    return HRNet(replace(HRNetConfig(), **changes))


@register_model(
    published=(
        Published("Sun et al. 2019", (256, 192), 63.6, 14.6, "2^30", "AP 75.1 COCO val"),
        Published("Sun et al. 2019", (384, 288), 63.6, 32.9, "2^30", "AP 76.3 COCO val"),
    )
)
def hrnet_w48(**changes: Any) -> HRNet:
    """HRNet-W48: 63,595,745 parameters, 15.692 G multiply-accumulates at 256x192, 17 keypoints."""
    return HRNet(replace(HRNetConfig(widths=(48, 96, 192, 384)), **changes))


@register_model(
    published=(
        Published("Yu et al. 2021 (Lite-HRNet)", (256, 192), 1.3, 0.54, "2^30", "AP 55.2 COCO val"),
        Published("Yu et al. 2021 (Lite-HRNet)", (384, 288), 1.3, 1.21, "2^30", "AP 56.0 COCO val"),
        Published("Yu et al. 2021 (Lite-HRNet)", (256, 256), 1.3, 0.72, "2^30", "PCKh@0.5 80.2 MPII val"),
    )
)
def small_hrnet_w16(**changes: Any) -> HRNet:
    """Small HRNet-W16: 1,284,961 parameters, 570,703,872 multiply-accumulates at 256x192, 17 keypoints."""
    config = HRNetConfig(widths=(16, 32, 64, 128), modules=(1, 1, 1), blocks=2, stage1_width=32, stage1_blocks=1)
    return HRNet(replace(config, **changes))
