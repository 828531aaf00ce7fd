"""Distillation: the heatmaps of a trained network are targets beside the labels.

After G. Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), and F. Zhang et al., "Fast Human Pose
Estimation" (CVPR 2019). A teacher says which other positions were plausible, and something about unlabelled keypoints.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastpose.checkpoints import DEFAULT_WEIGHTS
from fastpose.codecs import HeatmapCodec
from fastpose.layers import channels_last
from fastpose.models._registry import create_from, read_weights
from fastpose.ops import use_fused
from fastpose.plan import NotOptimizable, optimize
from fastpose.skeletons import Skeleton
from fastpose.training.settings import TrainConfig


class Teacher:
    """A trained network that sees the crops of the one in training, enlarged to the size it was trained with itself.

    Raises:
        FileNotFoundError, ValueError: no such weights, or for other keypoints or with another kind of heatmaps.
    """

    def __init__(self, config: TrainConfig, skeleton: Skeleton, device: torch.device) -> None:
        shipped = config.teacher in DEFAULT_WEIGHTS
        checkpoint = read_weights("default", config.teacher) if shipped else read_weights(config.teacher, "auto")
        path, info = checkpoint.path, checkpoint.info()
        if info is None:
            raise ValueError(f"teacher {path}: expected a weights file of fastpose, which tells size and decoder")
        if info.get_skeleton() != skeleton:
            raise ValueError(f"teacher {path} knows the keypoints {info.skeleton}, the data have {skeleton.name}")
        assert isinstance(config.codec, HeatmapCodec)
        if info.codec.type != config.codec.type or not isinstance(info.codec, HeatmapCodec):
            raise ValueError(
                f"teacher {path} makes heatmaps of codec {info.codec.type!r}, the run has {config.codec.type!r}"
            )
        self.codec, self.own_codec, self.size = config.codec, info.codec, info.input_size
        self.model: nn.Module = channels_last(create_from(checkpoint, info.model).to(device))
        if device.type == "cpu" and use_fused():
            with contextlib.suppress(NotOptimizable):  # the network itself gives the same numbers, slower
                self.model = optimize(self.model, self.size)

    def loss(self, images: Tensor, outputs: Tensor) -> Tensor:
        """How far `outputs` [B, K, H, W] of the network in training are from the teacher's for the same images."""
        with torch.no_grad():
            enlarged = functional.interpolate(images, self.size, mode="bilinear", align_corners=False)
            heatmaps = self.own_codec.heatmaps(self.model(enlarged.contiguous(memory_format=torch.channels_last)))
            # a cell covers the same part of the crop on both scales
            heatmaps = functional.interpolate(heatmaps, outputs.shape[2:], mode="bilinear", align_corners=False)
        return self.codec.imitation_loss(outputs.float(), heatmaps)
