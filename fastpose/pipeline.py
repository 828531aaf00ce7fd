"""`PoseEstimator`: images in, poses out.

Top-down: image -> boxes (given or detected) -> crops of all images batched through the network -> heatmap decoding ->
original pixels -> rescoring -> one OKS-NMS call for all images -> `Poses`.

Bottom-up: image -> resized as a whole through the network -> heatmaps and tags -> grouping -> original pixels ->
`Poses`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from fastpose.checkpoints import WeightsInfo, describe_weights
from fastpose.codecs import AssociativeEmbeddingCodec, Codec, HeatmapCodec, get_codec
from fastpose.data.base import boxes_of_keypoints
from fastpose.detect import Detector, make_detector, whole_image
from fastpose.geometry import apply_affine, crop_matrix, invert_affine, warp_crop, whole_image_matrix
from fastpose.images import Array, to_rgb
from fastpose.layers import channels_last
from fastpose.models._registry import create_from, is_bottom_up, read_weights
from fastpose.ops import oks_nms, rescore, use_fused
from fastpose.plan import NotOptimizable
from fastpose.plan import optimize as fastpose_optimize
from fastpose.poses import Poses
from fastpose.preprocess import normalize
from fastpose.skeletons import Skeleton

# preparing an optimised network costs about as much as it saves on so many crops
OPTIMIZE_AFTER = 128


class BoxError(ValueError):
    """Boxes that cannot be used; the message says which and why."""


class PoseEstimator:
    """Find people's keypoints in images.

    Bottom-up networks, those with `AssociativeEmbeddingCodec`, find the people themselves: they need no detector, take
    no boxes and give no duplicates; the instance score is the mean keypoint score, and boxes are the keypoints' extent.

    Args:
        model: network name, see `fastpose.list_models`, or ``"auto"`` to find it by the weights.
        weights: ``"default"`` (shipped with the package) or the path of a file of any format that
            `fastpose.load_checkpoint` accepts. Input size, crop rule, decoder and skeleton come from the metadata of a
            fastpose file; for others' they are what is customary, see `checkpoints.describe_weights`, and can be
            corrected by the arguments from `skeleton` on.
        detector: where boxes come from when none are given: ``"auto"`` (OpenCV's HOG people detector, or the whole
            image where its keypoints score higher than those of HOG's people), ``"hog"``, ``"none"`` (the whole image)
            or a callable ``image -> boxes [P, 4] xyxy`` or ``-> (boxes, scores)``.
        device: where the network runs, e.g. ``"cpu"`` or ``"cuda"``; default CPU.
        batch_size: crops per forward pass; a whole image for a bottom-up network counts as 8.
        flip_test: average with the mirrored crop: more accurate, twice the work. None: as the weights recommend.
        nms: suppression of duplicates among detected people: ``"hard"``, ``"soft"``, ``"parallel"`` or ``"none"``;
            nms_threshold: see `fastpose.ops.oks_nms`. Given boxes are never suppressed.
        keypoint_threshold: keypoints that score less count neither for the instance score nor for OKS.
        optimize: run the network through `fastpose.optimize`, which takes some seconds to prepare. None: on a CPU, once
            it pays, which is after `OPTIMIZE_AFTER` crops, and where the network and the installation allow it.
        channel_order: ``"rgb"``, or ``"bgr"`` for arrays as OpenCV reads them.
        skeleton: the keypoints, a built-in skeleton's name or a `Skeleton`.
        input_size: (height, width) of the crops; for bottom-up networks the lesser number is the shorter side.
        padding: crop side in units of the box's longer side.
        codec: ``"softmax"``, ``"msra"``, ``"dark"``, ``"udp"``, ``"associative"`` or an instance from
            `fastpose.codecs`.

    Raises:
        ValueError, FileNotFoundError, ImportError: unknown model or detector, weights missing or unfit, settings that
            do not fit the network.
    """

    def __init__(
        self,
        model: str = "mobileposenet",
        weights: str | Path = "default",
        *,
        detector: str | Detector | None = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 32,
        flip_test: bool | None = None,
        nms: str = "hard",
        nms_threshold: float | None = None,
        keypoint_threshold: float = 0.1,
        optimize: bool | None = None,
        channel_order: str = "rgb",
        skeleton: str | Skeleton | None = None,
        input_size: tuple[int, int] | None = None,
        padding: float | None = None,
        codec: str | Codec | None = None,
    ) -> None:
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
        if nms not in ("hard", "soft", "parallel", "none"):
            raise ValueError(f"nms must be 'hard', 'soft', 'parallel' or 'none', got {nms!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device = torch.device("cpu" if device is None else device)
        checkpoint = read_weights(weights, model)
        network = create_from(checkpoint, model)
        name = skeleton.name if isinstance(skeleton, Skeleton) else skeleton
        info = describe_weights(checkpoint, model, name)
        changes: dict[str, Any] = {"skeleton": name, "padding": padding, "input_size": input_size}
        changes["codec"] = get_codec(codec) if isinstance(codec, str) else codec
        self.info: WeightsInfo = dataclasses.replace(info, **{k: v for k, v in changes.items() if v is not None})
        self.model_name = info.model
        self.skeleton: Skeleton = skeleton if isinstance(skeleton, Skeleton) else self.info.get_skeleton()
        _check_settings(self.info, self.skeleton, network)
        self.model = channels_last(network.to(self.device))
        if optimize:
            self.model = fastpose_optimize(self.model, self.info.input_size)
        pays = optimize is None and self.device.type == "cpu" and use_fused()
        self._crops_until_optimized = OPTIMIZE_AFTER if pays else math.inf
        self.bottom_up = isinstance(self.info.codec, AssociativeEmbeddingCodec)
        self.detector, self.notice = make_detector("none" if self.bottom_up else detector)
        self.try_whole_image = not self.bottom_up and isinstance(detector, str) and detector == "auto"
        self.batch_size = batch_size
        self.flip_test = self.info.flip_test if flip_test is None else flip_test
        self.nms, self.nms_threshold = nms, nms_threshold
        self.keypoint_threshold = keypoint_threshold
        self.channel_order = channel_order

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], boxes: Sequence[Any] | None = None) -> list[Poses]: ...
    @overload
    def __call__(self, images: Any, boxes: Any = None) -> Poses: ...
    def __call__(self, images: Any, boxes: Any = None) -> Poses | list[Poses]:
        """Poses in one image, or in each of a list of images (crops are batched across the list).

        Args:
            images: a path, a uint8 array [H, W, 3] (RGB, or as `channel_order` says; grey, RGBA and uint16 are
                converted), a PIL image, a tensor, or a list of those.
            boxes: [P, 4] xyxy in pixels for one image, a list of such for a list (an element may be None: detect).
                All given boxes are kept, in order.

        Raises:
            ImageError: an image that cannot be used. BoxError: boxes that are not finite, are inverted or lie outside
            the image. Both are ValueErrors.
        """
        single = not isinstance(images, (list, tuple))
        image_list = [images] if single else list(images)
        box_list = [boxes] if single else [None] * len(image_list) if boxes is None else list(boxes)
        if len(box_list) != len(image_list):
            raise BoxError(f"boxes must be a list of one entry per image, {len(image_list)}, got {len(box_list)}")
        arrays = [to_rgb(image, self.channel_order) for image in image_list]
        results = self.estimate(arrays, box_list)
        return results[0] if single else results

    def estimate(self, images: list[Array], boxes: Sequence[Any]) -> list[Poses]:
        """The same for RGB arrays [H, W, 3] and one entry of boxes (or None) per image."""
        if isinstance(self.info.codec, AssociativeEmbeddingCodec):
            if any(given is not None for given in boxes):
                raise BoxError(f"{self.model_name} finds people itself and cannot be told boxes: boxes must be None")
            return self._estimate_whole_images(images, self.info.codec)
        found = [self._boxes(image, given) for image, given in zip(images, boxes, strict=True)]
        counts = [len(b) for b, _, _ in found]
        index = np.repeat(np.arange(len(images)), counts)
        all_boxes = np.concatenate([b for b, _, _ in found]) if found else np.zeros((0, 4), np.float32)
        box_scores = np.concatenate([s for _, s, _ in found]) if found else np.zeros(0, np.float32)
        given = np.repeat([g for _, _, g in found], counts).astype(bool)

        if self.try_whole_image:
            extra = np.array([i for i, (_, _, g) in enumerate(found) if not g], np.int64)
            whole = [whole_image(images[i])[0] for i in extra]
            all_boxes = np.concatenate([all_boxes, *whole])
            box_scores = np.concatenate([box_scores, np.ones(len(extra), np.float32)])
            index, given = np.concatenate([index, extra]), np.concatenate([given, np.zeros(len(extra), bool)])
        keypoints, keypoint_scores = self._keypoints(images, all_boxes, index)
        scores = rescore(
            torch.from_numpy(keypoint_scores), torch.from_numpy(box_scores), self.keypoint_threshold
        ).numpy()
        keep = np.ones(len(index), bool)
        if self.try_whole_image:
            keep = self._whole_or_detected(keypoint_scores.mean(1), index, given, len(extra))
        if self.nms != "none" and not given[keep].all():
            at = np.flatnonzero(keep)
            scores[at], keep[at] = self._suppress(
                keypoints[at], keypoint_scores[at], scores[at], all_boxes[at], index[at], given[at]
            )

        results = []
        for i, image in enumerate(images):
            chosen = np.flatnonzero((index == i) & keep)
            if len(chosen) and not given[chosen[0]]:  # detected people: best first
                chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
            size = (image.shape[0], image.shape[1])
            results.append(
                Poses(
                    keypoints[chosen], keypoint_scores[chosen], all_boxes[chosen], scores[chosen], size, self.skeleton
                )
            )
        return results

    @torch.inference_mode()
    def _estimate_whole_images(self, images: list[Array], codec: AssociativeEmbeddingCodec) -> list[Poses]:
        """Poses by a bottom-up network."""
        flip_indices = self.skeleton.flip_indices if self.flip_test else None
        maps = [whole_image_matrix((i.shape[0], i.shape[1]), min(self.info.input_size)) for i in images]
        of_size: dict[tuple[int, int], list[int]] = {}
        for i, (_, size) in enumerate(maps):
            of_size.setdefault(size, []).append(i)
        results: dict[int, Poses] = {}
        step = max(1, self.batch_size // 8)  # an image has about as many pixels as 8 crops
        self._optimize_once_it_pays(8 * len(images))
        for size, indices in of_size.items():
            for start in range(0, len(indices), step):
                part = indices[start : start + step]
                resized = np.stack([warp_crop(images[i], maps[i][0], size, self.info.antialias) for i in part])
                x = normalize(torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device))
                x = x.contiguous(memory_format=torch.channels_last)
                mirrored = None if flip_indices is None else self.model(x.flip(3))
                found = codec.decode(*codec.aggregate(self.model(x), mirrored, flip_indices))
                for i, (people, scores) in zip(part, found, strict=True):
                    there = people[..., 2] > 0
                    keypoints = apply_affine(invert_affine(maps[i][0]), people[..., :2].astype(np.float64))
                    keypoints[~there] = 0
                    best = np.argsort(-scores, kind="stable")
                    image_size = (images[i].shape[0], images[i].shape[1])
                    boxes = boxes_of_keypoints(keypoints, there, 0.0)
                    poses = Poses(keypoints, people[..., 2], boxes, scores, image_size, self.skeleton)
                    results[i] = poses[best]
        return [results[i] for i in range(len(images))]

    def _boxes(self, image: Array, given: Any) -> tuple[Array, Array, bool]:
        if given is not None:
            checked = check_boxes(given, image.shape[0], image.shape[1])
            return checked, np.ones(len(checked), np.float32), True
        result = self.detector(image)
        found, scores = result if isinstance(result, tuple) else (result, None)
        checked = check_boxes(found, image.shape[0], image.shape[1], "the detector's boxes")
        if scores is None:
            return checked, np.ones(len(checked), np.float32), False
        scores = np.asarray(scores, np.float32).reshape(-1)
        if len(scores) != len(checked):
            raise BoxError(f"the detector returned {len(checked)} boxes and {len(scores)} scores")
        return checked, scores, False

    def prepare(self, crops: int) -> None:
        """Optimise the network now if that pays for so many crops still to come, as far as it is possible.

        Otherwise the first crops are estimated by another arithmetic, equal to rounding, than those that follow.
        """
        if self._crops_until_optimized < crops:
            self._crops_until_optimized = math.inf
            with contextlib.suppress(NotOptimizable):
                self.model = fastpose_optimize(self.model, self.info.input_size)

    def _optimize_once_it_pays(self, crops: int) -> None:
        """Count `crops` that have come."""
        self.prepare(crops)
        self._crops_until_optimized -= crops

    def _keypoints(self, images: list[Array], boxes: Array, index: Array) -> tuple[Array, Array]:
        k, size = self.skeleton.num_keypoints, self.info.input_size
        keypoints = np.zeros((len(boxes), k, 2), np.float32)
        scores = np.zeros((len(boxes), k), np.float32)
        codec = self.info.codec
        assert isinstance(codec, HeatmapCodec)
        flip_indices = self.skeleton.flip_indices if self.flip_test else None
        matrices = [crop_matrix(box, size, self.info.padding, convention=codec.convention) for box in boxes]
        self._optimize_once_it_pays(len(boxes))
        for start in range(0, len(boxes), self.batch_size):
            part = slice(start, min(start + self.batch_size, len(boxes)))
            pairs = zip(index[part], matrices[part], strict=True)
            crops = np.stack([warp_crop(images[i], m, size, self.info.antialias) for i, m in pairs])
            batch = torch.from_numpy(crops).permute(0, 3, 1, 2).to(self.device)
            points, point_scores = estimate_crops(self.model, batch, codec, flip_indices)
            back = invert_affine(np.stack(matrices[part]))
            keypoints[part] = apply_affine(back, points.cpu().numpy().astype(np.float64))
            scores[part] = point_scores.cpu().numpy()
        return keypoints, scores

    @staticmethod
    def _whole_or_detected(fit: Array, index: Array, given: Array, extra: int) -> Array:
        """Of each image keep the detected people or the whole image (the last `extra` entries): the better fit."""
        keep = np.ones(len(index), bool)
        for whole in range(len(index) - extra, len(index)):
            detected = np.flatnonzero((index[: len(index) - extra] == index[whole]) & ~given[: len(index) - extra])
            if len(detected) and fit[detected].max() > fit[whole]:
                keep[whole] = False
            else:
                keep[detected] = False
        return keep

    def _suppress(
        self, keypoints: Array, keypoint_scores: Array, scores: Array, boxes: Array, index: Array, given: Array
    ) -> tuple[Array, Array]:
        new_scores, keep = oks_nms(
            torch.from_numpy(keypoints),
            torch.from_numpy(keypoint_scores),
            torch.from_numpy(scores),
            torch.from_numpy((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])),
            torch.tensor(self.skeleton.sigmas),
            image_index=torch.from_numpy(index),
            method=self.nms,
            threshold=self.nms_threshold,
            keypoint_threshold=self.keypoint_threshold,
        )
        return np.where(given, scores, new_scores.numpy()), given | keep.numpy()


@torch.inference_mode()
def estimate_crops(
    model: nn.Module, crops: Tensor, codec: HeatmapCodec, flip_indices: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Keypoints [B, K, 2] in crop pixels and scores [B, K] from uint8 RGB crops [B, 3, h, w].

    flip_indices: of the skeleton, for the flip test; None to go without.
    """
    x = normalize(crops).contiguous(memory_format=torch.channels_last)
    heatmaps = codec.heatmaps(model(x))
    if flip_indices is not None:
        heatmaps = codec.average_flipped(heatmaps, codec.heatmaps(model(x.flip(3))), flip_indices)
    return codec.decode(heatmaps)


def _check_settings(info: WeightsInfo, skeleton: Skeleton, network: nn.Module) -> None:
    """Raise ValueError for what a user may have chosen and the network cannot do."""
    if skeleton.num_keypoints != info.num_keypoints:
        raise ValueError(
            f"skeleton {skeleton.name!r} has {skeleton.num_keypoints} keypoints, the weights have {info.num_keypoints}"
        )
    bottom_up = isinstance(info.codec, AssociativeEmbeddingCodec)
    if bottom_up != is_bottom_up(info.model):
        kind = "top-down" if bottom_up else "bottom-up"
        raise ValueError(f"{info.model} is a {kind} network, for which codec {info.codec.type!r} is not made")
    if not info.padding > 0:
        raise ValueError(f"padding must be positive, got {info.padding}")
    multiple = int(getattr(network, "input_multiple", 1))
    sides = tuple(info.input_size)
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 and n % multiple == 0 for n in sides):
        raise ValueError(f"input_size must be (height, width), positive multiples of {multiple}, got {sides}")


def check_boxes(boxes: Any, height: int, width: int, what: str = "boxes") -> Array:
    """`boxes` as float32 [P, 4].

    Raises:
        BoxError: not [P, 4] numbers, not finite, inverted or empty, or without overlap with the image.
    """
    if hasattr(boxes, "detach"):
        boxes = boxes.detach().cpu().numpy()
    try:
        array = np.asarray(boxes, np.float32)
    except (TypeError, ValueError):
        raise BoxError(f"{what} must be numbers [P, 4] (x1, y1, x2, y2), got {boxes!r:.80}") from None
    if array.size == 0:
        return np.zeros((0, 4), np.float32)
    if array.ndim == 1 and array.shape[0] == 4:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != 4:
        raise BoxError(f"{what} must be [P, 4] (x1, y1, x2, y2), got {list(array.shape)}")
    for i, (x1, y1, x2, y2) in enumerate(array.tolist()):
        text = f"{what}: box {i} ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
        if not np.isfinite(array[i]).all():
            raise BoxError(f"{text} is not finite")
        if x2 <= x1 or y2 <= y1:
            raise BoxError(f"{text} is inverted or empty; expected x1 < x2 and y1 < y2")
        if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
            raise BoxError(f"{text} lies outside the image of {width} x {height} pixels")
    return array
