"""Batch norm over the batches of all processes, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch norm in training take its statistics over all processes; names of parameters stay. Returns the model.

    On GPUs this is torch's own, which has no implementation for the CPU.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


class _Sum(torch.autograd.Function):
    """Sum over all processes. Each process has its own loss, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the batches of all processes together."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y = x.double() if x.dtype == torch.float64 else x.float()
        own = y.new_full((1,), y.numel() / y.shape[1])
        totals: Tensor = _Sum.apply(torch.cat([y.sum((0, 2, 3)), own]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centred = y - mean.view(1, -1, 1, 1)
        # a second pass: the mean of the squares less the square of the mean would lose digits
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        result = centred * torch.rsqrt(variance + self.eps).view(1, -1, 1, 1)
        if self.affine:
            result = result * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return result.to(x.dtype)
