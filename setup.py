"""Builds the C++ extensions: fastpose/_ops.so (operators, LibTorch stable ABI) and fastpose._native (pybind11).

Without torch or a compiler the package installs as pure Python. Switches (environment):
  FASTPOSE_BUILD_EXT  auto (default): build if possible; 1: fail if not; 0: do not
  MAX_JOBS            parallel compilations
  FASTPOSE_SANITIZE   1: build with address and undefined-behaviour sanitizers (for the test suite)
  FORCE_CUDA          unset: CUDA kernels if torch has CUDA and an nvcc of the same major version is found; 1: fail
                      without them (they also build against a CPU torch); 0: none
  CUDA_HOME           where nvcc is; else the one on PATH, else /usr/local/cuda
  TORCH_CUDA_ARCH_LIST   as for PyTorch, e.g. "8.0 9.0+PTX"; default: 8.0, 9.0 and 10.0 as far as nvcc knows them, + PTX

`python setup.py cuda_check` compiles the CUDA kernels for the default architectures with whatever torch there is, links
nothing, and fails on errors and on register spills.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Command, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # which setup.py and --no-build-isolation leave to whoever calls
    raise SystemExit(
        f"fastpose: setuptools {setuptools.__version__} is too old, 77 is needed: pip install -U setuptools"
    )

HERE = Path(__file__).resolve().parent
VERSION = "0.1.0"
TORCH_TARGET = "2.11"  # the lowest torch the binary runs on
TARGET_MACRO = "0x{:02x}{:02x}000000000000".format(*map(int, TORCH_TARGET.split(".")))
WISH = os.environ.get("FASTPOSE_BUILD_EXT", "auto")
FORCE_CUDA = os.environ.get("FORCE_CUDA", "")
HOW = "pip install torch, then, in the folder of the sources, pip install --no-build-isolation ."


def say(text):
    print(f"fastpose: {text}", file=sys.stderr)


def give_up(reason):
    if WISH == "1":
        raise SystemExit(f"fastpose: FASTPOSE_BUILD_EXT=1, but {reason}")
    say(f"{reason}: installing without kernels, everything runs on plain PyTorch. For the kernels: {HOW}")
    return {}


class NoCuda(Exception):
    """Why there will be no CUDA kernels."""


def find_nvcc():
    """Path of nvcc, or None."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            path = Path(home) / "bin" / "nvcc"
            return path if path.is_file() else None
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return Path(found) if Path(found).is_file() else None


def nvcc_version(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def library_dirs(nvcc):
    """Where the CUDA runtime is, by nvcc's own account: nvcc may be a link or a wrapper."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    line = re.search(r"^#\$ LIBRARIES=(.*)$", done.stderr + done.stdout, re.MULTILINE)
    return re.findall(r"-L([^\"\s]+)", line[1]) if line else []


def architectures(nvcc, wish):
    """(flags for nvcc, description) of a list like TORCH_CUDA_ARCH_LIST, or of the default if it is empty."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if not wish:
        names = [name for name in ("8.0", "9.0", "10.0") if "compute_" + name.replace(".", "") in known]
        wish = " ".join(names) + "+PTX"
    families = {"turing": "7.5+PTX", "ampere": "8.0 8.6+PTX", "ada": "8.9+PTX", "hopper": "9.0+PTX"}
    families["blackwell"] = "10.0 12.0+PTX"
    flags, words = [], []
    for item in re.split(r"[;,\s]+", " ".join(families.get(w.lower(), w) for w in re.split(r"[;,\s]+", wish.strip()))):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not match or f"compute_{match[1]}{match[2]}" not in [*known, *(f"{k}{x}" for k in known for x in "af")]:
            known_text = ", ".join(k.removeprefix("compute_") for k in known)
            raise SystemExit(
                f"fastpose: TORCH_CUDA_ARCH_LIST must name architectures like 9.0 or 10.0+PTX that {nvcc} knows "
                f"({known_text}), got {item!r}"
            )
        number = match[1] + match[2]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        words.append(f"sm_{number}{match[3] or ''}")
    return flags, " ".join(words)


def nvcc_commands(nvcc, folder, flags):
    """{object file: command} for every CUDA source."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{HERE / 'csrc'}", *(f"-isystem={p}" for p in include_paths())]
    common = [str(nvcc), "-std=c++17", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_MACRO}"]
    common += ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0,-Wall", *includes, *flags]
    sources = sorted((HERE / "csrc/cuda").glob("*.cu"))
    return {folder / f"{p.stem}.o": [*common, "-c", str(p), "-o", str(folder / f"{p.stem}.o")] for p in sources}


def build_cuda(folder):
    """(object files, description) of the CUDA kernels, or ([], "none: <why>")."""
    try:
        return compile_cuda(folder / "cuda")
    except NoCuda as reason:
        if FORCE_CUDA == "1":
            raise RuntimeError(f"FORCE_CUDA=1, but {reason}") from None
        say(f"no CUDA kernels: {reason}")
        return [], f"none: {reason}"


def compile_cuda(folder):
    import torch

    if FORCE_CUDA not in ("", "0", "1"):
        raise SystemExit(f"fastpose: FORCE_CUDA must be 0, 1 or unset, got {FORCE_CUDA!r}")
    if FORCE_CUDA == "0":
        raise NoCuda("switched off by FORCE_CUDA=0")
    if FORCE_CUDA != "1" and torch.version.cuda is None:
        raise NoCuda("torch is a build without CUDA")
    nvcc = find_nvcc()
    if nvcc is None:
        raise NoCuda("nvcc was not found (CUDA_HOME says where)")
    version = nvcc_version(nvcc)
    if FORCE_CUDA != "1" and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise NoCuda(f"nvcc is of CUDA {version}, torch of CUDA {torch.version.cuda}")
    flags, description = architectures(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    folder.mkdir(parents=True, exist_ok=True)
    commands = nvcc_commands(nvcc, folder, flags)
    newest = max(p.stat().st_mtime for p in (HERE / "csrc").rglob("*") if p.suffix in (".h", ".cu"))

    def compile_one(item):
        target, command = item
        note = target.with_suffix(".command")
        if target.is_file() and target.stat().st_mtime > newest and note.is_file() and note.read_text() == str(command):
            return
        if subprocess.run(command).returncode:
            raise NoCuda(f"nvcc could not compile {Path(command[-3]).name}; see the output above")
        note.write_text(str(command))

    say(f"compiling CUDA kernels for {description} with CUDA {version}")
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, commands.items()))
    return [str(target) for target in commands], f"{description}, CUDA {version}"


class CudaCheck(Command):
    description = "compile the CUDA kernels for the default architectures, without linking"
    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        nvcc = find_nvcc()
        if nvcc is None:
            raise SystemExit("fastpose: nvcc was not found (CUDA_HOME says where)")
        flags, description = architectures(nvcc, "")
        spills = []
        with tempfile.TemporaryDirectory() as folder:
            for target, command in nvcc_commands(
                nvcc, Path(folder), [*flags, "-Xptxas=-v", "-Werror=all-warnings"]
            ).items():
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{done.stdout}{done.stderr}fastpose: {target.stem}.cu does not compile")
                kernel = ""
                for line in done.stderr.splitlines():
                    match = re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line)
                    kernel = f"{match[2]} {match[1]}" if match else kernel
                    if re.search(r"[1-9]\d* bytes spill", line):
                        spills.append(f"{kernel}: {line.strip()}")
                print(f"{target.stem}.cu: {description}", flush=True)
        if spills:
            raise SystemExit("\n".join([*spills, "fastpose: registers are spilled, see above"]))


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

    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]
    # vectors passed between inlined functions; false alarms of GCC 12 in its own intrinsics
    flags += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
    link = ["-Wl,-s"] if sys.platform == "linux" else []
    sanitize = []
    if os.environ.get("FASTPOSE_SANITIZE") == "1":
        # the asserts of -fsanitize=undefined stop at the first finding, so that a test fails
        sanitize = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags, link = [*flags, *sanitize], sanitize
    sources = ["csrc/library.cpp", *sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc/cpu").glob("*.cpp"))]
    ops = CppExtension(
        "fastpose._ops",
        sources,
        include_dirs=[str(HERE / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TARGET_MACRO)],
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,  # do not link libtorch_python
    )
    built, native = [ops], None
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
            extra_compile_args=["-O3", "-g0", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", *sanitize],
            extra_link_args=sanitize,
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
                objects, description = build_cuda(Path(self.build_temp))
                if objects:
                    ops.extra_objects += objects
                    ops.extra_link_args += [f"-L{folder}" for folder in library_dirs(find_nvcc())]
                    ops.libraries += ["cudart_static", "dl", "pthread", "rt"]
                if native is not None:
                    native.define_macros.append(("FASTPOSE_CUDA", f'"{description}"'))
                super().run()
            except Exception as error:
                if WISH == "1" or FORCE_CUDA == "1":
                    raise
                last = str(error).strip().splitlines() or [type(error).__name__]
                say(f"the kernels could not be compiled ({last[-1]}): installing without; see the output above")

        def copy_extensions_to_source(self):
            try:
                super().copy_extensions_to_source()
            except Exception:
                if WISH == "1":
                    raise

    return {"ext_modules": built, "cmdclass": {"build_ext": Build, "cuda_check": CudaCheck}}


setup(version=VERSION, **extensions())
