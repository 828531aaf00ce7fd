"""EfficientHRNet: C. Neff et al., "EfficientHRNet: Efficient Scaling for Lightweight High-Resolution Multi-Person Pose
Estimation", 2020.

A bottom-up network: the backbone of EfficientNet (M. Tan and Q. Le, ICML 2019) gives maps at 1/4, 1/8, 1/16 and 1/32
resolution; each enters one branch of a high-resolution network, whose stages 2 to 4 are HRNet's with two blocks per
branch; the head is HigherHRNet's. One number r = 0, -1, -2, -3, -4 scales everything down:

* input 512 + 32 r;
* backbone widths by 1.1^r, rounded to multiples of 8, and repeats by 1.2^r, rounded up;
* branch widths 32, 64, 128, 256 by 1.2455^r, rounded up (the factor is that of the authors' code);
* modules of stages 2, 3, 4: (1, 4, 3), (1, 3, 3), (1, 2, 3), (1, 1, 3), (1, 1, 2).

Structure and keys of the state dict are those of the authors' code. Their published sizes come from its counter:

| network | input | parameters | published | counted | multiply-accumulates | published | counted |
|---------|-------|------------|-----------|---------|----------------------|-----------|---------|
| H0      | 512   | 19,725,359 | 23.3 M    | 23.32 M | 23.958e9             | 25.6 G    | 25.62 G |
| H-1     | 480   | 13,004,446 | 16 M      | 16.05 M | 13.130e9             | 14.2 G    | 14.21 G |
| H-2     | 448   | 8,263,495  | 10.3 M    | 10.39 M | 7.030e9              | 7.7 G     | 7.73 G  |
| H-3     | 416   | 5,360,390  | 6.9 M     | 6.96 M  | 3.759e9              | 4.2 G     | 4.21 G  |
| H-4     | 384   | 2,764,706  | 3.7 M     | 3.76 M  | 1.807e9              | 2.1 G     | 2.11 G  |

"Counted" is what that counter finds: the parameters of the inverted residual blocks twice, once for the block and once
for its layers, and the weights of the transposed convolution per output position, four times too often. So the networks
are those of the paper and smaller than it says.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastpose.layers import check_images, check_num_keypoints
from fastpose.models._registry import Published, register_model
from fastpose.models.hrnet import stage
from fastpose.models.hrnet_ae import higher_head

# EfficientNet-B0 without its classifier: expansion, output width, repeats, stride of the first repeat, kernel size
B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
TAPS = (24, 40, 112, 320)  # the last block of these widths feeds branch 1, 2, 3, 4


def backbone_width(width: int, r: int) -> int:
    """`width` of EfficientNet-B0 scaled by 1.1^r: to the nearest multiple of 8 that takes away no more than a tenth."""
    scaled = width * 1.1**r
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def branch_widths(r: int) -> tuple[int, int, int, int]:
    """Widths of the four branches: 32, 64, 128 and 256 scaled by 1.2455^r and rounded up."""
    scale = 1.2455**r
    return math.ceil(32 * scale), math.ceil(64 * scale), math.ceil(128 * scale), math.ceil(256 * scale)


@dataclass(frozen=True)
class EfficientHRNetConfig:
    """Scale `r`, and per stage 2, 3, 4 the number of modules; `drop_connect` is the backbone's rate in training."""

    num_keypoints: int = 17
    r: int = 0
    modules: tuple[int, int, int] = (1, 4, 3)
    blocks: int = 2
    head_blocks: int = 2
    drop_connect: float = 0.2

    def __post_init__(self) -> None:
        check_num_keypoints(self.num_keypoints)
        if self.r > 0:
            raise ValueError(f"r must be 0 or negative, got {self.r}")
        if len(self.modules) != 3 or min(self.modules) < 1:
            raise ValueError(f"modules must have 3 positive entries, for stages 2, 3 and 4, got {self.modules}")
        if self.head_blocks < 0:
            raise ValueError(f"head_blocks must not be negative, got {self.head_blocks}")
        if not 0 <= self.drop_connect < 1:
            raise ValueError(f"drop_connect must be at least 0 and below 1, got {self.drop_connect}")


class SameConv(nn.Sequential):
    """Convolution, batch norm, SiLU, padded by k - s in all with the smaller half in front: [B, O, H/s, W/s]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        total = kernel_size - stride
        half = total // 2
        # equal halves, at stride 1, are left to the convolution
        pad = nn.Identity() if total % 2 == 0 else nn.ZeroPad2d((half, total - half, half, total - half))
        padding = half if total % 2 == 0 else 0
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        super().__init__(pad, conv, nn.BatchNorm2d(out_channels), nn.SiLU())


class SiLUGate(nn.Module):
    """Squeeze-and-excitation as in EfficientNet: ``x * sigmoid(W2 silu(W1 mean(x) + b1) + b2)``."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        reduce, expand = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), reduce, nn.SiLU(), expand, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x)


class MBConv(nn.Module):
    """Inverted residual: 1x1 expand, depthwise k x k, squeeze-and-excitation, 1x1 project, identity if shapes allow.

    In training the residual of an image is dropped with the rate `drop`, and the others scaled up to make up for it.
    """

    identity: Final[bool]
    drop: Final[float]

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, kernel_size: int, stride: int, drop: float
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        expand = [SameConv(in_channels, width, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            SameConv(width, width, kernel_size, stride, groups=width),
            SiLUGate(width, max(1, in_channels // 4)),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.identity = stride == 1 and in_channels == out_channels
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not self.identity:
            return y
        if self.training and self.drop > 0:
            keep = 1 - self.drop
            y = y / keep * torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x + y


def transition(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Into a branch: 3x3 convolution (with bias, as in the authors' code), batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.BatchNorm2d(out_channels), nn.ReLU())


class EfficientHRNet(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> (maps [B, 2K, H/4, W/4], heatmaps [B, K, H/2, W/2]).

    The maps are K heatmaps, then K tag maps.
    """

    input_multiple: Final[int]
    taps: Final[list[int]]

    def __init__(self, config: EfficientHRNetConfig) -> None:
        super().__init__()
        self.config = config
        r = config.r
        channels = backbone_width(32, r)
        blocks: list[nn.Module] = [SameConv(3, channels, 3, 2)]
        self.taps = []
        for expansion, width, repeats, stride, kernel_size in B0:
            out_channels = backbone_width(width, r)
            for i in range(math.ceil(repeats * 1.2**r)):
                s = stride if i == 0 else 1
                blocks.append(MBConv(channels, out_channels, expansion, kernel_size, s, config.drop_connect))
                channels = out_channels
            if width in TAPS:
                self.taps.append(len(blocks) - 1)
        self.features = nn.Sequential(*blocks)

        a = [backbone_width(width, r) for width in TAPS]
        w = branch_widths(r)
        m = config.modules
        self.trans1_branch1 = transition(a[0], w[0])
        self.trans1_branch2 = transition(a[1], w[1])
        self.stage2 = stage(w[:2], m[0], config.blocks, 2)
        self.trans2_branch1 = transition(w[0], w[0])
        self.trans2_branch2 = transition(w[1], w[1])
        self.trans2_branch3 = transition(a[2], w[2])
        self.stage3 = stage(w[:3], m[1], config.blocks, 3)
        self.trans3_branch1 = transition(w[0], w[0])
        self.trans3_branch2 = transition(w[1], w[1])
        self.trans3_branch3 = transition(w[2], w[2])
        self.trans3_branch4 = transition(a[3], w[3])
        self.stage4 = stage(w, m[2], config.blocks, 1)
        self.final_layers, self.deconv_layers = higher_head(w[0], config.num_keypoints, w[0], config.head_blocks)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_images(x, self.input_multiple, "EfficientHRNet")
        a: list[Tensor] = []
        for i, block in enumerate(self.features):
            x = block(x)
            if i in self.taps:
                a.append(x)
        b = [self.trans1_branch1(a[0]), self.trans1_branch2(a[1])]
        for module in self.stage2:
            b = module(b)
        b = [self.trans2_branch1(b[0]), self.trans2_branch2(b[1]), self.trans2_branch3(a[2])]
        for module in self.stage3:
            b = module(b)
        b = [
            self.trans3_branch1(b[0]),
            self.trans3_branch2(b[1]),
            self.trans3_branch3(b[2]),
            self.trans3_branch4(a[3]),
        ]
        for module in self.stage4:
            b = module(b)
        maps = self.final_layers[0](b[0])
        return maps, self.final_layers[1](self.deconv_layers[0](torch.cat([b[0], maps], 1)))


PAPER = "Neff et al. 2020"


@register_model((512, 512), published=(Published(PAPER, (512, 512), 23.3, 25.6, "1e9", "AP 64.0 COCO test-dev"),))
def efficient_hrnet_h0(**changes: Any) -> EfficientHRNet:
    """EfficientHRNet H0: 19,725,359 parameters, 23.958 G multiply-accumulates at 512x512, 17 keypoints."""
    return EfficientHRNet(replace(EfficientHRNetConfig(), **changes))


@register_model((480, 480), published=(Published(PAPER, (480, 480), 16.0, 14.2, "1e9", "AP 59.1 COCO test-dev"),))
def efficient_hrnet_h1(**changes: Any) -> EfficientHRNet:
    """EfficientHRNet H-1: 13,004,446 parameters, 13.130 G multiply-accumulates at 480x480, 17 keypoints."""
    return EfficientHRNet(replace(EfficientHRNetConfig(r=-1, modules=(1, 3, 3)), **changes))


@register_model((448, 448), published=(Published(PAPER, (448, 448), 10.3, 7.7, "1e9", "AP 52.8 COCO test-dev"),))
def efficient_hrnet_h2(**changes: Any) -> EfficientHRNet:
    """EfficientHRNet H-2: 8,263,495 parameters, 7.030 G multiply-accumulates at 448x448, 17 keypoints."""
    return EfficientHRNet(replace(EfficientHRNetConfig(r=-2, modules=(1, 2, 3)), **changes))


@register_model((416, 416), published=(Published(PAPER, (416, 416), 6.9, 4.2, "1e9", "AP 44.5 COCO test-dev"),))
def efficient_hrnet_h3(**changes: Any) -> EfficientHRNet:
    """EfficientHRNet H-3: 5,360,390 parameters, 3.759 G multiply-accumulates at 416x416, 17 keypoints."""
    return EfficientHRNet(replace(EfficientHRNetConfig(r=-3, modules=(1, 1, 3)), **changes))


@register_model((384, 384), published=(Published(PAPER, (384, 384), 3.7, 2.1, "1e9", "AP 35.5 COCO test-dev"),))
def efficient_hrnet_h4(**changes: Any) -> EfficientHRNet:
    """EfficientHRNet H-4: 2,764,706 parameters, 1.807 G multiply-accumulates at 384x384, 17 keypoints."""
    return EfficientHRNet(replace(EfficientHRNetConfig(r=-4, modules=(1, 1, 2)), **changes))
