"""Parameters and multiply-accumulates of a network."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastpose.ops import set_fused


def count_parameters(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image of `size` (height, width): those of convolutions and matrix products.

    Batch norm, activations, pooling and additions are not counted. A transposed convolution costs its weights once per
    *input* position, which is the arithmetic it needs; counters that multiply by output positions give four times as
    much at stride 2. `model` runs once, in eval mode on the reference path, and is left as it was.
    """
    fused = [m for m in model.modules() if getattr(m, "fused", False)]
    training = model.training
    set_fused(model.eval(), False)
    parameter = next(model.parameters())
    images = torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
    finally:
        for module in fused:
            module.fused = True  # type: ignore[assignment]
        model.train(training)
    return counter.get_total_flops() // 2
