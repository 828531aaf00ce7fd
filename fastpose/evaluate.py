"""Accuracy of a weights file on a data set, through `PoseEstimator` as a user would run it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from fastpose.data import PoseData
from fastpose.images import Array, read_image
from fastpose.metrics import pck, torso_lengths
from fastpose.pipeline import PoseEstimator


@dataclass(frozen=True)
class PckResult:
    """PCK@0.2 (torso): over all labelled keypoints, and per keypoint by name; `people` counts those with a torso."""

    total: float
    per_keypoint: dict[str, float]
    people: int


def evaluate_pck(estimator: PoseEstimator, data: PoseData, quiet: bool = False) -> PckResult:
    """PCK@0.2 of `estimator` on the annotated boxes of `data`, in image pixels.

    Raises:
        ValueError: the estimator's skeleton is not the data set's.
    """
    if estimator.skeleton != data.skeleton:
        raise ValueError(f"the weights have skeleton {estimator.skeleton.name!r}, the data set {data.skeleton.name!r}")
    predicted: list[Array] = []
    for start in tqdm(range(0, len(data), 32), unit="batch", disable=quiet):
        part = range(start, min(start + 32, len(data)))
        images = [read_image(data.images[i]) for i in part]
        predicted += [p.keypoints for p in estimator.estimate(images, [data.boxes[i : i + 1] for i in part])]
    lengths = torso_lengths(data.keypoints, data.labelled, data.skeleton)
    total, per_keypoint = pck(np.concatenate(predicted), data.keypoints, data.labelled, lengths)
    counted = int((np.nan_to_num(lengths) > 0).sum())
    names = (str(n) for n in data.skeleton.names)
    return PckResult(total, dict(zip(names, (float(v) for v in per_keypoint), strict=True)), counted)
