"""Layers shared by the models, and the only places where a layer chooses between a fused kernel and the reference.

A fused layer keeps its parameters exactly as the plain layers would (same state-dict keys, same shapes), so one
checkpoint serves both paths. Batch norm is folded inside ``forward`` from the current parameters: nothing derived is
stored, so nothing can be stale after a checkpoint load or a train/eval switch.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.ops import dw_upsample, use_fused


def activation(name: str) -> nn.Module:
    """Module for an activation name: ``none``, ``relu``, ``hardswish`` or ``silu``."""
    table: dict[str, type[nn.Module]] = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "hardswish": nn.Hardswish,
        "silu": nn.SiLU,
    }
    if name not in table:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(table)}")
    return table[name]()


class ConvBNAct(nn.Sequential):
    """Convolution (no bias, "same" padding k // 2), batch norm, activation. [B, I, H, W] -> [B, O, H/s, W/s]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: str = "none",
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), activation(act))


class SqueezeExcite(nn.Module):
    """Channel gate of squeeze-and-excitation: ``hardsigmoid(W2 relu(W1 mean(x) + b1) + b2)``, [B, C, 1, 1].

    With ``residual`` the gate is ``1 + gate``, so that ``x * se(x)`` is ``x + x * gate`` (Eq. 5 of MobilePoseNet).
    """

    residual: Final[bool]

    def __init__(self, channels: int, ratio: int = 4, residual: bool = False) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // ratio, 1)
        self.expand = nn.Conv2d(channels // ratio, channels, 1)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        # mean over H and W rather than adaptive pooling: same value, and plain for every exporter
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        if self.residual:
            gate = gate + 1.0
        return x * gate


class DWUpsampleBNAct(nn.Module):
    """Depthwise transposed convolution, batch norm and activation: [B, C, H, W] -> [B, C, 2H, 2W] for k4 s2 p1.

    In eval mode batch norm is folded and one `dw_upsample` call does all three. In training the kernel does the
    convolution and batch norm stays separate, since its statistics need the convolution's output.
    """

    fused: Final[bool]
    act: Final[str]

    def __init__(
        self, channels: int, kernel_size: int = 4, stride: int = 2, padding: int = 1, act: str = "relu"
    ) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.activation = activation(act)
        self.act = act
        self.stride = stride
        self.padding = padding
        self.fused = use_fused()

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            if self.training:
                y = dw_upsample(x, self.conv.weight, None, "none", self.stride, self.padding)
                return self.activation(self.bn(y))
            weight, bias = fold_batch_norm(
                self.conv.weight, self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var, self.bn.eps
            )
            return dw_upsample(x, weight, bias, self.act, self.stride, self.padding)
        return self.activation(self.bn(self.conv(x)))


def channels_last(module: nn.Module) -> nn.Module:
    """Convert the module's parameters to channels-last, in which CPU convolutions run fastest; returns the module."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batch_norm(
    weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a depthwise convolution with eval-mode batch norm folded in.

    `weight` is [C, 1, k, k] with one filter per *output* channel, which for a depthwise convolution, transposed or not,
    is dimension 0; the batch norm's tensors are [C]. Returns the scaled weight (same shape) and the bias [C].
    """
    assert mean is not None and var is not None
    scale = gamma * torch.rsqrt(var + eps)
    return weight * scale.view(-1, 1, 1, 1), beta - mean * scale
