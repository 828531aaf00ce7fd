"""From images and crops to network input, on any device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpose.geometry import Array, invert_affine
from fastpose.images import channels_first

# ImageNet statistics of RGB in [0, 1]; every network here is trained with them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(crops: Tensor) -> Tensor:
    """uint8 RGB [B, 3, H, W] -> float32 [B, 3, H, W], channels-last, zero mean and unit variance over ImageNet."""
    pixels = crops.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    rows = pixels.flatten(2)  # whole rows at a time, in place: ten times faster than broadcasting over three channels
    for statistic, apply in ((MEAN, rows.sub_), (STD, rows.div_)):
        apply((torch.tensor(statistic, device=crops.device) * 255).repeat(pixels.shape[2]))
    return pixels.permute(0, 3, 1, 2)


def planes_on(device: torch.device, image: Any, channel_order: str) -> Tensor | None:
    """A uint8 colour image [3, H, W] or [H, W, 3] that is on `device` already, as RGB [3, H, W]; None for all else."""
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or not image.numel():
        return None
    if image.device.type != device.type or device.index not in (None, image.device.index):
        return None
    planes = image.detach() if channels_first(image.shape) else image.detach().permute(2, 0, 1)
    if planes.shape[0] != 3:
        return None
    return planes.flip(0) if channel_order == "bgr" else planes


def warp_crops(image: Tensor, matrices: Array, size: tuple[int, int], antialias: bool = True) -> Tensor:
    """Crops of an image, on the device it is on; pixels outside the image are black.

    The same as `geometry.warp_crop` for each matrix, which OpenCV does on the host, but for how a crop that shrinks the
    image is smoothed: by the mean over squares of whole image pixels and, where that leaves more than 1.5 of them to a
    crop pixel, of four samples per crop pixel.

    Args:
        image: uint8 [3, H, W], any strides.
        matrices: float64 [B, 2, 3], from image pixels to crop pixels.
        size: (height, width) of the crops.

    Returns:
        uint8 [B, 3, height, width].

    Raises:
        ValueError: another dtype or shape.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"image must be uint8 [3, H, W] with pixels, got {image.dtype} {list(image.shape)}")
    matrices = np.asarray(matrices, np.float64)
    if matrices.ndim != 3 or matrices.shape[1:] != (2, 3):
        raise ValueError(f"matrices must be [B, 2, 3], got {list(matrices.shape)}")
    crops = torch.empty(len(matrices), 3, *size, dtype=torch.uint8, device=image.device)
    shrunk = 1 / np.sqrt(np.abs(np.linalg.det(matrices[:, :, :2])))  # image pixels per crop pixel
    reduce = np.maximum(np.floor(shrunk), 1) if antialias else np.ones(len(matrices))
    reduce = np.minimum(reduce, max(image.shape[1:])).astype(int)
    samples = np.where(antialias & (shrunk / reduce > 1.5), 2, 1)
    planes = image.to(torch.float32)[None]
    for way in sorted(set(zip(reduce.tolist(), samples.tolist(), strict=True))):
        chosen = np.flatnonzero((reduce == way[0]) & (samples == way[1]))
        small = planes
        if way[0] > 1:
            small = nn.functional.avg_pool2d(planes, way[0], ceil_mode=True, count_include_pad=False)
        back = (invert_affine(matrices[chosen]) + [[0, 0, 0.5]]) / way[0] - [[0, 0, 0.5]]  # to pixels of `small`
        crops[torch.from_numpy(chosen).to(image.device)] = _sample(small, back, size, way[1])
    return crops


def _sample(image: Tensor, back: Array, size: tuple[int, int], samples: int) -> Tensor:
    """Bilinear samples, uint8 [B, 3, *size], of float [1, 3, H, W] at crop pixels taken back by [B, 2, 3]."""
    height, width = size
    # -1 and 1 are the outer edges of the image's outer pixels
    sides = np.array(image.shape[:1:-1])
    unit = (back + [[0, 0, 0.5]]) * (2 / sides)[:, None] - [[0, 0, 1]]
    theta = torch.from_numpy(unit).to(image.device, torch.float32)
    within = (torch.arange(samples, device=image.device) + 0.5) / samples - 0.5
    ys, xs = ((torch.arange(n, device=image.device)[:, None] + within).flatten() for n in (height, width))
    grid = (
        xs[:, None] * theta[:, None, None, :, 0]
        + (ys[:, None] * theta[:, None, :, 1] + theta[:, None, :, 2])[:, :, None]
    )
    # corners aligned would go to cuDNN, which copies the image for every crop
    crops = nn.functional.grid_sample(image.expand(len(back), -1, -1, -1), grid, align_corners=False)
    if samples > 1:
        crops = nn.functional.avg_pool2d(crops, samples)
    return crops.round().to(torch.uint8)
