"""Everything about the CUDA kernels in one call: build, test, time; a table last, all numbers in a JSON file.

    python benchmarks/bench_cuda.py --build --test --sanitize

For each operator, direction, shape, dtype and layout, per call, on the device:

    fused      the kernel
    compiled   torch.compile(mode="max-autotune") of the reference
    copy       a device copy of as many bytes as the operator must read and write

Every competitor is captured in a CUDA graph of calls on different tensors, together several times the second-level
cache, so that none finds its input there and none pays for launches; graphs are replayed in turns and the medians
compared. Results are checked against the reference first. `oks_nms` is timed on 5,000 images of 5 and 30 poses and on
500 of 100, alone: its reference, a loop over images, can be neither compiled nor captured.

With `--networks` whole networks follow, which are called as a user calls them, launches and all:

    fused      fastpose.optimize: one CUDA graph
    compiled   torch.compile(mode="max-autotune") of the network, with its CUDA graphs
    eager      the network as it is built, channels-last

`--rehearse` walks through all of it on the CPU with tiny tensors, without a graph: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
DW_SHAPES = ((320, 16, 12), (320, 32, 24), (320, 24, 18), (320, 48, 36))
GHOST_SHAPES = ((16, 64, 48), (32, 32, 24), (64, 16, 12), (128, 8, 6))
NETWORKS = "mobileposenet,lite_csw_hrnet,hr_litenet,lightweight_hrnet_448,le_hrnet"
GOALS = "goals: 85 % of a copy; 1.3 times compiled; oks_nms of 5,000 x 30 poses in 1 ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="first build the kernels in place, for this device only")
    parser.add_argument("--test", action="store_true", help="then run the tests that need a device")
    parser.add_argument(
        "--networks", nargs="?", const=NETWORKS, default="", help="time networks too, these or all five of the papers"
    )
    parser.add_argument("--sanitize", action="store_true", help="at last the tests under compute-sanitizer")
    parser.add_argument("--batch", type=int, default=64, help="images per call (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], help="(default: float32 float16)")
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile, which takes minutes")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all; what would be late is left out")
    parser.add_argument("--json", type=Path, help="(default: benchmarks/results/cuda-<device>.json)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, to test this script")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA device; --rehearse shows what would happen\n")
    Run(args).everything()


class Run:
    """One run: the steps, the deadline and the report, which is written after every step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.rehearse else "cuda")
        self.deadline = time.monotonic() + args.budget
        self.report: dict[str, Any] = {"environment": environment(self.device), "steps": {}, "rows": []}
        name = "rehearsal" if args.rehearse else torch.cuda.get_device_name().replace(" ", "-")
        self.file = args.json or ROOT / "benchmarks" / "results" / f"cuda-{name}.json"

    def everything(self) -> None:
        args = self.args
        if args.build:
            self.step(
                "build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], build_environment(self.device)
            )
        if args.test:
            where = "cpu" if args.rehearse else "cuda"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", "tests/cuda"]
            command.append("tests/test_preprocess.py")
            few = "worked_example" if args.rehearse else where
            self.step("test", [*command, "-m", "not slow", "-k", few], {"FASTPOSE_FUSED": "1"})
        sys.path.insert(0, str(ROOT))  # only now: importing fastpose loads the kernels
        self.operators()
        if not self.late("cropping"):
            self.cropping()
        self.networks()
        if args.sanitize and not args.rehearse:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_cuda.py"]
            self.step("sanitize", [*command, "-k", "sanitizer"], {"FASTPOSE_FUSED": "1"})
        self.print_table()

    def step(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=max(1.0, self.deadline - start),
            )  # fmt: skip
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            text = late.stdout or ""
            code, output = 124, text.decode(errors="replace") if isinstance(text, bytes) else text
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

    # ---- what is timed

    def operators(self) -> None:
        from fastpose.ops import _backend

        for op in ("dw_upsample", "ghost_cheap", "oks_nms"):
            if not _backend.has_kernel(op, self.device.type):
                sys.exit(
                    f"nothing to time: {op} has no kernel for {self.device.type} ({_backend.WHY_NOT or 'not built'})"
                )
        for images, poses in [(4, 5)] if self.args.rehearse else [(5000, 30), (5000, 5), (500, 100)]:
            for method in ("hard", "soft", "parallel"):
                if not self.late(f"oks_nms {images}x{poses} {method}"):
                    self.oks_nms(images, poses, method)
        cases = [("dw_upsample", shape) for shape in DW_SHAPES] + [("ghost_cheap", shape) for shape in GHOST_SHAPES]
        cases = [("dw_upsample", (8, 4, 3)), ("ghost_cheap", (8, 4, 6))] if self.args.rehearse else cases
        layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
        for direction, dtype, layout, (op, shape) in itertools.product(
            ("forward", "backward"), self.args.dtypes, layouts, cases
        ):
            if not self.late(f"{op} {direction} {shape} {dtype} {layout}"):
                self.depthwise(op, direction, shape, getattr(torch, dtype), layouts[layout], layout)

    def depthwise(
        self, op: str, direction: str, shape: tuple[int, int, int], dtype: torch.dtype, layout: Any, layout_name: str
    ) -> None:
        from fastpose.ops import dw_upsample, ghost_cheap

        c, h, w = shape
        batch = 2 if self.args.rehearse else self.args.batch
        upsample = op == "dw_upsample"
        size = 4 if upsample else 3
        kind = {"dtype": dtype, "device": self.device}
        weight, bias = torch.randn(c, 1, size, size, **kind), torch.randn(c, **kind)
        settings = ("none" if direction == "backward" else "relu", *((2, 1, 0) if upsample else ()))
        kernel = getattr(torch.ops.fastpose, op if direction == "forward" else f"{op}_backward").default
        module = sys.modules[(dw_upsample if upsample else ghost_cheap).__module__]
        reference = getattr(module, f"{op}_reference" if direction == "forward" else "_backward_reference")
        y_shape = (batch, c, 2 * h, 2 * w) if upsample else (batch, 2 * c, h, w)
        x_shape = (batch, c, h, w)
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
        row = {"op": op, "direction": direction, "shape": f"{batch}x{c}x{h}x{w}", "dtype": str(dtype)[6:]}
        row |= {"layout": layout_name, "MB": moved / 1e6, "sets": len(sets)}
        with torch.inference_mode():
            error = difference(
                kernel(*sets[0], weight, bias, *settings),
                reference_in_double(reference, sets[0], weight, bias, settings),
            )
            limit = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-10)
            self.add(row | {"error": error, "right": error <= limit}, competitors)
        torch.compiler.reset()

    def oks_nms(self, images: int, poses: int, method: str) -> None:
        from bench_oks_nms import METHODS, make_poses

        from fastpose import get_skeleton
        from fastpose.ops import oks_nms, oks_nms_reference

        torch.manual_seed(0)
        sigmas = torch.tensor(get_skeleton("coco17").sigmas, dtype=torch.float32, device=self.device)
        some = [t.to(self.device) for t in make_poses(images, poses, torch.float32)]
        few = [t[: 50 * poses] for t in some]

        def fused(s: list[torch.Tensor]) -> Any:
            return oks_nms(*s[:4], sigmas, image_index=s[4], method=method)

        got = fused(few)
        expected = oks_nms_reference(*few[:4], sigmas, few[4], method, threshold=METHODS[method])
        same = bool(torch.equal(got[1], expected[1]) and torch.allclose(got[0], expected[0], atol=1e-4))
        error = float((got[0] - expected[0]).abs().max())
        moved = sum(t.nbytes for t in some)
        sets = [some] + [[t.clone() for t in some] for _ in range(self.sets(moved) - 1)]
        row = {"op": "oks_nms", "direction": method, "shape": f"{images}x{poses}", "dtype": "float32", "layout": ""}
        row |= {"MB": moved / 1e6, "sets": len(sets), "error": error, "right": same}
        with torch.inference_mode():
            self.add(row, {"fused": [lambda s=s: fused(s) for s in sets]})

    def networks(self) -> None:
        for name, batch, dtype in itertools.product(
            filter(None, self.args.networks.split(",")), (1, 32, 256), ("float32", "bfloat16")
        ):
            if not self.late(f"{name} {dtype} batch {batch}"):
                self.network(name, 2 if self.args.rehearse else batch, dtype)

    def cropping(self) -> None:
        """Thirty people of a photograph: uploaded whole and cropped there, beside cropped by OpenCV and uploaded."""
        from fastpose.geometry import crop_matrix, warp_crop
        from fastpose.preprocess import warp_crops

        rng, size = np.random.default_rng(0), (256, 192)
        photo = rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
        corners = rng.uniform(0, 600, (30, 2))
        people = np.concatenate([corners, corners + [[200, 380]]], 1)
        matrices = np.stack([crop_matrix(box, size, 1.25) for box in people])
        planes = torch.from_numpy(photo).to(self.device).permute(2, 0, 1)

        def upload() -> torch.Tensor:
            return warp_crops(torch.from_numpy(photo).to(self.device).permute(2, 0, 1), matrices, size)

        def opencv() -> torch.Tensor:
            crops = np.stack([warp_crop(photo, matrix, size) for matrix in matrices])
            return torch.from_numpy(crops).permute(0, 3, 1, 2).to(self.device)

        expected = opencv()
        cases = {"upload, crop": upload, "crop": lambda: warp_crops(planes, matrices, size)}
        for direction, call in cases.items():
            error = float((call().double() - expected.double()).abs().mean()) / 255  # of noise: smoothed differently
            row = {"op": "cropping", "direction": direction, "shape": "30x256x192", "dtype": "uint8", "layout": ""}
            row |= {"error": error, "right": error < 0.1}
            self.add(row, {"fused": [call], "eager": [opencv]}, graph=False)

    @torch.inference_mode()
    def network(self, name: str, batch: int, dtype: str) -> None:
        import fastpose
        from fastpose.models import model_entry

        torch.manual_seed(0)
        size = (64, 64) if self.args.rehearse else model_entry(name).input_size
        model = fastpose.create_model(name).eval().to(self.device)
        x = torch.randn(batch, 3, *size, device=self.device)
        expected = model(x)
        fast = fastpose.optimize(model, size, dtype)
        low = copy.deepcopy(model).to(getattr(torch, dtype), memory_format=torch.channels_last)
        x_low = x.to(getattr(torch, dtype), memory_format=torch.channels_last)
        error = difference(fast(x), expected)
        calls: dict[str, Callable[[], Any]] = {"fused": lambda: fast(x), "eager": lambda: low(x_low)}
        if not self.args.no_compile and not self.args.rehearse:
            compiled = torch.compile(copy.deepcopy(low), mode="max-autotune", dynamic=False)
            calls["compiled"] = lambda: compiled(x_low)
        shape = f"{batch}x{size[0]}x{size[1]}"
        row = {"op": name, "direction": "network", "shape": shape, "dtype": dtype, "layout": ""}
        row |= {"error": error, "right": error <= {"float32": 1e-2}.get(dtype, 0.2)}  # random weights amplify rounding
        self.add(row, {key: [call] for key, call in calls.items()}, graph=False)
        row["images/s"] = batch * 1e6 / row["fused us"]
        self.write()
        torch.compiler.reset()

    # ---- how it is timed

    def sets(self, moved: int) -> int:
        """How many sets of tensors exceed the second-level cache four times."""
        if self.args.rehearse:
            return 2
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return int(min(256, max(4, -(-4 * cache // moved))))

    def add(self, row: dict[str, Any], competitors: dict[str, list[Callable[[], Any]]], graph: bool = True) -> None:
        replays: dict[str, Callable[[], None]] = {}
        for name, calls in competitors.items():
            try:
                replays[name] = captured(calls, self.device) if graph else warmed(calls[0])
            except Exception as error:  # a rival that cannot run is a row of the table
                if name == "fused":
                    raise
                row[f"{name} failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        per_call = len(next(iter(competitors.values())))
        times: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(3 if self.args.rehearse else 31):
            for name, replay in replays.items():
                times[name].append(timed(replay, self.device) / per_call)
        row |= {f"{name} us": float(np.median(t)) * 1e6 for name, t in times.items()}
        if "copy us" in row:
            row["% copy"] = 100 * row["copy us"] / row["fused us"]
            row["GB/s"] = row["MB"] * 1e3 / row["fused us"]
        if "compiled us" in row:
            row["x compiled"] = row["compiled us"] / row["fused us"]
        if "eager us" in row:
            row["x eager"] = row["eager us"] / row["fused us"]
        self.report["rows"].append(row)
        self.write()
        note = "" if row["right"] else "  WRONG"
        case = " ".join(str(row[key]) for key in ("op", "direction", "shape", "dtype", "layout"))
        print(f"{case}: {row['fused us']:.1f} us{note}", flush=True)

    def print_table(self) -> None:
        columns = {"op": 21, "direction": 9, "shape": 13, "dtype": 8, "layout": 13}
        numbers = {"fused us": 1, "copy us": 1, "compiled us": 1, "% copy": 0, "GB/s": 0, "x compiled": 2, "x eager": 2}
        print()
        for key, value in self.report["environment"].items():
            print(f"{key}: {value}")
        for name, step in self.report["steps"].items():
            print(f"{name}: exit code {step['exit code']}, {step['seconds']} s, {step['output'][-1]}")
        if "left out" in self.report:
            print(f"left out for lack of time: {len(self.report['left out'])} cases")
        print(GOALS)
        print("  ".join([*(f"{n:<{w}}" for n, w in columns.items()), *(f"{n:>11}" for n in numbers)]))
        for row in self.report["rows"]:
            cells = [f"{row[n]:<{w}}" for n, w in columns.items()]
            cells += [f"{row[n]:>11.{d}f}" if n in row else f"{'-':>11}" for n, d in numbers.items()]
            print("  ".join(cells) + ("" if row["right"] else f"  WRONG by {row['error']:.2g}"))
        print(f"written: {self.file}")


def environment(device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        result |= {"device": p.name, "multiprocessors": p.multi_processor_count, "L2 MB": p.L2_cache_size / 1e6}
        result["copy GB/s"] = round(peak_copy(device))
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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:1] * 3:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()

    def replay(keep: Any = (results, calls)) -> None:
        graph.replay()

    return replay


def warmed(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` after it has compiled and captured what it wants to."""
    for _ in range(4):
        call()
    return call


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
