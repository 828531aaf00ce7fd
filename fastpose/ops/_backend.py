"""Loads the compiled operators and decides, in one place, between them and the pure PyTorch reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import library as torch_library
from torch.autograd import forward_ad

LIBRARY = Path(__file__).resolve().parent.parent / "_ops.so"
OPS = ("ghost_cheap", "ghost_cheap_backward", "dw_upsample", "dw_upsample_backward", "oks_nms", "run_plan")
# as in csrc/cpu/isa.cpp; the highest that may be used
CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


def _load() -> tuple[bool, str]:
    """(loaded, reason why not). The reason is the loader's own text: guessing at causes helps nobody."""
    wish = os.environ.get("FASTPOSE_FUSED", "auto")
    if wish not in ("auto", "0", "1"):
        raise ValueError(f"FASTPOSE_FUSED must be 'auto', '0' or '1', got {wish!r}")
    level = os.environ.get("FASTPOSE_CPU_ISA")
    if level is not None and level not in CPU_LEVELS:
        raise ValueError(f"FASTPOSE_CPU_ISA must be one of {', '.join(CPU_LEVELS)}, got {level!r}")
    reason = ""
    if wish == "0":
        return False, "switched off by FASTPOSE_FUSED=0"
    if not LIBRARY.is_file():
        how = "FASTPOSE_BUILD_EXT=1 pip install -v --no-build-isolation . says what is missing: torch, g++ 11 or newer"
        reason = f"{LIBRARY.name} was not built (for the kernels: {how})"
    else:
        try:
            torch.ops.load_library(str(LIBRARY))
            absent = [op for op in OPS if not hasattr(torch.ops.fastpose, op)]
            if absent:
                reason = f"{LIBRARY} is of another version: it lacks {', '.join(absent)}; reinstall fastpose"
        except (OSError, RuntimeError) as error:
            reason = f"{LIBRARY.name} could not be loaded: {error}"
            if wish == "auto":
                import warnings

                warnings.warn(f"fastpose: {reason}; using the PyTorch reference", RuntimeWarning, stacklevel=2)
    if reason and wish == "1":
        raise ImportError(f"FASTPOSE_FUSED=1, but the fused kernels are not available: {reason}")
    return not reason, reason


LOADED, WHY_NOT = _load()


def use_fused() -> bool:
    """Whether layers built from now on call the compiled kernels."""
    return LOADED


def runs_reference() -> bool:
    """Whether a differentiable operator called from Python runs its reference: without the library, and inside
    `torch.func` and forward-mode differentiation, which refuse the kernels or take their derivatives to be zero."""
    return not LOADED or forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def cpu_level() -> str:
    """The instruction set in use, one of `CPU_LEVELS`; "unknown" without the native module."""
    try:
        from fastpose import _native  # type: ignore[attr-defined]
    except ImportError:
        return "unknown"
    return str(_native.cpu_info()["isa"])


def has_kernel(op: str, device: str) -> bool:
    """Whether an operator has a compiled kernel for ``"cpu"`` or ``"cuda"``; without one it runs the reference there.

    A library that was built without CUDA serves the CPU only. Layers need not ask: they call the operator, and torch
    picks the kernel or the reference by the device of the tensors.
    """
    return LOADED and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpose::{op}", device.upper())


def set_fused(model: nn.Module, on: bool) -> nn.Module:
    """Switch every layer of a built model to the kernels or to the reference, e.g. before a portable export.

    Parameters and outputs stay the same. Returns `model`. Raises RuntimeError if the kernels are not available.
    """
    if on and not LOADED:
        raise RuntimeError(f"fused kernels are not available: {WHY_NOT}")
    for layer in model.modules():
        if hasattr(layer, "fused"):
            layer.fused = on  # type: ignore[assignment]
    return model


def check_dtypes(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for what the kernel of `op` refuses, so that its reference does not take it either."""

    def name(t: Tensor) -> str:
        return str(t.dtype).removeprefix("torch.")

    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be float32, float64, float16 or bfloat16, got {name(x)}")
    for argument, t in others.items():
        # autocast makes one dtype of them
        if t is not None and t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{op}: {argument} must have the dtype of x, {name(x)}, got {name(t)}")


def without_gradient(name: str) -> str:
    """What to say where somebody differentiates an operator that cannot be."""
    return (
        f"{name} has no gradient here; the reference has: fastpose.set_fused(model, False), "
        "or the network that was optimised"
    )


def refuse_tangents(op: str, *tensors: Tensor) -> None:
    """Raise RuntimeError in forward-mode differentiation, which would go on with a derivative of zero."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(without_gradient(f"fastpose::{op}"))


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: str = "lower",
) -> None:
    """Complete an operator whose schema and CPU kernel the library brings.

    Args:
        op: name without namespace.
        fake: output shapes, dtypes and strides without data, for export and compilation.
        reference: runs on every device that has no kernel.
        backward, setup_context: autograd formula; without one, a backward pass raises.
        autocast: under autocast cast floating-point arguments to autocast's dtype ("lower") or to float32 ("float32").
    """
    name = f"fastpose::{op}"
    torch_library.register_fake(name)(fake)
    if backward is None:

        def refuse(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(without_gradient(name))

        backward = refuse
    torch_library.register_autograd(name, backward, setup_context=setup_context)
    library = torch_library.Library("fastpose", "IMPL")
    _LIBRARIES.append(library)
    library.impl(op, reference, "CompositeExplicitAutograd")
    for device in ("cpu", "cuda"):
        library.impl(op, _autocast(op, device, autocast), f"Autocast{device.upper()}")


_LIBRARIES: list[torch_library.Library] = []  # a Library unregisters its kernels when it is collected


def _autocast(op: str, device: str, policy: str) -> Callable[..., Any]:
    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device) if policy == "lower" else torch.float32
        cast = [
            a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
            for a in args
        ]
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.fastpose, op)(*cast)

    return cast_and_call


ACTIVATIONS = ("none", "relu", "hardswish", "silu")


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name, scriptable."""
    if activation == "relu":
        return torch.relu(x)
    if activation == "hardswish":
        return torch.nn.functional.hardswish(x)
    if activation == "silu":
        return torch.nn.functional.silu(x)
    if activation != "none":
        raise ValueError("activation must be 'none', 'relu', 'hardswish' or 'silu', got '" + activation + "'")
    return x


def activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """Gradient before the activation from the one behind it; z is the activation's input."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    if activation == "hardswish":
        return torch.ops.aten.hardswish_backward(grad, z)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    return grad


def empty_like_layout(x: Tensor, shape: list[int]) -> Tensor:
    """New tensor for a fake kernel: x's dtype and device, channels-last if x is (and is not also contiguous)."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
