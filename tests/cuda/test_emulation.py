"""The CUDA kernels without a GPU: compiled for the CPU (emulation.h), with address and undefined-behaviour sanitizers,
in place of the CPU kernels; then the operators' own tests."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpose

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# gradcheck repeats what the comparison of gradients says, thousands of times; scripts and opcheck know no kernels
SELECTION = "not script and not opcheck and not gradcheck and not threads"


def compiler() -> str:
    """g++, or skip: the emulation relies on its built-in jumps and its sanitizers."""
    if not (ROOT / "csrc/cuda").is_dir():
        pytest.skip("the sources of the kernels are not here")
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("needs g++ on x86-64")
    return "g++"


def build(folder: Path, compile: str, sanitizers: list[str]) -> Path:
    """The operator library with the CUDA kernels as its CPU kernels."""
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DFASTPOSE_EMULATE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", *sanitizers]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}", *(f"-isystem{p}" for p in include_paths())]
    objects = []
    for source in [ROOT / "csrc/library.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([compile, *flags, "-x", "c++", "-c", source, "-o", objects[-1]], check=True)
    library = folder / "_ops.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    link = ["-shared", *sanitizers, "-o", library, *objects, f"-L{torch_lib}", "-ltorch_cpu", "-lc10"]
    subprocess.run([compile, *link], check=True)
    return library


def run_tests(folder: Path, library: Path, selection: str, **environment: str) -> subprocess.CompletedProcess:
    """The operators' tests in a copy of the package that has this library."""
    shutil.copytree(Path(fastpose.__file__).parent, folder / "fastpose", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(library, folder / "fastpose" / "_ops.so")
    env = {**os.environ, "FASTPOSE_FUSED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **environment}
    # -s: what a sanitizer says when it ends the process must not be captured
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "tests/ops", "-k", selection]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_kernels_pass_the_operators_tests_under_sanitizers(tmp_path):
    compile = compiler()
    library = build(tmp_path, compile, SANITIZERS)
    runtime = [
        subprocess.run([compile, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python itself leaks at exit by design
    done = run_tests(tmp_path, library, SELECTION, LD_PRELOAD=" ".join(runtime), ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 300
