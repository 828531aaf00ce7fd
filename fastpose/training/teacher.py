"""Distillation: the heatmaps of a trained network are targets beside the labels.

After G. Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), and F. Zhang et al., "Fast Human Pose
Estimation" (CVPR 2019). A teacher says which other positions were plausible, and something about unlabelled keypoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastpose.checkpoints import DEFAULT_WEIGHTS
from fastpose.codecs import AssociativeEmbeddingCodec, HeatmapCodec
from fastpose.layers import channels_last
from fastpose.models._registry import create_from, read_weights
from fastpose.ops import use_fused
from fastpose.plan import NotOptimizable, optimize
from fastpose.preprocess import MEAN, STD
from fastpose.skeletons import Skeleton
from fastpose.training.settings import TrainConfig

# A person's box is taken to be so much larger than the rectangle around the labelled keypoints: LSPET's boxes are.
BOX_OF_KEYPOINTS = 1.3


class Teacher:
    """A trained top-down network that sees what the one in training sees, enlarged to the size it was trained with.

    Of a bottom-up network's scenes it sees each person of whom at least half of the keypoints are labelled.

    Raises:
        FileNotFoundError, ValueError: no such weights, or for other keypoints, or with another kind of heatmaps.
    """

    def __init__(self, config: TrainConfig, skeleton: Skeleton, device: torch.device) -> None:
        shipped = config.teacher in DEFAULT_WEIGHTS
        checkpoint = read_weights("default", config.teacher) if shipped else read_weights(config.teacher, "auto")
        path, info = checkpoint.path, checkpoint.info()
        if info is None:
            raise ValueError(f"teacher {path}: expected a weights file of fastpose, which tells size and decoder")
        if info.get_skeleton() != skeleton:
            raise ValueError(f"teacher {path} knows the keypoints {info.skeleton}, the data have {skeleton.name}")
        assert config.codec is not None
        expected = config.codec.type if isinstance(config.codec, HeatmapCodec) else "softmax"
        if info.codec.type != expected or not isinstance(info.codec, HeatmapCodec):
            raise ValueError(
                f"teacher {path} makes heatmaps of codec {info.codec.type!r}, the run with {config.codec.type!r} needs "
                f"{expected!r}"
            )
        self.codec, self.own_codec = config.codec, info.codec
        self.size, self.padding = info.input_size, info.padding
        self.model: nn.Module = channels_last(create_from(checkpoint, info.model).to(device))
        if device.type == "cpu" and use_fused():
            with contextlib.suppress(NotOptimizable):  # the network itself gives the same numbers, slower
                self.model = optimize(self.model, self.size)

    def loss(self, images: Tensor, outputs: Any, targets: Sequence[Tensor]) -> Tensor:
        """How far `outputs` of the network in training are from the teacher's for the same images; a scalar.

        images: [B, 3, H, W], normalized; targets: the other arguments of the codec's loss.
        """
        if isinstance(self.codec, AssociativeEmbeddingCodec):
            size = (outputs[-1].shape[2], outputs[-1].shape[3])
            return self.codec.imitation_loss(
                [o.float() for o in outputs], self.scene_heatmaps(images, targets[0], targets[1], size)
            )
        with torch.no_grad():
            heatmaps = self._heatmaps(functional.interpolate(images, self.size, mode="bilinear", align_corners=False))
            # a cell covers the same part of the crop on both scales
            heatmaps = functional.interpolate(heatmaps, outputs.shape[2:], mode="bilinear", align_corners=False)
        return self.codec.imitation_loss(outputs.float(), heatmaps)

    @torch.no_grad()
    def scene_heatmaps(self, images: Tensor, keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
        """Where the teacher sees the keypoints of an image's people, each person's summing to 1: [B, K, *size].

        Args:
            images: [B, 3, H, W], normalized; keypoints: [B, N, K, 2], (x, y) in pixels; valid: bool [B, N, K].
            size: (height, width) of the maps.
        """
        image, person = torch.nonzero(2 * valid.sum(2) >= valid.shape[2], as_tuple=True)
        maps = images.new_zeros(len(images), valid.shape[2], *size)
        if not len(image):
            return maps
        points, there = keypoints[image, person], valid[image, person].unsqueeze(-1)
        low = points.masked_fill(~there, float("inf")).amin(1)
        high = points.masked_fill(~there, -float("inf")).amax(1)
        aspect = images.new_tensor([self.size[1] / self.size[0], 1.0])
        extent = ((high - low).clamp(min=1.0) / aspect).amax(1, keepdim=True) * aspect * BOX_OF_KEYPOINTS * self.padding
        # from -1 and 1, the outer edges of a crop, to those of the image, and back
        sides = images.new_tensor([images.shape[3], images.shape[2]])
        zoom, centre = extent / sides, (low + high + 1) / sides - 1
        black = -images.new_tensor(MEAN).div(images.new_tensor(STD)).view(3, 1, 1)  # what is outside the image
        crops = _window(images[image] - black, zoom, centre, self.size) + black
        seen = _window(self._heatmaps(crops), 1 / zoom, -centre / zoom, size)
        seen = seen / seen.sum((2, 3), keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)
        return maps.index_add(0, image, seen)

    def _heatmaps(self, crops: Tensor) -> Tensor:
        return self.own_codec.heatmaps(self.model(crops.contiguous(memory_format=torch.channels_last)))


def _window(maps: Tensor, zoom: Tensor, offset: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear samples [P, C, *size] of `maps` [P, C, H, W] at ``zoom * (x, y) + offset``, [P, 2] each, 0 outside.

    Coordinates go from -1 to 1 between the outer edges of the outer cells, on both sides.
    """
    theta = torch.cat([torch.diag_embed(zoom), offset.unsqueeze(2)], 2)
    grid = functional.affine_grid(theta, [len(maps), maps.shape[1], *size], align_corners=False)
    return functional.grid_sample(maps, grid, align_corners=False)
