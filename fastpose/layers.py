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

from fastpose.ops import dw_upsample, ghost_cheap, use_fused


def activation(name: str) -> nn.Module:
    """Module for an activation name: ``none``, ``relu``, ``relu6``, ``hardswish``, ``silu`` or ``sigmoid``."""
    table: dict[str, type[nn.Module]] = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "hardswish": nn.Hardswish,
        "silu": nn.SiLU,
        "sigmoid": nn.Sigmoid,
    }
    if name not in table:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(table)}")
    return table[name]()


class ConvBNAct(nn.Sequential):
    """Convolution (no bias, "same" padding k // 2), batch norm, activation. [B, I, H, W] -> [B, O, H/s, W/s].

    The parts are called ``conv``, ``bn`` and ``act``, as in the checkpoints of the OpenMMLab packages.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: str = "none",
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = activation(act)


class ConvAct(nn.Sequential):
    """1x1 convolution with bias and activation; its parts are called ``conv`` and ``act`` as those of ConvBNAct."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, act: str = "none") -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups)
        self.act = activation(act)


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3 convolution and batch norm (no activation), then 1x1 convolution, batch norm and activation.

    The parts are called ``depthwise_conv`` and ``pointwise_conv``, as in the checkpoints of the OpenMMLab packages.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, act: str = "relu") -> None:
        super().__init__()
        self.depthwise_conv = ConvBNAct(in_channels, in_channels, 3, stride, groups=in_channels)
        self.pointwise_conv = ConvBNAct(in_channels, out_channels, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class GhostModule(nn.Module):
    """Ghost module (Han et al., GhostNet, CVPR 2020): [B, I, H, W] -> [B, O, H, W], half of it by a cheap operation.

    Primary features: 1x1 convolution to O / ratio channels, batch norm, activation. The rest comes from them by a
    depthwise k x k convolution, batch norm and activation, and stands behind them. In eval mode the second half is one
    `ghost_cheap` call that writes beside the first, without a concatenation.
    """

    fused: Final[bool]
    act: Final[str]

    def __init__(
        self, in_channels: int, out_channels: int, act: str = "relu", ratio: int = 2, kernel_size: int = 3
    ) -> None:
        super().__init__()
        if out_channels % ratio != 0:
            raise ValueError(f"GhostModule: out_channels must be a multiple of ratio {ratio}, got {out_channels}")
        width = out_channels // ratio
        self.primary = ConvBNAct(in_channels, width, act=act)
        self.cheap = ConvBNAct(width, out_channels - width, kernel_size, groups=width, act=act)
        self.act = act
        self.fused = use_fused()

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        if self.fused and not self.training:
            bn = self.cheap.bn
            weight, bias = fold_batch_norm(
                self.cheap.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
            )
            return ghost_cheap(y, weight, bias, self.act)
        return torch.cat([y, self.cheap(y)], 1)


def largest_pixel(x: Tensor, training: bool, keepdim: bool = False) -> Tensor:
    """Maximum over the pixels, [B, C, H, W] -> [B, C], or [B, C, 1, 1] with `keepdim`.

    In training the whole gradient goes to one of equal maxima. `amax` divides it among all of them, by way of masks of
    64-bit integers, which takes as long as a convolution.
    """
    if training:
        pooled = F.adaptive_max_pool2d(x, 1)
        return pooled if keepdim else pooled.flatten(1)
    return x.amax((2, 3), keepdim=keepdim)


def largest_channel(x: Tensor, training: bool) -> Tensor:
    """Maximum over the channels, [B, C, H, W] -> [B, 1, H, W]; gradients as those of `largest_pixel`."""
    return x.max(1, keepdim=True)[0] if training else x.amax(1, keepdim=True)


class SpatialAttention(nn.Module):
    """Spatial gate of CBAM: sigmoid of a 7x7 convolution (no bias) over channel mean and maximum, [B, 1, H, W]."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, 1, kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), largest_channel(x, self.training)], 1)))


class CBAM(nn.Module):
    """Convolutional block attention (S. Woo et al., ECCV 2018), [B, C, H, W] -> the same shape.

    First the channel gate, ``sigmoid(mlp(mean(x)) + mlp(max(x)))`` with one MLP (no bias) for both, then
    `SpatialAttention`.
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        if not 1 <= ratio <= channels:
            raise ValueError(f"CBAM: ratio must be between 1 and {channels}, the number of channels, got {ratio}")
        self.reduce = nn.Conv2d(channels, channels // ratio, 1, bias=False)
        self.expand = nn.Conv2d(channels // ratio, channels, 1, bias=False)
        self.spatial = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        # mean and maximum side by side, so that the MLP runs once
        pooled = torch.cat([x.mean((2, 3), keepdim=True), largest_pixel(x, self.training, keepdim=True)], 3)
        x = x * torch.sigmoid(self.expand(F.relu(self.reduce(pooled))).sum(3, keepdim=True))
        return x * self.spatial(x)


class SqueezeExcite(nn.Module):
    """Channel gate of squeeze-and-excitation: ``hardsigmoid(W2 relu(W1 mean(x) + b1) + b2)``, [B, C, 1, 1].

    With ``residual`` the gate is ``1 + gate``, so that ``x * se(x)`` is ``x + x * gate`` (Eq. 5 of MobilePoseNet). The
    hidden width is ``channels / ratio`` rounded to a multiple of `divisor`.
    """

    residual: Final[bool]

    def __init__(self, channels: int, ratio: int = 4, residual: bool = False, divisor: int = 1) -> None:
        super().__init__()
        hidden = max(divisor, (channels // ratio + divisor // 2) // divisor * divisor)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
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


def channel_shuffle(x: Tensor, groups: int = 2, training: bool = False) -> Tensor:
    """Interleave the channels of `groups` equal parts (Zhang et al., ShuffleNet): [B, C, H, W] -> the same shape."""
    if training:
        return torch.channel_shuffle(x, groups)  # stays channels-last; exporters know the one below
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def check_images(x: Tensor, multiple: int, name: str) -> None:
    """Raise a ValueError unless `x` is [B, 3, H, W] with H and W positive multiples of `multiple`."""
    if (
        x.dim() != 4
        or x.shape[1] != 3
        or x.shape[2] % multiple != 0
        or x.shape[3] % multiple != 0
        or x.shape[2] * x.shape[3] == 0
    ):
        raise ValueError(
            f"{name}: input must be [B, 3, H, W] with H and W positive multiples of {multiple}, got {list(x.shape)}"
        )


def check_num_keypoints(num_keypoints: int) -> None:
    """Raise a ValueError unless a network's number of keypoints is positive."""
    if num_keypoints < 1:
        raise ValueError(f"num_keypoints must be at least 1, got {num_keypoints}")


def channels_last(module: nn.Module) -> nn.Module:
    """Convert the module's parameters to channels-last, in which CPU convolutions run fastest; returns the module."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batch_norm(
    weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with eval-mode batch norm folded in.

    `weight` is [C, I, k, k] with the *output* channels in dimension 0, as they are in all but dense transposed
    convolutions; the batch norm's tensors are [C]. A bias of the convolution has to be taken off `mean` before. Returns
    the scaled weight (same shape) and the bias [C].
    """
    assert mean is not None and var is not None
    scale = gamma * torch.rsqrt(var + eps)
    return weight * scale.view(-1, 1, 1, 1), beta - mean * scale
