"""What the heatmap codecs share: their interface, and batched arithmetic on maps [B, K, H, W] without a loop."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


def check_at_least(codec: object, **least: float) -> None:
    """Raise ValueError unless the named fields are numbers of at least so much."""
    for name, bound in least.items():
        if not bound <= getattr(codec, name) < math.inf:
            raise ValueError(f"codec.{name} must be at least {bound}, got {getattr(codec, name)}")


def check_above_zero(codec: object, *names: str) -> None:
    """Raise ValueError unless the named fields are positive numbers."""
    for name in names:
        if not 0 < getattr(codec, name) < math.inf:
            raise ValueError(f"codec.{name} must be above 0, got {getattr(codec, name)}")


@dataclass(frozen=True)
class HeatmapCodec(ABC):
    """How keypoints become training targets and a network's outputs become keypoints.

    Positions are (x, y) in crop pixels, integer = pixel centre. Everything is batched and stays on its device.

    Attributes:
        convention: the crop that the codec was made for, see `fastpose.geometry.crop_matrix`. It says which pixels of
            the image the crop shows; where in the crop a heatmap cell lies is the codec's own affair. So a network
            may be run with another convention: its keypoints then move by the resampling of the crop only.
        draws_outside: whether keypoints outside the crop are trained too, by the part of their Gaussian that is on the
            map, as in the original code.
        flip_shift: columns by which the heatmaps of the mirrored crop, mirrored back, are moved right before they are
            averaged with those of the crop; columns at the left stay. 1 for `MSRAHeatmapCodec` and `DarkHeatmapCodec`,
            whose cells are not symmetric, as in the original code (SHIFT_HEATMAP); otherwise 0.
        stride: input pixels per heatmap cell.
    """

    convention: ClassVar[str] = "fastpose"
    draws_outside: ClassVar[bool] = False

    stride: int = 4
    flip_shift: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_at_least(self, stride=1, flip_shift=0)

    def heatmaps(self, outputs: Tensor) -> Tensor:
        """What `decode` takes and the flip test averages, from the network's outputs [B, K, H, W]; float32."""
        return outputs.float()

    @abstractmethod
    def encode(self, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Training targets.

        Args:
            keypoints: float [B, K, 2]; ignored where not valid, may be NaN there.
            valid: bool [B, K].
            size: (height, width) of the heatmaps in cells.

        Returns:
            target [B, K, H, W], zero where the weight is, and weight [B, K], 0 or 1, both of the dtype of `keypoints`.
        """

    @abstractmethod
    def decode(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        """Keypoints float32 [B, K, 2] and scores float32 [B, K] from the result of `heatmaps`, [B, K, H, W].

        NaN counts as 0. Where a map has nothing above 0 the score is 0 and the position that of cell (0, 0).
        """

    @abstractmethod
    def loss(self, outputs: Tensor, keypoints: Tensor, valid: Tensor) -> Tensor:
        """Training loss, a scalar; 0 without valid keypoints. `outputs` [B, K, H, W], the rest as for `encode`."""

    @abstractmethod
    def imitation_loss(self, outputs: Tensor, heatmaps: Tensor) -> Tensor:
        """As `loss`, a scalar, with another network's heatmaps, as `heatmaps` returns them, for all keypoints' targets.

        outputs, heatmaps: float [B, K, H, W].
        """

    def average_flipped(self, heatmaps: Tensor, mirrored: Tensor, flip_indices: Sequence[int]) -> Tensor:
        """Mean of the heatmaps of a crop and of the mirrored crop, both [B, K, H, W].

        flip_indices: keypoint i of a mirrored person is keypoint ``flip_indices[i]`` (see `Skeleton`).
        """
        mirrored = mirrored.flip(3)[:, list(flip_indices)]
        if self.flip_shift:
            mirrored[..., self.flip_shift :] = mirrored[..., : -self.flip_shift].clone()
        return (heatmaps + mirrored) / 2


@dataclass(frozen=True)
class GaussianCodec(HeatmapCodec):
    """The networks' outputs are heatmaps that approach a Gaussian with maximum 1 around the keypoint.

    The score of a keypoint is the maximum of its map, as everywhere in the field; it can exceed 1 a little.

    Attributes:
        stride: input pixels per heatmap cell.
        sigma: standard deviation of the Gaussian in cells; by custom 2 for inputs of 256x192 and 3 for 384x288.
        hardest: the loss takes only so many keypoints of each person, those with the greatest loss (online hard
            keypoint mining, Y. Chen et al., "Cascaded Pyramid Network", CVPR 2018, uses 8); 0 for all.
    """

    sigma: float = 2.0
    hardest: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, hardest=0)
        check_above_zero(self, "sigma")

    def loss(self, outputs: Tensor, keypoints: Tensor, valid: Tensor) -> Tensor:
        """`heatmap_mse` with the targets of `encode`."""
        target, weight = self.encode(keypoints, valid, (outputs.shape[2], outputs.shape[3]))
        return heatmap_mse(outputs, target.to(outputs.dtype), weight.to(outputs.dtype), self.hardest)

    def imitation_loss(self, outputs: Tensor, heatmaps: Tensor) -> Tensor:
        return heatmap_mse(outputs, heatmaps, outputs.new_ones(outputs.shape[:2]))

    def decode(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        heatmaps = heatmaps.float()
        if heatmaps.numel() == 0:
            return heatmaps.new_zeros(*heatmaps.shape[:2], 2), heatmaps.new_zeros(heatmaps.shape[:2])
        score, x, y = peaks(heatmaps)
        return self._position(heatmaps, score, x, y), score

    @abstractmethod
    def _position(self, heatmaps: Tensor, score: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Crop pixels [B, K, 2] for float32 maps [B, K, H, W], not empty, and their `peaks`: the refined maximum."""


def heatmap_mse(outputs: Tensor, target: Tensor, weight: Tensor, hardest: int = 0) -> Tensor:
    """Half the mean of the squared differences, as in the code of SimpleBaseline and HRNet; scalar.

    mmpose's is twice that. The mean goes over all cells and keypoints, also over those of weight 0.

    Args:
        outputs, target: [B, K, H, W]; weight: [B, K], factor on both maps of a keypoint (so its square counts).
        hardest: if above 0, the mean over the `hardest` keypoints of each person with the greatest loss only.
    """
    if outputs.shape != target.shape or weight.shape != outputs.shape[:2]:
        raise ValueError(
            f"outputs and target must be [B, K, H, W] alike and weight [B, K], "
            f"got {list(outputs.shape)}, {list(target.shape)}, {list(weight.shape)}"
        )
    if outputs.numel() == 0:
        return outputs.sum()
    difference = (outputs - target) * weight[..., None, None]
    losses = 0.5 * difference.square().mean((2, 3))
    if hardest and hardest < losses.shape[1]:
        losses = losses.topk(hardest, dim=1).values
    return losses.mean()


def gaussian_maps(centres: Tensor, sigma: float, size: tuple[int, int], low: Tensor, high: Tensor) -> Tensor:
    """Gaussians of maximum 1, cut off: maps [..., H, W] for centres [..., 2] (x, y) in cells.

    Only cells from `low` to `high` [..., 2], both included, are above 0. A Gaussian is the product of one in x and one
    in y, so that H + W exponentials per map do.
    """

    def along(axis: int, length: int) -> Tensor:
        cell = torch.arange(length, device=centres.device, dtype=centres.dtype)
        line = torch.exp(-((cell - centres[..., axis, None]) ** 2) / (2 * sigma**2))
        inside = (cell >= low[..., axis, None]) & (cell <= high[..., axis, None])
        return torch.where(inside, line, torch.zeros_like(line))

    return along(1, size[0]).unsqueeze(-1) * along(0, size[1]).unsqueeze(-2)


def masked_targets(maps: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and weights: keypoints that are not valid, or of whose Gaussian no cell is on the map, weigh nothing."""
    weight = valid & (maps.flatten(-2).amax(-1) > 0) if maps.numel() else torch.zeros_like(valid)
    return torch.where(weight[..., None, None], maps, torch.zeros_like(maps)), weight.to(maps.dtype)


def blur(maps: Tensor, taps: Tensor) -> Tensor:
    """Convolve maps [B, K, H, W] with `taps` (odd number) in x and in y, zeros outside.

    As products with banded matrices, which is many times faster than a convolution of one channel on a CPU and has
    full precision on a GPU.
    """

    def band(length: int) -> Tensor:
        cell = torch.arange(length, device=maps.device)
        index = cell[:, None] - cell[None, :] + len(taps) // 2
        inside = (index >= 0) & (index < len(taps))
        return torch.where(inside, taps[index.clamp(0, len(taps) - 1)], torch.zeros_like(taps[0]))

    b, k, height, width = maps.shape
    # both products as one large matrix product each
    rows = maps.reshape(-1, width) @ band(width)
    columns = rows.view(b * k, height, width).transpose(1, 2).reshape(-1, height) @ band(height)
    return columns.view(b, k, width, height).transpose(2, 3)


@functools.lru_cache
def opencv_taps(length: int) -> tuple[float, ...]:
    """The Gaussian of `length` taps as cv2.GaussianBlur takes it if it is given no standard deviation.

    That is 0.3 (length / 2 - 1.5) + 0.8, except for tabulated short ones.
    """
    import cv2

    return tuple(float(v) for v in cv2.getGaussianKernel(length, 0, cv2.CV_32F)[:, 0])


def peaks(heatmaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of each map [B, K, H, W] with at least one cell: value, x and y [B, K], x and y as int64.

    Where the maximum is not above 0 (or NaN), value, x and y are 0.
    """
    width = heatmaps.shape[3]
    value, index = heatmaps.flatten(2).max(dim=2)
    # asking a GPU would wait for it, and an exported program would keep the answer
    always = heatmaps.is_cuda or torch.jit.is_tracing() or torch.compiler.is_compiling()
    if always or bool(value.isnan().any()):
        value, index = torch.nan_to_num(heatmaps, nan=0.0).flatten(2).max(dim=2)
    index = torch.where(value > 0, index, torch.zeros_like(index))
    y = torch.div(index, width, rounding_mode="floor")
    return value.clamp(min=0.0), index - y * width, y


class Neighbours:
    """Values of maps [B, K, H, W] around positions x, y [B, K]: ``n(dx, dy)`` is [B, K], clamped at the border."""

    def __init__(self, maps: Tensor, x: Tensor, y: Tensor) -> None:
        self.maps, self.x, self.y = maps.flatten(2), x, y
        self.height, self.width = maps.shape[2], maps.shape[3]

    def __call__(self, dx: int, dy: int) -> Tensor:
        x, y = (self.x + dx).clamp(0, self.width - 1), (self.y + dy).clamp(0, self.height - 1)
        return self.maps.gather(2, (y * self.width + x).unsqueeze(-1)).squeeze(-1)


def newton_step(dx: Tensor, dy: Tensor, dxx: Tensor, dxy: Tensor, dyy: Tensor) -> Tensor:
    """``-H^-1 g`` for gradients and Hessians of shape [B, K]: [B, K, 2]; 0 where H has no inverse."""
    determinant = dxx * dyy - dxy * dxy
    ok = determinant != 0
    determinant = torch.where(ok, determinant, torch.ones_like(determinant))
    step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], dim=-1) / determinant.unsqueeze(-1)
    return torch.where((ok & step.isfinite().all(-1)).unsqueeze(-1), step, torch.zeros_like(step))
