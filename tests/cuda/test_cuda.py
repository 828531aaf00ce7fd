"""What only a CUDA device has: streams, graphs, several devices, memory that runs out."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import fastpose
from fastpose.ops import dw_upsample, dw_upsample_reference, ghost_cheap, ghost_cheap_reference, oks_nms
from tests.conftest import CUDA_REASON
from tests.ops.test_oks_nms import METHODS, random_poses
from tests.test_models import build

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(CUDA_REASON), reason=CUDA_REASON)]

ROOT = Path(__file__).resolve().parents[2]
needs_two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def sample(device="cuda", layout=torch.contiguous_format, batch=2):
    x = torch.randn(batch, 48, 16, 12, device=device).contiguous(memory_format=layout)
    return x, torch.randn(48, 1, 4, 4, device=device), torch.randn(48, 1, 3, 3, device=device)


def busy(cycles=50_000_000):
    """Keeps the current stream occupied, so that work on a wrong stream would overtake it."""
    torch.cuda._sleep(cycles)


def test_runs_on_the_current_stream():
    x, w4, w3 = sample()
    tensors, image = random_poses(60, dtype=torch.float32, device="cuda")
    expected = (dw_upsample(x, w4), ghost_cheap(x, w3), *oks_nms(*tensors, image_index=image))
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        busy()
        late.copy_(x)
        got = (dw_upsample(late, w4), ghost_cheap(late, w3), *oks_nms(*tensors, image_index=image))
        torch.cuda.current_stream().synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_forward_and_backward_in_a_graph(layout):
    x, w4, w3 = sample(layout=layout)
    inputs = [t.requires_grad_() for t in (x, w4, w3)]

    def step():
        y = dw_upsample(ghost_cheap(x, w3, None, "silu")[:, 24:72], w4, None, "hardswish")
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    graph, results = capture(step)
    for _ in range(2):
        with torch.no_grad():
            for t in inputs:
                t.copy_(torch.randn_like(t))
        graph.replay()
        for got, expected in zip(results, step(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("method", "decay"), METHODS)
@pytest.mark.parametrize("n", [30, 500])
def test_nms_in_a_graph_follows_the_images(n, method, decay):
    """Capture fails if anything waits for the device; a replay must see new images, whose sizes are others."""
    tensors, image = random_poses(n, dtype=torch.float32, device="cuda")
    graph, results = capture(lambda: oks_nms(*tensors, image_index=image, method=method, decay=decay))
    for images in (1, 3, n):
        image.copy_(torch.randint(0, images, (n,)))
        tensors[2].copy_(torch.rand(n))
        graph.replay()
        for got, expected in zip(
            results, oks_nms(*tensors, image_index=image, method=method, decay=decay), strict=True
        ):
            assert torch.equal(got, expected)


def capture(step):
    """(graph, its results) of a function without arguments, after a warm-up on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_nothing_waits_for_the_device():
    x, w4, w3 = sample()
    tensors, image = random_poses(200, dtype=torch.float32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dw_upsample(x, w4)
        ghost_cheap(x, w3)
        for method in ("hard", "soft", "parallel"):
            oks_nms(*tensors, image_index=image, method=method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_two_devices
def test_other_device_than_the_current_one():
    x, w4, w3 = sample("cuda:1")
    tensors, image = random_poses(60, dtype=torch.float32, device="cuda:1")
    with torch.cuda.device(0):
        got = dw_upsample(x, w4), ghost_cheap(x, w3)
        keep = oks_nms(*tensors, image_index=image)[1]
        assert torch.cuda.current_device() == 0
    assert torch.allclose(got[0], dw_upsample_reference(x, w4), atol=1e-4)
    assert torch.allclose(got[1], ghost_cheap_reference(x, w3), atol=1e-4)
    assert keep.device == x.device
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        dw_upsample(x, w4.to("cuda:0"))


def test_tensors_of_several_devices_are_refused():
    x, w4, _ = sample()
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        dw_upsample(x, w4.cpu())
    tensors, image = random_poses(5, device="cuda")
    with pytest.raises(ValueError, match="image_index must be on the device of keypoints"):
        oks_nms(*tensors, image_index=image.cpu())


def test_out_of_memory_leaves_everything_usable():
    x, w4, _ = sample()
    expected = dw_upsample(x, w4)
    huge = torch.empty(1, device="cuda").expand(1 << 17, 48, 512, 512)  # the result would take 26 TB
    with pytest.raises(RuntimeError, match="could not allocate"):
        dw_upsample(huge, w4)
    assert torch.equal(dw_upsample(x, w4), expected)


def test_more_than_two_billion_elements():
    """Offsets beyond 32 bits, in the last image of a batch."""
    needed = 12 << 30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    _, w4, w3 = (t.half() for t in sample())
    for layout in (torch.contiguous_format, torch.channels_last):
        for fn, reference, weight, batch in (
            (dw_upsample, dw_upsample_reference, w4, 115),
            (ghost_cheap, ghost_cheap_reference, w3, 230),
        ):
            x = torch.zeros(batch, 48, 312, 312, dtype=torch.float16, device="cuda").contiguous(memory_format=layout)
            x[-1] = torch.randn(48, 312, 312, device="cuda")
            y = fn(x, weight)
            assert y.numel() > 1 << 31
            assert torch.allclose(y[-1:], reference(x[-1:], weight), atol=2e-2)
            del x, y


SANITIZED = (
    "alignment or repetitions or worked_example or odd_inputs or (images_of_every_size and 17) "
    "or (gradients_equal and not strided)"
)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        pytest.skip("compute-sanitizer is not installed")
    # our kernels only; torch asks the driver for what it may refuse, which memcheck would report
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += ["--kernel-name", "kns=fastpose", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTPOSE_FUSED": "1"}
    done = subprocess.run(
        [*command, "-k", f"cuda and ({SANITIZED}) and not float64"],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", ["mobileposenet", "lite_csw_hrnet", "lightweight_hrnet_448"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_optimised_networks(name, precision):
    model = build(name, num_keypoints=5).cuda()
    fast, exact = fastpose.optimize(model, precision=precision), copy.deepcopy(model).double()
    tolerance = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}[precision]
    with torch.inference_mode():
        results = []
        for batch in (1, 3, 1, 3, 1):
            x = torch.randn(batch, 3, 64, 96, device="cuda")
            got, expected = fast(x), exact(x.double())
            got, expected = ((o if isinstance(o, tuple) else (o,)) for o in (got, expected))
            for g, e in zip(got, expected, strict=True):
                assert g.dtype == torch.float32 and (g - e).abs().max() < tolerance * e.abs().max()
            results.append((got[0], got[0].clone()))
    assert {shape for _, _, shape in fast._graphs} == {(1, 3, 64, 96), (3, 3, 64, 96)}
    assert all(torch.equal(kept, copied) for kept, copied in results)  # later calls leave earlier results alone


def test_optimised_on_several_streams():
    fast = fastpose.optimize(build("mobileposenet", num_keypoints=2).cuda())
    images = [torch.randn(2, 3, 64, 64, device="cuda") for _ in range(6)]
    with torch.inference_mode():
        expected = [fast(x) for x in images]
        torch.cuda.synchronize()
        streams, got = [torch.cuda.Stream() for _ in range(3)], []
        for i, x in enumerate(images):
            with torch.cuda.stream(streams[i % 3]):
                busy(1_000_000)
                got.append(fast(x))
        torch.cuda.synchronize()
    for g, e in zip(got, expected, strict=True):
        assert torch.allclose(g, e, atol=1e-4)


def test_optimised_inside_and_outside_inference_mode():
    model = build("mobileposenet", num_keypoints=2).cuda()
    fast, x = fastpose.optimize(model), torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        expected = model(x)
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.allclose(fast(x), expected, atol=1e-3)
    assert len(fast._graphs) == 1


def test_optimised_for_inputs_of_two_dtypes():
    model = build("mobileposenet", num_keypoints=2).cuda()
    fast, x = fastpose.optimize(model), torch.randn(1, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            fast((x * 99).byte())
        for _ in range(3):
            assert torch.allclose(fast(x), expected, atol=1e-3)


def test_optimised_and_moved():
    model = build("mobileposenet", num_keypoints=2).cuda()
    fast, x = fastpose.optimize(model), torch.randn(1, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            fast(x)
        fast.cpu()
        assert torch.allclose(fast(x.cpu()), expected.cpu(), atol=1e-3)
        with pytest.raises(RuntimeError):
            fast(x)
        fast.cuda()
        for _ in range(3):
            assert torch.allclose(fast(x), expected, atol=1e-3)


def test_optimised_while_another_thread_allocates():
    fast, stop = fastpose.optimize(build("mobileposenet", num_keypoints=2).cuda()), threading.Event()

    def allocate():
        while not stop.is_set():
            torch.ones(1 << 20).cuda()
            torch.cuda.empty_cache()

    other = threading.Thread(target=allocate)
    other.start()
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error")  # says that there is no graph
            for batch in (1, 2, 3, 1, 2, 3):
                fast(torch.randn(batch, 3, 64, 64, device="cuda"))
    finally:
        stop.set()
        other.join()
    assert len(fast._graphs) == 3


@needs_two_devices
def test_optimised_on_two_devices():
    for device in ("cuda:0", "cuda:1"):
        model = build("mobileposenet", num_keypoints=2).to(device)
        fast = fastpose.optimize(model)
        with torch.inference_mode():
            for _ in range(4):
                x = torch.randn(1, 3, 64, 64, device=device)
                assert torch.allclose(fast(x), model(x), atol=1e-3)


FAILING_CAPTURE = """
import warnings
import torch
import fastpose
from tests.test_models import build

class Asks(torch.nn.Module):  # the host for a number, which a graph cannot hold
    def forward(self, x):
        return x + float(x.sum().item())

model = build("mobileposenet", num_keypoints=2).cuda()
fast, other = fastpose.optimize(model), fastpose.optimize(model)
fast.network, x = Asks(), torch.ones(1, 1, 2, 2, device="cuda")
before = torch.cuda.current_stream()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [fast(x) for _ in range(3)]
assert any("running call by call" in str(w.message) for w in caught), caught
assert torch.cuda.current_stream() == before
assert all(torch.equal(r, torch.full_like(x, 5)) for r in results)
# afterwards everything is as before: random numbers, memory, other graphs
image = torch.randn(1, 3, 64, 64, device="cuda")
block = torch.empty(1 << 28, device="cuda")
del block
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() < 1 << 30, torch.cuda.memory_reserved()
with torch.inference_mode():
    assert all(torch.allclose(other(image), model(image), atol=1e-3) for _ in range(3))
assert len(other._graphs) == 1
"""


def test_a_capture_that_fails_leaves_everything_usable():
    """In a process of its own: what it leaves behind in torch would spoil other tests."""
    done = subprocess.run([sys.executable, "-c", FAILING_CAPTURE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_optimised_without_memory_for_a_graph(monkeypatch):
    fast = fastpose.optimize(build("mobileposenet", num_keypoints=2).cuda())
    x = torch.randn(1, 3, 64, 64, device="cuda")

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastpose.graphs._Graph", fail)
    with torch.inference_mode():
        expected = fast(x)
        with pytest.warns(UserWarning, match="running call by call: CUDA out of memory"):
            assert torch.equal(fast(x), expected)
        assert torch.equal(fast(x), expected)


def test_images_that_are_on_the_device_are_cropped_there(monkeypatch):
    photo = torch.randint(0, 256, (3, 120, 90), dtype=torch.uint8, device="cuda")
    boxes = [[5, 5, 60, 110], [20, 10, 80, 100]]
    expected = fastpose.PoseEstimator(device="cuda")(photo, boxes)
    monkeypatch.setattr("fastpose.pipeline.to_rgb", None)
    poses = fastpose.PoseEstimator(device="cuda", crop_on_device=True)(photo, boxes)
    assert len(poses) == 2 and abs(poses.keypoint_scores - expected.keypoint_scores).max() < 0.05
