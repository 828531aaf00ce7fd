"""`dw_upsample`: depthwise transposed convolution with bias and activation in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpose.ops import _backend


def dw_upsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    stride: int = 2,
    padding: int = 1,
    output_padding: int = 0,
) -> Tensor:
    """``act(conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups=C))``.

    The upsampling half of MobilePoseNet's lightweight upsampling block (Section 3.1), with batch norm folded into
    `weight` and `bias`. Kernel 4, stride 2, padding 1 is the fast case; any other is right.

    Args:
        x: [B, C, H, W]; float32, float64, float16 or bfloat16 (half types are computed in float32); any strides.
        weight: [C, 1, k, k] of x's dtype.
        bias: [C] of x's dtype, or None.
        activation: ``"none"``, ``"relu"``, ``"hardswish"`` or ``"silu"``.
        stride, padding, output_padding: as in ``torch.nn.ConvTranspose2d``, the same for height and width.

    Returns:
        [B, C, H', W'] with H' = (H - 1) * stride - 2 * padding + k + output_padding; channels-last if x is.

    Raises:
        ValueError: a shape, dtype or setting that does not fit; names the argument, what was expected and given.
    """
    if not torch.jit.is_scripting():
        if _backend.runs_reference():
            return dw_upsample_reference(x, weight, bias, activation, stride, padding, output_padding)
    return torch.ops.fastpose.dw_upsample(x, weight, bias, activation, stride, padding, output_padding)


def dw_upsample_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    stride: int = 2,
    padding: int = 1,
    output_padding: int = 0,
) -> Tensor:
    """The same in plain PyTorch."""
    _backend.check_dtypes("dw_upsample", x, weight=weight, bias=bias)
    if x.dim() != 4:
        raise ValueError(f"dw_upsample: x must be [B, C, H, W], got {list(x.shape)}")
    c = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] != c or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"dw_upsample: weight must be [C, 1, k, k] with C = x.size(1) = {c}, got {list(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != c):
        raise ValueError(f"dw_upsample: bias must be [C] with C = x.size(1) = {c}, got {list(bias.shape)}")
    if stride < 1 or padding < 0 or output_padding < 0 or output_padding >= stride:
        raise ValueError(
            "dw_upsample: expected stride >= 1, padding >= 0 and output_padding in [0, stride), got "
            f"{stride}, {padding} and {output_padding}"
        )
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"dw_upsample: x must have at least one pixel, got {list(x.shape)}")
    size = [(n - 1) * stride - 2 * padding + weight.shape[2] + output_padding for n in x.shape[2:]]
    if min(size) < 1:
        raise ValueError(f"dw_upsample: the output would be empty, {size[0]} x {size[1]}, for x {list(x.shape)}")
    if c == 0:  # which conv_transpose2d refuses
        return x.new_empty(x.shape[0], 0, size[0], size[1])
    dtype = x.dtype
    if not x.is_cuda and (dtype == torch.float16 or dtype == torch.bfloat16):
        # on a CPU torch may add up in half precision, depending on the number of threads; the kernels never do
        x, weight = x.float(), weight.float()
        bias = None if bias is None else bias.float()
    y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups=c)
    return _backend.activate(y, activation).to(dtype)


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: int,
    padding: int,
    output_padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if activation != "none":
        z = dw_upsample_reference(x, weight, bias, "none", stride, padding, output_padding)
        grad = _backend.activation_backward(grad, z, activation)
    c = x.shape[1]
    s, p, o = [stride] * 2, [padding] * 2, [output_padding] * 2
    return torch.ops.aten.convolution_backward(grad, x, weight, [c], s, p, [1, 1], True, o, c, [True, True, True])


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, stride: int, padding: int, output_padding: int
) -> Tensor:
    k = weight.shape[2]
    height, width = ((n - 1) * stride - 2 * padding + k + output_padding for n in x.shape[2:])
    return _backend.empty_like_layout(x, [x.shape[0], x.shape[1], height, width])


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _backend.empty_like_layout(x, list(x.shape)), weight.new_empty(weight.shape), weight.new_empty(x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dw, db = torch.ops.fastpose.dw_upsample_backward(grad, x, weight, bias, *ctx.settings)
    return dx, dw, None if bias is None else db, None, None, None, None


if _backend.LOADED:
    _backend.register(
        "dw_upsample", fake=_fake, reference=dw_upsample_reference, backward=_backward, setup_context=_setup_context
    )
    _backend.register("dw_upsample_backward", fake=_fake_backward, reference=_backward_reference)
