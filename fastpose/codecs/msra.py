"""Heatmaps as in SimpleBaseline and HRNet: B. Xiao et al., "Simple Baselines for Human Pose Estimation and Tracking",
ECCV 2018; K. Sun et al., "Deep High-Resolution Representation Learning for Human Pose Estimation", CVPR 2019."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastpose.codecs.base import GaussianCodec, Neighbours, gaussian_maps, masked_targets


@dataclass(frozen=True)
class MSRAHeatmapCodec(GaussianCodec):
    """Gaussian around the nearest cell; decoded as the maximum, moved a quarter of a cell towards its neighbours.

    Cell k lies at crop pixel ``stride * k``. Seen from the pixels that the cell covers, this is ``(stride - 1) / 2``
    pixels too far to the left, and so the heatmaps of a mirrored crop lie ``(stride - 1) / stride`` of a cell too far
    to the left: hence the shift by one cell in the flip test (`flip_shift`).

    `decode` equals `get_final_preds` of HRNet and `MSRAHeatmap` of mmpose, apart from maps without a value above 0
    (there HRNet gives the maximum as score, mmpose cell (-1, -1)). The two differ near the border, see `edges`.
    `encode` equals theirs for a whole `sigma` and keypoints in the crop. Left of it and above it they round towards
    zero, so that a Gaussian whose centre is up to 1.5 cells outside is drawn at cell 0, here where it belongs.

    Attributes:
        edges: where the maximum is moved: ``"hrnet"``: not at all in the two first and the last row and column;
            ``"mmpose"``: not in x in the two first columns and the last, not in y in the first row, and accordingly.
        stride, sigma, hardest, flip_shift: see `GaussianCodec`.
    """

    convention: ClassVar[str] = "hrnet"
    draws_outside: ClassVar[bool] = True

    edges: str = "hrnet"
    flip_shift: int = field(default=1, kw_only=True)
    type: str = field(default="msra", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edges not in ("hrnet", "mmpose"):
            raise ValueError(f"edges must be 'hrnet' or 'mmpose', got {self.edges!r}")

    def encode(self, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        centres = torch.floor(keypoints.masked_fill(~valid.unsqueeze(-1), 0.0) / self.stride + 0.5)
        reach = 3 * self.sigma
        return masked_targets(gaussian_maps(centres, self.sigma, size, centres - reach, centres + reach), valid)

    def _position(self, heatmaps: Tensor, score: Tensor, x: Tensor, y: Tensor) -> Tensor:
        height, width = heatmaps.shape[2:]
        near = Neighbours(heatmaps, x, y)
        inner_x, inner_y = (x > 1) & (x < width - 1), (y > 1) & (y < height - 1)
        if self.edges == "hrnet":
            move_x = move_y = inner_x & inner_y
        else:
            move_x, move_y = inner_x & (y > 0), inner_y & (x > 0)
        dx = torch.sign(near(1, 0) - near(-1, 0)).nan_to_num() * move_x
        dy = torch.sign(near(0, 1) - near(0, -1)).nan_to_num() * move_y
        return torch.stack([x + 0.25 * dx, y + 0.25 * dy], dim=-1) * self.stride
