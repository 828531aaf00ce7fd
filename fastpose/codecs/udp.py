"""J. Huang et al., "The Devil is in the Details: Delving into Unbiased Data Processing for Human Pose Estimation"
(UDP), CVPR 2020."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastpose.codecs.base import GaussianCodec, gaussian_maps, masked_targets, newton_step
from fastpose.codecs.dark import LogNeighbours, check_kernel


@dataclass(frozen=True)
class UDPHeatmapCodec(GaussianCodec):
    """Gaussian around the exact position, on heatmaps whose corner cells lie at the crop's corner pixels.

    Lengths are measured between pixel centres: a crop of w pixels is w - 1 long and its heatmap of W cells W - 1, so
    that cell k lies at crop pixel ``k (w - 1) / (W - 1)``. This is symmetric under mirroring and needs no shift in the
    flip test. Decoded by one Newton step on the logarithm of the smoothed map, like DARK but with differences between
    next neighbours and also at the border.

    `decode` equals `UDPHeatmap` of mmpose with ``heatmap_type="gaussian"`` in the image. In the crop, mmpose gives
    ``k w / (W - 1)``, which is not where its `encode` has cell k, and makes up for it on the way to the image. Where
    no value is above 0 mmpose refines cell (-1, -1), and where no smoothed value is, it turns the map upside down;
    here there is no step. The variant with offset maps (``"combined"``) is not here.

    Attributes:
        kernel: taps of the smoothing, odd; by custom 11 for a sigma of 2 and 17 for 3.
        stride, sigma, hardest: see `GaussianCodec`.
    """

    convention: ClassVar[str] = "udp"
    draws_outside: ClassVar[bool] = True

    kernel: int = 11
    type: str = field(default="udp", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel)

    def pixels_per_cell(self, height: int, width: int) -> tuple[float, float]:
        """Crop pixels between neighbouring cells of heatmaps of this size, in x and in y."""
        x, y = ((self.stride * n - 1) / max(n - 1, 1) for n in (width, height))
        return x, y

    def encode(self, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        cell = keypoints.new_tensor(self.pixels_per_cell(*size))
        centres = keypoints.masked_fill(~valid.unsqueeze(-1), 0.0) / cell
        nearest, reach = torch.floor(centres + 0.5), 3 * self.sigma
        return masked_targets(gaussian_maps(centres, self.sigma, size, nearest - reach, nearest + reach), valid)

    def _position(self, heatmaps: Tensor, score: Tensor, x: Tensor, y: Tensor) -> Tensor:
        at = LogNeighbours(heatmaps, score, x, y, self.kernel, 1e-3, 50.0)
        here = at(0, 0)
        dx, dy = 0.5 * (at(1, 0) - at(-1, 0)), 0.5 * (at(0, 1) - at(0, -1))
        tiny = torch.finfo(torch.float32).eps  # added to the diagonal as in the original
        dxx = at(1, 0) - 2 * here + at(-1, 0) + tiny
        dyy = at(0, 1) - 2 * here + at(0, -1) + tiny
        dxy = 0.5 * (at(1, 1) + at(-1, -1) + 2 * here - at(1, 0) - at(0, 1) - at(-1, 0) - at(0, -1))
        step = torch.where(at.meaningful.unsqueeze(-1), newton_step(dx, dy, dxx, dxy, dyy), 0.0)
        cell = step.new_tensor(self.pixels_per_cell(heatmaps.shape[2], heatmaps.shape[3]))
        return (torch.stack([x, y], dim=-1) + step) * cell
