"""Heatmaps as probabilities, trained by cross-entropy; the codec of the networks trained by this package.

Heatmap cell k covers the input pixels ``stride * k ... stride * k + stride - 1``; its centre is at pixel
``stride * k + (stride - 1) / 2`` (1.5 for stride 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpose.codecs.base import HeatmapCodec, Neighbours, blur, check_above_zero, check_at_least, peaks


@dataclass(frozen=True)
class SoftmaxHeatmapCodec(HeatmapCodec):
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

    sigma: float = 1.0
    blur: float = 1.0
    type: str = field(default="softmax", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(self, "sigma")
        check_at_least(self, blur=0)

    def loss(self, outputs: Tensor, keypoints: Tensor, valid: Tensor) -> Tensor:
        """Mean cross-entropy over the valid keypoints; 0 if there are none.

        Args:
            outputs: logits, float [B, K, H, W].
            keypoints: float [B, K, 2], (x, y) in crop pixels; ignored where not valid.
            valid: bool [B, K].
        """
        weight = valid.to(outputs.dtype)
        gy, gx = self._gaussians(keypoints, valid, (outputs.shape[2], outputs.shape[3]))
        log_z = torch.logsumexp(outputs.flatten(2), dim=2)
        expected = torch.einsum("bkhw,bkh,bkw->bk", outputs, gy, gx)
        return ((log_z - expected) * weight).sum() / weight.sum().clamp(min=1.0)

    def imitation_loss(self, outputs: Tensor, heatmaps: Tensor) -> Tensor:
        """Mean cross-entropy with the probability maps `heatmaps` [B, K, H, W], which need not sum to 1."""
        if outputs.numel() == 0:
            return outputs.sum()
        target, logits = heatmaps.flatten(2), outputs.flatten(2)
        target = target / target.sum(2, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        return (torch.logsumexp(logits, 2) - (target * logits).sum(2)).mean()

    def encode(self, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Probability maps [B, K, H, W], which `loss` does not need as a whole, and weights; see `HeatmapCodec`."""
        gy, gx = self._gaussians(keypoints, valid, size)
        weight = valid.to(keypoints.dtype)
        return gy.unsqueeze(-1) * gx.unsqueeze(-2) * weight[..., None, None], weight

    def _gaussians(self, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A Gaussian is a product of one in y and one in x; so is its normalisation: [B, K, H] and [B, K, W]."""
        cells = ((keypoints - (self.stride - 1) / 2) / self.stride).masked_fill(~valid.unsqueeze(-1), 0.0)
        lines = []
        for axis, length in ((1, size[0]), (0, size[1])):
            grid = torch.arange(length, device=cells.device, dtype=cells.dtype)
            lines.append(torch.softmax(-((grid - cells[..., axis, None]) ** 2) / (2 * self.sigma**2), dim=-1))
        return lines[0], lines[1]

    def heatmaps(self, outputs: Tensor) -> Tensor:
        """Softmax over the cells of each map: [B, K, H, W] -> [B, K, H, W]."""
        return torch.softmax(outputs.flatten(2).float(), dim=2).view_as(outputs)

    def decode(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and scores of probability maps.

        Args:
            heatmaps: probabilities, float [B, K, H, W], non-negative.

        Returns:
            keypoints float32 [B, K, 2], (x, y) crop pixels, and scores float32 [B, K] in [0, 1]: the probability within
            the smoothing window, relative to that of a perfectly located keypoint. A map of NaN gives score 0 and the
            position of cell (0, 0).
        """
        p = torch.nan_to_num(heatmaps.float(), nan=0.0)
        b, k, height, width = p.shape
        if p.numel() == 0:
            return p.new_zeros(b, k, 2), p.new_zeros(b, k)
        smooth = self._smooth(p)
        peak, x, y = peaks(smooth)
        near = Neighbours(smooth, x, y)
        dx = self._parabola(near(-1, 0), near(0, 0), near(1, 0), (x > 0) & (x < width - 1))
        dy = self._parabola(near(0, -1), near(0, 0), near(0, 1), (y > 0) & (y < height - 1))
        cells = torch.stack([x + dx, y + dy], dim=-1)
        # the smoothed peak of the training target itself is 1 / (2 pi (sigma^2 + blur^2))
        score = (peak * (2 * math.pi * (self.sigma**2 + self.blur**2))).clamp(0.0, 1.0)
        return cells * self.stride + (self.stride - 1) / 2, score

    def _smooth(self, p: Tensor) -> Tensor:
        if self.blur <= 0:
            return p
        radius = math.ceil(3 * self.blur)
        taps = torch.arange(-radius, radius + 1, device=p.device, dtype=p.dtype)
        taps = torch.exp(-(taps**2) / (2 * self.blur**2))
        return blur(p, taps / taps.sum())

    @staticmethod
    def _parabola(before: Tensor, here: Tensor, after: Tensor, inner: Tensor) -> Tensor:
        """Offset in [-0.5, 0.5] of the vertex of the parabola through the logarithms; 0 where not `inner`."""
        before, here, after = (v.clamp(min=1e-12).log() for v in (before, here, after))
        curvature = 2 * here - before - after
        offset = (after - before) / (2 * curvature.clamp(min=1e-6))
        return torch.where(inner, offset.clamp(-0.5, 0.5), 0.0)
