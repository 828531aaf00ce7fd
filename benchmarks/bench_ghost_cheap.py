"""`ghost_cheap` on the CPU: depthwise 3x3 convolution with bias and ReLU, written beside its input (M = 1).

Shapes are the primary features of the four stages at 256x192 input. Competitors:

    fused            fastpose.ops.ghost_cheap
    reference        the same in plain PyTorch: convolution, activation, concatenation
    jit.freeze       the reference, scripted and frozen
    torch.compile    the reference, compiled with default options for this shape
    copy, clone      as many bytes moved as the operator must read and write; clone also allocates its result, as the
                     operator does

Run: python benchmarks/bench_ghost_cheap.py [--quick] [--threads 1,2] [--batch 1,32] [--no-compile] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools

import torch
from _timing import LAYOUTS, OP_COLUMNS, Table, attempt, check, frozen, op_rows, options, parse, set_threads
from torch import Tensor, nn

from fastpose.ops import ghost_cheap, ghost_cheap_reference

SHAPES = ((16, 64, 48), (32, 32, 24), (64, 16, 12), (128, 8, 6))


class Reference(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return ghost_cheap_reference(x, self.weight, self.bias, "relu")


@torch.inference_mode()
def run(
    table: Table, args: argparse.Namespace, threads: int, shape: tuple[int, int, int], batch: int, layout: str
) -> None:
    set_threads(threads)
    c, h, w = shape
    x = torch.randn(batch, c, h, w, dtype=args.torch_dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(c, 1, 3, 3, dtype=x.dtype), torch.randn(c, dtype=x.dtype)
    module = Reference(weight, bias)
    y = ghost_cheap_reference(x, weight, bias, "relu")

    competitors = {
        "fused": lambda: ghost_cheap(x, weight, bias, "relu"),
        "reference": lambda: ghost_cheap_reference(x, weight, bias, "relu"),
        "jit.freeze": attempt(lambda: frozen(module), x),
    }
    if args.compile:
        competitors["torch.compile"] = attempt(lambda: torch.compile(module, dynamic=False), x)
    for name, call in competitors.items():
        if callable(call):
            check(name, call(), y, args.tolerance)

    case = {"shape": f"{c}x{h}x{w}", "batch": batch, "threads": threads, "layout": layout}
    op_rows(table, case, competitors, x.nbytes + weight.nbytes + bias.nbytes + y.nbytes)


def main() -> None:
    args = parse(options(__doc__))
    table = Table(args, OP_COLUMNS)
    for case in itertools.product(args.threads, SHAPES, args.batch, LAYOUTS):
        run(table, args, *case)
    table.finish()


if __name__ == "__main__":
    main()
