"""Distillation: the heatmaps of a trained network are targets beside the labels.

After G. Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), and F. Zhang et al., "Fast Human Pose
Estimation" (CVPR 2019). A teacher says which other positions were plausible, and something about unlabelled keypoints.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastpose.codecs import AssociativeEmbeddingCodec, Codec, HeatmapCodec
from fastpose.data.base import KEYPOINT_MARGIN
from fastpose.layers import channels_last
from fastpose.models._registry import create_from, read_weights
from fastpose.ops import use_fused
from fastpose.plan import NotOptimizable, optimize
from fastpose.preprocess import MEAN, STD
from fastpose.skeletons import Skeleton, describe_difference
from fastpose.training.settings import TrainConfig

PEOPLE = 32  # of scenes through the teacher at a time


class Teacher:
    """A trained top-down network that sees the crops of the one in training, resized to what it was trained with.

    It sees them mirrored too where its weights recommend the flip test: a better teacher, above all of left and right.

    Raises:
        FileNotFoundError, ValueError: no such weights, or for other keypoints, or with another kind of heatmaps.
    """

    def __init__(self, config: TrainConfig, skeleton: Skeleton, device: torch.device) -> None:
        checkpoint = read_weights(*config.teacher_weights)
        path, info = checkpoint.path, checkpoint.info()
        if info is None:
            raise ValueError(f"teacher {path}: expected a weights file of fastpose, which tells size and decoder")
        if info.get_skeleton().names != skeleton.names:
            own = info.get_skeleton()
            raise ValueError(f"teacher {path} knows {own.name!r}, the data have {describe_difference(own, skeleton)}")
        assert config.codec is not None
        expected = config.codec.type if isinstance(config.codec, HeatmapCodec) else "softmax"
        if info.codec.type != expected or not isinstance(info.codec, HeatmapCodec):
            raise ValueError(f"teacher {path} makes heatmaps of codec {info.codec.type!r}, expected {expected!r}")
        if isinstance(config.codec, HeatmapCodec):
            _check_sizes(config, info.input_size, path)
        self.codec: Codec = config.codec
        self.own_codec, self.weight = info.codec, config.teacher_weight
        self.size, self.padding = info.input_size, info.padding
        self.flip_indices = info.get_skeleton().flip_indices if info.flip_test else None
        self.model: nn.Module = channels_last(create_from(checkpoint, info.model).to(device))
        if device.type == "cpu" and use_fused():
            with contextlib.suppress(NotOptimizable):  # the network itself gives the same numbers, slower
                self.model = optimize(self.model, self.size, "float32")

    def loss(self, images: Tensor, outputs: Any, targets: Sequence[Tensor]) -> Tensor:
        """The codec's loss, the labels' share of it reduced in favour of the teacher's heatmaps; a scalar.

        images: [B, 3, H, W], normalized; outputs: of the network in training for them; targets: the other arguments of
        the codec's loss.
        """
        codec = self.codec
        if isinstance(codec, AssociativeEmbeddingCodec):
            keypoints, valid, mask = targets
            maps = [output.float() for output in outputs]
            seen = self.scene_heatmaps(images, keypoints, valid, (maps[-1].shape[2], maps[-1].shape[3]))
            # heights of peaks and tags come from the labels alone
            labels = replace(codec, position=codec.position * (1 - self.weight)).loss(maps, *targets)
            return labels + self.weight * codec.imitation_loss(maps, seen, mask)
        with torch.no_grad():
            heatmaps = self._heatmaps(functional.interpolate(images, self.size, mode="bilinear", align_corners=False))
            # a cell covers the same part of the crop on both scales
            heatmaps = functional.interpolate(heatmaps, outputs.shape[2:], mode="bilinear", align_corners=False)
        maps = outputs.float()
        return torch.lerp(codec.loss(maps, *targets), codec.imitation_loss(maps, heatmaps), self.weight)

    @torch.no_grad()
    def scene_heatmaps(self, images: Tensor, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
        """Where keypoints of an image's people are, each person's summing to 1: [B, K, *size].

        The teacher sees every person of whom at least half of the keypoints are labelled, in a box around these. A
        keypoint that it sees outside the image has no map. Of the others the labels are taken.

        Args:
            images: [B, 3, H, W], normalized; keypoints: [B, N, K, 2], (x, y) in pixels; valid: bool [B, N, K].
            size: (height, width) of the maps.
        """
        codec = self.codec
        assert isinstance(codec, AssociativeEmbeddingCodec)
        taught = 2 * valid.sum(2) >= valid.shape[2]
        stride = images.shape[2] // size[0]
        labels, _ = codec.encode(keypoints, valid & ~taught.unsqueeze(2), size, stride)
        maps = labels / (2 * math.pi * codec.sigma**2)
        black = -images.new_tensor(MEAN).div(images.new_tensor(STD)).view(3, 1, 1)  # what is outside the image
        bright = images - black
        sides = images.new_tensor([images.shape[3], images.shape[2]])
        for chosen in torch.nonzero(taught).split(PEOPLE):
            if not len(chosen):  # nobody: splitting nothing gives one part
                break
            image, person = chosen.T
            zoom, centre = self._box(keypoints[image, person], valid[image, person], sides)
            seen = self._heatmaps(_window(bright[image], zoom, centre, self.size) + black)
            # cell c of the codec is for the positions from c to c + 1 strides, half a pixel from where its pixels are
            placed = _window(seen, 1 / zoom, (1 / sides - centre) / zoom, size)
            mass = placed.sum((2, 3))
            cells = zoom.prod(1).mul(size[0] * size[1] / (seen.shape[2] * seen.shape[3])).unsqueeze(1)
            inside = mass > 0.5 * cells * seen.sum((2, 3))
            placed *= torch.where(inside, 1 / mass, 0.0)[..., None, None]
            maps.index_add_(0, image, placed)
        return maps

    def _box(self, points: Tensor, valid: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """The crop around labelled keypoints [P, K, 2]: half its sides and its centre, [P, 2] in units of half images.

        From -1 to 1 are the outer edges of an image's outer pixels; `sides` are its width and height.
        """
        nowhere = ~valid.unsqueeze(2)
        low = points.masked_fill(nowhere, float("inf")).amin(1)
        high = points.masked_fill(nowhere, -float("inf")).amax(1)
        extent = (high - low).clamp(min=1.0)
        extent = extent + 2 * KEYPOINT_MARGIN * extent.amax(1, keepdim=True)
        aspect = sides.new_tensor([self.size[1] / self.size[0], 1.0])
        extent = (extent / aspect).amax(1, keepdim=True) * aspect * self.padding
        return extent / sides, (low + high + 1) / sides - 1

    def _heatmaps(self, crops: Tensor) -> Tensor:
        crops = crops.contiguous(memory_format=torch.channels_last)
        heatmaps = self.own_codec.heatmaps(self.model(crops))
        if self.flip_indices is None:
            return heatmaps
        mirrored = self.own_codec.heatmaps(self.model(crops.flip(3)))
        return self.own_codec.average_flipped(heatmaps, mirrored, self.flip_indices)


def _check_sizes(config: TrainConfig, size: tuple[int, int], path: object) -> None:
    """Raise ValueError if heatmaps of the teacher's `size` would be elsewhere than those of a stage."""
    assert config.codec is not None
    for stage in config.stages:
        if stage.size[0] * size[1] != stage.size[1] * size[0]:
            raise ValueError(
                f"teacher {path} sees crops of {size}: stages must have the same ratio of the sides, got {stage.size}"
            )
        # a cell of the other codecs is a place, which another size moves by a part of a cell
        if config.codec.type != "softmax" and stage.size != size:
            raise ValueError(
                f"teacher {path} sees crops of {size}: with codec {config.codec.type!r} stages must have that size, "
                f"got {stage.size}"
            )


def _window(maps: Tensor, zoom: Tensor, offset: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear samples [P, C, *size] of `maps` [P, C, H, W] at ``zoom * (x, y) + offset``, [P, 2] each, 0 outside.

    Coordinates go from -1 to 1 between the outer edges of the outer cells, on both sides. Where a cell of the result
    takes several of `maps`, it is the mean of several samples.
    """
    ratio = zoom * zoom.new_tensor([maps.shape[3] / size[1], maps.shape[2] / size[0]])
    samples = math.ceil(min(float(ratio.max()), 4.0))
    theta = torch.cat([torch.diag_embed(zoom), offset.unsqueeze(2)], 2)
    shape = [len(maps), maps.shape[1], size[0] * samples, size[1] * samples]
    grid = functional.affine_grid(theta, shape, align_corners=False)
    found = functional.grid_sample(maps, grid, align_corners=False)
    return found if samples == 1 else functional.avg_pool2d(found, samples)
