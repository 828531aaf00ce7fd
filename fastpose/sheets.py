"""Contact sheets: many people side by side, estimated poses against annotated ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastpose.draw import draw_poses
from fastpose.geometry import apply_affine, crop_matrix, warp_crop
from fastpose.images import Array
from fastpose.poses import Poses
from fastpose.skeletons import Skeleton

TILE = (256, 192)  # (height, width)
CAPTION = 18  # pixels below a tile
WHITE, RED, GREY = (255, 255, 255), (230, 40, 40), (40, 40, 40)


@dataclass(frozen=True)
class Case:
    """One tile: the surroundings of `box` [4] xyxy on the RGB `image`, the annotated `truth` [K, 2] where `labelled`
    [K], and the `estimate` [K, 2] (None: nobody was found), all in pixels of the image."""

    image: Array
    box: Array
    truth: Array
    labelled: Array
    estimate: Array | None
    caption: str


def contact_sheet(cases: Sequence[Case], skeleton: Skeleton, columns: int = 6) -> Array:
    """Draw `cases` on one picture, uint8 RGB: estimates as skeletons in colour, red lines from there to the white dots
    of the annotation.

    Raises:
        ValueError: no cases.
    """
    if not cases:
        raise ValueError("a contact sheet needs at least one case")
    columns = min(columns, len(cases))
    rows = math.ceil(len(cases) / columns)
    height, width = TILE[0] + CAPTION, TILE[1]
    sheet = np.full((rows * height, columns * width, 3), GREY, np.uint8)
    for i, case in enumerate(cases):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = _tile(case, skeleton)
    return sheet


def _tile(case: Case, skeleton: Skeleton) -> Array:
    import cv2

    matrix = crop_matrix(case.box, TILE, 1.25)
    tile = warp_crop(case.image, matrix, TILE)
    truth = apply_affine(matrix, case.truth.astype(np.float64))
    estimate = None if case.estimate is None else apply_affine(matrix, case.estimate.astype(np.float64))
    if estimate is not None:
        k = skeleton.num_keypoints
        box = np.array([[0, 0, TILE[1], TILE[0]]])
        tile = draw_poses(tile, Poses(estimate[None], np.ones((1, k)), box, np.ones(1), TILE, skeleton), 0.0)
    limit = 2**14
    for k in np.flatnonzero(case.labelled).tolist():
        at = _pixel(truth[k], limit)
        if estimate is not None and np.isfinite(estimate[k]).all():
            cv2.line(tile, _pixel(estimate[k], limit), at, RED, 1, cv2.LINE_AA)
        cv2.circle(tile, at, 2, WHITE, -1, cv2.LINE_AA)
    caption = np.full((CAPTION, TILE[1], 3), GREY, np.uint8)
    cv2.putText(caption, case.caption[:32], (3, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.36, WHITE, 1, cv2.LINE_AA)
    return np.concatenate([tile, caption])


def _pixel(point: Array, limit: int) -> tuple[int, int]:
    x, y = np.clip(np.nan_to_num(point), -limit, limit)
    return round(float(x)), round(float(y))
