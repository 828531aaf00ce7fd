"""Associative embedding: from heatmaps and tag maps of a whole image to people.

A. Newell et al., "Associative Embedding: End-to-End Learning for Joint Detection and Grouping", NeurIPS 2017, in the
form of HigherHRNet (B. Cheng et al., CVPR 2020). Keypoints are found as local maxima of the heatmaps and given to
people by the values of the tag maps at these places, one kind of keypoint after the other. See `group_people`.

What the reference implementations, HigherHRNet's and mmpose's, leave open or get wrong, and what is done here:

* Ties. The cost of an assignment contains rounded tag distances, so that several assignments are often equally good,
  above all between people whose tags differ by less than 1, and the order of rows decides. Here the smaller sum of
  squared distances does (of distances up to the threshold, since beyond it all are alike).
* Equal neighbours, such as the two cells beside the middle of an enlarged symmetric bump, are two candidates there.
  That is mended by accident where their tags are exactly equal, too, because people are kept in a dictionary by the tag
  of their first keypoint and the later candidate replaces the earlier; but so are people far apart. Here equal
  neighbours are one candidate and people stay apart.
* More than `max_people`: HigherHRNet assigns to the first `max_people` only, starts a new person with every other
  keypoint and returns them all; mmpose assigns to all and returns the first. Here all take part, and those with the
  best scores are returned.
* Quarters. HigherHRNet moves a keypoint left and up if both neighbours are alike, mmpose not at all and neither near
  the border (compare `codecs.MSRAHeatmapCodec`). Here as in HigherHRNet.
* Missing keypoints. mmpose fills in the bare cell without the half and the quarter that other keypoints get, also
  where the heatmap is negative, and weighs a difference in the rounded tags a hundred times. Here as in HigherHRNet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LARGEST_DISTANCE = 1e6
TIE_BREAK = 1e-7

# head and trunk of COCO's keypoints first, then outwards; as the reference implementations have it
COCO_ORDER = (0, 1, 2, 3, 4, 5, 6, 11, 12, 7, 8, 9, 10, 13, 14, 15, 16)


def _load() -> ModuleType | None:
    if os.environ.get("FASTPOSE_FUSED", "auto") == "0":
        return None
    try:
        from fastpose import _native  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _native if hasattr(_native, "group_people") else None


_NATIVE = _load()


def default_order(num_keypoints: int) -> list[int]:
    """The order of assignment: COCO's for 17 keypoints and, cut short, for fewer; further keypoints come last."""
    known = [i for i in COCO_ORDER if i < num_keypoints]
    return known + list(range(len(known), num_keypoints))


def group_people(
    heatmaps: Array,
    tags: Array,
    *,
    order: Sequence[int] | None = None,
    max_people: int = 30,
    detection_threshold: float = 0.1,
    tag_threshold: float = 1.0,
    window: int = 5,
    refine: bool = True,
) -> tuple[Array, Array]:
    """People in one image.

    1. Candidates for each keypoint: cells above `detection_threshold` that no cell in the `window` x `window` around
       them exceeds, and of equal ones there the first by row and column; the best `max_people` of them.
    2. The keypoints are assigned in `order`. The first one's candidates are a person each. Then candidates and people
       are matched so that the sum of 100 x rounded distance - heatmap value is least, the distance being that of the
       candidate's tags to the mean of the person's; ties by the distances as they are. Candidates without a person,
       or not nearer than `tag_threshold`, are new people.
    3. Score of a person: mean heatmap value over all keypoints, 0 for missing ones. The best `max_people` are kept.
    4. `refine`: a missing keypoint is set at the cell where heatmap value minus rounded tag distance is greatest, if
       the heatmap is above 0 there.
    5. Positions: half a cell right of and below the cell's centre (the targets are rounded down), and a quarter
       towards the greater neighbour, left and up if they are alike.

    Compiled code if `fastpose._native` is built and FASTPOSE_FUSED is not 0; it does not hold the interpreter lock.

    Args:
        heatmaps: float32 [K, H, W]; NaN and infinite cells are no candidates.
        tags: float32 [L, K, H, W], L tags per cell (2 with the flip test).
        order: permutation of the keypoints; None for `default_order`.

    Returns:
        float32 [P, K, 3]: x and y in cells, integer = centre, and heatmap value, all 0 for a missing keypoint; and the
        scores, float32 [P]. People come in the order in which they were found.

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    heatmaps, tags = (np.ascontiguousarray(a, np.float32) for a in (heatmaps, tags))
    if heatmaps.ndim != 3 or tags.ndim != 4 or tags.shape[1:] != heatmaps.shape or tags.shape[0] < 1:
        raise ValueError(
            f"expected heatmaps [K, H, W] and tags [L, K, H, W], got {list(heatmaps.shape)} and {list(tags.shape)}"
        )
    k = heatmaps.shape[0]
    chosen = default_order(k) if order is None else [int(i) for i in order]
    if sorted(chosen) != list(range(k)):
        raise ValueError(f"order must be a permutation of the {k} keypoints, got {chosen}")
    if max_people < 1 or not detection_threshold >= 0 or not tag_threshold > 0 or window < 1 or window % 2 == 0:
        raise ValueError(
            "expected max_people >= 1, detection_threshold >= 0, tag_threshold > 0 and an odd window, "
            f"got {max_people}, {detection_threshold}, {tag_threshold} and {window}"
        )
    group = group_people_reference if _NATIVE is None else _NATIVE.group_people
    people, scores = group(
        heatmaps, tags, chosen, max_people, detection_threshold, float(tag_threshold), window, bool(refine)
    )
    return people, scores


def group_people_reference(
    heatmaps: Array,
    tags: Array,
    order: Sequence[int],
    max_people: int,
    detection_threshold: float,
    tag_threshold: float,
    window: int,
    refine: bool,
) -> tuple[Array, Array]:
    """The same in numpy; arguments as for `group_people`, checked there."""
    k, height, width = heatmaps.shape
    values = np.where(np.isfinite(heatmaps), heatmaps, -np.inf).astype(np.float32).reshape(k, height * width)
    flat_tags = tags.reshape(tags.shape[0], k, height * width)
    peaks = values == _window_maximum(values.reshape(k, height, width), window).reshape(values.shape)
    cells = np.zeros((0, k), np.int64)  # of the people so far, -1 where missing
    tag_sums, counts = np.zeros((0, tags.shape[0])), np.zeros(0, np.int64)
    for kp in order:
        found = np.flatnonzero(peaks[kp] & (values[kp] > np.float32(detection_threshold)))
        found = found[_first_of_equals(values[kp].reshape(height, width), found, window)]
        found = found[np.isfinite(flat_tags[:, kp, found]).all(0)]
        found = found[np.argsort(-values[kp, found], kind="stable")[:max_people]]
        found_tags = flat_tags[:, kp, found].T.astype(np.float64)
        person_of = np.full(len(found), -1)
        if len(found) and len(cells):
            squared = (found_tags[:, None] - (tag_sums / counts[:, None])[None]) ** 2
            distance = np.minimum(np.sqrt(squared.sum(2)), LARGEST_DISTANCE)
            close = np.minimum(distance / tag_threshold, 1.0)
            value = values[kp, found].astype(np.float64)[:, None]
            cost = np.round(distance) * 100.0 - value + TIE_BREAK * (close * close)
            if len(found) > len(cells):
                person_of[assign(cost.T)] = np.arange(len(cells))
            else:
                person_of = assign(cost)
            far = ~(distance[np.arange(len(found)), person_of] < tag_threshold)
            person_of[far] = -1
        new = person_of < 0
        person_of[new] = len(cells) + np.arange(int(new.sum()))
        more = int(new.sum())
        cells = np.concatenate([cells, np.full((more, k), -1)])
        tag_sums = np.concatenate([tag_sums, np.zeros((more, tags.shape[0]))])
        counts = np.concatenate([counts, np.zeros(more, np.int64)])
        cells[person_of, kp] = found
        tag_sums[person_of] += found_tags
        counts[person_of] += 1

    found_values = np.where(cells >= 0, values[np.arange(k), cells], 0.0)
    scores = (found_values.astype(np.float64).sum(1) / max(k, 1)).astype(np.float32)
    if len(cells) > max_people:
        kept = np.sort(np.argsort(-scores, kind="stable")[:max_people])
        cells, tag_sums, counts, scores = cells[kept], tag_sums[kept], counts[kept], scores[kept]
    if refine:
        means = (tag_sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        for person, kp in np.argwhere(cells < 0):
            with np.errstate(over="ignore", invalid="ignore"):
                distance = np.sqrt(((flat_tags[:, kp] - means[person][:, None]) ** 2).sum(0))
                fit = np.nan_to_num(values[kp] - np.round(distance), nan=-np.inf, neginf=-np.inf)
            best = int(np.argmax(fit))
            if values[kp, best] > 0 and fit[best] > -np.inf:
                cells[person, kp] = best
    return _positions(heatmaps, cells), scores


def assign(cost: Array) -> Array:
    """Column for every row of `cost`, float64 [n, m] with n <= m, all different, at the least total cost: int64 [n].

    The Hungarian method with potentials, one shortest augmenting path per row (R. Jonker, A. Volgenant, "A Shortest
    Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems", Computing 38, 1987).
    """
    rows, columns = cost.shape
    row_potential, potential = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of, previous = np.zeros(columns + 1, np.int64), np.zeros(columns + 1, np.int64)  # index 0 is a dummy
    for row in range(1, rows + 1):
        row_of[0] = row
        distance, done, at = np.full(columns + 1, np.inf), np.zeros(columns + 1, bool), 0
        while row_of[at] != 0:
            done[at] = True
            reduced = cost[row_of[at] - 1] - row_potential[row_of[at]] - potential[1:]
            better = ~done[1:] & (reduced < distance[1:])
            distance[1:][better] = reduced[better]
            previous[1:][better] = at
            open_distance = np.where(done, np.inf, distance)
            open_distance[0] = np.inf
            after = int(np.argmin(open_distance))
            step = open_distance[after]
            row_potential[row_of[done]] += step
            potential[done] -= step
            distance[~done] -= step
            at = after
        while at != 0:
            row_of[at] = row_of[previous[at]]
            at = int(previous[at])
    column_of = np.zeros(rows, np.int64)
    used = np.flatnonzero(row_of[1:])
    column_of[row_of[1:][used] - 1] = used
    return column_of


def _window_maximum(maps: Array, window: int) -> Array:
    """Maximum over the window around each cell of maps [K, H, W]."""
    half = window // 2
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (half, half)
        padded = np.pad(maps, pad, constant_values=-np.inf)
        views = (np.take(padded, np.arange(i, i + maps.shape[axis]), axis) for i in range(window))
        maps = np.maximum.reduce(list(views))
    return maps


def _first_of_equals(values: Array, cells: Array, window: int) -> Array:
    """bool, for `cells` of a map [H, W]: no cell before it (by row and column) in its window has the same value."""
    height, width = values.shape
    half = window // 2
    y, x = cells // max(width, 1), cells % max(width, 1)
    first = np.ones(len(cells), bool)
    for dy in range(-half, 1):
        for dx in range(-half, half + 1 if dy < 0 else 0):
            v, u = y + dy, x + dx
            inside = (v >= 0) & (u >= 0) & (u < width)
            first[inside] &= values[v[inside], u[inside]] != values[y[inside], x[inside]]
    return first


def _positions(heatmaps: Array, cells: Array) -> Array:
    """float32 [P, K, 3] from cells int64 [P, K], -1 where missing."""
    k, height, width = heatmaps.shape
    y, x = cells // max(width, 1), cells % max(width, 1)
    kp = np.arange(k)

    def at(dx: int, dy: int) -> Array:
        return np.asarray(heatmaps[kp, np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)])

    if cells.size == 0:
        return np.zeros((len(cells), k, 3), np.float32)
    right, below = at(1, 0) > at(-1, 0), at(0, 1) > at(0, -1)
    people = np.stack([x + np.where(right, 0.75, 0.25), y + np.where(below, 0.75, 0.25), at(0, 0)], axis=2)
    people[cells < 0] = 0.0
    return people.astype(np.float32)
