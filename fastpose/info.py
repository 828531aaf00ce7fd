"""What is installed and what runs: the report of ``fastpose info``."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

import fastpose
from fastpose.models import create_model
from fastpose.models._registry import model_entry
from fastpose.ops import _backend
from fastpose.plan import NotOptimizable, Optimized, optimize, usual_precision


def collect() -> dict[str, Any]:
    """Versions, processor, threads and the state of the fused operators, as plain values."""
    import numpy as np

    report: dict[str, Any] = {
        "fastpose": fastpose.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **_opencv(),
        "threads": torch.get_num_threads(),
        "torch cuda": torch.version.cuda or "no",
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    try:
        from fastpose import _native  # type: ignore[attr-defined]
    except ImportError as error:
        report["processor"] = platform.processor() or platform.machine()
        report["native module"] = f"not available: {error}"
    else:
        cpu, build = _native.cpu_info(), _native.build_info()
        report["processor"] = cpu["model"] or platform.machine()
        report["instruction set"] = f"{cpu['isa']} (processor: {cpu['detected']})"
        report["cuda kernels"] = build["cuda"]
        report["native module"] = "loaded"
        report["built with"] = f"{build['compiler']}, torch {build['torch']}, runs on torch {build['torch_target']}+"
    report["fused kernels"] = "loaded" if _backend.LOADED else f"not used: {_backend.WHY_NOT}"
    report["operator library"] = str(_backend.LIBRARY) if _backend.LOADED else "none"
    ops = [op for op in _backend.OPS if not op.endswith("_backward")]
    without = {op: "reference" for op in ops} | {"run_plan": "not there"}  # a program of kernels has no reference
    for device in ("cpu", "cuda"):
        report[f"ops on {device}"] = {op: "fused" if _backend.has_kernel(op, device) else without[op] for op in ops}
    how = f"optimised, by default in {usual_precision()}" if _backend.LOADED else "PyTorch"
    report["whole networks"] = f"{how}; of one: fastpose info --model NAME"
    return report


def _opencv() -> dict[str, str]:
    """Of all packages the one that may be installed and yet not load: it needs libraries of the system's."""
    from fastpose.detect import hog_available

    try:
        import cv2
    except ImportError as error:
        return {"opencv": f"cannot be loaded: {error}"}
    return {"opencv": cv2.__version__, "hog detector": "available" if hog_available() else "not in this OpenCV"}


def collect_model(name: str) -> dict[str, Any]:
    """Whether `fastpose.optimize` takes the network called `name`, which takes some seconds to find out.

    Raises:
        ValueError: unknown name.
    """
    entry = model_entry(name)
    report: dict[str, Any] = {"model": name, "input size": list(entry.input_size)}
    if not _backend.LOADED:
        return report | {"optimised": False, "reason": f"the fused kernels are not available: {_backend.WHY_NOT}"}
    start = time.perf_counter()
    try:
        fast = optimize(create_model(name).eval(), entry.input_size)
    except NotOptimizable as error:
        return report | {"optimised": False, "reason": str(error), "instead": "the network runs layer by layer"}
    assert isinstance(fast, Optimized)  # on the CPU
    seconds = round(time.perf_counter() - start, 1)
    return report | {"optimised": True, "instructions": int(fast.program[2]), "seconds to prepare": seconds}


def to_text(report: dict[str, Any]) -> str:
    """The report as aligned lines."""
    width = max(len(key) for key in report)
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list):
            value = "x".join(map(str, value))
        lines.append(f"{key:<{width}}  {value}")
    return "\n".join(lines)
