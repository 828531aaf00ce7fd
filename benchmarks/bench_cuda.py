"""Everything about the CUDA kernels: build, test, time; a table last, all numbers in a JSON file.

    python benchmarks/bench_cuda.py                        # build test nms cropping networks operators
    python benchmarks/bench_cuda.py compiled --json FILE   # networks in torch.compile, as far as --budget goes
    python benchmarks/bench_cuda.py sanitize

Steps can be given in any order, in one call or several: rows go into the JSON file of earlier calls, and `compiled`
goes on with what is not there. A case that fails is a row that says so. For each operator, direction, shape, dtype and
layout, per call, on the device:

    fused      the kernel
    compiled   torch.compile(mode="max-autotune") of the reference
    copy       a device copy of as many bytes as the operator must read and write

Every competitor is captured in a CUDA graph of calls on different tensors, together several times the second-level
cache, so that none finds its input there and none pays for launches; graphs are replayed in turns and the medians
compared. Results are checked against the reference first. `oks_nms` is timed on 5,000 images of 5 and 30 poses and on
500 of 100, alone: its reference, a loop over images, can be neither compiled nor captured.

Whole networks are called as a user calls them, launches and all, on several images in turn:

    fused        fastpose.optimize: one CUDA graph
    launched     the same call by call
    NCHW         the graph of the network in that layout
    eager        the network as it is built, without our kernels, channels-last; eager graph: captured
    compiled     torch.compile(mode="max-autotune") of that, with its CUDA graphs; no graph: without. Each in a process
                 of its own, which is stopped after --compile-timeout

`--rehearse` walks through all of it on the CPU with tiny tensors, without a graph: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
DW_SHAPES = ((320, 16, 12), (320, 32, 24), (320, 24, 18), (320, 48, 36))
GHOST_SHAPES = ((16, 64, 48), (32, 32, 24), (64, 16, 12), (128, 8, 6))
NETWORKS = "mobileposenet,lite_csw_hrnet,hr_litenet,lightweight_hrnet_448,le_hrnet"
STEPS = ("build", "test", "nms", "cropping", "networks", "operators", "compiled", "sanitize")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
MODES = {"compiled": "max-autotune", "no graph": "max-autotune-no-cudagraphs"}
GOALS = (
    "goals: operators 85 % of a copy and 1.3 times compiled; oks_nms of 5,000 x 30 poses in 1 ms; "
    "networks of one image 5 times eager and 1.5 times compiled, of 256 not slower"
)
# images/s, 32 at once, float32, 256x192, on a TITAN RTX: S. Niu et al. 2021, the table of speeds
PUBLISHED = {"mobileposenet": 54.8, "lite_hrnet_18": 17.4, "hrnet_w32": 19.2, "simplebaseline_resnet50": 273.1}
LATE = 124  # as `timeout` ends
KEYS = ("op", "direction", "shape", "dtype", "layout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {' '.join(STEPS)} (default: the first six)")
    parser.add_argument("--networks", default=NETWORKS, help="(default: all five of the papers)")
    parser.add_argument("--network-batches", type=int, nargs="+", default=[1, 32, 256], help="(default: 1 32 256)")
    parser.add_argument("--network-dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: these)")
    parser.add_argument("--batch", type=int, default=64, help="images per call of operators (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], help="(default: float32 float16)")
    parser.add_argument(
        "--no-compile", action="store_true", help="operators: do not time torch.compile, which takes minutes"
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds in all; what would be late is left out")
    parser.add_argument("--compile-timeout", type=float, default=240, help="seconds for one network (default: 240)")
    parser.add_argument("--json", type=Path, help="(default: benchmarks/results/cuda-<device>.json)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, to test this script")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [step for step in args.steps if step not in STEPS]
    if unknown:
        parser.error(f"steps are {' '.join(STEPS)}, got {' '.join(unknown)}")
    if not args.rehearse and not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA device; --rehearse shows what would happen\n")
    if args.rival:
        print(json.dumps(rival(*args.rival.split(","), device="cpu" if args.rehearse else "cuda")))
    else:
        Run(args).everything()


class Run:
    """One run: the steps, the deadline and the report, which is written after every case."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.rehearse else f"cuda:{torch.cuda.current_device()}")
        self.deadline = time.monotonic() + args.budget
        name = "rehearsal" if args.rehearse else torch.cuda.get_device_name().replace(" ", "-")
        self.file = args.json or ROOT / "benchmarks" / "results" / f"cuda-{name}.json"
        self.report: dict[str, Any] = {"environment": {}, "steps": {}, "rows": []}
        if self.file.is_file():
            self.report |= json.loads(self.file.read_text())
        self.report["left out"] = []

    def everything(self) -> None:
        for step in self.args.steps or STEPS[:6]:
            if step not in ("build", "test", "sanitize"):
                sys.path.insert(0, str(ROOT))  # only now: importing fastpose loads the kernels
                self.report["environment"] = environment(self.device)
            getattr(self, step)()
        self.print_table()

    def build(self) -> None:
        self.step("build", ["setup.py", "-q", "build_ext", "--inplace"], build_environment(self.device))

    def test(self) -> None:
        few = "worked_example" if self.args.rehearse else "cuda or test_graphs"
        where = ["tests/ops", "tests/cuda", "tests/test_preprocess.py", "tests/test_graphs.py"]
        # half of what is left: the measurements shall have the rest
        half = (self.deadline - time.monotonic()) / 2
        self.step("test", ["-m", "pytest", "-q", *where, "-m", "not slow", "-k", few], {"FASTPOSE_FUSED": "1"}, half)

    def sanitize(self) -> None:
        for i, tool in enumerate(SANITIZERS):  # a step each, so that a slow one costs no other its result
            where = ["tests/cuda/test_cuda.py", "-k", f"sanitizer and {tool}"]
            share = (self.deadline - time.monotonic()) / (len(SANITIZERS) - i)
            self.step(f"sanitize {tool}", ["-m", "pytest", "-q", *where], {"FASTPOSE_FUSED": "1"}, share)

    def step(self, name: str, command: list[str], environment: dict[str, str], seconds: float | None = None) -> None:
        start = time.monotonic()
        left = self.deadline - start if seconds is None else seconds
        code, output, _ = finished([sys.executable, *command], max(1.0, left), environment, errors=subprocess.STDOUT)
        lines = output.strip().splitlines() or [""]
        self.report["steps"][name] = {
            "exit code": code, "seconds": round(time.monotonic() - start, 1), "output": lines[-200:],
        }  # fmt: skip
        self.write()
        print(f"{name}: exit code {code}, {time.monotonic() - start:.0f} s: {lines[-1]}", flush=True)
        if code and name == "build":
            sys.exit("\n".join(lines[-40:]))

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.report, indent=1) + "\n")

    def late(self, what: str) -> bool:
        if time.monotonic() < self.deadline - 30:
            return False
        self.report.setdefault("left out", []).append(what)
        return True

    def case(
        self,
        key: tuple[str, str, str, str, str],
        time_it: Callable[[dict[str, Any]], None],
        failed: str = "failed",
    ) -> None:
        """One row. A case that fails says so in it, as `failed`; a device that no longer answers ends the run."""
        name = " ".join(filter(None, key))
        if self.late(name):
            return
        row = next((r for r in self.report["rows"] if tuple(r[k] for k in KEYS) == key), None)
        if row is None:
            row = dict(zip(KEYS, key, strict=True))
            self.report["rows"].append(row)
        row.pop(failed, None)
        try:
            time_it(row)
        except Exception as error:
            row[failed] = reason(error)
            if self.device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    self.print_table()
                    raise
        finally:
            self.write()
        failures = [f"{k}: {v}" for k, v in row.items() if k.endswith("failed")]
        done = [f"{k} {v:.1f}" for k, v in row.items() if k.endswith(" us")]
        print(f"{name}: {', '.join([*done, *failures])}{'' if row.get('right', True) else '  WRONG'}", flush=True)

    # ---- what is timed

    def nms(self) -> None:
        for images, poses in [(4, 5)] if self.args.rehearse else [(5000, 30), (5000, 5), (500, 100)]:
            for method in ("hard", "soft", "parallel"):
                key = ("oks_nms", method, f"{images}x{poses}", "float32", "")
                self.case(key, lambda row, n=images, p=poses, m=method: self.oks_nms(row, n, p, m))

    def operators(self) -> None:
        cases = [("dw_upsample", shape) for shape in DW_SHAPES] + [("ghost_cheap", shape) for shape in GHOST_SHAPES]
        cases = [("dw_upsample", (8, 4, 3)), ("ghost_cheap", (8, 4, 6))] if self.args.rehearse else cases
        batch = 2 if self.args.rehearse else self.args.batch
        layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
        for direction, dtype, layout, (op, (c, h, w)) in itertools.product(
            ("forward", "backward"), self.args.dtypes, layouts, cases
        ):
            shape, kind = (batch, c, h, w), getattr(torch, dtype)
            self.case(
                (op, direction, "x".join(map(str, shape)), dtype, layout),
                lambda row, a=(op, direction, shape, kind, layouts[layout]): self.depthwise(row, *a),
            )

    def has_kernel(self, op: str) -> None:
        from fastpose.ops import _backend

        if not _backend.has_kernel(op, self.device.type):
            raise RuntimeError(f"{op} has no kernel for {self.device.type} ({_backend.WHY_NOT or 'not built'})")

    def depthwise(
        self, row: dict[str, Any], op: str, direction: str, x_shape: tuple[int, ...], dtype: torch.dtype, layout: Any
    ) -> None:
        from fastpose.ops import dw_upsample, ghost_cheap

        self.has_kernel(op)
        batch, c, h, w = x_shape
        upsample = op == "dw_upsample"
        size = 4 if upsample else 3
        kind = {"dtype": dtype, "device": self.device}
        weight, bias = torch.randn(c, 1, size, size, **kind), torch.randn(c, **kind)
        rest = (2, 1, 0) if upsample else ()
        settings = ("relu", *rest)
        kernel = getattr(torch.ops.fastpose, op if direction == "forward" else f"{op}_backward").default
        module = sys.modules[(dw_upsample if upsample else ghost_cheap).__module__]
        reference = getattr(module, f"{op}_reference" if direction == "forward" else "_backward_reference")
        y_shape = (batch, c, 2 * h, 2 * w) if upsample else (batch, 2 * c, h, w)
        shapes = [x_shape] if direction == "forward" else [y_shape, x_shape]

        def inputs() -> list[torch.Tensor]:
            return [torch.randn(s, **kind).contiguous(memory_format=layout) for s in shapes]

        moved = dtype.itemsize * int(np.prod(x_shape) + np.prod(y_shape))
        moved += dtype.itemsize * int(np.prod(x_shape)) if direction == "backward" else 0
        sets = [inputs() for _ in range(self.sets(moved))]
        compiled = torch.compile(reference, mode="max-autotune-no-cudagraphs", dynamic=False)
        competitors: dict[str, list[Callable[[], Any]]] = {
            "fused": [lambda s=s: kernel(*s, weight, bias, *settings) for s in sets],
            "copy": copies(moved, len(sets), self.device),
        }
        if not self.args.no_compile and not self.args.rehearse:
            competitors["compiled"] = [lambda s=s: compiled(*s, weight, bias, *settings) for s in sets]
        row |= {"MB": moved / 1e6, "sets": len(sets)}
        with torch.inference_mode():
            smooth = ("silu", *rest)  # a derivative that jumps makes a large error of a small one
            error = difference(
                kernel(*sets[0], weight, bias, *smooth), reference_in_double(reference, sets[0], weight, bias, smooth)
            )
            limit = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-10)
            self.add(row, error, limit, competitors)
        torch.compiler.reset()

    def oks_nms(self, row: dict[str, Any], images: int, poses: int, method: str) -> None:
        from bench_oks_nms import METHODS, make_poses

        from fastpose import get_skeleton
        from fastpose.ops import oks_nms, oks_nms_reference

        self.has_kernel("oks_nms")
        torch.manual_seed(0)
        sigmas = torch.tensor(get_skeleton("coco17").sigmas, dtype=torch.float32, device=self.device)
        some = [t.to(self.device) for t in make_poses(images, poses, torch.float32)]
        few = [t[: 50 * poses] for t in some]

        def fused(s: list[torch.Tensor]) -> Any:
            return oks_nms(*s[:4], sigmas, image_index=s[4], method=method)

        got = fused(few)
        expected = oks_nms_reference(*few[:4], sigmas, few[4], method, threshold=METHODS[method])
        error = float((got[0] - expected[0]).abs().max()) if torch.equal(got[1], expected[1]) else float("inf")
        moved = sum(t.nbytes for t in some)
        sets = [some] + [[t.clone() for t in some] for _ in range(self.sets(moved) - 1)]
        row |= {"MB": moved / 1e6, "sets": len(sets)}
        with torch.inference_mode():
            self.add(row, error, 1e-4, {"fused": [lambda s=s: fused(s) for s in sets]})

    def networks(self) -> None:
        for name in self.args.networks.split(","):
            folded: list[Any] = []  # once for all dtypes and batches: it takes seconds
            for dtype, batch in itertools.product(self.args.network_dtypes, self.args.network_batches):
                key = network_key(name, batch, dtype, self.device)
                self.case(key, lambda row, a=(folded, name, batch, dtype): self.network(row, *a))

    @torch.inference_mode()
    def network(self, row: dict[str, Any], folded: list[Any], name: str, batch: int, dtype: str) -> None:
        from fastpose import set_fused
        from fastpose.graphs import Graphed

        model, low, images = network_and_images(name, batch, dtype, self.device)
        if not folded:
            one = Graphed(set_fused(copy.deepcopy(model), True))
            other = copy.deepcopy(one)
            other.layout = torch.contiguous_format
            other.network.to(memory_format=torch.contiguous_format)
            folded += [one, other]
        fast, planar = (copy.deepcopy(f).to(getattr(torch, dtype)) for f in folded)
        low_images = [low_input(x, dtype) for x in images]
        exact = in_double(model, images[0])
        self.add(
            row,
            difference(ends(fast(images[0])), exact),
            rounding(ends(low(low_images[0])), exact),
            {
                "fused": [lambda x=x: fast(x) for x in images],
                "launched": [lambda x=x: fast._compute(x) for x in images],
                "NCHW": [lambda x=x: planar(x) for x in images],
                "eager": [lambda x=x: low(x) for x in low_images],
                "eager graph": [self.captured_alone(lambda: low(low_images[0]))],
            },
            graph=False,
        )
        if self.device.type == "cuda" and not planar._graphs:
            row["NCHW failed"] = "no CUDA graph was captured"
        if self.device.type == "cuda" and not fast._graphs:
            raise RuntimeError("no CUDA graph was captured: what was timed as fused ran call by call")
        row["images/s"] = batch * 1e6 / row["fused us"]
        if batch == 32 and dtype == "float32" and name in PUBLISHED:
            row["published images/s"] = PUBLISHED[name]

    def captured_alone(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Captured when it is first called, so that a failure is that competitor's."""
        replay: list[Callable[[], None]] = []

        def run() -> None:
            if not replay:
                replay.append(captured([call], self.device))
            replay[0]()

        return run

    def compiled(self) -> None:
        """Networks in torch.compile, single images first."""
        args, names = self.args, self.args.networks.split(",")
        for batch, dtype, what, name in itertools.product(args.network_batches, args.network_dtypes, MODES, names):
            key = network_key(name, batch, dtype, self.device)
            row = next((r for r in self.report["rows"] if tuple(r[k] for k in KEYS) == key), {})
            if f"{what} us" not in row and f"{what} failed" not in row:
                self.case(
                    key, lambda row, a=(what, name, batch, dtype): self.compiled_network(row, *a), f"{what} failed"
                )

    def compiled_network(self, row: dict[str, Any], what: str, name: str, batch: int, dtype: str) -> None:
        limit = max(1.0, min(self.args.compile_timeout, self.deadline - time.monotonic()))
        spec = ",".join((name, str(batch), dtype, MODES[what]))
        command = [sys.executable, __file__, "--rival", spec, *(["--rehearse"] if self.args.rehearse else [])]
        code, output, errors = finished(command, limit, {}, errors=subprocess.PIPE)
        if code == LATE and limit < self.args.compile_timeout:
            self.report["left out"].append(spec)
        elif code == LATE:
            row[f"{what} failed"] = f"not compiled after {limit:.0f} s"
        elif code:
            row[f"{what} failed"] = (errors.strip().splitlines() or ["no message"])[-1][:300]
        if code:
            return
        result = json.loads(output.strip().splitlines()[-1])
        row[f"{what} us"], row[f"eager beside {what} us"] = result["us"], result["eager us"]
        if not result["error"] <= result["limit"]:
            row[f"{what} failed"] = f"wrong by {result['error']:.2g}"
        ratios(row)

    def cropping(self) -> None:
        """Thirty people of a photograph: uploaded whole and cropped there, beside cropped by OpenCV and uploaded."""
        from fastpose.geometry import crop_matrix, warp_crop
        from fastpose.preprocess import warp_crops

        rng, size = np.random.default_rng(0), (256, 192)
        photo = rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
        corners = rng.uniform(0, 600, (30, 2))
        people = np.concatenate([corners, corners + [[200, 380]]], 1)
        matrices = np.stack([crop_matrix(box, size, 1.25) for box in people])

        def upload() -> torch.Tensor:
            return warp_crops(torch.from_numpy(photo).to(self.device).permute(2, 0, 1), matrices, size)

        def opencv() -> torch.Tensor:
            crops = np.stack([warp_crop(photo, matrix, size) for matrix in matrices])
            return torch.from_numpy(crops).permute(0, 3, 1, 2).to(self.device)

        def time_it(row: dict[str, Any], on_device: bool) -> None:
            planes = torch.from_numpy(photo).to(self.device).permute(2, 0, 1)
            call = partial(warp_crops, planes, matrices, size) if on_device else upload
            error = float((call().double() - opencv().double()).abs().mean()) / 255  # of noise: smoothed differently
            self.add(row, error, 0.1, {"fused": [call], "eager": [opencv]}, graph=False)

        for direction in ("upload, crop", "crop"):
            key = ("cropping", direction, "30x256x192", "uint8", "")
            self.case(key, partial(time_it, on_device=direction == "crop"))

    # ---- how it is timed

    def sets(self, moved: int) -> int:
        """How many sets of tensors exceed the second-level cache four times."""
        if self.args.rehearse:
            return 2
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return int(min(256, max(4, -(-4 * cache // moved))))

    def add(
        self,
        row: dict[str, Any],
        error: float,
        limit: float,
        competitors: dict[str, list[Callable[[], Any]]],
        graph: bool = True,
    ) -> None:
        """Time `competitors` in turns into `row`; with `graph` all calls of each at once, else one call at a time."""
        for stale in ("x eager", "% copy", "GB/s", *(f"{n} {what}" for n in competitors for what in ("us", "failed"))):
            row.pop(stale, None)  # of a run before
        row |= {"error": error, "right": error <= limit}
        replays: dict[str, Callable[[int], Any]] = {}
        for name, calls in competitors.items():
            try:
                replays[name] = captured_all(calls, self.device) if graph else warmed(calls)
            except Exception as failure:  # a rival that cannot run is part of the row
                if name == "fused":
                    raise
                row[f"{name} failed"] = reason(failure)
        per_call = len(competitors["fused"]) if graph else 1
        times: dict[str, list[float]] = {name: [] for name in replays}
        for i in range(3 if self.args.rehearse else 31):
            for name, replay in replays.items():
                times[name].append(timed(partial(replay, i), self.device) / per_call)
        row |= {f"{name} us": float(np.median(t)) * 1e6 for name, t in times.items()}
        if "copy us" in row:
            row["GB/s"] = row["MB"] * 1e3 / row["fused us"]
        ratios(row)

    def print_table(self) -> None:
        print()
        for key, value in self.report["environment"].items():
            print(f"{key}: {value}")
        for name, step in self.report["steps"].items():
            print(f"{name}: exit code {step['exit code']}, {step['seconds']} s, {step['output'][-1]}")
        if self.report["left out"]:
            print(f"left out for lack of time: {len(self.report['left out'])} cases")
        print(GOALS)
        operators = {
            "fused us": 1,
            "copy us": 1,
            "compiled us": 1,
            "% copy": 0,
            "GB/s": 0,
            "x compiled": 2,
            "x eager": 2,
        }
        networks = dict.fromkeys(("fused us", "launched us", "NCHW us", "eager us", "eager graph us"), 0)
        networks |= dict.fromkeys(("compiled us", "no graph us", "images/s"), 0) | {"x eager": 2, "x compiled": 2}
        for columns, whole in ((operators, False), (networks, True)):
            rows = [row for row in self.report["rows"] if (row["direction"] == "network") == whole]
            widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in KEYS} if rows else {}
            if rows:
                print("  ".join([*(f"{k:<{w}}" for k, w in widths.items()), *(f"{n:>14}" for n in columns)]))
            for row in rows:
                cells = [f"{row[k]:<{w}}" for k, w in widths.items()]
                cells += [f"{row[n]:>14.{d}f}" if n in row else f"{'-':>14}" for n, d in columns.items()]
                wrong = "" if row.get("right", True) else f"  WRONG by {row['error']:.2g}"
                print("  ".join(cells) + wrong + "".join(f"  {k}: {v}" for k, v in row.items() if k.endswith("failed")))
        print(f"written: {self.file}")


def ratios(row: dict[str, Any]) -> None:
    for name, rivals in (("x eager", ("eager",)), ("x compiled", tuple(MODES)), ("copy", ("copy",))):
        found = [row[f"{r} us"] for r in rivals if f"{r} us" in row and f"{r} failed" not in row]
        if found and "fused us" in row and name == "copy":
            row["% copy"] = 100 * found[0] / row["fused us"]
        elif found and "fused us" in row:
            row[name] = min(found) / row["fused us"]  # the faster of the two


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def network_key(name: str, batch: int, dtype: str, device: torch.device) -> tuple[str, str, str, str, str]:
    from fastpose.models import model_entry

    height, width = model_entry(name).input_size
    return (
        name,
        "network",
        f"{min(batch, 2)}x64x64" if device.type == "cpu" else f"{batch}x{height}x{width}",
        dtype,
        "",
    )


def network_and_images(
    name: str, batch: int, dtype: str, device: torch.device
) -> tuple[torch.nn.Module, torch.nn.Module, list[torch.Tensor]]:
    """A network without our kernels, the same in `dtype` and channels-last, and batches of images."""
    import fastpose

    torch.manual_seed(0)
    shape = [int(n) for n in network_key(name, batch, dtype, device)[2].split("x")]
    model = fastpose.set_fused(fastpose.create_model(name), False).to(device)
    for layer in model.modules():  # statistics of noise, so that the outputs depend on the image
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, *shape[1:], device=device))
    model.eval()
    images = [torch.randn(shape[0], 3, *shape[1:], device=device) for _ in range(4)]
    return model, copy.deepcopy(model).to(getattr(torch, dtype), memory_format=torch.channels_last), images


def low_input(x: torch.Tensor, dtype: str) -> torch.Tensor:
    return x.to(getattr(torch, dtype), memory_format=torch.channels_last)


def ends(outputs: Any) -> Any:
    """The first and last of a batch of results."""
    return outputs[[0, -1]] if isinstance(outputs, torch.Tensor) else tuple(o[[0, -1]] for o in outputs)


def in_double(model: torch.nn.Module, x: torch.Tensor) -> Any:
    """What `ends` of the results should be."""
    return copy.deepcopy(model).double()(ends(x).double())


def rounding(eager: Any, exact: Any) -> float:
    """How far from the exact results is right: three times as far as eager PyTorch's. (float32 is TF32 for both.)"""
    return 3 * difference(eager, exact) + 1e-4


@torch.inference_mode()
def rival(name: str, batch: str, dtype: str, mode: str, device: str) -> dict[str, float]:
    """Seconds of a compiled network, and of the eager one beside it, which tell whether the clocks are the same."""
    where = torch.device(device)
    model, low, images = network_and_images(name, int(batch), dtype, where)
    low_images = [low_input(x, dtype) for x in images]
    kind = {"backend": "eager"} if device == "cpu" else {"mode": mode}  # nothing is compiled in a rehearsal
    fast = torch.compile(copy.deepcopy(low), dynamic=False, **kind)
    exact = in_double(model, images[0])
    calls = {"us": [partial(fast, x) for x in low_images], "eager us": [partial(low, x) for x in low_images]}
    replays = {key: warmed(each) for key, each in calls.items()}
    check = {"error": difference(ends(fast(low_images[0])), exact), "limit": rounding(ends(low(low_images[0])), exact)}
    times: dict[str, list[float]] = {key: [] for key in replays}
    for i in range(3 if device == "cpu" else 31):
        for key, replay in replays.items():
            times[key].append(timed(partial(replay, i), where))
    return check | {key: float(np.median(t)) * 1e6 for key, t in times.items()}


def environment(device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        result |= {"device": p.name, "multiprocessors": p.multi_processor_count, "L2 MB": p.L2_cache_size / 1e6}
        try:
            result["copy GB/s"] = round(peak_copy(device))
        except Exception as error:
            result["copy GB/s"] = reason(error)
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        result["commit"] = git.stdout.strip() or "unknown"
    except OSError:
        result["commit"] = "unknown"
    result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return result


def peak_copy(device: torch.device) -> float:
    """GB/s read and written by copies of a gigabyte."""
    calls = copies(2 << 30, 2, device)
    replay = captured(calls, device)
    return (2 << 30) * len(calls) / float(np.median([timed(replay, device) for _ in range(15)])) / 1e9


def finished(command: list[str], limit: float, environment: dict[str, str], errors: int) -> tuple[int, str, str]:
    """Exit code (`LATE` after `limit` seconds), output and errors of a command, which ends with all it has started."""
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True, errors="replace",
        start_new_session=True, stdout=subprocess.PIPE, stderr=errors,
    ) as child:  # fmt: skip
        try:
            output, said = child.communicate(timeout=limit)
            return child.returncode, output, said or ""
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # compilers too
            output, said = child.communicate()
            return LATE, output, said or ""


def build_environment(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"FASTPOSE_BUILD_EXT": "1"}
    major, minor = torch.cuda.get_device_capability()
    return {"FASTPOSE_BUILD_EXT": "1", "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}


def copies(moved: int, sets: int, device: torch.device) -> list[Callable[[], Any]]:
    """Copies that read and write `moved` bytes together, each of other tensors."""
    pairs = [[torch.randint(0, 99, (moved // 8,), dtype=torch.int32, device=device) for _ in "ab"] for _ in range(sets)]
    return [lambda a=a, b=b: a.copy_(b) for a, b in pairs]


def captured(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """All calls as one graph. The results are kept, so that every call writes memory of its own."""
    if device.type == "cpu":
        return lambda: [call() for call in calls] and None
    from fastpose.graphs import capture

    graph, results = capture(lambda: [call() for call in calls])
    graph.replay()
    torch.cuda.synchronize()

    def replay(keep: Any = (results, calls)) -> None:
        graph.replay()

    return replay


def captured_all(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[int], Any]:
    replay = captured(calls, device)
    return lambda i: replay()


def warmed(calls: list[Callable[[], Any]]) -> Callable[[int], Any]:
    """The i-th of `calls` in turn, after all have compiled and captured what they want to."""
    for call in calls * 3:
        call()
    return lambda i: calls[i % len(calls)]()


def timed(replay: Callable[[], None], device: torch.device) -> float:
    """Seconds of one replay."""
    if device.type == "cpu":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def reference_in_double(
    reference: Callable[..., Any], tensors: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, settings: Any
) -> Any:
    return reference(*(t.double() for t in tensors), weight.double(), bias.double(), *settings)


def difference(got: Any, expected: Any) -> float:
    """Largest |got - expected| relative to the largest |expected|, over all results."""
    pairs = [(got, expected)] if isinstance(got, torch.Tensor) else list(zip(got, expected, strict=True))
    errors = [(a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30) for a, b in pairs]
    return float(torch.stack(errors).max())


if __name__ == "__main__":
    main()
