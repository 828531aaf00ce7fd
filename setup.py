"""Builds the C++ extensions: fastpose/_ops.so (operators, LibTorch stable ABI) and fastpose._native (pybind11).

Without torch or a compiler the package installs as pure Python. Switches (environment):
  FASTPOSE_BUILD_EXT  auto (default): build if possible; 1: fail if not; 0: do not
  MAX_JOBS            parallel compilations
  FASTPOSE_SANITIZE   1: build with address and undefined-behaviour sanitizers (for the test suite)
  FORCE_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST   as usual; reserved, there are no CUDA kernels yet
"""

import os
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
VERSION = "0.1.0"
TORCH_TARGET = "2.11"  # the lowest torch the binary runs on
WISH = os.environ.get("FASTPOSE_BUILD_EXT", "auto")
HOW = "pip install torch, then pip install --no-build-isolation fastpose"


def say(text):
    print(f"fastpose: {text}", file=sys.stderr)


def give_up(reason):
    if WISH == "1":
        raise SystemExit(f"fastpose: FASTPOSE_BUILD_EXT=1, but {reason}")
    say(f"{reason}: installing without kernels, everything runs on plain PyTorch. For the kernels: {HOW}")
    return {}


def extensions():
    if WISH not in ("auto", "0", "1"):
        raise SystemExit(f"fastpose: FASTPOSE_BUILD_EXT must be auto, 0 or 1, got {WISH!r}")
    if WISH == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return give_up("torch is not installed in the build environment")
    if tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return give_up(f"torch {torch.__version__} is older than {TORCH_TARGET}")
    if os.environ.get("FORCE_CUDA") == "1":
        say("FORCE_CUDA=1: there are no CUDA kernels yet; CUDA tensors take the PyTorch path")

    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]
    # vectors passed between inlined functions; false alarms of GCC 12 in its own intrinsics
    flags += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
    link = ["-Wl,-s"] if sys.platform == "linux" else []
    if os.environ.get("FASTPOSE_SANITIZE") == "1":
        # the asserts of -fsanitize=undefined stop at the first finding, so that a test fails
        flags += ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        link = ["-fsanitize=address,undefined"]
    sources = ["csrc/library.cpp", *sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc/cpu").glob("*.cpp"))]
    major, minor = (int(v) for v in TORCH_TARGET.split("."))
    ops = CppExtension(
        "fastpose._ops",
        sources,
        include_dirs=[str(HERE / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")],
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,  # do not link libtorch_python
    )
    built = [ops]
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        say("pybind11 is not installed in the build environment: `fastpose info` will lack processor details")
    else:
        texts = {
            "FASTPOSE_VERSION": VERSION,
            "FASTPOSE_BUILD_TORCH": torch.__version__,
            "FASTPOSE_TORCH_TARGET": TORCH_TARGET,
        }
        native = Pybind11Extension(
            "fastpose._native",
            ["csrc/native/module.cpp", "csrc/native/grouping.cpp", "csrc/cpu/isa.cpp"],
            include_dirs=[str(HERE / "csrc")],
            define_macros=[(k, f'"{v}"') for k, v in texts.items()],
            # no fused multiply-add: numpy has none either; vectors are passed between inlined functions only
            extra_compile_args=["-O3", "-g0", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi"],
            cxx_std=17,
        )
        built.append(native)

    class Build(BuildExtension):
        def get_ext_filename(self, fullname):
            # the operator library is no Python module: torch.ops.load_library opens it
            *parents, name = fullname.split(".")
            return os.path.join(*parents, "_ops.so") if name == "_ops" else super().get_ext_filename(fullname)

        def run(self):
            try:
                super().run()
            except Exception as error:
                if WISH == "1":
                    raise
                last = str(error).strip().splitlines() or [type(error).__name__]
                say(f"the kernels could not be compiled ({last[-1]}): installing without; see the output above")

        def copy_extensions_to_source(self):
            try:
                super().copy_extensions_to_source()
            except Exception:
                if WISH == "1":
                    raise

    return {"ext_modules": built, "cmdclass": {"build_ext": Build}}


setup(version=VERSION, **extensions())
