"""`PoseEstimator`: images in, poses out.

Top-down: image -> boxes (given or detected) -> crops, batched across images, through the network -> heatmap decoding ->
original pixels -> rescoring -> OKS-NMS -> `Poses`.

Bottom-up: image -> resized as a whole through the network -> heatmaps and tags -> grouping -> original pixels ->
`Poses`.

Everything before the network runs ahead of it in other threads. An image is a `_Job` on this way, see `_run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from fastpose.checkpoints import WeightsInfo, check_number, describe_weights
from fastpose.codecs import AssociativeEmbeddingCodec, Codec, HeatmapCodec, get_codec
from fastpose.data.base import boxes_of_keypoints
from fastpose.detect import Detector, make_detector, whole_image
from fastpose.geometry import apply_affine, crop_matrix, invert_affine, warp_crop, whole_image_matrix
from fastpose.images import Array, ImageError, to_rgb
from fastpose.layers import channels_last
from fastpose.models._registry import check_codec, create_from, read_weights
from fastpose.ops import oks_nms, rescore, use_fused
from fastpose.ops._backend import WHY_NOT
from fastpose.ops.oks_nms import check_threshold
from fastpose.plan import PLAIN, NotOptimizable, Optimized, usual_precision
from fastpose.plan import optimize as fastpose_optimize
from fastpose.poses import Poses
from fastpose.preprocess import normalize, planes_on, warp_crops
from fastpose.skeletons import Skeleton
from fastpose.stream import reading_threads, run_ahead

# preparing an optimised network costs about as much as it saves on so many crops
OPTIMIZE_AFTER = 128
WHOLE_IMAGE = 8  # crops that have about as many pixels as the input of a bottom-up network
AHEAD = 32  # at most so many images are read ahead of the network, and so many crops of one image cut


class BoxError(ValueError):
    """Boxes that cannot be used; the message says which and why."""


Results = Generator[Poses | ImageError | BoxError, None, None]


@dataclass(eq=False)
class _Job:
    """An image on its way to its poses."""

    given: Any  # boxes, or None
    image: Array  # RGB, or empty once it is no longer needed
    size: tuple[int, int] = (0, 0)  # of the image
    error: ImageError | BoxError | None = None
    boxes: Array = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    box_scores: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    matrices: list[Array] = field(default_factory=list)  # from the image to each crop
    input_size: tuple[int, int] = (0, 0)  # of the crops
    antialias: bool = True
    ready: list[Array] = field(default_factory=list)  # the first crops
    planes: Tensor | None = None  # the image [3, H, W] on the device, if it is cropped there
    outputs: list[tuple[Array, Array]] = field(default_factory=list)  # what the codec found in each crop

    def cut(self) -> None:
        """Cut the crops, unless the device does; of very many only the first, to spare memory."""
        if self.planes is not None:
            self.image = self.image[:0]
            return
        self.ready = [self._warp(matrix) for matrix in self.matrices[:AHEAD]]
        if len(self.ready) == len(self.matrices):
            self.image = self.image[:0]

    def crop(self, i: int) -> Array:
        return self.ready[i] if i < len(self.ready) else self._warp(self.matrices[i])

    def _warp(self, matrix: Array) -> Array:
        return warp_crop(self.image, matrix, self.input_size, self.antialias)


F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """`function` outside the caller's `torch.autocast`: decoders work in float32, and precision is the estimator's.

    `torch.autocast` is a decorator too, but keeps what to restore in one object, which threads would share.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return cast(F, call)


class PoseEstimator:
    """Find people's keypoints in images.

    Bottom-up networks, those with `AssociativeEmbeddingCodec`, find the people themselves: they need no detector, take
    no boxes and give no duplicates; the instance score is the mean keypoint score, and boxes are the keypoints' extent.

    Args:
        model: network name, see `fastpose.list_models`, or ``"auto"``: that of the weights.
        weights: ``"default"`` (shipped with the package; of ``"auto"`` mobileposenet's) or the path of a file of any
            format that `fastpose.load_checkpoint` accepts. Input size, crop rule, decoder and skeleton come from the
            metadata of a fastpose file; for others' they are what is customary, see `checkpoints.describe_weights`, and
            can be corrected by the arguments from `skeleton` on.
        detector: where boxes come from when none are given: ``"auto"`` (OpenCV's HOG people detector, or the whole
            image where its keypoints score higher than those of HOG's people), ``"hog"``, ``"none"`` (the whole image)
            or a callable ``image -> boxes [P, 4] xyxy`` or ``-> (boxes, scores)``.
        device: where the network runs, e.g. ``"cpu"`` or ``"cuda"``; default CPU.
        batch_size: crops per forward pass; a whole image for a bottom-up network counts as 8.
        flip_test: average with the mirrored crop: often more accurate, twice the work. None: as the weights recommend.
        nms: suppression of duplicates among detected people: ``"hard"``, ``"soft"``, ``"parallel"`` or ``"none"``;
            nms_threshold: see `fastpose.ops.oks_nms`. Given boxes are never suppressed.
        keypoint_threshold: keypoints that score less count neither for the instance score nor for OKS.
        optimize: run the network through `fastpose.optimize`, which takes some seconds to prepare. None: on a CPU, once
            it pays, which is after `OPTIMIZE_AFTER` crops, and where the network and the installation allow it.
            On CUDA only if true.
        precision: of `fastpose.optimize`; ``"bfloat16"`` and ``"int8"`` are faster on processors that have them, a
            little less accurate, and prepare the network at once, as ``"bfloat16x3"`` does. ``"auto"``, the default,
            and ``"float32"`` leave that to `optimize`.
        crop_on_device: whole images go to `device` and are cropped there (`preprocess.warp_crops`), instead of by
            OpenCV in other threads on the host. A uint8 tensor that is there already, with boxes given, stays there.
        channel_order: ``"rgb"``, or ``"bgr"`` for arrays as OpenCV reads them.
        skeleton: the keypoints, a built-in skeleton's name or a `Skeleton`.
        input_size: (height, width) of the crops; for bottom-up networks the lesser number is the shorter side.
        padding: crop side in units of the box's longer side.
        codec: ``"softmax"``, ``"msra"``, ``"dark"``, ``"udp"``, ``"associative"`` or an instance from
            `fastpose.codecs` (``MSRAHeatmapCodec(flip_shift=0)`` for a flip test without the shift by one cell).

    Attributes:
        not_optimized: why the network is not run through `fastpose.optimize`; empty if it is, or will be once it pays.

    Raises:
        ValueError, FileNotFoundError, ImportError: unknown model or detector, weights missing or unfit, settings that
            do not fit the network.
    """

    def __init__(
        self,
        model: str = "auto",
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
        precision: str = "auto",
        crop_on_device: bool = False,
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
        if nms != "none":
            check_threshold(nms, nms_threshold)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device = _local_device("cpu" if device is None else device)
        if precision not in PLAIN:
            reason = WHY_NOT if self.device.type == "cpu" and not use_fused() else ""
            reason = "optimize=False switches it off" if optimize is False else reason
            if reason:
                raise ValueError(f"precision {precision!r} needs fastpose.optimize: {reason}")
            optimize = True
        checkpoint = read_weights(weights, model)
        network = create_from(checkpoint, model)
        info = describe_weights(checkpoint, model, skeleton)
        chosen = get_codec(codec) if isinstance(codec, str) else codec
        self.info, self.skeleton = with_settings(info, network, skeleton, chosen, input_size, padding, flip_test)
        self.model_name = self.info.model
        self.model = channels_last(network.to(self.device))
        if optimize:
            self.model = fastpose_optimize(self.model, self.info.input_size, precision)
        self._precision = precision
        self.not_optimized = ""
        if optimize is False:
            self.not_optimized = "switched off by optimize=False"
        elif not optimize and self.device.type != "cpu":
            self.not_optimized = f"on {self.device} only with optimize=True"
        elif not use_fused():
            self.not_optimized = WHY_NOT
        self._crops_until_optimized = math.inf if optimize or self.not_optimized else OPTIMIZE_AFTER
        self.bottom_up = isinstance(self.info.codec, AssociativeEmbeddingCodec)
        if self.bottom_up and (callable(detector) or detector == "hog"):
            raise ValueError(f"{self.model_name} finds people itself: it takes no detector")
        self.detector, self.notice = make_detector("none" if self.bottom_up else detector)
        self.own_detector = callable(detector) and not self.bottom_up
        self.try_whole_image = isinstance(detector, str) and detector == "auto" and self.detector is not whole_image
        self.batch_size = batch_size
        self.flip_test = self.info.flip_test
        self.nms, self.nms_threshold = nms, nms_threshold
        self.keypoint_threshold = keypoint_threshold
        self.crop_on_device = crop_on_device
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
        if not isinstance(images, (list, tuple)):
            return _all_poses(self._run([(images, boxes)], self.channel_order))[0]
        return _all_poses(self.stream(images, boxes))

    def estimate(self, images: Sequence[Array], boxes: Sequence[Any]) -> list[Poses]:
        """The same for RGB arrays [H, W, 3] and one entry of boxes (or None) per image."""
        return _all_poses(self._run(_pairs(images, boxes), "rgb"))

    def stream(self, images: Iterable[Any], boxes: Iterable[Any] | None = None) -> Results:
        """The poses of any number of images, one after the other, in the same order.

        Files are read, people detected and crops cut in threads of their own, up to 32 images ahead of the network (a
        detector of your own is called in this thread). Its batches are filled across images. Memory does not grow with
        the number of images, and one may stop at any time.

        Args:
            images: what a call takes, in a list, a generator or the like; also functions without arguments that return
                an image, which are called like files are read.
            boxes: as many entries, [P, 4] or None each.

        Yields:
            `Poses`, or the error in this image or its boxes.

        Raises:
            ValueError: a single image; another number of boxes than images, which of generators shows at the end only.
        """
        if isinstance(images, (str, Path)) or not isinstance(images, Iterable) or hasattr(images, "shape"):
            raise ValueError(f"stream takes several images, in a list for example, got a {type(images).__name__}")
        return self._run(_pairs(images, boxes), self.channel_order)

    def _run(self, pairs: Iterable[tuple[Any, Any]], channel_order: str) -> Results:
        """Images and their boxes through all steps; of a list of them all crops are treated alike, see `prepare`."""
        if isinstance(pairs, list):
            self.prepare(sum(self._least_crops(boxes) for _, boxes in pairs))
        ahead = 0 if isinstance(pairs, list) and len(pairs) < 2 else min(self.batch_size, AHEAD)
        # images that are on the device already are due on the caller's stream, which threads do not inherit
        here = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def read(pair: tuple[Any, Any]) -> _Job:
            with torch.cuda.stream(here):
                return self._read(*pair, channel_order)

        def read_and_find(pair: tuple[Any, Any]) -> _Job:
            with torch.cuda.stream(here):
                return self._find(self._read(*pair, channel_order))

        work = read if self.own_detector else read_and_find
        with contextlib.closing(run_ahead(work, pairs, ahead, reading_threads())) as jobs:
            yield from self._estimate(map(self._find, jobs) if self.own_detector else jobs)

    def _estimate(self, jobs: Iterable[_Job]) -> Results:
        """Take the jobs' crops through the network, in batches of one size."""
        step = max(1, self.batch_size // WHOLE_IMAGE) if self.bottom_up else self.batch_size
        enough = 4 * step if self.bottom_up else step  # whole images differ in size: choose among some
        begun: deque[_Job] = deque()
        crops: list[tuple[_Job, int]] = []  # of the jobs begun, those still to do

        def finished() -> Results:
            done: list[_Job] = []
            while begun and len(begun[0].outputs) == len(begun[0].matrices):
                done.append(begun.popleft())
            yield from self._results(done)

        failure: Exception | None = None
        source = iter(jobs)
        while True:
            try:
                job = next(source)
            except StopIteration:
                break
            except Exception as error:  # raised when the poses in all images before have been given
                failure = error
                break
            self._optimize_once_it_pays(len(job.matrices) * (WHOLE_IMAGE if self.bottom_up else 1))
            begun.append(job)
            crops += [(job, i) for i in range(len(job.matrices))]
            while len(crops) >= enough or (crops and len(begun) > enough):
                crops = self._estimate_batch(crops, step)
            yield from finished()
        while crops:
            crops = self._estimate_batch(crops, step)
        yield from finished()
        if failure is not None:
            raise failure

    def _estimate_batch(self, crops: list[tuple[_Job, int]], step: int) -> list[tuple[_Job, int]]:
        """Take the first crop and up to `step` - 1 more of its size through the network; returns the others."""
        size = crops[0][0].input_size
        chosen = [c for c in crops if c[0].input_size == size][:step]
        outputs = self._forward(self._crops(chosen))
        for (job, _), output in zip(chosen, outputs, strict=True):
            job.outputs.append(output)
        taken = set(chosen)
        return [c for c in crops if c not in taken]

    def _crops(self, chosen: list[tuple[_Job, int]]) -> Tensor:
        """Crops of one size, uint8 RGB [B, 3, h, w] on the device."""
        if not self.crop_on_device:
            return torch.from_numpy(np.stack([job.crop(i) for job, i in chosen])).permute(0, 3, 1, 2).to(self.device)
        crops = []
        for job, group in itertools.groupby(chosen, key=lambda c: c[0]):
            assert job.planes is not None
            matrices = np.stack([job.matrices[i] for _, i in group])
            crops.append(warp_crops(job.planes, matrices, job.input_size, job.antialias))
        return torch.cat(crops)

    @without_autocast
    @torch.inference_mode()
    def _forward(self, batch: Tensor) -> Sequence[tuple[Array, Array]]:
        """What the codec finds in each of the crops, uint8 RGB [B, 3, h, w], in crop pixels."""
        flip_indices = self.skeleton.flip_indices if self.flip_test else None
        codec = self.info.codec
        if isinstance(codec, AssociativeEmbeddingCodec):
            x = normalize(batch).contiguous(memory_format=torch.channels_last)
            mirrored = None if flip_indices is None else self.model(x.flip(3))
            return codec.decode(*codec.aggregate(self.model(x), mirrored, flip_indices))
        assert isinstance(codec, HeatmapCodec)
        points, scores = estimate_crops(self.model, batch, codec, flip_indices)
        return list(zip(points.cpu().numpy(), scores.cpu().numpy(), strict=True))

    def _read(self, image: Any, boxes: Any, channel_order: str) -> _Job:
        if self.crop_on_device and (boxes is not None or self.bottom_up):
            planes = planes_on(self.device, image, channel_order)
            if planes is not None:
                size = (planes.shape[1], planes.shape[2])
                return _Job(boxes, np.zeros((0, 0, 3), np.uint8), size, planes=planes)
        try:
            pixels = to_rgb(image, channel_order)
        except ImageError as error:
            return _Job(boxes, np.zeros(0, np.uint8), error=error)
        job = _Job(boxes, pixels, (pixels.shape[0], pixels.shape[1]))
        if self.crop_on_device:
            job.planes = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)
        return job

    def _find(self, job: _Job) -> _Job:
        """Find boxes, unless they are given, and cut the crops."""
        if job.error:
            return job
        try:
            if self.bottom_up:
                self._place_whole_image(job)
            else:
                self._find_boxes(job)
                self._place_crops(job)
        except BoxError as error:
            job.error = error
        else:
            job.cut()
        return job

    def _place_whole_image(self, job: _Job) -> None:
        if job.given is not None:
            raise BoxError(f"{self.model_name} finds people itself and cannot be told boxes: boxes must be None")
        matrix, job.input_size = whole_image_matrix(job.size, min(self.info.input_size))
        job.matrices, job.antialias = [matrix], self.info.antialias

    def _place_crops(self, job: _Job) -> None:
        codec = self.info.codec
        assert isinstance(codec, HeatmapCodec)
        job.input_size, job.antialias = self.info.input_size, self.info.antialias
        job.matrices = [
            crop_matrix(box, job.input_size, self.info.padding, convention=codec.convention) for box in job.boxes
        ]

    def _find_boxes(self, job: _Job) -> None:
        height, width = job.size
        if job.given is not None:
            job.boxes = check_boxes(job.given, height, width)
            job.box_scores = np.ones(len(job.boxes), np.float32)
            return
        result = self.detector(job.image)
        found, scores = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        job.boxes = box_array(found, "the detector's boxes")
        job.box_scores = np.ones(len(job.boxes), np.float32)
        if scores is not None:
            scores = scores.detach().cpu().float().numpy() if isinstance(scores, Tensor) else scores
            job.box_scores = np.array(scores, np.float32).reshape(-1)
            if len(job.box_scores) != len(job.boxes):
                raise BoxError(f"the detector returned {len(job.boxes)} boxes and {len(job.box_scores)} scores")
            if not np.isfinite(job.box_scores).all():
                raise BoxError(f"the detector's scores must be finite, got {job.box_scores.tolist()!s:.80}")
        usable = [not why_unusable(box, height, width) for box in job.boxes]  # one slip does not cost the others
        job.boxes, job.box_scores = job.boxes[usable], job.box_scores[usable]
        if self.try_whole_image:
            whole, score = whole_image(job.image)
            job.boxes = np.concatenate([job.boxes, whole])
            job.box_scores = np.concatenate([job.box_scores, score])

    def _results(self, jobs: list[_Job]) -> list[Poses | ImageError | BoxError]:
        """The poses of each image or its error; those of detected people without duplicates, the best first."""
        results: list[Poses | ImageError | BoxError] = []
        detected: list[tuple[int, Poses]] = []
        for job in jobs:
            poses = job.error or self._poses(job)
            if isinstance(poses, Poses) and job.given is None and not self.bottom_up:
                detected.append((len(results), poses))
            results.append(poses)
        kept = [poses for _, poses in detected]
        if self.nms != "none" and kept:
            kept = self._suppress(kept)
        for (i, _), poses in zip(detected, kept, strict=True):
            results[i] = poses[np.argsort(-poses.scores, kind="stable")]
        return results

    def _poses(self, job: _Job) -> Poses:
        """The poses of an image, from what the codec found in its crops."""
        if self.bottom_up:
            return self._poses_of_whole_image(job)
        if not job.outputs:
            return Poses.empty(job.size, self.skeleton)
        points, keypoint_scores = (np.stack(part) for part in zip(*job.outputs, strict=True))
        keypoints = apply_affine(invert_affine(np.stack(job.matrices)), points.astype(np.float64))
        scores = rescore(
            torch.from_numpy(keypoint_scores), torch.from_numpy(job.box_scores), self.keypoint_threshold
        ).numpy()
        poses = Poses(keypoints, keypoint_scores, job.boxes, scores, job.size, self.skeleton)
        if job.given is None and self.try_whole_image:  # the last one
            fit = keypoint_scores.mean(1)
            poses = poses[:-1] if len(fit) > 1 and fit[:-1].max() > fit[-1] else poses[-1]
        return poses

    def _poses_of_whole_image(self, job: _Job) -> Poses:
        (people, scores), matrix = job.outputs[0], job.matrices[0]
        there = people[..., 2] > 0
        keypoints = apply_affine(invert_affine(matrix), people[..., :2].astype(np.float64))
        keypoints[~there] = 0
        boxes = boxes_of_keypoints(keypoints, there, 0.0)
        poses = Poses(keypoints, people[..., 2], boxes, scores, job.size, self.skeleton)
        return poses[np.argsort(-scores, kind="stable")]

    def _suppress(self, images: list[Poses]) -> list[Poses]:
        """Without duplicates in each image, all in one call."""
        boxes = np.concatenate([poses.boxes for poses in images])
        counts = [len(poses) for poses in images]
        scores, keep = oks_nms(
            torch.from_numpy(np.concatenate([poses.keypoints for poses in images])),
            torch.from_numpy(np.concatenate([poses.keypoint_scores for poses in images])),
            torch.from_numpy(np.concatenate([poses.scores for poses in images])),
            torch.from_numpy((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])),
            torch.tensor(self.skeleton.sigmas, dtype=torch.float32),
            image_index=torch.arange(len(images)).repeat_interleave(torch.tensor(counts)),
            method=self.nms,
            threshold=self.nms_threshold,
            keypoint_threshold=self.keypoint_threshold,
        )
        parts = zip(images, scores.split(counts), keep.split(counts), strict=True)
        return [dataclasses.replace(poses, scores=s.numpy())[k.numpy()] for poses, s, k in parts]

    @property
    def precision(self) -> str:
        """What the products of the network are computed in so far: ``"auto"`` is decided when it is optimised."""
        if self._precision == "auto":
            return usual_precision() if isinstance(self.model, Optimized) else "float32"
        return self._precision

    def prepare(self, crops: int) -> None:
        """Optimise the network now if that pays for so many crops still to come, as far as it is possible.

        Otherwise the first crops are estimated by another arithmetic than those that follow, equal to rounding (with
        ``precision="auto"`` on a processor with AMX to that of bfloat16x3, 1e-5 of the largest heatmap).
        """
        if self._crops_until_optimized < crops:
            self._crops_until_optimized = math.inf
            try:
                self.model = fastpose_optimize(self.model, self.info.input_size, self._precision)
            except (NotOptimizable, ValueError, RuntimeError) as error:  # a network that the caller has put in place
                self.not_optimized = str(error)

    def _optimize_once_it_pays(self, crops: int) -> None:
        """Count `crops` that have come."""
        self.prepare(crops)
        self._crops_until_optimized -= crops

    def _least_crops(self, given: Any) -> int:
        """Crops to expect of an image with boxes `given`, which nobody has checked yet."""
        if self.bottom_up:
            return WHOLE_IMAGE
        countable = isinstance(given, (list, tuple)) or (hasattr(given, "shape") and len(given.shape) > 0)
        return len(given) if countable else 1


def _pairs(images: Iterable[Any], boxes: Iterable[Any] | None) -> Iterable[tuple[Any, Any]]:
    """The images with their boxes; a list if the images are."""
    if not isinstance(images, (list, tuple)):
        # copies: who yields frames one by one may use the same memory for the next while this one is waiting
        pairs = ((image, None) for image in images) if boxes is None else zip(images, boxes, strict=True)
        return ((_copied(image), _copied(entry)) for image, entry in pairs)
    if boxes is not None and not isinstance(boxes, Iterable):
        raise BoxError(f"boxes must be a list of one entry per image, got {boxes!r:.80}")
    entries = [None] * len(images) if boxes is None else list(boxes)
    if len(entries) != len(images):
        raise BoxError(f"boxes must be a list of one entry per image, {len(images)}, got {len(entries)}")
    return list(zip(images, entries, strict=True))


def _copied(value: Any) -> Any:
    """A copy of an array, tensor, PIL image or list of boxes; anything else, like a path, as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return [_copied(v) for v in value]
    is_pixels = isinstance(value, np.ndarray) or type(value).__module__.partition(".")[0] == "PIL"
    return value.copy() if is_pixels else value


def _all_poses(results: Results) -> list[Poses]:
    """The results; raises the first error among them."""
    poses = []
    with contextlib.closing(results):
        for result in results:
            if not isinstance(result, Poses):
                raise result
            poses.append(result)
    return poses


@without_autocast
@torch.inference_mode()
def estimate_crops(
    model: nn.Module, crops: Tensor, codec: HeatmapCodec, flip_indices: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """`keypoints_of_crops` in inference mode."""
    return keypoints_of_crops(model, crops, codec, flip_indices)


def keypoints_of_crops(
    model: nn.Module, crops: Tensor, codec: HeatmapCodec, flip_indices: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Keypoints [B, K, 2] in crop pixels and scores [B, K] from uint8 RGB crops [B, 3, h, w].

    flip_indices: of the skeleton, for the flip test; None to go without.
    """
    x = normalize(crops).contiguous(memory_format=torch.channels_last)
    heatmaps = codec.heatmaps(model(x))
    if flip_indices is not None:
        heatmaps = codec.average_flipped(heatmaps, codec.heatmaps(model(x.flip(3))), flip_indices)
    return codec.decode(heatmaps)


def _local_device(name: str | torch.device) -> torch.device:
    """The device called `name`, ``"cuda"`` with the number of the current GPU, which threads do not inherit."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {str(name)!r}")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"device {str(device)!r}: torch {torch.__version__} sees {count} GPUs")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def with_settings(
    info: WeightsInfo,
    network: nn.Module,
    skeleton: str | Skeleton | None,
    codec: Codec | None,
    input_size: tuple[int, int] | None,
    padding: float | None,
    flip_test: bool | None,
) -> tuple[WeightsInfo, Skeleton]:
    """`info` with what a user has chosen instead, where that is not None, and the keypoints.

    Raises:
        ValueError: something that the network cannot do.
    """
    name = skeleton.name if isinstance(skeleton, Skeleton) else skeleton
    changes = {
        "skeleton": name, "codec": codec, "input_size": input_size, "padding": padding, "flip_test": flip_test
    }  # fmt: skip
    info = dataclasses.replace(info, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    keypoints = skeleton if isinstance(skeleton, Skeleton) else info.get_skeleton()
    check_number(keypoints, info.num_keypoints)
    check_codec(info.model, info.codec)
    if padding is not None and isinstance(info.codec, AssociativeEmbeddingCodec):
        raise ValueError(f"padding: {info.model} sees whole images, not crops; got {padding}")
    if not 0 < info.padding < math.inf:
        raise ValueError(f"padding must be positive and finite, got {info.padding}")
    multiple = int(getattr(network, "input_multiple", 1))
    sides = tuple(info.input_size) if isinstance(info.input_size, (tuple, list)) else (info.input_size,)
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 and n % multiple == 0 for n in sides):
        raise ValueError(f"input_size must be (height, width), positive multiples of {multiple}, got {sides}")
    return info, keypoints


def check_boxes(boxes: Any, height: int, width: int, what: str = "boxes") -> Array:
    """`boxes` as float32 [P, 4].

    Raises:
        BoxError: not [P, 4] numbers, not finite, inverted or empty, or without overlap with the image.
    """
    array = box_array(boxes, what)
    for i, box in enumerate(array):
        reason = why_unusable(box, height, width)
        if reason:
            raise BoxError(f"{what}: box {i} ({', '.join(f'{n:g}' for n in box.tolist())}) {reason}")
    return array


def box_array(boxes: Any, what: str = "boxes") -> Array:
    """`boxes` as float32 [P, 4], whatever the numbers; raises BoxError for anything else."""
    if hasattr(boxes, "detach"):
        boxes = boxes.detach().cpu()
        boxes = (boxes.float() if boxes.is_floating_point() else boxes).numpy()  # which has no bfloat16
    try:
        array = np.array(boxes, np.float32)  # a copy: it becomes part of the results
    except (TypeError, ValueError, OverflowError):
        raise BoxError(f"{what} must be numbers [P, 4] (x1, y1, x2, y2), got {boxes!r:.80}") from None
    if array.size == 0:
        return np.zeros((0, 4), np.float32)
    if array.ndim == 1 and array.shape[0] == 4:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != 4:
        raise BoxError(f"{what} must be [P, 4] (x1, y1, x2, y2), got {list(array.shape)}")
    return array


def why_unusable(box: Array, height: int, width: int) -> str:
    """What is wrong with a box [4] in an image; empty if nothing is."""
    x1, y1, x2, y2 = box.tolist()
    if not np.isfinite(box).all():
        return "is not finite"
    if x2 <= x1 or y2 <= y1:
        return "is inverted or empty; expected x1 < x2 and y1 < y2"
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return f"lies outside the image of {width} x {height} pixels"
    return ""
