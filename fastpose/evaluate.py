"""Accuracy of an estimator on a data set, through `PoseEstimator` as a user would run it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastpose.checkpoints import WeightsInfo
from fastpose.codecs import AssociativeEmbeddingCodec
from fastpose.data import UNREADABLE, PoseData, Report, to_results
from fastpose.data.base import OUTSIDE
from fastpose.data.coco import read_json
from fastpose.distributed import shared_map
from fastpose.files import write_json
from fastpose.geometry import crop_matrix
from fastpose.images import Array, ImageError, write_image
from fastpose.ops.oks_nms import check_threshold
from fastpose.pipeline import WHOLE_IMAGE, PoseEstimator
from fastpose.poses import Poses
from fastpose.scoring import Score, check_metric, score_found, score_poses, score_results
from fastpose.sheets import Case, contact_sheet
from fastpose.skeletons import describe_difference


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        score: the numbers. data: what was evaluated: without images that could not be read.
        keypoints: float32 [N, K, 2] pixels and keypoint_scores: float32 [N, K], of the people of `data`; of a bottom-up
            network those that it found.
    """

    score: Score
    data: PoseData
    keypoints: Array
    keypoint_scores: Array

    @classmethod
    def of_results(cls, data: PoseData, path: str | Path, evaluator: str = "fastpose") -> Evaluation:
        """Score a file of results in COCO's format by AP; no network, no images.

        Raises:
            FileNotFoundError: no such file. ValueError: not a list in JSON, or `data` is not in COCO's format.
        """
        content = read_json(path, "result file")
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of results in COCO's format, got a {type(content).__name__}")
        if data.annotated is None or data.metric != "AP":
            raise ValueError("a file of results can be scored by AP only, with annotations in COCO's format")
        score = score_results(data.annotated, content, data.skeleton, evaluator, data.report)
        shape = (0, data.skeleton.num_keypoints)
        return cls(score, data, np.zeros((*shape, 2), np.float32), np.zeros(shape, np.float32))

    @property
    def report(self) -> Report:
        """What was skipped, while reading the data set and after."""
        return self.data.report

    def write_results(self, path: str | Path) -> None:
        """Write the results that AP was computed from, in COCO's submission format, atomically.

        Raises:
            ValueError: the metric is not AP.
        """
        if self.score.metric != "AP":
            raise ValueError(f"only AP has results in COCO's format; the metric is {self.score.metric}")
        write_json(path, self.score.results)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON (a number that could not be measured is None)."""
        return {
            "metric": self.score.metric,
            "value": _none_for_nan(self.score.value),
            "numbers": {k: _none_for_nan(v) for k, v in self.score.numbers.items()},
            "per_keypoint": {k: _none_for_nan(v) for k, v in self.score.per_keypoint.items()},
            "people": self.score.people,
            "sigmas": list(self.data.skeleton.sigmas) if self.score.metric == "AP" else None,
            "images": len(self.data.image_files()),
            "skipped": self.report.to_dict(),
        }

    def worst(self, count: int = 24, columns: int = 6) -> Array:
        """Contact sheet (uint8 RGB) of the `count` people whose poses fit worst, the worst first.

        Raises:
            ValueError: nobody was measured, or `count` or `columns` is less than 1.
        """
        if count < 1 or columns < 1:
            raise ValueError(f"the sheet needs at least one picture and column, got {count} and {columns}")
        quality = self.score.quality
        order = np.argsort(np.where(np.isnan(quality), np.inf, quality), kind="stable")
        order = order[: min(count, int((~np.isnan(quality)).sum()))]
        return contact_sheet([self._case(int(i)) for i in order], self.data.skeleton, columns)

    def write_worst(self, path: str | Path, count: int = 24) -> None:
        """Write the sheet of `worst` to an image file, atomically."""
        write_image(path, self.worst(count))

    def _case(self, i: int) -> Case:
        data, score = self.data, self.score
        measure = "OKS" if score.metric == "AP" else "fit"
        estimate = None if np.isnan(score.matched[i]).all() else score.matched[i]
        if score.metric != "AP" or data.annotated is None:
            caption = f"{measure} {score.quality[i]:.2f} {data.images[i].name}"
            image = _image_or_black(data.read, i)
            return Case(image, data.boxes[i], data.keypoints[i], data.labelled[i], estimate, caption)
        people, images = data.annotated.people, data.annotated
        at = int(people.image[i])
        x, y, w, h = people.boxes[i]
        caption = f"{measure} {score.quality[i]:.2f} {images.files[at].name}"
        box = np.array([x, y, x + w, y + h])
        return Case(_image_or_black(images.read, at), box, people.keypoints[i], people.visible[i], estimate, caption)


def evaluate(
    estimator: PoseEstimator,
    data: PoseData,
    *,
    nms: str = "hard",
    nms_threshold: float | None = None,
    keypoint_threshold: float = 0.2,
    evaluator: str = "fastpose",
    quiet: bool = True,
    share: bool = False,
) -> Evaluation:
    """Estimate everybody in `data` and score the poses by its metric. Bottom-up networks find the people themselves.

    Images that cannot be read, and boxes outside their image, are reported and left out; images without boxes are not
    opened, the people on them are missed. Keypoints of which the data say nothing but their names have the sigmas that
    the network was trained with. The arguments from `nms` on are those of `fastpose.scoring.score_poses` and matter for
    AP of top-down networks only (`evaluator`: of all).

    Args:
        share: share the images among the processes of `torch.distributed`. Every process must make the same call; each
            gets the whole result, the same as one process alone would.

    Raises:
        ValueError: the estimator has other keypoints than the data, or nothing is left to evaluate.
    """
    if estimator.skeleton.names != data.skeleton.names:
        difference = describe_difference(estimator.skeleton, data.skeleton)
        raise ValueError(f"the weights know {estimator.skeleton.name!r}, the data set has {difference}")
    check_metric(data)
    if nms != "none":
        check_threshold(nms, nms_threshold)
    skeleton = estimator.skeleton if data.skeleton.undefined else data.skeleton
    data = dataclasses.replace(data, skeleton=skeleton, report=copy.deepcopy(data.report))  # the caller's stays
    codec = estimator.info.codec
    if isinstance(codec, AssociativeEmbeddingCodec):
        return _evaluate_whole_images(estimator, data, evaluator, quiet, share)
    n, k = len(data), data.skeleton.num_keypoints
    keypoints, scores = np.zeros((n, k, 2), np.float32), np.zeros((n, k), np.float32)
    done, unreadable = np.zeros(n, bool), []
    estimator.prepare(n)
    # network and batches must not depend on who does the work: sums of floats are rounded by the size of the batch
    batches = _batches(data, estimator.batch_size)
    for part in shared_map(
        partial(_read_boxes, data),
        partial(_estimate_boxes, estimator),
        batches,
        share=share,
        unit="batch",
        quiet=quiet,
    ):
        for kind, text in part.findings:
            data.report.add(kind, text)
        unreadable += part.unreadable
        if part.rows:
            keypoints[part.rows], scores[part.rows], done[part.rows] = part.keypoints, part.scores, True

    rows = np.flatnonzero(done)
    rest = data.take(rows).without_images(unreadable)
    if len(rest.image_files()) == 0 or (len(rest) == 0 and rest.metric != "AP"):
        raise ValueError(f"nothing is left to evaluate: {data.report.to_text() or 'the data set is empty'}")
    score = score_poses(
        rest,
        keypoints[rows],
        scores[rows],
        nms=nms,
        nms_threshold=nms_threshold,
        keypoint_threshold=keypoint_threshold,
        crop_areas=_crop_areas(estimator.info, codec.convention, rest.boxes),
        evaluator=evaluator,
    )
    return Evaluation(score, rest, keypoints[rows], scores[rows])


@dataclass
class _Part:
    """What came of some images: people of `PoseData` by row, and what went wrong."""

    rows: list[int] = field(default_factory=list)
    keypoints: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    scores: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    unreadable: list[Path] = field(default_factory=list)
    findings: list[tuple[str, str]] = field(default_factory=list)


def _batches(data: PoseData, size: int) -> list[list[list[int]]]:
    """The people of `data` by image, and consecutive images together until they have at least `size` people."""
    by_image: dict[Path, list[int]] = {}
    for i, path in enumerate(data.images):
        by_image.setdefault(path, []).append(i)
    batches: list[list[list[int]]] = []
    room = 0
    for rows in by_image.values():
        if room <= 0:
            batches.append([])
            room = size
        batches[-1].append(rows)
        room -= len(rows)
    return batches


def _read_boxes(data: PoseData, batch: list[list[int]]) -> tuple[_Part, list[Array], list[Array]]:
    """The images of a batch (the people's rows by image), the boxes that lie on them, and whose they are."""
    part, images, boxes = _Part(), [], []
    for rows in batch:
        path = data.images[rows[0]]
        try:
            image = data.read(rows[0])
        except ImageError as error:
            part.findings.append((UNREADABLE, str(error)))
            part.unreadable.append(path)
            continue
        height, width = image.shape[:2]
        x1, y1, x2, y2 = data.boxes[rows].T
        usable = (x2 > x1) & (y2 > y1) & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)
        usable &= np.isfinite(data.boxes[rows]).all(1)
        for row in np.array(rows)[~usable]:
            text = f"{path.name}: {data.boxes[row].tolist()}"
            part.findings.append((OUTSIDE, text))
        if usable.any():
            images.append(image)
            boxes.append(data.boxes[np.array(rows)[usable]])
            part.rows += np.array(rows)[usable].tolist()
    return part, images, boxes


def _estimate_boxes(estimator: PoseEstimator, read: tuple[_Part, list[Array], list[Array]]) -> _Part:
    """The poses in what `_read_boxes` has read."""
    part, images, boxes = read
    if images:
        found = estimator.estimate(images, boxes)
        part.keypoints = np.concatenate([poses.keypoints for poses in found])
        part.scores = np.concatenate([poses.keypoint_scores for poses in found])
    return part


def _evaluate_whole_images(
    estimator: PoseEstimator, data: PoseData, evaluator: str, quiet: bool, share: bool
) -> Evaluation:
    """Score of a bottom-up network: it finds the people itself, in every image; its scores are taken as they are."""
    if data.annotated is None:
        raise ValueError(
            f"{estimator.model_name} finds people itself, which is scored with annotations of everybody only: data in "
            f"COCO's format, or mosaics of single people"
        )
    annotated, unreadable = data.annotated, []
    found: list[tuple[int, Poses]] = []

    def read(i: int) -> Array | ImageError:
        try:
            return annotated.read(i)
        except ImageError as error:
            return error

    def estimate(image: Array | ImageError) -> Poses | ImageError:
        return image if isinstance(image, ImageError) else estimator.estimate([image], [None])[0]

    estimator.prepare(WHOLE_IMAGE * len(annotated))  # whoever takes which part
    results = shared_map(read, estimate, range(len(annotated)), share=share, unit="image", quiet=quiet)
    for i, result in enumerate(results):
        if isinstance(result, Poses):
            found.append((i, result))
        else:
            data.report.add(UNREADABLE, result)
            unreadable.append(annotated.files[i])
    if not found:
        raise ValueError(f"nothing is left to evaluate: {data.report.to_text() or 'the data set is empty'}")
    index = np.repeat([i for i, _ in found], [len(poses) for _, poses in found])
    keypoints = np.concatenate([poses.keypoints for _, poses in found])
    keypoint_scores = np.concatenate([poses.keypoint_scores for _, poses in found])
    scores = np.concatenate([poses.scores for _, poses in found])
    entries = to_results(annotated, index, keypoints, keypoint_scores, scores)
    rest = data.without_images(unreadable)
    score = score_found(rest, entries, evaluator)
    return Evaluation(score, rest, keypoints, keypoint_scores)


def _crop_areas(info: WeightsInfo, convention: str, boxes: Array) -> Array:
    """Square pixels of the image that the crops around `boxes` cover, [N]."""
    matrices = [crop_matrix(box, info.input_size, info.padding, convention=convention) for box in boxes]
    zooms = np.array([abs(np.linalg.det(m[:, :2])) for m in matrices], np.float64)
    return np.asarray(info.input_size[0] * info.input_size[1] / zooms)


def _image_or_black(read: Callable[[int], Array], i: int) -> Array:
    """Results are scored without the images too."""
    try:
        return read(i)
    except ImageError:
        return np.zeros((1, 1, 3), np.uint8)


def _none_for_nan(value: float) -> float | None:
    return None if np.isnan(value) else value


def to_text(score: Score) -> str:
    """The numbers as a table for people, in percent."""
    lines = [f"{name:<16}{value:6.1f}" for name, value in score.per_keypoint.items()]
    if score.metric == "PCK@0.2":
        return "\n".join(
            [*lines, f"{'PCK@0.2':<16}{score.value:6.1f}  ({score.people} people with a measurable torso)"]
        )
    if score.metric == "PCKh@0.5":
        lines += [f"{name:<16}{value:6.1f}" for name, value in score.numbers.items()]
        return "\n".join([*lines, f"({score.people} people with a head box)"])
    lines = ["similarity of the best pose of each person, by keypoint:", *lines, ""]
    lines += [f"{name:<16}{'-' if value < 0 else f'{100 * value:.1f}':>6}" for name, value in score.numbers.items()]
    return "\n".join([*lines, f"({score.people} people)"])
