"""F. Zhang et al., "Distribution-Aware Coordinate Representation for Human Pose Estimation" (DARK), CVPR 2020."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastpose.codecs.base import (
    GaussianCodec,
    Neighbours,
    blur,
    gaussian_maps,
    masked_targets,
    newton_step,
    opencv_taps,
)


@dataclass(frozen=True)
class DarkHeatmapCodec(GaussianCodec):
    """Gaussian around the exact position; decoded by one Newton step on the logarithm of the smoothed map.

    The map is smoothed by a Gaussian ("modulation") and the step goes from the maximum of the map as it was. Crops,
    cells and flip test are those of `MSRAHeatmapCodec`; the Gaussian has no cut-off.

    `decode` equals the authors' and `MSRAHeatmap(unbiased=True)` of mmpose: no step within two cells of the border or
    if the Hessian has no inverse. As there, the length of the step is not limited. Where the smoothed map has nothing
    above 0, theirs turns it upside down and steps from there; here there is no step.

    Attributes:
        kernel: taps of the smoothing, odd; the authors use 11 for a sigma of 2 and 17 for 3.
        stride, sigma, hardest, flip_shift: see `GaussianCodec`.
    """

    convention: ClassVar[str] = "hrnet"
    draws_outside: ClassVar[bool] = True

    kernel: int = 11
    flip_shift: int = field(default=1, kw_only=True)
    type: str = field(default="dark", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel)

    def encode(self, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        centres = keypoints.masked_fill(~valid.unsqueeze(-1), 0.0) / self.stride
        # weightless as in the original: nothing within three sigma (and a cell to the right) is on the map
        extent = centres.new_tensor([size[1], size[0]])
        near = (centres - 3 * self.sigma < extent).all(-1) & (centres + 3 * self.sigma + 1 >= 0).all(-1)
        everywhere = torch.full_like(centres, torch.inf)
        return masked_targets(gaussian_maps(centres, self.sigma, size, -everywhere, everywhere), valid & near)

    def _position(self, heatmaps: Tensor, score: Tensor, x: Tensor, y: Tensor) -> Tensor:
        height, width = heatmaps.shape[2:]
        at = LogNeighbours(heatmaps, score, x, y, self.kernel, 1e-10, torch.inf)
        dx, dy = 0.5 * (at(1, 0) - at(-1, 0)), 0.5 * (at(0, 1) - at(0, -1))
        dxx = 0.25 * (at(2, 0) - 2 * at(0, 0) + at(-2, 0))
        dyy = 0.25 * (at(0, 2) - 2 * at(0, 0) + at(0, -2))
        dxy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
        inner = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2) & at.meaningful
        step = torch.where(inner.unsqueeze(-1), newton_step(dx, dy, dxx, dxy, dyy), 0.0)
        return (torch.stack([x, y], dim=-1) + step) * self.stride


def check_kernel(kernel: int) -> None:
    """Raise ValueError unless `kernel` is an odd number of taps."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be an odd number of taps, got {kernel}")


class LogNeighbours:
    """Logarithm of smoothed maps around the maxima x, y [B, K] of the maps themselves: ``n(dx, dy)`` is [B, K].

    The smoothed map is scaled to the maximum of the map, `peak` [B, K], and clamped to [low, high]. `meaningful`, bool
    [B, K], is false where the map or the smoothed map has nothing above 0.
    """

    def __init__(
        self, heatmaps: Tensor, peak: Tensor, x: Tensor, y: Tensor, kernel: int, low: float, high: float
    ) -> None:
        smooth = blur(torch.nan_to_num(heatmaps, nan=0.0), heatmaps.new_tensor(opencv_taps(kernel)))
        smooth_peak = smooth.amax((2, 3))
        self.meaningful = (peak > 0) & (smooth_peak > 0)
        self.scale = torch.where(self.meaningful, peak / smooth_peak, 1.0)
        self.near = Neighbours(smooth, x, y)
        self.low, self.high = low, high

    def __call__(self, dx: int, dy: int) -> Tensor:
        return (self.near(dx, dy) * self.scale).clamp(self.low, self.high).log()
