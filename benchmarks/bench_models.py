"""Whole networks on the CPU at 256x192: fused kernels against the PyTorch reference, eager, frozen and compiled.

Each network has random weights and batch-norm statistics, the same for all competitors. Unless the name says otherwise,
weights and input are channels-last, as in the pipeline. Competitors:

    optimized               the network as `fastpose.optimize` makes it
    fused                   the network as `create_model` builds it
    fused contiguous        the same with contiguous weights and input
    fused jit.freeze        the same, scripted and frozen
    reference ...           after `fastpose.set_fused(model, False)`
    reference compile       torch.compile of that with default options

In a network without fused layers (the ablations with dense upsampling), fused and reference are the same.

Run: python benchmarks/bench_models.py [--quick] [--model NAME,...] [--threads 1,2] [--batch 1,32] [--no-compile]
     [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from _timing import Table, attempt, check, frozen, measure, options, parse, set_threads
from torch import nn

import fastpose

COLUMNS: dict[str, tuple[int, int | None]] = {
    "model": (18, None),
    "batch": (5, 0),
    "threads": (7, 0),
    "competitor": (20, None),
    "ms": (8, 2),
    "p10": (8, 2),
    "p90": (8, 2),
    "x fused": (8, 2),
    "images/s": (8, 1),
    "note": (0, None),
}


DEFAULT = ("mobileposenet", "hr_litenet", "le_hrnet", "lite_csw_hrnet", "lightweight_hrnet_448")


def build(name: str, fused: bool, layout: torch.memory_format, dtype: torch.dtype) -> nn.Module:
    """The network in eval mode; every call gives the same weights."""
    torch.manual_seed(0)
    model = fastpose.create_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # the initial statistics would hide a mistake in folding
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return fastpose.set_fused(model.eval(), fused).to(dtype=dtype, memory_format=layout)


@torch.inference_mode()
def run(table: Table, args: argparse.Namespace, name: str, threads: int, batch: int) -> None:
    set_threads(threads)
    x = torch.randn(batch, 3, 256, 192, dtype=args.torch_dtype)
    x_last = x.contiguous(memory_format=torch.channels_last)
    competitors: dict[str, Any] = {}
    for kind in ("fused", "reference"):
        last = build(name, kind == "fused", torch.channels_last, x.dtype)
        plain = build(name, kind == "fused", torch.contiguous_format, x.dtype)
        competitors[kind] = lambda model=last: model(x_last)
        competitors[f"{kind} contiguous"] = lambda model=plain: model(x)
        competitors[f"{kind} jit.freeze"] = attempt(lambda model=last: frozen(model), x_last)
    competitors["optimized"] = attempt(
        lambda: fastpose.optimize(build(name, True, torch.contiguous_format, x.dtype)), x_last
    )
    if args.compile:
        competitors["reference compile"] = attempt(lambda: torch.compile(last, dynamic=False), x_last)

    expected = competitors["reference"]()
    expected = expected[0] if isinstance(expected, tuple) else expected
    for competitor, call in competitors.items():
        if callable(call):
            got = call()
            check(f"{name}, {competitor}", got[0] if isinstance(got, tuple) else got, expected, args.tolerance)

    case = {"model": name, "batch": batch, "threads": threads}
    for competitor, t in measure(competitors, args).items():
        if isinstance(t, str):
            table.add(**case, competitor=competitor, note=t)
        else:
            values = {"ms": t.median * 1e3, "p10": t.p10 * 1e3, "p90": t.p90 * 1e3, "x fused": t.ratio}
            table.add(**case, competitor=competitor, **values, **{"images/s": batch / t.median})


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", metavar="NAME,...", help="networks (default: one of each paper; quick: the first)")
    args = parse(parser)
    args.tolerance *= 10  # many layers
    table = Table(args, COLUMNS)
    names = args.model.split(",") if args.model else DEFAULT[: 1 if args.quick else None]
    for case in itertools.product(names, args.threads, args.batch):
        run(table, args, *case)
    table.finish()


if __name__ == "__main__":
    main()
