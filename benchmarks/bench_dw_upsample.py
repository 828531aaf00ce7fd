"""`dw_upsample` on the CPU: depthwise transposed convolution 4x4, stride 2, with bias and ReLU as in the decoder.

Shapes are those of 256x192 and 384x288 inputs. Competitors:

    fused            fastpose.ops.dw_upsample
    reference        the same in plain PyTorch
    eager no bias    conv_transpose2d without bias and activation. The fair baseline: with a bias, as after folding
                     batch norm, PyTorch takes a path that is several times slower
    jit.freeze       the reference, scripted and frozen
    torch.compile    the reference, compiled with default options for this shape
    copy, clone      as many bytes moved as the operator must read and write; clone also allocates its result, as the
                     operator does

Run: python benchmarks/bench_dw_upsample.py [--quick] [--threads 1,2] [--batch 1,32] [--no-compile] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from _timing import LAYOUTS, OP_COLUMNS, Table, attempt, check, frozen, op_rows, options, parse, set_threads
from torch import Tensor, nn

from fastpose.ops import dw_upsample, dw_upsample_reference

SHAPES = ((320, 16, 12), (320, 32, 24), (320, 24, 18), (320, 48, 36))


class Reference(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return dw_upsample_reference(x, self.weight, self.bias, "relu")


@torch.inference_mode()
def run(
    table: Table, args: argparse.Namespace, threads: int, shape: tuple[int, int, int], batch: int, layout: str
) -> None:
    set_threads(threads)
    c, h, w = shape
    x = torch.randn(batch, c, h, w, dtype=args.torch_dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(c, 1, 4, 4, dtype=x.dtype), torch.randn(c, dtype=x.dtype)
    module = Reference(weight, bias)
    y = dw_upsample_reference(x, weight, bias, "relu")

    competitors = {
        "fused": lambda: dw_upsample(x, weight, bias, "relu"),
        "reference": lambda: dw_upsample_reference(x, weight, bias, "relu"),
        "jit.freeze": attempt(lambda: frozen(module), x),
    }
    if args.compile:
        competitors["torch.compile"] = attempt(lambda: torch.compile(module, dynamic=False), x)
    for name, call in competitors.items():
        if callable(call):
            check(name, call(), y, args.tolerance)
    no_bias = F.conv_transpose2d(x, weight, None, 2, 1, groups=c)
    check("fused without bias", dw_upsample(x, weight, None, "none"), no_bias, args.tolerance)
    competitors["eager no bias"] = lambda: F.conv_transpose2d(x, weight, None, 2, 1, groups=c)

    case = {"shape": f"{c}x{h}x{w}", "batch": batch, "threads": threads, "layout": layout}
    op_rows(table, case, competitors, x.nbytes + weight.nbytes + bias.nbytes + y.nbytes)


def main() -> None:
    args = parse(options(__doc__))
    table = Table(args, OP_COLUMNS)
    shapes = SHAPES[:2] if args.quick else SHAPES
    for case in itertools.product(args.threads, shapes, args.batch, LAYOUTS):
        run(table, args, *case)
    table.finish()


if __name__ == "__main__":
    main()
