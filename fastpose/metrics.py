"""Accuracy measures on plain arrays; no model inside."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpose.skeletons import Skeleton

Array = NDArray[Any]


def torso_lengths(keypoints: Array, labelled: Array, skeleton: Skeleton) -> Array:
    """Torso length of each person in pixels, NaN where it cannot be measured: float64 [N].

    The torso is the mean of the two diagonals left shoulder - right hip and right shoulder - left hip, or the one whose
    ends are both labelled.
    """
    lengths = []
    for a, b in (("left_shoulder", "right_hip"), ("right_shoulder", "left_hip")):
        i, j = skeleton.names.index(a), skeleton.names.index(b)
        length = np.linalg.norm(keypoints[:, i].astype(np.float64) - keypoints[:, j], axis=-1)
        lengths.append(np.where(labelled[:, i] & labelled[:, j], length, np.nan))
    both = np.stack(lengths)
    count = (~np.isnan(both)).sum(0)
    return np.asarray(np.where(count > 0, np.nansum(both, 0) / np.maximum(count, 1), np.nan))


def pck(
    predictions: Array, keypoints: Array, labelled: Array, lengths: Array, fraction: float = 0.2
) -> tuple[float, Array]:
    """Percentage of correct keypoints: those within `fraction` of the person's reference length.

    Args:
        predictions, keypoints: [N, K, 2] pixels; labelled: bool [N, K];
        lengths: [N] reference length in pixels; people whose length is NaN or 0 are not counted.

    Returns:
        The percentage over all counted keypoints together, and per keypoint [K] (NaN where none is labelled).
    """
    distance = np.linalg.norm(predictions.astype(np.float64) - keypoints, axis=-1)
    counted = labelled & (np.nan_to_num(lengths) > 0)[:, None]
    hit = counted & (distance <= fraction * np.nan_to_num(lengths)[:, None])
    with np.errstate(invalid="ignore"):
        per_keypoint = 100.0 * hit.sum(0) / counted.sum(0)
    return 100.0 * float(hit.sum()) / max(int(counted.sum()), 1), per_keypoint
