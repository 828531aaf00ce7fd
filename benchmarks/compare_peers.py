"""Whole networks on the CPU: fastpose.optimize beside PyTorch, ONNX Runtime, OpenVINO and ncnn on the same network.

Random weights and batch-norm statistics, the same for all. Every competitor lives in a process of its own, since thread
pools in one process disturb each other. The processes take turns, block by block, and are stopped in between, as some
threads go on spinning; the median over all blocks counts. Before anything is timed every output is compared with
PyTorch's. A competitor that is not installed, fails or computes something else gets a row that says so: pip install
--no-build-isolation '.[peers]'. How many processors other programs kept busy meanwhile is recorded ("foreign load").

    fastpose        fastpose.optimize: in float32 or, where the processor has AMX, in bfloat16x3
    fastpose float32  the same in float32 on all processors
    exported        that from a TorchScript file, without the memory that preparing it takes
    eager           PyTorch, channels-last
    jit.freeze      scripted and frozen, channels-last
    compile         torch.compile, default options (only with --compile, as the next two: it takes minutes)
    compile frozen  the same with weights as constants, batch norms folded and convolutions packed (freezing)
    aotinductor     the same as `compile`, ahead of time: a shared library that runs without Python
    onnxruntime     intra-op threads as given
    openvino        latency hint
    ncnn            converted by pnnx, Winograd and packing as by default, float32, image by image
    ... bf16        the same in bfloat16 (only with --bf16); for ncnn as a storage type
    fastpose int8   1x1 convolutions of many channels with bytes (only with --bf16)

ONNX Runtime, OpenVINO and ncnn take a batch at once or, in as many threads of one core each, image by image, what is
faster.

A part of a network is --model PART:CxHxW, with its own input size: `dw_upsample` and `ghost_cheap`, for which fastpose
is the operator called from eager PyTorch with batch norm folded, and `upsampling_block` (MobilePoseNet's, behind a 1x1
convolution of three channels to C, since that is what `optimize` takes).

MB: most memory, by the operating system's account, that reading, preparing and running the network took beyond what the
process had once its libraries were imported.

Run: python benchmarks/compare_peers.py [--model NAME,PART:CxHxW,...] [--threads 1,2] [--batch 1,32] [--size 256x192]
     [--rounds 7] [--json FILE] [--picture FILE.svg]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import json
import logging
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 0.4  # seconds
MODELS = "mobileposenet,hr_litenet,le_hrnet,lightweight_hrnet_448,lite_csw_hrnet,lite_hrnet_18,lite_hrnet_30,hrnet_w32"
COMPILED = ("compile", "compile frozen", "aotinductor")
OURS = ("fastpose", "fastpose float32", "exported")
COMPETITORS = (*OURS, "eager", "jit.freeze", *COMPILED, "onnxruntime", "openvino", "ncnn")
COLOURS = {
    "fastpose": "#2b7a4b", "ncnn": "#8fa8c8", "openvino": "#6b7fa6", "onnxruntime": "#4a5a86", "eager": "#c9c9c9"
}  # fmt: skip
BF16 = ("fastpose bf16", "fastpose int8", "openvino bf16", "ncnn bf16")
PRECISION = {"fastpose": "auto", "fastpose float32": "float32", "fastpose bf16": "bfloat16", "fastpose int8": "int8"}


def build(name: str) -> Any:
    """The network or part in eval mode on the reference path; every call, in every process, gives the same weights."""
    import torch

    import fastpose
    from fastpose.layers import DWUpsampleBNAct, GhostModule
    from fastpose.models.mobileposenet import LPB

    torch.manual_seed(0)
    part, _, shape = name.partition(":")
    if not shape:
        model = fastpose.create_model(name)
    else:
        c = int(shape.split("x")[0])
        if part == "dw_upsample":
            model = DWUpsampleBNAct(c)
        elif part == "ghost_cheap":
            model = GhostModule(c, 2 * c)
            model.primary = torch.nn.Identity()
        elif part == "upsampling_block":
            model = torch.nn.Sequential()
            model.add_module("enter", torch.nn.Conv2d(3, c, 1))
            model.add_module("block", LPB(c, 2 * c, c, 4))
            model.input_multiple = 1
        else:
            raise SystemExit(f"no part {part!r}; expected dw_upsample, ghost_cheap or upsampling_block")
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return fastpose.set_fused(model.eval(), False)


def is_operator(name: str) -> bool:
    return name.startswith(("dw_upsample:", "ghost_cheap:"))


def images_for(name: str, batch: int, size: tuple[int, int]) -> np.ndarray:
    """The input of network or part `name`, of `size` for networks; the same in every process."""
    channels = 3
    if ":" in name:
        c, *size = map(int, name.partition(":")[2].split("x"))
        channels = c if is_operator(name) else 3
    return np.random.default_rng(0).standard_normal((batch, channels, *size), dtype=np.float32)


def file_of(folder: str | Path, name: str) -> str:
    """Files of network or part `name` begin so; converters make names of variables of it."""
    return str(Path(folder) / name.replace(":", "_"))


def all_of(outputs: Any) -> np.ndarray:
    """One row of numbers per image, whatever the network returns."""
    if not isinstance(outputs, (list, tuple)):
        outputs = [outputs]
    rows = [np.asarray(o).reshape(len(o), -1) for o in outputs]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, 1)


def operator(name: str, layer: Any) -> Callable[[Any], Any]:
    """The operator in place of `layer`, with the layer's weights."""
    from fastpose.layers import fold_batch_norm
    from fastpose.ops import dw_upsample, ghost_cheap

    layer = layer.cheap if name.startswith("ghost_cheap") else layer
    bn = layer.bn
    folded = fold_batch_norm(layer.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    function = ghost_cheap if name.startswith("ghost_cheap") else dw_upsample
    return lambda x: function(x, *folded, "relu")


def make_torch(options: argparse.Namespace, x: np.ndarray) -> Callable[[], Any]:
    import torch

    import fastpose

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    competitor, file = options.serve, file_of(options.folder, options.model)
    images = torch.from_numpy(x)
    model = torch.jit.load(f"{file}.script") if competitor == "exported" else build(options.model)
    if competitor in PRECISION and is_operator(options.model):
        model = operator(options.model, model)
    elif competitor in PRECISION:
        model = fastpose.optimize(model, precision=PRECISION[competitor])
    elif competitor != "exported":
        model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    if competitor == "jit.freeze":
        model = torch.jit.freeze(torch.jit.script(model))
    if competitor == "compile":
        model = torch.compile(model, dynamic=False)
    if competitor == "compile frozen":
        model = torch.compile(model, dynamic=False, options={"freezing": True})
    if competitor == "aotinductor":
        exported = torch.export.export(model, (images,))
        package = f"{file}_{len(x)}_{options.threads}.pt2"
        model = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(exported, package_path=package)
        )
    return lambda: model(images)


def fastest(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The one that takes least."""
    return min(calls, key=lambda call: min(timed(call) for _ in range(4))) if len(calls) > 1 else calls[0]


def streams(runs: Sequence[Callable[[np.ndarray], Any]], x: np.ndarray) -> Callable[[], np.ndarray]:
    """Single images, shared out among `runs`, each in a thread of its own."""
    pool, shares = ThreadPoolExecutor(len(runs)), np.array_split(x, len(runs))

    def share(run: Callable[[np.ndarray], Any], images: np.ndarray) -> list[np.ndarray]:
        return [all_of(run(images[i : i + 1])) for i in range(len(images))]

    return lambda: np.concatenate(list(itertools.chain(*pool.map(share, runs, shares))))


def make_onnxruntime(options: argparse.Namespace, x: np.ndarray) -> Callable[[], Any]:
    import onnxruntime

    def session(file: str, threads: int) -> Callable[[np.ndarray], Any]:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})

    file = file_of(options.folder, options.model)
    whole = session(f"{file}_{len(x)}.onnx", options.threads)
    calls = [lambda: whole(x)]
    if len(x) > 1:
        calls.append(streams([session(f"{file}_1.onnx", 1) for _ in range(options.threads)], x))
    return fastest(calls)


def make_openvino(options: argparse.Namespace, x: np.ndarray) -> Callable[[], Any]:
    import openvino

    precision = "bf16" if options.serve == "openvino bf16" else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": options.threads}
    core = openvino.Core()
    file = file_of(options.folder, options.model)
    whole = core.compile_model(f"{file}_{len(x)}.onnx", "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
    request = whole.create_infer_request()
    calls = [lambda: list(request.infer({0: x}).values())]
    if len(x) > 1:
        compiled = core.compile_model(f"{file}_1.onnx", "CPU", {**settings, "NUM_STREAMS": options.threads})
        requests = [compiled.create_infer_request() for _ in range(options.threads)]
        calls.append(streams([lambda image, r=r: list(r.infer({0: image}).values()) for r in requests], x))
    return fastest(calls)


def make_ncnn(options: argparse.Namespace, x: np.ndarray) -> Callable[[], Any]:
    import ncnn

    file = file_of(options.folder, options.model)

    def load(threads: int) -> Callable[[np.ndarray], np.ndarray]:
        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = options.serve == "ncnn bf16"
        net.load_param(f"{file}.ncnn.param")
        net.load_model(f"{file}.ncnn.bin")

        def run(image: np.ndarray) -> np.ndarray:
            extractor = net.create_extractor()
            extractor.input(net.input_names()[0], ncnn.Mat(image[0]))
            return all_of([np.array(extractor.extract(name)[1])[None] for name in net.output_names()])

        return run

    whole = load(options.threads)
    calls = [lambda: np.concatenate([whole(x[i : i + 1]) for i in range(len(x))])]
    if len(x) > 1 and options.threads > 1:
        calls.append(streams([load(1) for _ in range(options.threads)], x))
    return fastest(calls)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory(what: str) -> float:
    """MB that this process has (VmRSS) or had at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


def reason(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:120]


def serve(options: argparse.Namespace) -> None:
    """The process of one competitor: prepares, reports its largest difference, then times a block per line of input."""
    x = images_for(options.model, options.batch, options.size)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # converters print
    name = options.serve.removesuffix(" bf16")
    makers = {"onnxruntime": make_onnxruntime, "openvino": make_openvino, "ncnn": make_ncnn}
    try:
        for library in (name,) if name in makers else ("torch", "fastpose"):
            importlib.import_module(library)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        call = makers.get(name, make_torch)(options, x)
        if name not in makers:
            mode = sys.modules["torch"].inference_mode()
            mode.__enter__()  # for the rest of the process, so that what is timed is nothing but the call
        got = all_of(call())
        most = memory("VmHWM") - before
        expected = np.load(f"{file_of(options.folder, options.model)}_{len(x)}.npy")
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        print(json.dumps({"error": error, "MB": most}), file=out, flush=True)
    except Exception as problem:  # a rival's failure is a row of the table
        print(json.dumps({"failed": reason(problem)}), file=out, flush=True)
        return
    for _ in sys.stdin:
        call()
        times: list[float] = []
        while sum(times) < BLOCK or len(times) < 3:
            times.append(timed(call))
        print(json.dumps({"ms": statistics.median(times) * 1e3}), file=out, flush=True)


def prepare(model: str, batch: int, size: tuple[int, int], folder: Path) -> dict[str, str]:
    """Write every competitor's file and the expected output; returns what failed, and why."""
    import torch

    import fastpose

    logging.disable(logging.WARNING)  # the exporter's, about what it works without
    network, x, start = build(model), images_for(model, batch, size), file_of(folder, model)
    whole, image, here = torch.from_numpy(x), torch.from_numpy(x[:1]), os.getcwd()

    def to_onnx(images: torch.Tensor) -> Callable[[Path], Any]:
        return lambda file: torch.onnx.export(network, (images,), str(file), dynamo=True, verbose=False)

    def to_script(file: Path) -> None:
        if is_operator(model):
            fast = torch.jit.freeze(torch.jit.script(fastpose.set_fused(build(model), True)))
        else:
            fast = torch.jit.script(fastpose.optimize(network, x.shape[2:], "float32"))
        torch.jit.save(fast, str(file))

    def to_ncnn(file: Path) -> None:
        import pnnx

        os.chdir(folder)  # it writes what else it makes into the current one
        pnnx.export(network, f"{start}.pt", (image,), fp16=False)
        os.chdir(here)

    failed: dict[str, str] = {}
    for end, write, users in (
        (f"_{batch}.npy", lambda file: np.save(file, all_of(network(whole))), ()),
        (f"_{batch}.onnx", to_onnx(whole), ("onnxruntime", "openvino")),
        ("_1.onnx", to_onnx(image), ("onnxruntime", "openvino")),
        (".script", to_script, ("exported",)),
        (".ncnn.param", to_ncnn, ("ncnn",)),
    ):
        file = Path(start + end)
        try:
            if not file.is_file():  # it is there for another number of threads: making it can take minutes
                with torch.no_grad():
                    write(file)
        except Exception as problem:
            failed |= dict.fromkeys(users, reason(problem))
    return failed


def run_case(arguments: argparse.Namespace, model: str, threads: int, batch: int, folder: Path) -> list[dict[str, Any]]:
    failed = prepare(model, batch, arguments.size, folder)
    children: dict[str, subprocess.Popen[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    started = busy_seconds(), time.monotonic()
    try:
        for competitor in arguments.competitors:
            rows[competitor] = {"model": model, "batch": batch, "threads": threads, "competitor": competitor}
            if competitor.removesuffix(" bf16") in failed:
                rows[competitor]["failed"] = failed[competitor.removesuffix(" bf16")]
                continue
            child = children[competitor] = start(arguments, competitor, model, threads, batch, folder)
            rows[competitor] |= answer(child)  # one prepares after the other
            if "failed" not in rows[competitor] and not rows[competitor]["error"] <= tolerance(competitor):
                rows[competitor]["failed"] = f"wrong by {rows[competitor]['error']:.1g} of the largest number"
            child.send_signal(signal.SIGSTOP)  # threads that wait for work by spinning would disturb the others
        for _ in range(arguments.rounds):
            for competitor, child in children.items():
                if "failed" in rows[competitor]:
                    continue
                assert child.stdin is not None
                child.send_signal(signal.SIGCONT)
                try:
                    child.stdin.write("block\n")
                    child.stdin.flush()
                except BrokenPipeError:
                    pass  # it has died; its exit code is the answer
                result = answer(child)
                rows[competitor] |= {k: v for k, v in result.items() if k == "failed"}
                rows[competitor].setdefault("blocks", []).extend([result["ms"]] if "ms" in result else [])
                child.send_signal(signal.SIGSTOP)
    finally:
        for child in children.values():  # those that are stopped would stay for ever
            child.kill()
            child.communicate()
    foreign = (busy_seconds() - started[0]) / (time.monotonic() - started[1])
    ours = [] if "failed" in rows.get("fastpose", {"failed": ""}) else rows["fastpose"]["blocks"]
    for row in rows.values():
        row["foreign load"] = round(foreign, 2)
        if "failed" not in row:
            row["ms"] = statistics.median(row["blocks"])
            row["ratio"] = row["ms"] / statistics.median(ours) if ours else float("nan")
    return list(rows.values())


def start(
    arguments: argparse.Namespace, competitor: str, model: str, threads: int, batch: int, folder: Path
) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--serve", competitor, "--model", model, "--threads", str(threads)]
    command += ["--batch", str(batch), "--size", "x".join(map(str, arguments.size)), "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)


def answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a process, or how it ended."""
    assert child.stdout is not None
    line = child.stdout.readline()
    result: dict[str, Any] = json.loads(line) if line else {"failed": f"exit code {child.wait()}"}
    return result


def tolerance(competitor: str) -> float:
    """Largest difference from PyTorch's output, relative to its largest number, that is still the same network's."""
    return 1e-3 if competitor not in BF16 else 0.5


def busy_seconds() -> float:
    """Time that all processors together have been busy with what is not this process nor its ended children."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idling and waiting for disks
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(u.ru_utime + u.ru_stime for u in used)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    import _timing

    report = _timing.environment(argparse.Namespace(threads=arguments.threads, dtype="float32"))
    for package in ("onnxruntime", "openvino", "ncnn", "pnnx"):
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = "not installed"
    return {**report, "size": "x".join(map(str, arguments.size)), "rounds": arguments.rounds}


def picture(rows: list[dict[str, Any]]) -> str:
    """Bars of the times relative to fastpose.optimize, an SVG file."""
    shown = [r for r in rows if r.get("ratio", 0) > 0 and r["competitor"] in COLOURS]
    models = list(dict.fromkeys((r["model"], r["batch"], r["threads"]) for r in shown))
    scale = 420 / max((r["ratio"] for r in shown), default=1.0)
    parts, y = [], 34
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = 20 + 125 * i
        parts.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="18">{name}</text>')
    for case in models:
        name = case[0] + (f", batch {case[1]}" if case[1] > 1 else "") + (f", {case[2]} threads" if case[2] > 1 else "")
        parts.append(f'<text x="20" y="{y + 14}" font-weight="bold">{name}</text>')
        for row in (r for r in shown if (r["model"], r["batch"], r["threads"]) == case):
            width = row["ratio"] * scale
            colour = COLOURS[row["competitor"]]
            parts.append(f'<rect x="210" y="{y + 2}" width="{width:.1f}" height="11" fill="{colour}"/>')
            parts.append(f'<text x="{216 + width:.1f}" y="{y + 12}">{row["ms"]:.1f} ms</text>')
            y += 14
        y += 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{y}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODELS)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--size", default="256x192")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--picture", help="an SVG file")
    parser.add_argument("--serve", choices=COMPETITORS + BF16, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    height, width = arguments.size.split("x")
    arguments.size = (int(height), int(width))
    if arguments.serve:
        arguments.threads, arguments.batch = int(arguments.threads), int(arguments.batch)
        serve(arguments)
        return
    from fastpose.files import write_json  # here, since what serves other runtimes must not load PyTorch

    arguments.competitors = [c for c in COMPETITORS if c not in COMPILED or arguments.compile]
    arguments.competitors += BF16 if arguments.bf16 else ()
    rows: list[dict[str, Any]] = []
    header = (
        f"{'model':26}{'batch':>6}{'threads':>8}  {'competitor':15}{'ms':>9}{'x fastpose':>11}{'error':>9}{'MB':>8}"
    )
    circumstances = environment(arguments)
    print("\n".join([*(f"{key}: {value}" for key, value in circumstances.items()), header]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.model.split(","):
            for batch in map(int, arguments.batch.split(",")):
                for threads in map(int, arguments.threads.split(",")):
                    for row in run_case(arguments, model, threads, batch, Path(folder)):
                        rows.append(row)
                        case = f"{row['model']:26}{row['batch']:>6}{row['threads']:>8}  {row['competitor']:15}"
                        if "failed" in row:
                            print(f"{case}  {row['failed']}", flush=True)
                        else:
                            print(
                                f"{case}{row['ms']:>9.3f}{row['ratio']:>11.2f}{row['error']:>9.0e}{row['MB']:>8.1f}",
                                flush=True,
                            )
                    if arguments.json:  # after every case: a run of all takes an hour
                        write_json(arguments.json, {"environment": circumstances, "rows": rows})
                    if arguments.picture:
                        Path(arguments.picture).write_text(picture(rows))


if __name__ == "__main__":
    main()
