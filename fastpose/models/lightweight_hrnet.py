"""Lightweight HRNet: J. Liao et al., "Lightweight HRNet: A Lightweight Network for Bottom-Up Human Pose Estimation",
Engineering Letters, 2024.

A bottom-up network like EfficientHRNet, whose scaling by one number r it takes over. The backbone of Lite Conv Modules
(LCM, Section III-C) gives maps A1 to A4 at 1/4, 1/8, 1/16 and 1/32 resolution. The Channel Exchange Module (CEM,
Section III-D) mixes their channels before they enter the four branches. Stage 1 has the first two branches, stage 2 all
four. The maps are those of HigherHRNet.

The paper published no code and leaves these points open. What we chose, and why; parameters and multiply-accumulates
"by output" (the weights of the transposed convolution per output position, as the ancestors count) are for r = -2, -1,
0. As chosen they are 5.942 / 8.825 / 13.190 M and 5.472 / 9.270 / 15.523 G; the paper prints 5.9 / 8.8 / 13.2 M and
5.5 / 9.3 / 15.6 G. (The 5.5 M of its abstract is a misprint.)

* Widths. The printed formulas, 1.1^r for the backbone and 32 n 1.25^r for the branches, do not give Tables I and II.
  EfficientHRNet's do: the backbone's rounded to multiples of 8, the branches' 32, 64, 128, 256 times 1.2455^r, rounded
  up.
* Table I prints resolutions and strides that contradict each other. Rows 5 and 7 have stride 1 here, which gives the
  printed 28 and 14; row 1 gives 224, not the printed 448.
* LCM. "C11 keeps the number of channels" is read as the number of *input* channels, since both parts together are to
  have the output's. The convolutions are dense 3x3. The text speaks of group convolution and ShuffleNet: ``lite_conv``
  selects ``"shufflenet"`` (as in the units of ShuffleNetV2: 1x1, depthwise 3x3, 1x1; 5.749 M, 5.367 G at r = -2),
  ``"separable"`` (depthwise 3x3, 1x1; 5.736 M, 5.348 G) or ``"grouped"`` (3x3 in up to 8 groups; 5.734 M, 5.344 G), all
  farther from what is printed.
* CEM. What is done with the concatenated channels is drawn, not written. Here a quarter of them goes by in turn (0, 4,
  8, ..., then 1, 5, ...), as in a channel shuffle of four groups, and the result is cut into pieces of the old sizes.
  With the concatenation in the order A3, A2, A4, A1 and half of each map exchanged this is exactly Table IV
  (``cem="half"``); with A1, A2, A3, A4 and all channels it is exactly Table III (``cem="all"``). ``cem="off"`` leaves
  the module out and costs the same.
* The convolution that leads back from the grid of A1 has stride 2^(n-1), not the printed 2n, and is the one that brings
  the channels to the width of the branch; a further one would add 0.7 M parameters.
* The head is not mentioned. HigherHRNet's transposed convolution with two residual blocks (``head_blocks``) explains
  the cost: without it 3.73 G, with one block 5.07 G.
* Stages: ``modules=(1, 3)`` with two blocks per branch, EfficientHRNet's without its stage of three branches. Between
  the stages the first two branches have a 3x3 convolution as there; without it (``between=False``) 5.922 M and 5.373 G.
* Convolutions into a branch have a bias in front of batch norm, as in EfficientHRNet.

Multiply-accumulates with the transposed convolution counted once per input position, which is what it needs:
4,776,815,176 / 8,192,159,100 / 13,861,650,432.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastpose.layers import ConvBNAct, DepthwiseSeparable, channel_shuffle, check_images, check_num_keypoints
from fastpose.models._registry import Published, register_model
from fastpose.models.efficient_hrnet import backbone_width, branch_widths, transition
from fastpose.models.hrnet import stage
from fastpose.models.hrnet_ae import higher_head

LITE_CONVS = ("dense", "shufflenet", "separable", "grouped")
# order in which the exchanged channels of A1 to A4 (here 0 to 3) are concatenated
CEM_ORDER = {"half": (2, 1, 3, 0), "all": (0, 1, 2, 3)}


@dataclass(frozen=True)
class LightweightHRNetConfig:
    """Scale `r` and the points the paper leaves open; see the module's documentation."""

    num_keypoints: int = 17
    r: int = -2
    lite_conv: str = "dense"
    cem: str = "half"
    modules: tuple[int, int] = (1, 3)
    blocks: int = 2
    between: bool = True
    head_blocks: int = 2

    def __post_init__(self) -> None:
        check_num_keypoints(self.num_keypoints)
        if self.r > 0:
            raise ValueError(f"r must be 0 or negative, got {self.r}")
        if self.lite_conv not in LITE_CONVS:
            raise ValueError(f"lite_conv must be one of {', '.join(LITE_CONVS)}, got {self.lite_conv!r}")
        if self.cem not in ("half", "all", "off"):
            raise ValueError(f"cem must be 'half', 'all' or 'off', got {self.cem!r}")
        if len(self.modules) != 2 or min(self.modules) < 1:
            raise ValueError(f"modules must have 2 positive entries, for stages 1 and 2, got {self.modules}")
        if self.head_blocks < 0:
            raise ValueError(f"head_blocks must not be negative, got {self.head_blocks}")


def lite_conv(kind: str, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    """A 3x3 convolution of the LCM with batch norm and ReLU: [B, I, H, W] -> [B, O, H/s, W/s]."""
    if kind == "shufflenet":
        return nn.Sequential(
            ConvBNAct(in_channels, out_channels, act="relu"), DepthwiseSeparable(out_channels, out_channels, stride)
        )
    if kind == "separable":
        return DepthwiseSeparable(in_channels, out_channels, stride)
    groups = math.gcd(in_channels, out_channels, 8) if kind == "grouped" else 1
    return ConvBNAct(in_channels, out_channels, 3, stride, groups, act="relu")


class LiteConvModule(nn.Module):
    """LCM (Figure 2): [B, I, H, W] -> [B, O, H/2, W/2], O > I and even.

    Stage 1: one convolution keeps the I channels, another adds O - I, both with stride 2 on the whole input. Stage 2: a
    convolution on one half of the channels. A channel shuffle follows each stage.
    """

    def __init__(self, in_channels: int, out_channels: int, kind: str) -> None:
        super().__init__()
        half = out_channels // 2
        # the unit of ShuffleNetV2 has no 1x1 convolution in front on this side
        self.keep = lite_conv("separable" if kind == "shufflenet" else kind, in_channels, in_channels, 2)
        self.add = lite_conv(kind, in_channels, out_channels - in_channels, 2)
        self.refine = lite_conv(kind, half, half)

    def forward(self, x: Tensor) -> Tensor:
        x = channel_shuffle(torch.cat([self.keep(x), self.add(x)], 1), 2, self.training)
        first, second = x.chunk(2, 1)
        return channel_shuffle(torch.cat([first, self.refine(second)], 1), 2, self.training)


class ChannelExchange(nn.Module):
    """CEM without its convolutions: A1 to A4 -> A'1 to A'4 of the same widths, all at the resolution of A1.

    An is [B, Cn, h / 2^(n-1), w / 2^(n-1)]. Of each map the first half of the channels, or all (`mode`), is exchanged;
    the rest stays behind them. No parameters.
    """

    order: Final[list[int]]
    exchanged: Final[list[int]]

    def __init__(self, widths: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.upsample = nn.ModuleList([nn.Upsample(scale_factor=float(2**n), mode="nearest") for n in range(4)])
        self.order = list(CEM_ORDER[mode])
        self.exchanged = [c // 2 if mode == "half" else c for c in widths]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        a: list[Tensor] = []
        for n, upsample in enumerate(self.upsample):
            a.append(upsample(maps[n]) if n > 0 else maps[n])
        parts: list[Tensor] = []
        for n in self.order:
            parts.append(a[n][:, : self.exchanged[n]])
        x = torch.cat(parts, 1)
        x = channel_shuffle(x, x.shape[1] // 4, self.training)  # channels 0, 4, 8, ..., then 1, 5, 9, ...
        outputs: list[Tensor] = []
        start = 0
        for n, width in enumerate(self.exchanged):
            outputs.append(torch.cat([x[:, start : start + width], a[n][:, width:]], 1))
            start += width
        return outputs


class LightweightHRNet(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> (maps [B, 2K, H/4, W/4], heatmaps [B, K, H/2, W/2]).

    The maps are K heatmaps, then K tag maps.
    """

    input_multiple: Final[int]
    cem: Final[bool]

    def __init__(self, config: LightweightHRNetConfig) -> None:
        super().__init__()
        self.config = config
        kind = config.lite_conv
        # Table I: the widths of rows 1 to 7
        c = [backbone_width(width, config.r) for width in (16, 24, 40, 80, 112, 192, 320)]
        self.stem = ConvBNAct(3, c[0], 3, 2, act="relu")
        self.to_a1 = LiteConvModule(c[0], c[1], kind)
        self.to_a2 = LiteConvModule(c[1], c[2], kind)
        self.to_a3 = nn.Sequential(LiteConvModule(c[2], c[3], kind), ConvBNAct(c[3], c[4], 3, act="relu"))
        self.to_a4 = nn.Sequential(LiteConvModule(c[4], c[5], kind), ConvBNAct(c[5], c[6], 3, act="relu"))
        a = (c[1], c[2], c[4], c[6])

        w = branch_widths(config.r)
        self.cem = config.cem != "off"
        self.exchange = ChannelExchange(a, config.cem) if self.cem else nn.Identity()
        self.enter = nn.ModuleList([transition(a[n], w[n], 2**n if self.cem else 1) for n in range(4)])
        self.stage1 = stage(w[:2], config.modules[0], config.blocks, 2)
        self.between = nn.ModuleList([transition(n, n) if config.between else nn.Identity() for n in w[:2]])
        self.stage2 = stage(w, config.modules[1], config.blocks, 1)
        self.final_layers, self.deconv_layers = higher_head(w[0], config.num_keypoints, w[0], config.head_blocks)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_images(x, self.input_multiple, "LightweightHRNet")
        a1 = self.to_a1(self.stem(x))
        a2 = self.to_a2(a1)
        a3 = self.to_a3(a2)
        a = [a1, a2, a3, self.to_a4(a3)]
        if self.cem:
            a = self.exchange(a)
        entered: list[Tensor] = []
        for n, enter in enumerate(self.enter):
            entered.append(enter(a[n]))
        b = [entered[0], entered[1]]
        for module in self.stage1:
            b = module(b)
        b = [self.between[0](b[0]), self.between[1](b[1]), entered[2], entered[3]]
        for module in self.stage2:
            b = module(b)
        maps = self.final_layers[0](b[0])
        return maps, self.final_layers[1](self.deconv_layers[0](torch.cat([b[0], maps], 1)))


PAPER = "Liao et al. 2024"


@register_model((448, 448), published=(Published(PAPER, (448, 448), 5.9, 5.5, "1e9", "AP 46.6 COCO test-dev"),))
def lightweight_hrnet_448(**changes: Any) -> LightweightHRNet:
    """Lightweight HRNet, r = -2: 5,941,779 parameters, 4,776,815,176 multiply-accumulates at 448x448, 17 keypoints."""
    return LightweightHRNet(replace(LightweightHRNetConfig(r=-2), **changes))


@register_model(
    (480, 480), published=(Published(PAPER, (480, 480), 8.8, 9.3, "1e9", "AP 48.5 COCO test-dev without CEM"),)
)
def lightweight_hrnet_480(**changes: Any) -> LightweightHRNet:
    """Lightweight HRNet, r = -1: 8,824,710 parameters, 8,192,159,100 multiply-accumulates at 480x480, 17 keypoints."""
    return LightweightHRNet(replace(LightweightHRNetConfig(r=-1), **changes))


@register_model(
    (512, 512), published=(Published(PAPER, (512, 512), 13.2, 15.6, "1e9", "AP 54.9 COCO test-dev without CEM"),)
)
def lightweight_hrnet_512(**changes: Any) -> LightweightHRNet:
    """Lightweight HRNet, r = 0: 13,190,483 parameters, 13,861,650,432 multiply-accumulates at 512x512, 17 keypoints."""
    return LightweightHRNet(replace(LightweightHRNetConfig(r=0), **changes))
