"""How near the instructions of an optimised network come to what the processor can do.

Each row is one instruction at a size that the networks have, with one thread. Its time is the difference between a
network with eight of them and one with four, divided by four, so that reading the image and writing the result do not
count. The bound is the larger of two times: arithmetic at the rate of the fastest matrix product of this run (the row
with 100 %), and, where the maps do not fit the second-level cache, moving inputs, outputs and weights at the rate of a
copy of as many bytes. For Winograd's algorithm the arithmetic is that of the direct sum, so it may beat its
bound. The rate of int8 products is taken as four times that of float32, of bfloat16 products as twice where the
instruction set in use is avx512_bf16; elsewhere they are products of float32. With AMX those are 32 and 16 times, and
bfloat16x3 takes three of the latter.

Run: python benchmarks/bench_instructions.py [--quick] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _timing import Table, measure, options, parse, set_threads
from torch import Tensor, nn

import fastpose
from fastpose.layers import channel_shuffle
from fastpose.models.le_hrnet import MCAM
from fastpose.ops import _backend

COLUMNS: dict[str, tuple[int, int | None]] = {
    "instruction": (34, None),
    "size": (14, None),
    "threads": (7, 0),
    "us": (8, 1),
    "GFLOP/s": (8, 1),
    "bound us": (8, 1),
    "% of bound": (10, 0),
}
L2 = 512 * 1024  # bytes; maps larger than this are taken to come from further away


class Gate(nn.Module):
    """Squeeze and excitation without its convolutions: mean, sigmoid, product."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


class Shuffle(nn.Module):
    """Concatenation of two halves in turn."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return channel_shuffle(torch.cat([first, torch.relu(second)], 1))


class Chain(nn.Module):
    """Image -> `channels` maps of its size -> layers -> one map."""

    input_multiple = 1

    def __init__(self, channels: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 1, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x)))


def there_and_back(a: int, b: int) -> Callable[[], list[nn.Module]]:
    return lambda: [nn.Conv2d(a, b, 1), nn.Conv2d(b, a, 1)]


def depthwise(channels: int, k: int) -> Callable[[], list[nn.Module]]:
    return lambda: [nn.Conv2d(channels, channels, k, 1, k // 2, groups=channels), nn.ReLU()]


# name; channels, height, width; layers, which keep the shape; multiply-accumulates and numbers moved per pixel
CASES: list[tuple[str, tuple[int, int, int], Callable[[], list[nn.Module]], float, float]] = [
    ("1x1, 320 <-> 160", (320, 64, 48), there_and_back(320, 160), 2 * 320 * 160, 2 * 480),
    ("1x1, 672 <-> 160", (672, 16, 12), there_and_back(672, 160), 2 * 672 * 160, 2 * 832),
    ("1x1, 40 <-> 40", (40, 64, 48), there_and_back(40, 40), 2 * 40 * 40, 4 * 40),
    ("3x3 dense 32 (Winograd)", (32, 64, 48), lambda: [nn.Conv2d(32, 32, 3, 1, 1)], 9 * 32 * 32, 64),
    ("3x3 dense 64 (Winograd)", (64, 32, 24), lambda: [nn.Conv2d(64, 64, 3, 1, 1)], 9 * 64 * 64, 128),
    ("3x3 dense 128 (Winograd)", (128, 16, 12), lambda: [nn.Conv2d(128, 128, 3, 1, 1)], 9 * 128 * 128, 256),
    ("3x3 dense 256", (256, 8, 6), lambda: [nn.Conv2d(256, 256, 3, 1, 1)], 9 * 256 * 256, 512),
    ("depthwise 3x3 40", (40, 64, 48), depthwise(40, 3), 9 * 40, 80),
    ("depthwise 3x3 160", (160, 16, 12), depthwise(160, 3), 9 * 160, 320),
    ("depthwise 5x5 672", (672, 16, 12), depthwise(672, 5), 25 * 672, 2 * 672),
    ("multi-scale attention 32", (32, 64, 48), lambda: [MCAM(32)], 83 / 3 * 32, 64),
    ("multi-scale attention 128", (128, 16, 12), lambda: [MCAM(128)], 83 / 3 * 128, 256),
    ("mean and gate 160", (160, 32, 24), lambda: [Gate()], 160, 3 * 160),
    ("halves shuffled 40", (40, 64, 48), lambda: [Shuffle()], 40, 160),
]


def run(table: Table, args: argparse.Namespace, threads: int) -> None:
    set_threads(threads)
    rows: list[dict[str, Any]] = []
    cases = [(case, "float32") for case in CASES[:: 4 if args.quick else 1]]
    cases += [(CASES[i], p) for i in (0, 1) for p in ("bfloat16x3", "bfloat16", "int8")] + [(CASES[2], "bfloat16")]
    for (name, (channels, height, width), layers, macs, numbers), precision in cases:
        x = torch.randn(1, 3, height, width).contiguous(memory_format=torch.channels_last)
        calls: dict[str, Any] = {}
        for count in (4, 8):
            chain = Chain(channels, [layer for _ in range(count) for layer in layers()]).eval()
            fast = fastpose.optimize(chain, (height, width), precision)
            calls[str(count)] = lambda fast=fast, x=x: fast(x)
        source = torch.randn(int(numbers * height * width) // 2)
        target = torch.empty_like(source)
        calls["copy"] = lambda source=source, target=target: target.copy_(source)
        timings: dict[str, Any] = measure(calls, args)
        seconds = (timings["8"].median - timings["4"].median) / 4
        bytes_moved = 4 * numbers * height * width
        row = {"instruction": name if precision == "float32" else f"{name}, {precision}", "precision": precision}
        row |= {"size": f"{channels}x{height}x{width}", "threads": threads, "us": seconds * 1e6}
        row |= {"GFLOP/s": 2 * macs * height * width / seconds * 1e-9}
        row |= {"moving us": timings["copy"].median * 1e6 if bytes_moved > L2 else 0.0}
        rows.append(row | {"flops": 2 * macs * height * width})
    # products per cycle, beside float32
    level = _backend.cpu_level()
    rates = {"float32": 1, "bfloat16x3": 1, "bfloat16": 2 if level == "avx512_bf16" else 1, "int8": 4}
    if level == "amx":
        rates |= {"bfloat16x3": 16 / 3, "bfloat16": 16, "int8": 32}
    peak = max(r["GFLOP/s"] for r in rows if r["instruction"].startswith("1x1") and r["precision"] == "float32")
    for row in rows:
        bound = max(row["flops"] / (peak * rates[row["precision"]]) * 1e-3, row["moving us"])
        table.add(**row, **{"bound us": bound, "% of bound": 100 * bound / row["us"]})


@torch.inference_mode()
def main() -> None:
    args = parse(options(__doc__, batch=False, compiled=False, dtypes=("float32",)))
    table = Table(args, COLUMNS)
    for threads in args.threads:
        run(table, args, threads)
    table.finish()


if __name__ == "__main__":
    main()
