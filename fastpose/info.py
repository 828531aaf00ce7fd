"""What is installed and what runs: the report of ``fastpose info``."""

from __future__ import annotations

import platform
from typing import Any

import torch

import fastpose
from fastpose.ops import _backend


def collect() -> dict[str, Any]:
    """Versions, processor, threads and the state of the fused operators, as plain values."""
    import cv2
    import numpy as np

    from fastpose.detect import hog_available

    report: dict[str, Any] = {
        "fastpose": fastpose.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "hog detector": "available" if hog_available() else "not in this OpenCV",
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
        report["built with"] = f"{build['compiler']}, torch {build['torch']}, runs on torch {build['torch_target']}+"
    report["fused kernels"] = "loaded" if _backend.LOADED else f"not used: {_backend.WHY_NOT}"
    report["operator library"] = str(_backend.LIBRARY) if _backend.LOADED else "none"
    ops = [op for op in _backend.OPS if not op.endswith("_backward")]
    for device in ("cpu", "cuda"):
        report[f"ops on {device}"] = {op: "fused" if _backend.has_kernel(op, device) else "reference" for op in ops}
    if _backend.LOADED and not _backend.has_kernel("run_plan", "cuda"):
        report["ops on cuda"]["run_plan"] = "not there"  # an optimised network stays on the CPU
    return report


def to_text(report: dict[str, Any]) -> str:
    """The report as aligned lines."""
    width = max(len(key) for key in report)
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        lines.append(f"{key:<{width}}  {value}")
    return "\n".join(lines)
