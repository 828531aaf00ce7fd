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

    Raises:
        ValueError: the skeleton has no shoulders and hips of these names.
    """
    missing = {f"{side}_{part}" for side in ("left", "right") for part in ("shoulder", "hip")} - set(skeleton.names)
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"PCK by torso length needs shoulders and hips; skeleton {skeleton.name!r} has no {names}")
    lengths = []
    for a, b in (("left_shoulder", "right_hip"), ("right_shoulder", "left_hip")):
        i, j = skeleton.names.index(a), skeleton.names.index(b)
        length = np.linalg.norm(keypoints[:, i].astype(np.float64) - keypoints[:, j], axis=-1)
        both_labelled = (np.asarray(labelled)[:, [i, j]] > 0).all(1)
        lengths.append(np.where(both_labelled, length, np.nan))
    both = np.stack(lengths)
    count = (~np.isnan(both)).sum(0)
    return np.asarray(np.where(count > 0, np.nansum(both, 0) / np.maximum(count, 1), np.nan))


def head_sizes(head_boxes: Array) -> Array:
    """MPII's reference length: 0.6 times the diagonal of the head box. [N, 4] xyxy pixels -> float64 [N]."""
    boxes = head_boxes.astype(np.float64)
    return np.asarray(np.linalg.norm(boxes[:, 2:] - boxes[:, :2], axis=1) * 0.6)


def pckh(
    predictions: Array, keypoints: Array, labelled: Array, sizes: Array, skeleton: Skeleton, fraction: float = 0.5
) -> tuple[float, Array]:
    """Percentage of correct keypoints by head size, as MPII is scored (M. Andriluka et al., CVPR 2014).

    The total leaves out pelvis and thorax and weights the other keypoints by how often they are labelled, which is the
    percentage over all of them together.

    Args:
        predictions, keypoints: [N, K, 2] pixels; labelled: [N, K] bool or COCO's flags, of which 1 and 2 count;
        sizes: [N] from `head_sizes`; people whose size is NaN or 0 are not counted.
        fraction: 0.5 for PCKh@0.5. What the code of HRNet, and with it most papers, prints as PCKh@0.1 is taken at
            0.11 (the twelfth of the thresholds 0, 0.01, ...).

    Returns:
        The percentage, and that of every keypoint [K] (NaN where none is labelled).
    """
    counted = np.array([name not in ("pelvis", "thorax") for name in skeleton.names])
    labelled = np.asarray(labelled) > 0
    total, _ = pck(predictions, keypoints, labelled & counted, sizes, fraction)
    return total, pck(predictions, keypoints, labelled, sizes, fraction)[1]


def pck(
    predictions: Array, keypoints: Array, labelled: Array, lengths: Array, fraction: float = 0.2
) -> tuple[float, Array]:
    """Percentage of correct keypoints: those within `fraction` of the person's reference length.

    Args:
        predictions, keypoints: [N, K, 2] pixels; labelled: [N, K] bool or COCO's flags, of which 1 and 2 count;
        lengths: [N] reference length in pixels; people whose length is NaN or 0 are not counted.

    Returns:
        The percentage over all counted keypoints together, and per keypoint [K] (NaN where none is labelled).
    """
    counted = (np.asarray(labelled) > 0) & (np.nan_to_num(lengths) > 0)[:, None]
    hit = counted & (relative_distances(predictions, keypoints, lengths) <= fraction)
    with np.errstate(invalid="ignore"):
        per_keypoint = 100.0 * hit.sum(0) / counted.sum(0)
    return 100.0 * float(hit.sum()) / max(int(counted.sum()), 1), per_keypoint


def relative_distances(predictions: Array, keypoints: Array, lengths: Array) -> Array:
    """Distance of every keypoint to its label in units of the person's length: float64 [N, K], NaN without a length."""
    distance = np.linalg.norm(predictions.astype(np.float64) - keypoints, axis=-1)
    return np.asarray(distance / np.where(np.nan_to_num(lengths) > 0, lengths, np.nan)[:, None])
