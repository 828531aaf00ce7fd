"""From uint8 crops to network input."""

from __future__ import annotations

import torch
from torch import Tensor

# ImageNet statistics of RGB in [0, 1]; every network here is trained with them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(crops: Tensor) -> Tensor:
    """uint8 RGB [B, 3, H, W] -> float32 [B, 3, H, W], zero mean and unit variance over ImageNet."""
    mean = torch.tensor(MEAN, device=crops.device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=crops.device).view(3, 1, 1) * 255
    # in place: new memory for every step would take longer than the arithmetic
    return crops.to(torch.float32, copy=True).sub_(mean).div_(std)
