"""Associative embedding for bottom-up networks: A. Newell et al., "Associative Embedding: End-to-End Learning for Joint
Detection and Grouping", NeurIPS 2017; B. Cheng et al., "HigherHRNet: Scale-Aware Representation Learning for Bottom-Up
Human Pose Estimation", CVPR 2020, whose targets, losses and decoding these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastpose.codecs.base import check_above_zero, check_at_least, gaussian_maps
from fastpose.grouping import group_people

Array = NDArray[Any]


@dataclass(frozen=True)
class AssociativeEmbeddingCodec:
    """The first output holds heatmaps and tag maps, [B, 2K, H/4, W/4]; finer ones heatmaps only, [B, K, H/2, W/2].

    The network sees the whole image, resized as `fastpose.geometry.whole_image_matrix` says.
    Heatmaps approach Gaussians of maximum 1 around all people's keypoints, tag maps have similar values where the
    keypoints are of one person. A keypoint belongs to the cell whose pixels it lies in: cell k of stride s is for the
    positions from ``s * k`` up to ``s * (k + 1)``.

    Attributes:
        stride: input pixels per cell of the first output.
        sigma: standard deviation of the targets in cells, at every resolution.
        push, pull: weights of the two losses on the tags.
        background: weight of the cells that no Gaussian reaches in the heatmaps' loss. HigherHRNet has 1; with 0.1, as
            in DEKR (Z. Geng et al., CVPR 2021), the heatmaps of a network that is not sure are higher: raise
            `detection_threshold`, to 0.3 or so.
        position: weight of `position_loss` on the heatmaps, 0 in HigherHRNet. Of squared differences a new network
            learns slowly where peaks are, since zero everywhere is nearly right.
        max_people, detection_threshold, tag_threshold, window, refine: of `fastpose.grouping.group_people`.
    """

    stride: int = 4
    sigma: float = 2.0
    push: float = 1e-3
    pull: float = 1e-3
    background: float = 1.0
    position: float = 0.0
    max_people: int = 30
    detection_threshold: float = 0.1
    tag_threshold: float = 1.0
    window: int = 5
    refine: bool = True
    type: str = field(default="associative", init=False)

    def __post_init__(self) -> None:
        check_at_least(self, stride=1, push=0, pull=0, background=0, position=0, max_people=1, detection_threshold=0)
        check_above_zero(self, "sigma", "tag_threshold")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"codec.window must be an odd number of cells, got {self.window}")

    def encode(self, keypoints: Tensor, valid: Tensor, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
        """Training targets at one resolution.

        Args:
            keypoints: float [B, N, K, 2], (x, y) in input pixels, of N people; valid: bool [B, N, K], false also for
                people that are not there.
            size: (height, width) of the maps in cells; stride: input pixels per cell.

        Returns:
            heatmaps [B, K, H, W], the maximum over people; and the cell of each keypoint as ``y * W + x``, int64
            [B, N, K], -1 where not valid or not on the map.
        """
        cells = torch.floor(keypoints.masked_fill(~valid.unsqueeze(-1), 0.0) / stride)
        inside = valid & (cells >= 0).all(-1) & (cells < cells.new_tensor([size[1], size[0]])).all(-1)
        heatmaps = keypoints.new_zeros(keypoints.shape[0], keypoints.shape[2], *size)
        reach = 3 * self.sigma + 1
        # one person after the other: all at once would take N times the memory
        for n in range(keypoints.shape[1]):
            centre = cells[:, n]
            maps = gaussian_maps(centre, self.sigma, size, centre - reach, centre + reach)
            heatmaps = torch.maximum(heatmaps, maps * inside[:, n, :, None, None])
        index = cells[..., 1] * size[1] + cells[..., 0]
        return heatmaps, torch.where(inside, index, -1.0).long()

    def loss(self, outputs: Sequence[Tensor], keypoints: Tensor, valid: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum of the losses of `losses` with the weights `push` and `pull`; a scalar."""
        heatmap, push, pull = self.losses(outputs, keypoints, valid, mask)
        return heatmap + self.push * push + self.pull * pull

    def losses(
        self, outputs: Sequence[Tensor], keypoints: Tensor, valid: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses on heatmaps and tags, averaged over the batch.

        * Heatmaps: mean squared difference over all cells and keypoints, summed over the resolutions; cells where the
          target is 0 count by the factor `background`. With `position`, so many times `position_loss` are added.
        * Push: ``sum over n != m of exp(-(t_n - t_m)^2) / (2 N (N - 1))`` of the mean tags t_n of an image's N people
          with at least one keypoint; 0 for fewer than two. (mmpose also adds the terms n = m, a constant.)
        * Pull: mean over people of the mean squared difference of their keypoints' tags to t_n.

        Args:
            outputs: the network's; keypoints, valid: as for `encode`.
            mask: [B, H, W] in input pixels, 0 where crowds or unlabelled people are; there heatmaps do not count.
        """
        k = keypoints.shape[2]
        height = outputs[0].shape[2] * self.stride
        heatmap_loss = outputs[0].new_zeros(())
        for i, output in enumerate(outputs):
            size = (output.shape[2], output.shape[3])
            target, index = self.encode(keypoints, valid, size, height // size[0])
            if i == 0:
                first_index = index
            target = target.to(output.dtype)
            squared = (output[:, :k] - target) ** 2
            if self.background != 1.0:
                squared = torch.where(target > 0, squared, self.background * squared)
            counts = self._counts(mask, outputs[0], size)
            if counts is not None:
                squared = squared * counts
            heatmap_loss = heatmap_loss + squared.sum() / max(squared.numel(), 1)
            if self.position:
                heatmap_loss = heatmap_loss + self.position * position_loss(output[:, :k], target, counts)
        push, pull = tag_losses(outputs[0][:, k:], first_index)
        return heatmap_loss, push, pull

    def imitation_loss(self, outputs: Sequence[Tensor], heatmaps: Tensor, mask: Tensor | None = None) -> Tensor:
        """`position_loss` with where a trained network sees the keypoints, a scalar.

        It is summed over the resolutions, times `position`.

        heatmaps: [B, K, h, w] of the finest resolution; a map that is 0 everywhere does not count.
        mask: as for `losses`.
        """
        total = outputs[0].new_zeros(())
        for output in outputs:
            size = (output.shape[2], output.shape[3])
            target = F.adaptive_avg_pool2d(heatmaps, size)
            total = total + position_loss(output[:, : heatmaps.shape[1]], target, self._counts(mask, outputs[0], size))
        return self.position * total

    def _counts(self, mask: Tensor | None, first: Tensor, size: tuple[int, int]) -> Tensor | None:
        """The cells that count, bool [B, 1, *size], from a mask in pixels; `first` is the network's first output."""
        if mask is None:
            return None
        height, width = first.shape[2] * self.stride, first.shape[3] * self.stride
        if mask.shape[1:] != (height, width):
            raise ValueError(f"mask must be [B, {height}, {width}], got {list(mask.shape)}")
        return F.adaptive_avg_pool2d(mask.to(first.dtype).unsqueeze(1), size) > 0.5

    def aggregate(
        self,
        outputs: Sequence[Tensor],
        mirrored: Sequence[Tensor] | None = None,
        flip_indices: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One heatmap per keypoint at the resolution of the network's input, and the tags.

        The heatmaps of all resolutions are enlarged to the finest (bilinear) and averaged, and averaged with those of
        the mirrored image; the tags of the mirrored image are further tags.

        Args:
            outputs: the network's for images [B, 3, H, W]; mirrored: for the mirrored images, if there is a flip test,
                with the skeleton's `flip_indices`.

        Returns:
            heatmaps float32 [B, K, H, W] and tags float32 [B, L, K, H, W], L = 1, or 2 with the flip test.
        """
        heatmaps, tags = self._combine(outputs)
        stacked = [tags]
        if mirrored is not None and flip_indices is not None:
            order = list(flip_indices)
            other_heatmaps, other_tags = (maps.flip(3)[:, order] for maps in self._combine(mirrored))
            heatmaps = (heatmaps + other_heatmaps) / 2
            stacked.append(other_tags)
        size = (outputs[0].shape[2] * self.stride, outputs[0].shape[3] * self.stride)
        k = heatmaps.shape[1]
        # the tags are enlarged in the same steps as the heatmaps, as in the original
        full = _resize(torch.cat([heatmaps, *stacked], 1), size)
        return full[:, :k], full[:, k:].unflatten(1, (len(stacked), k))

    def _combine(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean heatmaps and tags at the finest resolution of `outputs`, [B, K, h, w] each."""
        k = outputs[0].shape[1] // 2
        size = (outputs[-1].shape[2], outputs[-1].shape[3])
        first = _resize(outputs[0].float(), size)
        total = first[:, :k]
        for output in outputs[1:]:
            total = total + _resize(output.float(), size)
        return total / len(outputs), first[:, k:]

    def decode(self, heatmaps: Tensor, tags: Tensor) -> list[tuple[Array, Array]]:
        """People of each image from the result of `aggregate`: see `fastpose.grouping.group_people`."""
        settings: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("max_people", "detection_threshold", "tag_threshold", "window", "refine")
        }
        pairs = zip(heatmaps.cpu().numpy(), tags.cpu().numpy(), strict=True)
        return [group_people(h, np.ascontiguousarray(t), **settings) for h, t in pairs]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if (maps.shape[2], maps.shape[3]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def position_loss(heatmaps: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """How badly heatmaps [B, K, H, W] tell where the peaks of `targets` are, whatever their height; a scalar.

    The cross-entropy of the softmax over the cells of ten times the heatmap with the target scaled to sum 1; the mean
    over the heatmaps whose target is not 0 everywhere, 0 if there are none. Cells where `counts`, bool [B, 1, H, W], is
    false are left out.
    """
    logits = 10 * heatmaps
    if counts is not None:
        targets, logits = targets * counts, logits.masked_fill(~counts, -1e4)
    total = targets.sum((2, 3))
    expected = (logits * targets).sum((2, 3)) / total.clamp(min=1e-6)
    entropy = torch.logsumexp(logits.flatten(2), 2) - expected
    there = (total > 0).to(entropy.dtype)
    return (entropy * there).sum() / there.sum().clamp(min=1)


def tag_losses(tags: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Push and pull loss as `AssociativeEmbeddingCodec.losses` has them, means over the batch.

    tags: [B, K, H, W]; index: cell of each person's keypoints, int64 [B, N, K], -1 for none.
    """
    there = index >= 0
    weight = there.to(tags.dtype)
    # [B, K, N] cells of each keypoint's own map
    values = tags.flatten(2).gather(2, index.clamp(min=0).transpose(1, 2)).transpose(1, 2) * weight
    count = weight.sum(2)
    mean = values.sum(2) / count.clamp(min=1)  # [B, N]
    pull = ((values - mean.unsqueeze(2)) ** 2 * weight).sum(2) / count.clamp(min=1)
    person = (count > 0).to(tags.dtype)
    people = person.sum(1)
    pull = pull.sum(1) / people.clamp(min=1)
    both = person.unsqueeze(1) * person.unsqueeze(2)
    near = torch.exp(-((mean.unsqueeze(1) - mean.unsqueeze(2)) ** 2)) * both
    push = 0.5 * (near.sum((1, 2)) - people) / (people * (people - 1)).clamp(min=1)
    batch = max(tags.shape[0], 1)
    return push.sum() / batch, pull.sum() / batch
