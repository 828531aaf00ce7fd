"""Heatmap codecs: how keypoints become training targets and how network outputs become keypoints, side by side.

Heatmap cell k covers the input pixels ``stride * k ... stride * k + stride - 1``; its centre is at pixel
``stride * k + (stride - 1) / 2`` (1.5 for stride 4). All positions below are in crop pixels, (x, y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxHeatmapCodec:
    """The network's outputs are logits of a probability over heatmap cells, one distribution per keypoint.

    Training minimises the cross-entropy with a normalised Gaussian around the labelled position, which on few data and
    short schedules is far ahead of a mean squared error on heatmaps. Decoding takes the most probable neighbourhood:
    the probabilities are smoothed by a Gaussian of `blur` cells before the maximum is located (a broad, certain bump
    beats a narrow, accidental spike), and the maximum is refined below the cell by fitting a parabola to the logarithm
    of the smoothed map in x and in y, exact for a Gaussian.

    Attributes:
        stride: input pixels per heatmap cell.
        sigma: standard deviation of the training target in cells.
        blur: standard deviation in cells of the smoothing before decoding, 0 for none.
    """

    stride: int = 4
    sigma: float = 1.0
    blur: float = 1.0

    def loss(self, logits: Tensor, keypoints: Tensor, valid: Tensor) -> Tensor:
        """Mean cross-entropy over the valid keypoints; 0 if there are none.

        Args:
            logits: float [B, K, H, W].
            keypoints: float [B, K, 2], (x, y) in crop pixels; ignored where not valid.
            valid: bool [B, K].
        """
        height, width = logits.shape[2], logits.shape[3]
        weight = valid.to(logits.dtype)
        cells = ((keypoints - (self.stride - 1) / 2) / self.stride).masked_fill(~valid.unsqueeze(-1), 0.0)
        # a Gaussian is a product of one in x and one in y; so is its normalisation over the grid
        gx = self._gaussian(cells[..., 0], width)  # [B, K, W]
        gy = self._gaussian(cells[..., 1], height)  # [B, K, H]
        log_z = torch.logsumexp(logits.flatten(2), dim=2)
        expected = torch.einsum("bkhw,bkh,bkw->bk", logits, gy, gx)
        return ((log_z - expected) * weight).sum() / weight.sum().clamp(min=1.0)

    def _gaussian(self, centre: Tensor, length: int) -> Tensor:
        grid = torch.arange(length, device=centre.device, dtype=centre.dtype)
        return torch.softmax(-((grid - centre.unsqueeze(-1)) ** 2) / (2 * self.sigma**2), dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the cells of each map: [B, K, H, W] -> [B, K, H, W]."""
        return torch.softmax(logits.flatten(2).float(), dim=2).view_as(logits)

    def decode(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and scores of probability maps.

        Args:
            probabilities: float [B, K, H, W], non-negative.

        Returns:
            keypoints float32 [B, K, 2], (x, y) crop pixels, and scores float32 [B, K] in [0, 1]: the probability within
            the smoothing window, relative to that of a perfectly located keypoint. A map of NaN gives score 0 and the
            position of cell (0, 0).
        """
        p = torch.nan_to_num(probabilities.float(), nan=0.0)
        b, k, height, width = p.shape
        if p.numel() == 0:
            return p.new_zeros(b, k, 2), p.new_zeros(b, k)
        smooth = self._smooth(p)
        peak, index = smooth.flatten(2).max(dim=2)
        y, x = torch.div(index, width, rounding_mode="floor"), index % width
        log_map = torch.log(smooth.clamp(min=1e-12)).flatten(2)
        dx = self._parabola(log_map, index, x, width, 1)
        dy = self._parabola(log_map, index, y, height, width)
        cells = torch.stack([x.float() + dx, y.float() + dy], dim=-1)
        # the smoothed peak of the training target itself is 1 / (2 pi (sigma^2 + blur^2))
        score = (peak * (2 * math.pi * (self.sigma**2 + self.blur**2))).clamp(0.0, 1.0)
        return cells * self.stride + (self.stride - 1) / 2, score

    def _smooth(self, p: Tensor) -> Tensor:
        if self.blur <= 0:
            return p
        radius = math.ceil(3 * self.blur)
        taps = torch.arange(-radius, radius + 1, device=p.device, dtype=p.dtype)
        taps = torch.exp(-(taps**2) / (2 * self.blur**2))
        taps = taps / taps.sum()
        flat = p.reshape(-1, 1, p.shape[2], p.shape[3])
        flat = F.conv2d(flat, taps.view(1, 1, 1, -1), padding=(0, radius))
        flat = F.conv2d(flat, taps.view(1, 1, -1, 1), padding=(radius, 0))
        return flat.view_as(p)

    @staticmethod
    def _parabola(log_map: Tensor, index: Tensor, position: Tensor, length: int, step: int) -> Tensor:
        """Offset in [-0.5, 0.5] of the vertex of the parabola through the maximum and its neighbours."""
        inner = (position > 0) & (position < length - 1)
        here = log_map.gather(2, index.unsqueeze(-1)).squeeze(-1)
        before = log_map.gather(2, (index - step).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        after = log_map.gather(2, (index + step).clamp(max=log_map.shape[2] - 1).unsqueeze(-1)).squeeze(-1)
        curvature = 2 * here - before - after
        offset = (after - before) / (2 * curvature.clamp(min=1e-6))
        return torch.where(inner, offset.clamp(-0.5, 0.5), torch.zeros_like(offset))
