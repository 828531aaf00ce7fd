"""The decision between kernels and reference, in fresh processes, and what the binary may depend on."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import fastpose
from fastpose.ops import _backend, dw_upsample, dw_upsample_reference, ghost_cheap, ghost_cheap_reference
from tests.conftest import needs_kernels

CODE = """
import torch, fastpose
from fastpose.ops import _backend, dw_upsample, ghost_cheap, oks_nms
x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 4, 4)
assert dw_upsample(x, w).shape == (1, 4, 12, 12) and ghost_cheap(x, w[:, :, :3, :3]).shape == (1, 8, 6, 6)
keep = oks_nms(torch.zeros(2, 3, 2), torch.ones(2, 3), torch.ones(2), torch.ones(2), torch.ones(3))[1]
assert keep.tolist() == [True, False]
print(_backend.LOADED, '|', _backend.WHY_NOT)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def test_switched_off():
    done = run(CODE, FASTPOSE_FUSED="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False | switched off by FASTPOSE_FUSED=0"


def test_wrong_value():
    done = run("import fastpose", FASTPOSE_CPU_ISA="AVX2")
    levels = "baseline, avx2, avx512, avx512_vnni, avx512_bf16, amx"
    assert f"FASTPOSE_CPU_ISA must be one of {levels}, got 'AVX2'" in done.stderr
    done = run("import fastpose", FASTPOSE_FUSED="yes")
    assert "FASTPOSE_FUSED must be 'auto', '0' or '1', got 'yes'" in done.stderr


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_missing_or_broken_library(content, tmp_path):
    """A package without its library, or with one that does not load, works on the reference and says why."""
    import shutil
    from pathlib import Path

    shutil.copytree(Path(fastpose.__file__).parent, tmp_path / "fastpose", ignore=shutil.ignore_patterns("_ops.so"))
    if content is not None:
        (tmp_path / "fastpose" / "_ops.so").write_bytes(content)
    env = {"PYTHONPATH": str(tmp_path)}
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + CODE, FASTPOSE_FUSED="auto", **env)
    assert done.returncode == 0, done.stderr
    expected = "was not built" if content is None else "could not be loaded"
    assert done.stdout.startswith("False | _ops.so " + expected)
    assert done.stderr.count("could not be loaded") == (0 if content is None else 1)
    required = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport fastpose", FASTPOSE_FUSED="1", **env)
    assert required.returncode != 0
    assert "FASTPOSE_FUSED=1, but the fused kernels are not available" in required.stderr


def test_set_fused_switches_every_layer():
    model = fastpose.create_model("mobileposenet")
    layers = [m for m in model.modules() if hasattr(m, "fused")]
    assert len(layers) == 2 and all(m.fused == fastpose.use_fused() for m in layers)
    assert fastpose.set_fused(model, False) is model
    assert not any(m.fused for m in layers)
    if _backend.LOADED:
        fastpose.set_fused(model, True)
        assert all(m.fused for m in layers)
    else:
        with pytest.raises(RuntimeError, match="fused kernels are not available: "):
            fastpose.set_fused(model, True)


@pytest.mark.parametrize("name", ["mobileposenet", "ghostnet_pose"])
def test_functional_derivatives(name):
    """Gradients of each sample by `torch.func`, and a derivative in a direction by all three ways."""
    model = fastpose.create_model(name, num_keypoints=2).eval()
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    images = torch.randn(2, 3, 64, 32)

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    directions = {k: torch.randn_like(p) for k, p in parameters.items()}
    ahead = [torch.func.jvp(lambda p: loss(p, image), (parameters,), (directions,))[1] for image in images]  # noqa: B023
    for i, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().mean().backward()
        expected = {k: p.grad for k, p in model.named_parameters()}
        assert all(torch.allclose(each[k][i], v, rtol=1e-3, atol=1e-6) for k, v in expected.items())
        along = sum((expected[k] * directions[k]).sum() for k in expected)
        assert along.abs() > 0 and torch.allclose(ahead[i], along, rtol=1e-3)


@needs_kernels
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_every_instruction_set_level(level):
    """The operator tests at a lowered level; a wish above the processor's is ignored."""
    pytest.importorskip("fastpose._native")
    done = run("from fastpose import _native; print(_native.cpu_info())", FASTPOSE_CPU_ISA=level)
    info = eval(done.stdout)
    order = ["baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
    if level != "amx" or info["detected"] == "amx":  # otherwise the best one, which need not be the highest
        assert order.index(info["isa"]) == min(order.index(level), order.index(info["detected"]))
    if min(order.index(info["isa"]), 2) == min(order.index(info["detected"]), 2):
        return  # the suite itself runs at this level; the operators have nothing of their own at the last three
    selection = "test_forward or test_gradients or test_nan or test_equals or test_float32 or test_fast_case"
    tests = os.path.join(os.path.dirname(__file__), "ops")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", selection],
        env={**os.environ, "FASTPOSE_CPU_ISA": level},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d{2,} passed", done.stdout)


@needs_kernels
def test_the_binary_imports_only_the_stable_abi():
    """Only C functions of libtorch: no mangled C++ names of torch, no OpenMP runtime of our own."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(_backend.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert any(name == "torch_parallel_for" for name in names)
    bad = [n for n in names if re.search(r"^_ZN.*(3c10|2at|5torch)|^omp_|^GOMP_|^kmp", n)]
    assert not bad, bad
    # introduced after 2.11
    assert "torch_exception_get_what_without_backtrace" not in names


@needs_kernels
def test_threads_follow_torch():
    """The kernels use as many threads as torch.set_num_threads allows, from torch's own pool."""
    code = """
import os, torch, fastpose
from fastpose.ops import dw_upsample
x, w = torch.randn(8, 320, 32, 24), torch.randn(320, 1, 4, 4)
def busy(threads):
    torch.set_num_threads(threads)
    before = {t: times(t) for t in os.listdir('/proc/self/task')}
    for _ in range(200): dw_upsample(x, w)
    return sum(times(t) - before.get(t, 0) >= 3 for t in os.listdir('/proc/self/task'))
def times(t):
    f = open(f'/proc/self/task/{t}/stat').read().rsplit(')', 1)[1].split()
    return int(f[11]) + int(f[12])
with torch.inference_mode():
    dw_upsample(x, w)
    print(busy(1), busy(2))
libraries = {l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l or 'libiomp' in l}
print(len(libraries))
"""
    if (os.cpu_count() or 1) < 2 or not os.path.isdir("/proc/self/task"):
        pytest.skip("needs two cores and /proc")
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "2", "1"]


@needs_kernels
def test_strings_do_not_leak():
    """Arguments of type str are owned and freed: 60,000 calls, a third of them errors, do not grow the process."""
    import resource

    op = torch.ops.fastpose.ghost_cheap.default
    x, w = torch.randn(1, 2, 1, 1), torch.randn(2, 1, 1, 1)

    def calls(n):
        for i in range(n):
            if i % 3:
                op(x, w, None, "hardswish")
            else:
                with contextlib.suppress(ValueError):
                    op(x, w, None, "an activation that does not exist")

    with torch.inference_mode():
        calls(5000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calls(60000)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1024, f"{grown} KiB"


@needs_kernels
def test_kernels_release_the_interpreter_lock_and_are_thread_safe():
    inputs = [(torch.randn(2, 48, 20, 20), torch.randn(48, 1, 4, 4), torch.randn(48, 1, 3, 3)) for _ in range(4)]
    failures = []

    def work(x, w4, w3):
        try:
            for _ in range(20):
                assert torch.allclose(dw_upsample(x, w4), dw_upsample_reference(x, w4), atol=1e-4)
                assert torch.allclose(ghost_cheap(x, w3), ghost_cheap_reference(x, w3), atol=1e-4)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=i) for i in inputs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
