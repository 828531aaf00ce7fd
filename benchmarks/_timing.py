"""Shared by the benchmarks: options, timing in turns, tables, JSON.

Competitors are timed in turns (A B C A B C ...), in blocks of calls of about 20 ms, so that a change of clock speed or
a busy neighbour hits all of them. Reported are the median, 10th and 90th percentile over the blocks, and the time
relative to the first competitor, the fused one: the median of the ratios of blocks in the same round. Below 1, fused
loses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastpose import info
from fastpose.ops import _backend

BLOCK_S = 0.02
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds per call, and time relative to the first competitor."""

    median: float
    p10: float
    p90: float
    ratio: float


def options(
    doc: str | None, batch: bool = True, compiled: bool = True, dtypes: Sequence[str] = tuple(TOLERANCE)
) -> argparse.ArgumentParser:
    """Parser with the common options, those for batch sizes and torch.compile if the script has a use for them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=integers, help="comma-separated thread counts (default 1,2; quick: 1)")
    if batch:
        parser.add_argument("--batch", type=integers, help="comma-separated batch sizes (default 1,32; quick: 1)")
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds and no torch.compile, < 1 minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows and the environment to FILE")
    if compiled:
        help = "time torch.compile, which takes up to minutes per network (default: unless --quick)"
        parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help=help)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options with defaults filled in, `rounds`, `budget` (seconds), `tolerance` and `torch_dtype`."""
    args = parser.parse_args()
    if not _backend.LOADED:
        parser.exit(1, f"nothing to compare, the fused kernels are not available: {_backend.WHY_NOT}\n")
    args.threads = args.threads or ([1] if args.quick else [1, 2])
    if "batch" in args:
        args.batch = args.batch or ([1] if args.quick else [1, 32])
    if "compile" in args and args.compile is None:
        args.compile = not args.quick
    args.rounds, args.budget = (5, 1.0) if args.quick else (25, 20.0)
    args.tolerance = TOLERANCE[args.dtype]
    args.torch_dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    return args


def integers(text: str) -> list[int]:
    """'1,2' -> [1, 2]; positive numbers only."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
    return numbers


def set_threads(threads: int) -> None:
    """Threads of everything that follows. Compiled code has its thread count built in, so it is forgotten."""
    torch.set_num_threads(threads)
    torch.compiler.reset()


def frozen(module: nn.Module) -> Callable[..., Any]:
    """torch.jit.freeze of the scripted module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.freeze(torch.jit.script(module.eval()))


def attempt(make: Callable[[], Callable[..., Any]], *inputs: Tensor) -> Call | str:
    """A competitor: the function that `make` returns, on `inputs`. If it cannot be made or called, the reason."""
    try:
        function = make()
        function(*inputs)
    except Exception as error:  # any failure of a rival becomes a row of the table
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return lambda: function(*inputs)


def check(name: str, got: Any, expected: Any, tol: float) -> None:
    """Raise AssertionError unless |got - expected| <= tol * largest |expected| everywhere."""
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    if got.shape != expected.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}")
    error = (got.double() - expected.double()).abs().max().item()
    limit = tol * expected.double().abs().max().item()
    if not error <= limit:
        raise AssertionError(f"{name}: differs from the expected output by {error:.3g}, allowed {limit:.3g}")


def measure(competitors: dict[str, Call | str], args: argparse.Namespace) -> dict[str, Timing | str]:
    """Time the competitors in turns; text (the reason why one cannot run) is passed through.

    There are `args.rounds` rounds, fewer (but at least three) once `args.budget` seconds are over.
    """
    runnable = {name: call for name, call in competitors.items() if not isinstance(call, str)}
    repeats = {name: _calibrate(call) for name, call in runnable.items()}
    blocks: dict[str, list[float]] = {name: [] for name in runnable}
    start = time.perf_counter()
    for done in range(args.rounds):
        if done >= 3 and time.perf_counter() - start > args.budget:
            break
        for name, call in runnable.items():
            blocks[name].append(_block(call, repeats[name]))
    first = np.array(next(iter(blocks.values())))
    timings: dict[str, Timing | str] = {}
    for name, call in competitors.items():
        if isinstance(call, str):
            timings[name] = call
        else:
            p10, median, p90 = np.percentile(blocks[name], (10, 50, 90)).tolist()
            timings[name] = Timing(median, p10, p90, float(np.median(blocks[name] / first)))
    return timings


def _block(call: Call, repeats: int) -> float:
    """Seconds per call of one block."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _calibrate(call: Call) -> int:
    """Calls per block. The first blocks are the warm-up: at least seven calls, unless they take long."""
    repeats = 1
    while True:
        seconds = _block(call, repeats)
        if repeats * seconds > BLOCK_S / 2 and (repeats >= 4 or repeats * seconds > 10 * BLOCK_S):
            return max(1, math.ceil(BLOCK_S / seconds))
        repeats *= 2


class Table:
    """Rows printed as they come. `columns` maps a name to its width and number of decimals (None: text)."""

    def __init__(self, args: argparse.Namespace, columns: dict[str, tuple[int, int | None]]) -> None:
        self.args, self.columns = args, columns
        self.environment = environment(args)
        self.rows: list[dict[str, Any]] = []
        for key, value in self.environment.items():
            print(f"{key}: {value}")
        print()
        print("  ".join(f"{n:{'<' if digits is None else '>'}{w}}" for n, (w, digits) in columns.items()).rstrip())

    def add(self, **row: Any) -> None:
        """Print a row, which may have more fields than the table has columns, or fewer."""
        self.rows.append(row)
        cells = []
        for name, (width, digits) in self.columns.items():
            value = row.get(name)
            if digits is None:
                cells.append(f"{'' if value is None else value:<{width}}")
            else:
                cells.append(f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}")
        print("  ".join(cells).rstrip(), flush=True)

    def finish(self) -> None:
        """Write the JSON file, if one was asked for."""
        if self.args.json:
            content = {"environment": self.environment, "rows": self.rows}
            self.args.json.write_text(json.dumps(content, indent=1) + "\n")
            print(f"\nwritten: {self.args.json}")


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    report = info.collect()
    keys = ("processor", "instruction set", "torch", "fastpose", "built with", "numpy", "python")
    result = {key: report[key] for key in keys if key in report}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        result["commit"] = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        result["commit"] = "unknown"
    result["logical processors"] = os.cpu_count()
    result["threads"] = args.threads
    result["dtype"] = args.dtype
    result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result["load average"] = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else "unknown"
    return result


OP_COLUMNS: dict[str, tuple[int, int | None]] = {
    "shape": (9, None),
    "batch": (5, 0),
    "threads": (7, 0),
    "layout": (13, None),
    "competitor": (22, None),
    "us": (9, 1),
    "p10": (9, 1),
    "p90": (9, 1),
    "x fused": (8, 2),
    "GB/s": (6, 1),
    "% copy": (6, 0),
    "note": (0, None),
}


def op_rows(table: Table, case: dict[str, Any], competitors: dict[str, Call | str], moved: int) -> None:
    """Time one case of an operator that moves `moved` bytes, against copies of as many bytes, and add its rows.

    `copy` writes into a tensor that exists, `clone` allocates its result as the operator has to.
    """
    source = torch.randn(moved // 8)  # half of the bytes are read, half are written
    target = torch.empty_like(source)
    competitors = {**competitors, "copy": lambda: target.copy_(source), "clone": lambda: source.clone()}
    timings = measure(competitors, table.args)
    copy = timings["copy"]
    for name, t in timings.items():
        if isinstance(t, str) or isinstance(copy, str):
            table.add(**case, competitor=name, note=t)
        else:
            values = {"us": t.median * 1e6, "p10": t.p10 * 1e6, "p90": t.p90 * 1e6, "x fused": t.ratio}
            rates = {"GB/s": moved / t.median / 1e9, "% copy": 100 * copy.median / t.median}
            table.add(**case, competitor=name, **values, **rates)
