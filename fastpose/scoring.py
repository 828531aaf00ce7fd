"""Scores of estimated poses on a data set, by the measure that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastpose.average_precision import (
    KeypointTruth,
    average_precision,
    average_precision_pycocotools,
    best_matches,
)
from fastpose.data.base import AnnotatedImages, Array, PoseData, Report
from fastpose.data.coco import AREA_SHARE, from_results, to_results
from fastpose.metrics import pck, pckh, relative_distances, torso_lengths
from fastpose.ops import oks_nms, rescore
from fastpose.skeletons import Skeleton

EVALUATORS = ("fastpose", "pycocotools")


@dataclass(frozen=True)
class Score:
    """How good poses are.

    Attributes:
        metric: "PCK@0.2", "PCKh@0.5" or "AP".
        value: the main number in percent, NaN if nothing could be measured.
        numbers: all numbers by their usual names: percent, but fractions (-1: nobody) for AP and its kin.
        per_keypoint: percent by keypoint name: correct keypoints; for AP the mean similarity exp(-d^2 / (2 s^2)) of the
            pose that fits each person best, 0 if there is none. NaN if nobody has the keypoint.
        people: how many people were measured.
        quality: float64, per person from 0 to 1, NaN where not measured: for AP the best OKS of the people of
            `AnnotatedImages`; otherwise, of the people of `PoseData`, the mean of 1 / (1 + d / limit) over keypoints.
        matched: float64 [P, K, 2] pixels, the pose that each of them was compared with, NaN if there was none.
        results: the result entries in COCO's format that AP was computed from.
    """

    metric: str
    value: float
    numbers: dict[str, float]
    per_keypoint: dict[str, float]
    people: int
    quality: Array
    matched: Array
    results: list[dict[str, Any]] = field(default_factory=list, repr=False)


def check_metric(data: PoseData) -> None:
    """Raise ValueError if `data` lacks what its metric needs: annotations in COCO's format, or a reference length."""
    if data.metric == "AP" and (data.annotated is None or data.image_index is None):
        raise ValueError("AP needs annotations in COCO's format")
    if data.metric == "PCKh@0.5" and (data.head_sizes is None or not np.isfinite(data.head_sizes).any()):
        raise ValueError(
            "PCKh needs head boxes, which the data does not have; for MPII in the HRNet repository's format they "
            "are in annot/gt_valid.mat"
        )
    if data.metric == "PCK@0.2":
        torso_lengths(data.keypoints, data.labelled, data.skeleton)


def score_poses(
    data: PoseData,
    keypoints: Array,
    keypoint_scores: Array,
    *,
    nms: str = "hard",
    nms_threshold: float | None = None,
    keypoint_threshold: float = 0.2,
    crop_areas: Array | None = None,
    evaluator: str = "fastpose",
) -> Score:
    """Score the poses estimated for the people (boxes) of `data` by its metric.

    For AP poses are rescored and suppressed as top-down methods do (B. Xiao et al., "Simple Baselines for Human Pose
    Estimation and Tracking", ECCV 2018; K. Sun et al., HRNet, CVPR 2019): the score is the box's times the mean of the
    keypoint scores above `keypoint_threshold`; duplicates fall to OKS-NMS, in which every keypoint counts and the area
    is `crop_areas`. Parallel OKS-NMS follows its paper instead (S. Niu et al. 2021, Section 3.3): only keypoints above
    the threshold count, and the area is the box's.

    Args:
        keypoints: [N, K, 2] pixels; keypoint_scores: [N, K].
        nms, nms_threshold: method and threshold of `fastpose.ops.oks_nms`, or "none". "soft" decays linearly and the
            decayed scores count; mmpose's ``soft_oks_nms`` decays by a Gaussian and keeps the scores as they were.
        crop_areas: [N] square pixels, the area of the OKS in NMS; HRNet takes the crop's. Default: the box's.
        evaluator: "fastpose", or "pycocotools" to let that compute AP.

    Raises:
        ValueError: shapes that do not fit, or a metric that the data has no reference length or annotations for.
    """
    n, k = len(data), data.skeleton.num_keypoints
    if keypoints.shape != (n, k, 2) or keypoint_scores.shape != (n, k):
        got = f"{list(keypoints.shape)} and {list(keypoint_scores.shape)}"
        raise ValueError(f"expected keypoints [{n}, {k}, 2] and keypoint_scores [{n}, {k}], got {got}")
    check_metric(data)
    if data.metric != "AP":
        return _score_by_distance(data, keypoints)
    assert data.annotated is not None and data.image_index is not None
    points, point_scores = torch.from_numpy(keypoints).double(), torch.from_numpy(keypoint_scores).double()
    scores = rescore(point_scores, torch.from_numpy(data.box_scores).double(), keypoint_threshold)
    keep = np.ones(n, bool)
    if nms != "none":
        sides = (data.boxes[:, 2:] - data.boxes[:, :2]).astype(np.float64)
        parallel = nms == "parallel"
        areas = sides.prod(1) if crop_areas is None or parallel else crop_areas
        scores, kept = oks_nms(
            points,
            point_scores,
            scores,
            torch.from_numpy(areas).double(),
            torch.tensor(data.skeleton.sigmas, dtype=torch.float64),
            image_index=torch.from_numpy(data.image_index),
            method=nms,
            threshold=nms_threshold,
            keypoint_threshold=keypoint_threshold if parallel else -1.0,
        )
        keep = kept.numpy()
    index, found = data.image_index[keep], keypoints[keep]
    kinds = None if data.categories is None else data.categories[keep]
    entries = to_results(data.annotated, index, found, keypoint_scores[keep], scores.numpy()[keep], kinds)
    return score_results(data.annotated, entries, data.skeleton, evaluator)


def score_results(
    annotated: AnnotatedImages,
    entries: list[Any],
    skeleton: Skeleton,
    evaluator: str = "fastpose",
    report: Report | None = None,
) -> Score:
    """AP of results in COCO's format; malformed entries are counted in `report`."""
    if evaluator not in EVALUATORS:
        raise ValueError(f"evaluator must be one of {', '.join(EVALUATORS)}, got {evaluator!r}")
    truth, results = annotated.people, from_results(entries, annotated, report)
    measure = average_precision if evaluator == "fastpose" else average_precision_pycocotools
    result = measure(truth, results, skeleton.sigmas)
    oks, match = best_matches(truth, results, skeleton.sigmas)
    counted = ~truth.ignored
    matched = np.full(truth.keypoints.shape, np.nan)
    matched[match >= 0] = results.keypoints[match[match >= 0]]
    similar = _similarities(annotated, matched, skeleton.sigmas)
    seen = truth.visible & counted[:, None]
    return Score(
        "AP",
        100 * result.ap if counted.any() and result.ap >= 0 else float("nan"),  # -1: nobody is of a size that counts
        result.to_dict(),
        _by_name(skeleton, np.where(seen, similar, 0).sum(0), seen.sum(0)),
        int(counted.sum()),
        np.where(counted, oks, np.nan),
        matched,
        entries,
    )


def score_found(data: PoseData, entries: list[Any], evaluator: str = "fastpose") -> Score:
    """Score results in COCO's format of a method that found the people itself, by the metric of `data`.

    For metrics of distance every person is compared with the found pose of the greatest OKS, and has no correct
    keypoint if there is none on the image; poses too many do not count.

    Raises:
        ValueError: `data` is not in COCO's format, or has no reference length for its metric.
    """
    if data.annotated is None or data.image_index is None:
        raise ValueError("found people are scored with annotations in COCO's format only")
    check_metric(data)
    if data.metric == "AP":
        return score_results(data.annotated, entries, data.skeleton, evaluator)
    sides = (data.boxes[:, 2:] - data.boxes[:, :2]).astype(np.float64)
    nobody = np.zeros(len(data), bool)
    people = KeypointTruth(
        data.annotated.people.image_ids,
        data.image_index,
        data.keypoints.astype(np.float64),
        data.labelled,
        AREA_SHARE * sides.prod(1),
        np.concatenate([data.boxes[:, :2], sides], axis=1),
        nobody,
        nobody,
    )
    results = from_results(entries, data.annotated)
    _, match = best_matches(people, results, data.skeleton.sigmas)
    matched = np.full(people.keypoints.shape, np.nan)
    matched[match >= 0] = results.keypoints[match[match >= 0]]
    return _score_by_distance(data, matched)


def _similarities(annotated: AnnotatedImages, matched: Array, sigmas: Sequence[float]) -> Array:
    """Of every keypoint to that of the matched pose [M, K, 2], as in OKS: [M, K]; 0 without a match."""
    truth = annotated.people
    squared = ((matched - truth.keypoints) ** 2).sum(-1)
    e = squared / (2 * (2 * np.asarray(sigmas)) ** 2 * (truth.areas + np.spacing(1))[:, None])
    return np.nan_to_num(np.exp(-e), nan=0.0)


def _by_name(skeleton: Skeleton, total: Array, count: Array) -> dict[str, float]:
    shares = [100.0 * float(t) / int(c) if c else float("nan") for t, c in zip(total, count, strict=True)]
    return dict(zip(skeleton.names, shares, strict=True))


def _score_by_distance(data: PoseData, keypoints: Array) -> Score:
    numbers: dict[str, float] = {}
    if data.metric == "PCKh@0.5":
        assert data.head_sizes is not None
        lengths, fraction = data.head_sizes, 0.5
        value, per_keypoint = pckh(keypoints, data.keypoints, data.labelled, lengths, data.skeleton)
        numbers["PCKh@0.5"] = value
        for name, at in (("PCKh@0.1", 0.1), ("PCKh@0.1 as HRNet's code has it (0.11)", 0.11)):
            numbers[name] = pckh(keypoints, data.keypoints, data.labelled, lengths, data.skeleton, at)[0]
    else:
        lengths, fraction = torso_lengths(data.keypoints, data.labelled, data.skeleton), 0.2
        value, per_keypoint = pck(keypoints, data.keypoints, data.labelled, lengths, fraction)
        numbers["PCK@0.2"] = value
    measured = np.nan_to_num(lengths) > 0
    seen = data.labelled & measured[:, None]
    away = np.where(seen, relative_distances(keypoints, data.keypoints, lengths) / fraction, 0.0)
    away = np.nan_to_num(away, nan=np.inf)  # nothing was found
    # 1 is perfect, 0.5 on average at the limit: finer than counting correct keypoints
    with np.errstate(invalid="ignore"):
        quality = np.where(seen, 1 / (1 + away), 0).sum(1) / seen.sum(1)
    names = data.skeleton.names
    return Score(
        data.metric,
        value if seen.any() else float("nan"),
        numbers,
        dict(zip(names, (float(v) for v in per_keypoint), strict=True)),
        int(measured.sum()),
        quality,
        keypoints.astype(np.float64),
    )
