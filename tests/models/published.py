"""Costs as the counters behind published figures find them."""

from __future__ import annotations

import torch
from torch import nn

from fastpose.counting import count_macs


def macs_by_output(model: nn.Module, size: int) -> int:
    """Multiply-accumulates as the published counters see them: transposed convolutions once per output position."""
    extra = 0

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal extra
        extra += layer.weight.numel() * (output[0, 0].numel() - inputs[0][0, 0].numel())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.ConvTranspose2d)]
    macs = count_macs(model, (size, size))
    for handle in handles:
        handle.remove()
    return macs + extra
