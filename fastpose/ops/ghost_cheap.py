"""`ghost_cheap`: both halves of a Ghost module from its primary half, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpose.ops import _backend


def ghost_cheap(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu") -> Tensor:
    """``cat([x, act(conv2d(x, weight, bias, padding=k // 2, groups=C))], dim=1)`` without the concatenation's copies.

    The cheap operation of a Ghost module (K. Han et al., CVPR 2020) with batch norm folded into `weight` and `bias`:
    M cheap features per primary one, written beside them. The module's ratio is s = 1 + M.

    Args:
        x: primary features [B, C, H, W]; float32, float64, float16 or bfloat16 (half types are computed in float32);
            any strides.
        weight: [M * C, 1, k, k] of x's dtype, k = 1, 3, 5 or 7; filter c * M + m belongs to channel c.
        bias: [M * C] of x's dtype, or None.
        activation: ``"none"``, ``"relu"``, ``"hardswish"`` or ``"silu"``; acts on the cheap half only.

    Returns:
        [B, (1 + M) * C, H, W], channels-last if x is; the first C channels are x, bit for bit.

    Raises:
        ValueError: a shape, dtype or activation that does not fit; names the argument, what was expected and given.
    """
    if not torch.jit.is_scripting():
        if _backend.runs_reference():
            return ghost_cheap_reference(x, weight, bias, activation)
    return torch.ops.fastpose.ghost_cheap(x, weight, bias, activation)


def ghost_cheap_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu") -> Tensor:
    """The same in plain PyTorch."""
    _backend.check_dtypes("ghost_cheap", x, weight=weight, bias=bias)
    if x.dim() != 4:
        raise ValueError(f"ghost_cheap: x must be [B, C, H, W], got {list(x.shape)}")
    c = x.shape[1]
    if (
        weight.dim() != 4
        or weight.shape[1] != 1
        or weight.shape[2] != weight.shape[3]
        or c == 0
        or weight.shape[0] == 0
        or weight.shape[0] % c != 0
    ):
        raise ValueError(
            f"ghost_cheap: weight must be [M * C, 1, k, k] with C = x.size(1) = {c}, got {list(weight.shape)}"
        )
    k = weight.shape[2]
    if k != 1 and k != 3 and k != 5 and k != 7:
        raise ValueError(f"ghost_cheap: kernel size must be 1, 3, 5 or 7, got {k}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"ghost_cheap: bias must be [{weight.shape[0]}] like weight, got {list(bias.shape)}")
    if x.shape[2] == 0 or x.shape[3] == 0:  # which conv2d refuses
        return torch.cat([x] * (1 + weight.shape[0] // c), dim=1)
    if not x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        # on a CPU torch may add up in half precision, depending on the number of threads; the kernels never do
        cheap = F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), padding=k // 2, groups=c)
    else:
        cheap = F.conv2d(x, weight, bias, padding=k // 2, groups=c)
    return torch.cat([x, _backend.activate(cheap, activation).to(x.dtype)], dim=1)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    c, pad = x.shape[1], [weight.shape[2] // 2] * 2
    primary, cheap = grad[:, :c], grad[:, c:]
    if activation != "none":
        z = F.conv2d(x, weight, bias, padding=pad[0], groups=c)
        cheap = _backend.activation_backward(cheap, z, activation)
    dx, dw, db = torch.ops.aten.convolution_backward(
        cheap, x, weight, [weight.shape[0]], [1, 1], pad, [1, 1], False, [0, 0], c, [True, True, True]
    )
    return dx + primary, dw, db


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _backend.empty_like_layout(x, [x.shape[0], x.shape[1] + weight.shape[0], x.shape[2], x.shape[3]])


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _backend.empty_like_layout(x, list(x.shape)),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dw, db = torch.ops.fastpose.ghost_cheap_backward(grad, x, weight, bias, ctx.activation)
    return dx, dw, None if bias is None else db, None


if _backend.LOADED:
    _backend.register(
        "ghost_cheap", fake=_fake, reference=ghost_cheap_reference, backward=_backward, setup_context=_setup_context
    )
    _backend.register("ghost_cheap_backward", fake=_fake_backward, reference=_backward_reference)
