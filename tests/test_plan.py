"""Optimised networks: the same numbers as the model in float64, whatever the size, batch, layout and thread count."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpose
from fastpose import plan
from fastpose.layers import CBAM, SpatialAttention, channel_shuffle
from fastpose.models.le_hrnet import MCAM
from fastpose.models.lite_csw_hrnet import LiteCSWHRNetConfig, SingleResolutionCSW
from fastpose.ops import run_plan
from fastpose.plan import (
    CHANNEL_STATS,
    CONV,
    INTERLEAVE,
    MEAN_MAX,
    OUTER,
    SCALE,
    SCALE_PIXELS,
    WINOGRAD,
    NotOptimizable,
    Optimized,
)
from tests.conftest import needs_kernels, opcheck
from tests.test_models import build, relative

pytestmark = needs_kernels


def optimize(model: nn.Module, size: tuple[int, int] | None = None, precision: str = "float32") -> Optimized:
    """In float32 if not said otherwise: the default depends on the processor."""
    return fastpose.optimize(model, size, precision)


def compare(
    module: nn.Module, *shapes: tuple[int, ...], size: tuple[int, int] = (24, 24), precision: str = "float32"
) -> Optimized:
    """Optimise `module` and compare with it in float64 on random images of the given shapes."""
    module.float().input_multiple = 1
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            m.running_mean.normal_(std=0.3)
            m.running_var.uniform_(0.5, 2.0)
    module.eval()
    fast = optimize(module, size, precision)
    exact = module.double()
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            expected, got = exact(x.double()), fast(x)
        assert got.shape == expected.shape and got.dtype == torch.float32
        if got.numel():
            assert relative(got, expected) < {"float32": 5e-6, "bfloat16x3": 3e-5, "bfloat16": 2e-2}[precision]
    return fast


def steps(fast: Optimized) -> list[list[int]]:
    """The instructions of a program."""
    count, outputs, maps = int(fast.program[2]), int(fast.program[4]), int(fast.program[1])
    return fast.program[5 + outputs + 3 * maps :].view(count, -1).tolist()


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 16, 17, 24, 25, 33, 40, 49, 64, 72])
def test_pointwise_convolution(channels):
    """Every way in which channels fill panels, vectors and half vectors."""
    compare(nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 5, 1)), (1, 3, 1, 1), (2, 3, 5, 11))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("into", "channels", "kernel", "stride"), [(200, 170, 3, 2), (190, 256, 3, 1), (700, 401, 1, 1), (600, 450, 1, 2)]
)
def test_weights_beyond_the_cache(into, channels, kernel, stride, threads):
    """Panels of weights are used for all pixels of a tile before the next one."""
    net = nn.Sequential(
        nn.Conv2d(3, into, 1), nn.ReLU(), nn.Conv2d(into, channels, kernel, stride=stride, padding=kernel // 2)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compare(net, (1, 3, 1, 1), (1, 3, 9, 7), (3, 3, 13, 10))
    finally:
        torch.set_num_threads(before)


class Rounded(nn.Module):
    """A 1x1 convolution whose factors `optimize` rounds; as an oracle it rounds them itself."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, into, 3, padding=1, bias=False), nn.Conv2d(into, out, 1)
        self.rounds = ""

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        rest, weight = x[:, : self.conv.out_channels], self.conv.weight
        if not self.rounds:
            return (self.conv(x) + rest).relu()
        if self.rounds == "bfloat16x3":
            (x, x_rest), (weight, weight_rest) = ([t.float().bfloat16().double(), t.double()] for t in (x, weight))
            x_rest, weight_rest = ((t - u).bfloat16().double() for t, u in ((x_rest, x), (weight_rest, weight)))
            least = F.conv2d(x_rest, weight_rest)  # of four products it is left out
            x, weight = x + x_rest, weight + weight_rest
            return (F.conv2d(x, weight, self.conv.bias) - least + rest).relu()
        if self.rounds == "bfloat16":
            x, weight = (t.float().bfloat16().double() for t in (x, weight))
        else:
            least, most = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
            step = ((most - least) / 255).clamp(min=1e-30)
            zero = (-least / step).round()
            x = ((x / step + zero).round().clamp(0, 255) - zero) * step
            scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
            weight = (weight / scale).round() * scale
        return (F.conv2d(x, weight, self.conv.bias) + rest).relu()


BFLOAT16 = [("bfloat16", *s) for s in ((1, 1), (8, 7), (16, 16), (17, 9), (33, 24), (47, 33), (64, 40), (97, 96))]
SPLIT = [("bfloat16x3", *s) for s in ((96, 96), (97, 16), (100, 33), (111, 47), (127, 127), (128, 128), (131, 1))]
INT8 = [("int8", *s) for s in ((72, 72), (97, 96), (130, 73), (160, 84), (195, 129))]


@pytest.mark.parametrize(("precision", "into", "out"), BFLOAT16 + SPLIT + INT8)
def test_rounded_products(precision, into, out):
    net = Rounded(into, out).eval()
    net.input_multiple = 1
    fast = optimize(net, (8, 8), precision)
    assert steps(fast)[-1][0] == {"bfloat16": 28, "int8": 29, "bfloat16x3": 31}[precision]
    net.rounds = precision
    for images in (torch.randn(1, 3, 1, 1), torch.randn(2, 3, 5, 11), torch.zeros(1, 3, 4, 4), torch.randn(0, 3, 4, 4)):
        with torch.no_grad():
            got, expected = fast(images), net.double()(images.double())
        # a number in the middle of two steps may be rounded the other way, since the stem's own rounding moves it
        if len(images) and precision == "bfloat16x3":
            # the numbers themselves where there is no AMX
            bound = 5e-6 if plan._backend.cpu_level() == "amx" else 5e-5
            assert (got - expected).abs().max() <= bound * expected.abs().max() + 1e-6
        elif len(images):
            assert (got - expected).abs().max() < 1e-2 and (got - expected).abs().mean() < 5e-5
    with torch.no_grad():
        for strange in (float("nan"), float("inf")):
            x = torch.randn(2, 3, 6, 6)
            x[1, :, 4, 4] = strange
            got = fast(x)
            assert torch.equal(got[0], fast(x[:1])[0]) and torch.isfinite(got[1, :, 0]).all()
            assert not torch.isfinite(got[1, :, 4, 4]).any() or strange == float("inf")


@pytest.mark.parametrize("name", ["mobileposenet", "lite_hrnet_18"])
def test_networks_in_reduced_precision(name):
    model = build(name, num_keypoints=5)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        exact = model.double()(x.double())
        model.float()
        errors = [relative(optimize(model, precision=p)(x), exact) for p in plan.PRECISIONS]
    auto, float32, split, bfloat16, int8 = errors
    assert float32 < 1e-5 < bfloat16 < 2e-2 and 1e-5 < int8 < 5e-2 and split < 3e-5
    assert auto == (split if plan._backend.cpu_level() == "amx" else float32)
    names = "auto, float32, bfloat16x3, bfloat16, int8"
    with pytest.raises(ValueError, match=f"precision must be one of {names}, got 'float16'"):
        optimize(model, precision="float16")


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 3, 0), (7, 2, 3), (1, 2, 0), (2, 2, 1)]
)
def test_dense_convolution(kernel, stride, padding):
    net = nn.Sequential(
        nn.Conv2d(3, 10, kernel, stride, padding, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 33, 3, 1, 1)
    )
    compare(net, (1, 3, 24, 24), (3, 3, 13, 9), (1, 3, 7, 31))


class Block(nn.Module):
    """HRNet's: 3x3 convolutions wide enough for Winograd's algorithm, one of them with a residual."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, into, 1)
        self.a, self.b = nn.Conv2d(into, out, 3, 1, 1), nn.Conv2d(out, into, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(into)

    def forward(self, x):
        x = self.stem(x)
        return F.relu(self.norm(self.b(F.silu(self.a(x)))) + x)


@pytest.mark.parametrize(("into", "out"), [(16, 16), (17, 40), (64, 24)])
def test_winograd(into, out):
    block = Block(into, out)
    assert {step[0] for step in steps(compare(block, (1, 3, 24, 24)))} == {CONV, WINOGRAD}
    compare(block, (3, 3, 1, 1), (2, 3, 5, 7), (1, 3, 4, 4), (1, 3, 13, 30))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_convolution(kernel, stride):
    net = nn.Sequential(
        nn.Conv2d(3, 20, 1),
        nn.Conv2d(20, 20, kernel, stride, kernel // 2, groups=20, bias=False),
        nn.BatchNorm2d(20),
        nn.Hardswish(),
    )
    compare(net, (1, 3, 24, 24), (2, 3, 1, 1), (1, 3, 2, 3), (1, 3, 5, 40), (1, 3, 9, 8))


def test_transposed_depthwise_convolution():
    net = nn.Sequential(
        nn.Conv2d(3, 37, 1), nn.ConvTranspose2d(37, 37, 4, 2, 1, groups=37, bias=False), nn.BatchNorm2d(37), nn.ReLU()
    )
    compare(net, (1, 3, 24, 24), (2, 3, 1, 1), (1, 3, 1, 6), (1, 3, 5, 2))


class Residual(nn.Module):
    """Additions in both orders, before and after activations; values used twice; a gate with a number added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 18, 1), nn.Conv2d(18, 18, 1), nn.Conv2d(18, 18, 3, 1, 1)
        self.reduce, self.expand = nn.Conv2d(18, 4, 1), nn.Conv2d(4, 18, 1)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(x + self.a(x))
        z = F.silu(self.b(y) + self.a(y)) + y
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(z.mean((2, 3), keepdim=True)))))
        gated = z * (gate + 1.0) + y
        again = torch.sigmoid(self.reduce(gated))
        return F.relu(self.expand(again)) * torch.sigmoid(gate) + F.hardswish(gated)


def test_additions_gates_and_activations():
    compare(Residual(), (1, 3, 24, 24), (3, 3, 2, 7))


@pytest.mark.parametrize(("channels", "kernel", "padding"), [(2, 7, 3), (1, 3, 1), (4, 3, 0), (3, 2, 1)])
def test_convolution_to_one_channel(channels, kernel, padding):
    net = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 1, kernel, 1, padding), nn.Sigmoid())
    compare(net, (1, 3, 24, 24), (2, 3, 3, 17), (1, 3, 40, 5), (1, 3, 4, 33), (1, 3, 9, 70), (1, 3, 6, 48))


class Attention(nn.Module):
    """CBAM, concatenation, and maps of several resolutions added as HRNet's exchanges do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 20, 1), nn.Conv2d(3, 24, 1)
        self.by2, self.by4 = nn.Conv2d(44, 44, 3, 2, 1), nn.Conv2d(44, 44, 4, 4)
        self.attention = CBAM(44, 4)

    def forward(self, x):
        x = torch.cat([self.stem(x), self.wide(x)], 1)
        half, quarter = self.by2(x), self.by4(x)
        x = x + F.interpolate(half, scale_factor=2.0) + F.interpolate(quarter, scale_factor=4.0)
        x = F.relu(F.interpolate(quarter, scale_factor=4.0) + x) + x + x
        return F.relu(self.attention(F.relu(x)) + x)


def test_attention_concatenation_and_exchange():
    compare(Attention(), (1, 3, 24, 24), (3, 3, 4, 12))


class Gates(nn.Module):
    """Gates per channel and per pixel, alone and together, before a shuffle, and on a map that others use as well."""

    def __init__(self, channels: int, serial: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * channels, 1)
        config = LiteCSWHRNetConfig(order="serial" if serial else "parallel")
        self.single, self.again = (SingleResolutionCSW(channels, config) for _ in range(2))
        self.spatial = SpatialAttention(3)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        x = channel_shuffle(torch.cat([a, self.single(b)], 1), 2)
        a, b = x.chunk(2, 1)
        x = channel_shuffle(torch.cat([a, b * self.spatial(a)], 1), 2)
        a, b = x.chunk(2, 1)
        a = a * (torch.sigmoid(a.amax((2, 3), keepdim=True)) + 1.0)
        a = F.relu(a * self.spatial(a) + b)
        c = a * torch.sigmoid(b.mean((2, 3), keepdim=True))
        return torch.cat([self.again(a), c, F.relu(c * self.spatial(c))], 1)


class NoPairOfGates(nn.Module):
    """Products that look like a gate per channel times one per pixel, and what such gates cannot be folded into."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.stem, self.low, self.case = nn.Conv2d(3, 19, 1), nn.Conv2d(3, 19, 2, 2), case
        self.channel, self.number, self.spatial = nn.Conv2d(19, 19, 1), nn.Conv2d(19, 1, 1), SpatialAttention(3)

    def forward(self, x):
        low, x = self.low(x), self.stem(x)
        mean = x.mean((2, 3), keepdim=True)
        channel, number = torch.sigmoid(self.channel(mean)), torch.sigmoid(self.number(mean))
        if self.case == "number per image":
            return x * (channel * number)
        if self.case == "number times pixels":
            return x * (self.spatial(x) * number)
        if self.case == "enlarged later":
            gate = channel * self.spatial(x)
            return F.interpolate(low, scale_factor=2.0) * gate
        enlarged = F.interpolate(low, scale_factor=2.0)
        return channel_shuffle(torch.cat([enlarged, x * self.spatial(x)], 1), 2)


@pytest.mark.parametrize(
    "case", ["number per image", "number times pixels", "enlarged later", "shuffled with an enlarged map"]
)
def test_gates_that_stay_apart(case):
    compare(NoPairOfGates(case), (1, 3, 24, 24), (3, 3, 2, 8))


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("channels", [3, 16, 19, 40])
def test_gates(channels, serial):
    fast = compare(Gates(channels, serial), (1, 3, 24, 24), (3, 3, 2, 7), (1, 3, 1, 1), (2, 3, 5, 17))
    count = Counter(step[0] for step in steps(fast))
    assert count[MEAN_MAX] == 2 and count[SCALE] == 1 and count[OUTER] == 0  # c alone has to exist for itself
    assert count[SCALE_PIXELS] == 3 and count[INTERLEAVE] == 2


class GatedConvolution(nn.Module):
    """Squeeze-and-excitation before a convolution, in the ways in which the gate is left to it or is not."""

    def __init__(self, channels: int, case: str) -> None:
        super().__init__()
        stride = 2 if case == "every other pixel" else 1
        self.stem, self.gate = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.conv = nn.Conv2d(channels, 21, 1, stride=stride, bias=False)
        self.norm, self.rest, self.case = nn.BatchNorm2d(21), nn.Conv2d(3, 21, 1, stride=stride), case

    def forward(self, x):
        y = F.relu(self.stem(x))
        gate = torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        gated = y * (gate + 0.5 if self.case == "plus" else gate)
        z = F.relu(self.norm(self.conv(gated)) + self.rest(x))
        return (z, gated) if self.case == "used twice" else z


class GatedImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x * torch.sigmoid(self.gate(x).mean((2, 3), keepdim=True)))


class JoinedImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 4, 1)

    def forward(self, x):
        return self.second(torch.cat([x, self.first(x)], 1))


@pytest.mark.parametrize("case", ["plain", "plus", "every other pixel", "used twice"])
@pytest.mark.parametrize("channels", [5, 16, 43])
def test_gates_left_to_convolutions(channels, case):
    net = GatedConvolution(channels, case)
    if case == "used twice":
        net.input_multiple = 1
        fast, x = optimize(net.eval(), (8, 8)), torch.randn(2, 3, 5, 7)
        with torch.no_grad():
            for got, expected in zip(fast(x), net.double()(x.double()), strict=True):
                assert relative(got, expected) < 5e-6
    else:
        fast = compare(net, (1, 3, 24, 24), (2, 3, 5, 9), (1, 3, 1, 1), (0, 3, 4, 4))
    assert Counter(step[0] for step in steps(fast))[SCALE] == (case in ("every other pixel", "used twice"))


@pytest.mark.parametrize(("precision", "channels"), [("bfloat16x3", c) for c in (96, 101, 112)] + [("bfloat16", 43)])
def test_gates_left_to_rounded_products(precision, channels):
    net = GatedConvolution(channels, "plus")
    fast = compare(net, (1, 3, 24, 24), (2, 3, 5, 9), (1, 3, 1, 1), (0, 3, 4, 4), precision=precision)
    count = Counter(step[0] for step in steps(fast))
    assert count[SCALE] == 0 and count[plan.CONV_SPLIT if precision == "bfloat16x3" else plan.CONV_BF16] > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16x3"])
def test_wrong_numbers_are_noticed(precision, monkeypatch):
    """Whatever packs weights wrongly: the program that is returned has been compared, not another."""
    net, pack = nn.Sequential(nn.Conv2d(3, 96, 1), nn.Conv2d(96, 96, 1)).eval(), plan._pack
    wrong = plan.CONV if precision == "float32" else plan.CONV_SPLIT
    monkeypatch.setattr(plan, "_pack", lambda op, weight: pack(op, weight.flip(0) if op == wrong else weight))
    with pytest.raises(NotOptimizable, match="the result would differ from the network's"):
        optimize(net, (8, 8), precision)


def test_attention_takes_in_its_gate():
    fast = optimize(build("hr_litenet"))
    count = Counter(step[0] for step in steps(fast))
    assert count[SCALE] == 0 and count[MEAN_MAX] == count[CHANNEL_STATS] == count[SCALE_PIXELS] > 50


class Statistics(nn.Module):
    """Maps of one and two channels for a gate per pixel, whose pixels are not padded unless others read them too."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.stem, self.gate, self.other = nn.Conv2d(3, 19, 1), nn.Conv2d(2, 1, 7, 1, 3), nn.Conv2d(2, 5, 3, 2, 1)
        self.shared = shared

    def forward(self, x):
        x = self.stem(x)
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        gate = torch.sigmoid(self.gate(both))
        y = F.relu(x * gate + x)
        if not self.shared:
            return y
        low = F.interpolate(self.other(both), scale_factor=2.0)
        return torch.cat([y, both, gate + both[:, 1:], low, both[:, :1]], 1)


@pytest.mark.parametrize("shared", [False, True])
def test_maps_of_few_channels(shared):
    compare(Statistics(shared), (1, 3, 24, 24), (3, 3, 2, 8), (1, 3, 4, 34))


class Shuffle(nn.Module):
    """What Lite-HRNet adds: halves, channel shuffles, pooling to the smallest map, gates of a lower resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.last = nn.Conv2d(3, 38, 1), nn.Conv2d(38, 6, 2, 2), nn.Conv2d(19, 19, 1)
        self.gate = nn.Conv2d(19 + 6 + 6, 19 + 12, 1)

    def forward(self, x):
        x = self.stem(x)
        low = self.down(x)
        a, b = x.chunk(2, 1)
        pooled = torch.cat([F.avg_pool2d(b, 4, 4), F.avg_pool2d(low, 2), F.avg_pool2d(low, 2)], 1)
        gate, rest = torch.sigmoid(self.gate(pooled)).split([19, 12], 1)
        b = F.relu(self.last(b) * F.interpolate(gate, scale_factor=4.0))
        x = channel_shuffle(torch.cat([a, b], 1), 2)
        up = F.interpolate(torch.cat([low, low], 1), scale_factor=2.0, mode="bilinear", align_corners=True)
        return torch.cat([x, up, F.interpolate(rest, scale_factor=4.0) * up], 1)


def test_halves_shuffles_and_pooling():
    compare(Shuffle(), (1, 3, 24, 24), (3, 3, 4, 8), (1, 3, 8, 4))


@pytest.mark.parametrize("channels", [1, 5, 24, 40])
def test_transposed_dense_convolution(channels):
    net = nn.Sequential(
        nn.Conv2d(3, 9, 1), nn.ConvTranspose2d(9, channels, 4, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()
    )
    compare(net, (1, 3, 24, 24), (2, 3, 1, 1), (1, 3, 1, 13), (1, 3, 5, 2))
    compare(nn.ConvTranspose2d(3, channels, 4, 2, 1), (2, 3, 5, 14))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (5, 1, 2)])
def test_max_pooling(kernel, stride, padding):
    net = nn.Sequential(nn.Conv2d(3, 11, 1), nn.MaxPool2d(kernel, stride, padding))
    compare(net, (1, 3, 24, 24), (2, 3, 7, 5), (1, 3, 2, 3))


@pytest.mark.parametrize("groups", [2, 3, 8])
def test_channel_shuffle(groups):
    net = nn.Sequential(nn.Conv2d(3, 24, 1), nn.ChannelShuffle(groups))
    net[1].forward = lambda x: channel_shuffle(x, groups)
    compare(net, (1, 3, 24, 24), (2, 3, 3, 5))


@pytest.mark.parametrize("name", ["hrnet_w32_ae", "lightweight_hrnet_448"])
def test_bottom_up_networks(name):
    """One map in a tuple, and two of different resolutions."""
    model = build(name, num_keypoints=5)
    fast, x = optimize(model), torch.randn(3, 3, 64, 96)
    with torch.inference_mode():
        expected, got = model.double()(x.double()), fast(x)
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            assert relative(g, e) < 2e-5
        assert torch.equal(torch.jit.script(fast)(x)[-1], got[-1])


class Narrow(nn.Module):
    """Concatenations and slices of widths that fill no vector: each part is written and read among its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.next = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 21, 1), nn.Conv2d(26, 13, 3, 1, 1)
        self.cheap = nn.Conv2d(13, 13, 3, 1, 1, groups=13)
        self.gate, self.transposed = nn.Conv2d(13, 13, 1), nn.ConvTranspose2d(13, 13, 4, 2, 1, groups=13)

    def forward(self, x):
        x = torch.cat([self.stem(x), self.wide(x)], 1)
        y = self.next(x)
        ghost = torch.cat([y, F.relu(self.cheap(y))], 1)
        gate = torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        middle = self.cheap(ghost[:, 7:20] * gate)  # a gate that depthwise weights take in
        both = torch.cat([ghost[:, :3], middle, x[:, 20:], F.interpolate(ghost, scale_factor=1.0)], 1)
        a, b = both[:, 1:14], both[:, 14:27]
        shuffled = channel_shuffle(torch.cat([a, b * gate], 1), 2)
        up = self.transposed(shuffled[:, 13:] + y)
        return torch.cat([up, F.interpolate(shuffled[:, 2:9], scale_factor=2.0), up[:, :1]], 1)


def test_parts_in_place():
    compare(Narrow(), (1, 3, 24, 24), (3, 3, 1, 1), (2, 3, 2, 7), (1, 3, 40, 3))


@pytest.mark.parametrize("channels", [16, 32, 48, 128])
def test_multi_scale_attention(channels):
    net = nn.Sequential(nn.Conv2d(3, channels, 1), MCAM(channels), nn.ReLU())
    for p in net[1].parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    compare(net, (1, 3, 24, 24), (3, 3, 1, 1), (2, 3, 18, 21), (1, 3, 40, 7), (1, 3, 1, 9))


class Link(nn.Module):
    """LE-HRNet's fusion: a gate per channel times the mean of the channels of another map, added; spatial attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 20, 1), nn.Conv2d(3, 9, 4, 4)
        self.gate, self.attention = nn.Conv2d(20, 20, 1), SpatialAttention()

    def forward(self, x):
        y, low = self.stem(x), self.low(x)
        gate = torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = y + gate * F.interpolate(low.mean(1, keepdim=True), scale_factor=4.0)
        y = y + gate * y.mean(1, keepdim=True)
        return F.relu(y * self.attention(y))


def test_fusion_by_channel_means():
    compare(Link(), (1, 3, 24, 24), (3, 3, 4, 4), (2, 3, 8, 28))


@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_as_in_tensorflow(kernel):
    """One row and column of zeros more at the end, stride 2; depthwise only where maps are even at every size."""
    half = (kernel - 2) // 2
    pad = nn.ZeroPad2d((half, half + 1, half, half + 1))
    dense, depthwise = (
        nn.Sequential(pad, nn.Conv2d(8 if groups > 1 else 3, 8, kernel, 2, groups=groups), nn.BatchNorm2d(8), nn.SiLU())
        for groups in (1, 8)
    )
    compare(dense, (1, 3, 6, 8), (2, 3, 7, 5), (1, 3, 2, 2))
    both = nn.Sequential(dense, depthwise, nn.AdaptiveAvgPool2d(1)).float()
    with pytest.raises(NotOptimizable, match="on a map padded unevenly is not supported"):
        optimize(Multiple(both, 2), (24, 24))
    x = torch.randn(2, 3, 20, 12)
    with torch.no_grad():
        assert relative(optimize(Multiple(both, 4), (24, 24))(x), both.double()(x.double())) < 5e-6


class Multiple(nn.Sequential):
    def __init__(self, module: nn.Module, multiple: int) -> None:
        super().__init__(module)
        self.input_multiple = multiple
        self.eval()


@pytest.mark.parametrize(
    "name", ["hr_litenet", "lite_csw_hrnet", "lite_hrnet_18", "small_hrnet_w16", "efficient_hrnet_h2"]
)
def test_networks(name):
    model = build(name, num_keypoints=5)
    fast, x = optimize(model), torch.randn(3, 3, 64, 96)
    with torch.inference_mode():
        assert relative(fast(x), model.double()(x.double())) < 2e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mobileposenet(threads):
    """Fewer, as many and more images than threads; images in any layout."""
    model = build("mobileposenet", num_keypoints=5)
    fast, exact = optimize(model), build("mobileposenet", num_keypoints=5).double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, height, width in ((1, 256, 192), (2, 64, 64), (5, 32, 48), (0, 64, 64)):
            x = torch.randn(batch, 3, height, width)
            wide = torch.randn(batch, 4, height, 2 * width)[:, 1:, :, ::2]
            with torch.inference_mode():
                for images in (x, x.contiguous(memory_format=torch.channels_last), wide):
                    got, expected = fast(images), exact(images.double())
                    assert got.shape == expected.shape
                    assert batch == 0 or got.is_contiguous() == (images is x or images is wide)
                    assert batch == 0 or relative(got, expected) < 1e-5
    finally:
        torch.set_num_threads(before)


class Chained(nn.Module):
    """Whatever may follow an instruction tile by tile, reductions after it, and what must wait for all tiles."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def conv(into: int, out: int, kernel: int = 1, groups: int = 1) -> nn.Module:
            layer = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(out))

        half, twice = channels // 2, 2 * channels
        self.stem = nn.Sequential(conv(3, channels, 3), nn.ReLU())
        self.expand, self.spread = conv(channels, twice), conv(twice, twice, 5, twice)
        self.less, self.more, self.narrow = nn.Conv2d(twice, 9, 1), nn.Conv2d(9, twice, 1), conv(twice, channels)
        self.pixels = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.left, self.right = conv(half, half), conv(channels - half, channels - half, 3, channels - half)
        self.attention, self.small, self.last = CBAM(channels), conv(channels, channels), conv(channels, 7)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu6(self.spread(F.hardswish(self.expand(x))))
        y = y * self.more(F.relu(self.less(y.mean((2, 3), keepdim=True)))).sigmoid()
        x = F.relu(self.narrow(y) + x)
        x = x * self.pixels(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        half = x.shape[1] // 2
        x = channel_shuffle(torch.cat([self.left(x[:, :half]), F.relu(self.right(x[:, half:]))], 1), 2)
        x = self.attention(x) + F.interpolate(self.small(F.avg_pool2d(x, 2)), scale_factor=2.0)
        return self.last(x) * x.amax((2, 3), keepdim=True)[:, :7]


@pytest.mark.parametrize(("channels", "precision"), [(16, "float32"), (22, "float32"), (98, "bfloat16x3")])
def test_chained_instructions(channels, precision):
    """Every cut of an image among threads, into more tiles than rows and fewer, gives the same bits; the largest one is
    cut for one thread too."""
    net, before = Chained(channels), torch.get_num_threads()
    shapes = [(1, 3, 2, 2), (1, 3, 2, 66), (1, 3, 34, 2), (1, 3, 30, 54), (1, 3, 14, 14), (2, 3, 150, 94)]
    fast = compare(net, *shapes, size=(32, 32), precision=precision)
    images = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        clean = [[fast(image) for image in batch.split(1)] for batch in images]
        try:
            for threads in (1, 2, 3, 4, 5, 17):
                torch.set_num_threads(threads)
                for _ in range(5):  # in whatever order tiles are done
                    for batch, expected in zip(images, clean, strict=True):
                        assert torch.equal(fast(batch), torch.cat(expected))
                for strange in (float("nan"), float("inf")):  # in a tile that only one thread sees
                    for y, x in ((0, 0), (75, 40), (149, 93)):
                        image = images[-1][:1].clone()
                        image[0, 0, y, x] = strange
                        assert not fast(image).isfinite().any()
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_every_instruction_set(level):
    code = "import tests.test_plan as t; [t.test_dense_convolution(*a) for a in ((3, 2, 1), (1, 2, 0))]; "
    code += "[t.test_depthwise_convolution(k, s) for k in (3, 5, 7) for s in (1, 2)]; "
    code += "[t.test_pointwise_convolution(c) for c in (7, 17, 24, 40, 72)]; "
    code += "[t.test_rounded_products(*a) for a in t.BFLOAT16 + t.SPLIT + t.INT8]; "
    code += "t.test_transposed_depthwise_convolution(); t.test_additions_gates_and_activations(); "
    code += "t.test_attention_concatenation_and_exchange(); t.test_halves_shuffles_and_pooling(); "
    code += "[t.test_gates(c, True) for c in (16, 19)]; [t.test_maps_of_few_channels(s) for s in (False, True)]; "
    code += "t.test_convolution_to_one_channel(2, 7, 3); t.test_parts_in_place(); t.test_fusion_by_channel_means(); "
    code += "t.test_winograd(17, 40); t.test_transposed_dense_convolution(24); t.test_max_pooling(3, 2, 1); "
    code += "[t.test_multi_scale_attention(c) for c in (16, 32, 48)]; "
    code += "t.test_weights_beyond_the_cache(200, 170, 3, 2, 2); t.test_gates_left_to_convolutions(43, 'plus'); "
    code += "t.test_sums_of_many_numbers(64, 512); t.test_chained_instructions(22, 'float32'); "
    code += "t.test_chained_instructions(98, 'bfloat16x3'); t.test_gates_left_to_rounded_products('bfloat16x3', 101); "
    code += "t.test_gates_left_to_rounded_products('bfloat16', 43)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTPOSE_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_networks_in_turn():
    """What is kept from call to call belongs to one network and size, and there are more of them than are kept."""
    nets = [nn.Sequential(nn.Conv2d(3, c, 3, 1, 1), nn.Sigmoid()).eval() for c in (8, 8, 20, 9, 10, 11)]
    for net in nets:
        net.input_multiple = 1
    fast = [optimize(net, (8, 8)) for net in nets]
    for size in ((8, 8), (5, 9), (8, 8)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            for net, quick in zip(nets, fast, strict=True):
                assert relative(quick(x), net(x)) < 1e-6
                with pytest.raises(ValueError, match="x must have 3 channels"):
                    run_plan(x[:, :2], quick.program, quick.weights, quick.outputs)
                assert relative(quick(x), net(x)) < 1e-6


def test_script_and_export(tmp_path):
    model = build("mobileposenet", num_keypoints=4)
    fast, x = optimize(model), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = fast(x)
        scripted = torch.jit.script(fast)
        torch.jit.save(scripted, tmp_path / "fast.pt")
        assert torch.equal(torch.jit.load(tmp_path / "fast.pt")(x), expected)
        assert torch.equal(torch.jit.freeze(scripted)(x), expected)
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(fast, (x,), dynamic_shapes={"x": {0: batch}})
        assert torch.equal(exported.module()(torch.cat([x, x]))[:2], expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fast(x), expected)  # float32 inside, whatever autocast says
    opcheck(torch.ops.fastpose.run_plan.default, (x, fast.program, fast.weights, fast.outputs))


def test_nan_stays_nan_and_in_its_image():
    fast, x = optimize(build("mobileposenet", num_keypoints=2)), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        clean = fast(x)
        x[1, 0, 30, 30] = float("nan")
        got = fast(x)
    assert got[1].isnan().any() and torch.equal(got[0], clean[0]) and torch.equal(got[2], clean[2])


class SliceFromTheEnd(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.stem, self.next, self.first = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 5, 1), first

    def forward(self, x):
        return self.next(self.stem(x)[:, self.first :][:, -8:])


@pytest.mark.parametrize("first", [0, 11, -13, -40])
def test_slices_from_the_end(first):
    compare(SliceFromTheEnd(first), (2, 3, 5, 4))


class ScaledSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return torch.add(self.conv(x), x, alpha=2)


class Split(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], 3, 1, 8, 8).sigmoid().flatten(1, 2)


class GatedUpsampling(nn.Conv2d):
    def forward(self, x):
        x = super().forward(x).sigmoid()
        return nn.functional.interpolate(x, scale_factor=2.0) * x.mean((2, 3), keepdim=True)


class Writes(nn.Module):
    """Operations in place, on a map alone or on what other names show too."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.a, self.b = case, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)
        self.c = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.a(x)
        if self.case == "dropout":
            z = F.relu_(F.dropout(y, training=False))
            return self.b(y) + self.b(z)
        if self.case == "chunk":
            p, q = y.chunk(2, 1)
            q += p
            return self.b(y) + q
        if self.case == "chunked before":
            p, q = y.chunk(2, 1)
            y.relu_()
            return self.b(y) + self.c(p) + q
        if self.case == "slice":
            y[:, :8].relu_()
            return self.b(y)
        if self.case == "detach":
            y.detach().relu_()
            return self.b(y)
        before = self.b(y)  # all else is in order
        y.relu_()
        z = F.dropout(self.b(y), training=False)
        z += before
        return self.c(F.silu(z, inplace=True))


def test_operations_in_place():
    compare(Writes("alone"), (1, 3, 8, 8), (2, 3, 5, 7))
    for case in ("dropout", "chunk", "chunked before", "slice", "detach"):
        with pytest.raises(NotOptimizable, match="aten..*_.* in place on a map that is read under another name"):
            optimize(Multiple(Writes(case), 1), (8, 8))


def test_the_exchange_of_the_published_code():
    compare(build("naive_lite_hrnet_18", legacy_fuse=True), (1, 3, 64, 96), size=(64, 64))


class BandLast(nn.Module):
    """Attention over channels (ECA) whose filter is the last of the network's numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.band = nn.Conv2d(3, channels, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        gate = torch.sigmoid(self.band(y.mean((2, 3)).unsqueeze(1)))
        return y * gate.transpose(1, 2).unsqueeze(-1)


@pytest.mark.parametrize("channels", [16, 17, 40])
def test_a_filter_over_channels_may_come_last(channels):
    compare(BandLast(channels), (1, 3, 8, 8), (2, 3, 5, 7))


def test_what_is_not_understood_is_named():
    with pytest.raises(NotOptimizable, match="DiteHRNet: aten.flatten.* is not in the table of patterns"):
        optimize(fastpose.create_model("dite_hrnet_30"))
    for module, message in (
        (nn.Softplus(), "aten.softplus.default giving .* is not in the table of patterns"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardtanh()), "hardtanh.*expected bounds 0 and 6"),
        (Split(), "view.* is not part of a channel shuffle"),
        (ScaledSum(), r"the addition .*aten.add.Tensor.*alpha: 2.* is not supported"),
        (nn.ConvTranspose2d(3, 6, 2, 2), r"convolution with weight .*, transposed is not supported"),
        (nn.Conv2d(3, 6, 3, groups=3), r"convolution with weight \[6, 1, 3, 3\].*is not supported"),
        (GatedUpsampling(3, 3, 1), "aten.upsample_nearest2d.* is used by aten.mul.Tensor, which is not supported"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2, 1)), "avg_pool2d.*expected stride = kernel only"),
        (nn.Conv2d(3, 4, 3, padding=3), "padding 3, .* is not supported"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)), "aten.relu_.* of the image itself is not supported"),
        (nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 4, 1)), "max_pool2d.* of the image itself .* dense conv"),
        (GatedImage(), "conv2d.* of the image itself is not supported"),
        (JoinedImage(), "aten.cat.default of the image itself is not supported"),
    ):
        module.input_multiple = 1
        with pytest.raises(NotOptimizable, match=message):
            optimize(module, (8, 8))


def test_too_large_images_are_an_error():
    fast = optimize(build("mobileposenet", num_keypoints=2))
    for side in (2**21, 2**24):
        with pytest.raises((RuntimeError, ValueError), match="out of memory|too large|could not allocate"):
            fast(torch.zeros(1, 3, 1, 1).expand(1, 3, side, side))
    assert fast(torch.zeros(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize(("channels", "height"), [(16, 1024), (64, 512)])
def test_sums_of_many_numbers(channels, height):
    """A constant above noise, as beside a letterboxed image: rounding must not grow with the number of pixels."""

    class Means(nn.Module):
        def forward(self, x):
            y = F.relu(self.first(x))
            return y.mean((2, 3), keepdim=True) + y.mean((2, 3), keepdim=True)

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, channels, 1)

    net = Multiple(Means(), 32)
    fast, x = optimize(net), torch.randn(1, 3, height, 1024)
    x[:, :, height // 2 :] = -2.1179
    with torch.no_grad():
        got, expected = fast(x), net.double()(x.double())
    assert float(((got - expected) / expected.abs().clamp(min=0.1)).abs().max()) < 1e-4


class PooledBySize(nn.Module):
    """The size of the pooling is that of the example's map."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        return x * torch.sigmoid(self.gate(F.avg_pool2d(x, x.shape[2:])))


class Turned(nn.Conv2d):
    """Of one pixel a map turned is the same."""

    def forward(self, x):
        return super().forward(x).transpose(2, 3)


class Wider(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).mean((2, 3), keepdim=True, dtype=torch.float64)


class Scaled(nn.Conv2d):
    def forward(self, x):
        x = super().forward(x)
        return x * torch.add(x.mean((2, 3), keepdim=True), 0.001, alpha=5.0)


class Flat(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).sum(dim=None, keepdim=True)


def test_forms_that_one_example_does_not_tell_apart():
    for module in (PooledBySize(), Turned(3, 4, 64, 64), Wider(3, 4, 1), Scaled(3, 4, 1), Flat(3, 4, 1)):
        with pytest.raises(NotOptimizable, match=f"{type(module).__name__}: "):
            optimize(module.eval())


class Returning(nn.Conv2d):
    def __init__(self, wanted):
        super().__init__(3, 8, 3, 1, 1)
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.wanted = wanted

    def forward(self, x):
        return self.wanted(self, super().forward(x), x)


class Maps(NamedTuple):
    heatmaps: torch.Tensor
    tags: torch.Tensor


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (lambda net, y, x: None, r"Returning returns NoneType\(\); expected one map \[B, C, H, W\] or a plain tuple"),
        (lambda net, y, x: ([y], y), r"Returning returns tuple\(list, Tensor\)"),
        (lambda net, y, x: Maps(y, y), r"Returning returns Maps\(Tensor, Tensor\)"),
        (lambda net, y, x: y.mean((2, 3)), r"Returning returns \[1, 8\]"),
        (lambda net, y, x: x, "Returning returns the image itself"),
        (lambda net, y, x: net.norm(y), "batch_norm.default with the statistics of the batch"),
        (lambda net, y, x: F.dropout(y, training=True), "dropout.default in training mode"),
        (lambda net, y, x: y if float(x.sum()) > 0 else y + 1, "Returning cannot be exported by PyTorch: "),
        (lambda net, y, x: torch.from_numpy(y.numpy()), "Returning cannot be exported by PyTorch: "),
        (lambda net, y, x: y + net.missing, "Returning cannot be copied and run on images .*: AttributeError: "),
        (lambda net, y, x: y * F.avg_pool2d(y, y.shape[2:]), "Returning: run_plan: a gate has pixels"),
    ],
)
def test_whatever_cannot_be_optimised_is_refused_in_every_precision(wanted, message, precision):
    with pytest.raises(NotOptimizable, match=message):
        optimize(Returning(wanted).eval(), precision=precision)


def test_inputs_and_modules_that_cannot_be_optimised():
    with pytest.raises(NotOptimizable, match=r"Sequential cannot be copied and run .* to have 1 channels"):
        optimize(nn.Sequential(nn.Conv2d(1, 4, 1)))
    with pytest.raises(NotOptimizable, match="Bilinear cannot be copied and run .* missing 1 required"):
        optimize(nn.Bilinear(3, 3, 3))
    with pytest.raises(NotOptimizable, match="cannot be exported by PyTorch: ValueError: Exporting a ScriptModule"):
        optimize(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1))))
    with pytest.raises(ValueError, match=r"size must be a positive \(height, width\), got \(0, 8\)"):
        optimize(nn.Conv2d(3, 4, 1), (0, 8))


def test_any_size_of_modules_that_ask_for_no_multiple():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    for fast in (optimize(net), optimize(net, (200, 136))):
        for size in ((33, 47), (64, 64), (1, 1)):
            x = torch.randn(2, 3, *size)
            with torch.no_grad():
                assert relative(fast(x), net(x)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        fast = optimize(net)
    with torch.no_grad():
        assert relative(fast(x), net(x)) < 1e-5


def test_announced_sizes_are_right_or_refused():
    halved = optimize(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1)))
    exported = torch.export.export(halved, (torch.zeros(1, 3, 34, 48),))
    assert exported.module()(torch.zeros(1, 3, 34, 48)).shape == (1, 8, 17, 24)
    with pytest.raises(RuntimeError, match="images of 33 x 48, of which its output is no fixed fraction"):
        torch.export.export(halved, (torch.zeros(1, 3, 33, 48),))
    thirds = optimize(nn.Sequential(nn.Conv2d(3, 8, 3, 3)))
    assert thirds(torch.zeros(1, 3, 192, 192)).shape == (1, 8, 64, 64)
    with pytest.raises(RuntimeError, match="images of 192 x 192, of which its output is no fixed fraction"):
        torch.export.export(thirds, (torch.zeros(1, 3, 192, 192),))
    smaller = optimize(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert smaller(torch.zeros(1, 3, 48, 40)).shape == (1, 8, 46, 38)
    with pytest.raises(RuntimeError, match="images of 48 x 40, of which its output is no fixed fraction"):
        torch.export.export(smaller, (torch.zeros(1, 3, 48, 40),))


def test_networks_that_amplify_rounding():
    """Noise in, statistics of few pixels: float32 itself is far off, which is no error of ours."""
    torch.manual_seed(0)
    model = fastpose.create_model("le_hrnet")
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(4, 3, 64, 64))
    assert isinstance(optimize(model), Optimized)


def test_the_dtype_of_an_optimised_network_stays():
    fast = optimize(nn.Sequential(nn.Conv2d(3, 4, 1)))
    for change in (fast.half, fast.double, nn.Sequential(fast).bfloat16):
        with pytest.raises(TypeError, match="computes in float32 and cannot be made torch"):
            change()
    for module in (fast, torch.jit.script(fast), nn.Sequential(torch.jit.script(fast))):
        assert module.to("cpu").float().share_memory()(torch.zeros(1, 3, 4, 4)).dtype == torch.float32


def test_batch_norm_without_weights():
    compare(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), (2, 3, 8, 9))


def test_errors_of_a_pattern_are_found_when_a_network_is_prepared(monkeypatch):
    wrong = {**plan.ACTIVATIONS, torch.ops.aten.relu.default: plan.ACTIVATIONS[torch.ops.aten.silu.default]}
    monkeypatch.setattr(plan, "ACTIVATIONS", wrong)
    net = Multiple(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), 1)
    with pytest.raises(NotOptimizable, match="Multiple: the result would differ from the network's by"):
        optimize(net, (8, 8))


def test_small_examples_and_other_dtypes():
    model = build("mobileposenet", num_keypoints=2)
    fast, x = optimize(model, (model.input_multiple, model.input_multiple)), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative(fast(x), model(x)) < 1e-4
    with pytest.raises(ValueError, match="optimize needs float32 parameters, got torch.float64"):
        optimize(model.double())


def test_wrong_images():
    fast = optimize(build("mobileposenet", num_keypoints=2))
    with pytest.raises(ValueError, match="MobilePoseNet: input must be .* multiples of 16, got"):
        fast(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ValueError, match=r"x must be float32 \[B, C, H, W\], got float64"):
        fast(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="has no gradient"):
        fast(torch.zeros(1, 3, 64, 64, requires_grad=True)).sum().backward()
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.func.jvp(fast, (torch.zeros(1, 3, 64, 64),), (torch.ones(1, 3, 64, 64),))


class Rare(nn.Module):
    """The instructions that the networks below do not have, around the two outputs of bottom-up ones."""

    input_multiple = 8

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.link, self.attention, self.block = Narrow(), Link(), MCAM(32), Block(20, 32)
        self.enter, self.last = nn.Conv2d(20, 32, 1), nn.Conv2d(11, 2, 1)
        self.pool, self.up = nn.MaxPool2d(3, 2, 1), nn.ConvTranspose2d(33, 24, 4, 2, 1)

    def forward(self, x):
        y = F.hardswish(self.attention(self.enter(self.link(x))) + self.enter(self.block(x)))
        y = channel_shuffle(self.up(torch.cat([self.pool(y), self.pool(y)[:, 3:4]], 1)), 3)
        return self.last(y[:, 2:13]), F.relu6(self.narrow(x))


@pytest.mark.parametrize(
    "name", ["mobileposenet", "hr_litenet", "lite_hrnet_18", "lite_csw_hrnet", "rare", "bfloat16x3", "int8"]
)
def test_damaged_programs_are_refused(name):
    """Any single changed number is noticed or harmless: never a read or write outside the maps."""
    known = "mobileposenet" if name in plan.PRECISIONS else name
    network = Rare().eval() if name == "rare" else build(known, num_keypoints=2)
    fast = optimize(network, precision=name if name in plan.PRECISIONS else "float32")
    x = torch.randn(1, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for at in torch.randperm(len(fast.program), generator=generator)[:150].tolist():
        for value in (-7, 3, 10**6, 2**62, 2**63 - 16, 2**63 - 1):
            program = fast.program.clone()
            program[at] = value
            try:
                run_plan(x, program, fast.weights, fast.outputs)
            except (ValueError, MemoryError):
                refused += 1
    assert refused > 500
    for _ in range(2):  # also when it is what was left of a failure
        with pytest.raises(ValueError, match="run_plan: program of version"):
            run_plan(x, torch.empty(0, dtype=torch.int64), torch.empty(0), [1, 1, 1])
    with pytest.raises(ValueError, match="program of version 99"):
        run_plan(x, torch.cat([torch.tensor([99]), fast.program[1:]]), fast.weights, fast.outputs)
    with pytest.raises(ValueError, match="program is damaged"):
        run_plan(x, fast.program[:-1], fast.weights, fast.outputs)
    with pytest.raises(ValueError, match="program is damaged"):
        run_plan(x, fast.program, fast.weights[:-64], fast.outputs)
    with pytest.raises(ValueError, match="has 2 channels, announced were 3"):
        run_plan(x, fast.program, fast.weights, [3, *fast.outputs[1:]])
