"""Average precision of keypoints by object keypoint similarity (OKS), as COCO and CrowdPose define it.

The rules are those of pycocotools (T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and the
keypoint evaluation page of COCO): per image, detections in the order of their scores each take the best unmatched
person whose OKS reaches the threshold; people to ignore (crowds, nobody's keypoints labelled, size outside the range)
are taken only if no other fits, and what is matched to them counts neither way. Precision is made monotonous and
averaged over 101 recalls and 10 OKS thresholds. `average_precision` does this for all images at once and gives the
numbers of pycocotools (`average_precision_pycocotools`) to rounding.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 20
# square pixels; the last two are COCO's medium and large
AREA_RANGES = ((0.0, 1e5**2), (32.0**2, 96.0**2), (96.0**2, 1e5**2))
# CrowdPose: images with a crowd index below 0.2 are easy, below 0.8 medium, the others hard
CROWD_LEVELS = (0.2, 0.8)
NO_VALUE = -1.0


@dataclass(frozen=True)
class KeypointTruth:
    """Annotated people of I images, M in all, with K keypoints each.

    Attributes:
        image_ids: int64 [I], ascending and unique; images without people are part of the evaluation.
        image: int64 [M], position of each person's image in `image_ids`, in any order.
        keypoints: float64 [M, K, 2], (x, y) pixels. visible: bool [M, K], labelled (hidden or not).
        areas: float64 [M], square pixels, the a of OKS and what size ranges are about.
        boxes: float64 [M, 4], COCO's [x, y, width, height] in pixels.
        ignored: bool [M], neither found nor missed: crowds, and people without labelled keypoints.
        crowd: bool [M], regions of many people, which any number of detections may match.
        crowd_index: float64 [I], CrowdPose's measure of crowding; None elsewhere.
    """

    image_ids: Array
    image: Array
    keypoints: Array
    visible: Array
    areas: Array
    boxes: Array
    ignored: Array
    crowd: Array
    crowd_index: Array | None = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.image_ids, np.int64).reshape(-1)
        if (np.diff(ids) <= 0).any():
            raise ValueError("KeypointTruth.image_ids must be ascending and unique")
        object.__setattr__(self, "image_ids", ids)
        m, k = self.visible.shape
        shapes = {
            "image": ((m,), np.int64), "keypoints": ((m, k, 2), np.float64), "visible": ((m, k), np.bool_),
            "areas": ((m,), np.float64), "boxes": ((m, 4), np.float64), "ignored": ((m,), np.bool_),
            "crowd": ((m,), np.bool_),
        }  # fmt: skip
        if self.crowd_index is not None:
            shapes["crowd_index"] = ((len(ids),), np.float64)
        _check("KeypointTruth", self, shapes)
        object.__setattr__(self, "ignored", self.ignored | self.crowd)
        if m and not (self.image.min() >= 0 and self.image.max() < len(ids)):
            raise ValueError(f"KeypointTruth.image must be positions in the {len(ids)} image_ids")

    def __len__(self) -> int:
        return len(self.image)

    def of_images(self, chosen: Array) -> KeypointTruth:
        """The part on the images where the bool [I] `chosen` is true."""
        place = np.cumsum(chosen) - 1
        at = chosen[self.image]
        return KeypointTruth(
            self.image_ids[chosen], place[self.image[at]], self.keypoints[at], self.visible[at], self.areas[at],
            self.boxes[at], self.ignored[at], self.crowd[at],
            None if self.crowd_index is None else self.crowd_index[chosen],
        )  # fmt: skip


@dataclass(frozen=True)
class KeypointResults:
    """N found people: `image` int64 [N] (position in the truth's `image_ids`), `keypoints` float64 [N, K, 2] pixels,
    `scores` float64 [N], `areas` float64 [N] square pixels (unmatched detections outside a size range do not count).
    """

    image: Array
    keypoints: Array
    scores: Array
    areas: Array

    def __post_init__(self) -> None:
        n, k = len(self.scores), self.keypoints.shape[1]
        shapes = {"image": ((n,), np.int64), "keypoints": ((n, k, 2), np.float64), "scores": ((n,), np.float64)}
        _check("KeypointResults", self, {**shapes, "areas": ((n,), np.float64)})

    def __len__(self) -> int:
        return len(self.scores)

    def of_images(self, chosen: Array) -> KeypointResults:
        """The part on the images where the bool [I] `chosen` is true."""
        place = np.cumsum(chosen) - 1
        at = chosen[self.image]
        return KeypointResults(place[self.image[at]], self.keypoints[at], self.scores[at], self.areas[at])


def _check(what: str, record: Any, expected: dict[str, tuple[tuple[int, ...], Any]]) -> None:
    for name, (shape, dtype) in expected.items():
        value = np.asarray(getattr(record, name), dtype)
        if value.shape != shape:
            raise ValueError(f"{what}.{name} must be {list(shape)}, got {list(value.shape)}")
        if value.dtype == np.float64 and not np.isfinite(value).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise ValueError(f"{what}.{name} must be finite, got {value[at]} at {list(at)}")
        object.__setattr__(record, name, value)


@dataclass(frozen=True)
class KeypointAP:
    """The result. Numbers are fractions in [0, 1]; -1 where there is nobody of that size (as pycocotools has it).

    Attributes:
        ap, ap50, ap75, ap_medium, ap_large, ar, ar50, ar75, ar_medium, ar_large: COCO's ten numbers.
        precision: float64 [10, 101, 3] by OKS threshold, recall and size range; recall: float64 [10, 3].
        levels: CrowdPose's AP on easy, medium and hard images, empty elsewhere.
    """

    precision: Array = field(repr=False)
    recall: Array = field(repr=False)
    levels: dict[str, float] = field(default_factory=dict)

    ap = property(lambda self: _mean(self.precision[:, :, 0]))
    ap50 = property(lambda self: _mean(self.precision[0, :, 0]))
    ap75 = property(lambda self: _mean(self.precision[5, :, 0]))
    ap_medium = property(lambda self: _mean(self.precision[:, :, 1]))
    ap_large = property(lambda self: _mean(self.precision[:, :, 2]))
    ar = property(lambda self: _mean(self.recall[:, 0]))
    ar50 = property(lambda self: _mean(self.recall[0, 0]))
    ar75 = property(lambda self: _mean(self.recall[5, 0]))
    ar_medium = property(lambda self: _mean(self.recall[:, 1]))
    ar_large = property(lambda self: _mean(self.recall[:, 2]))

    def to_dict(self) -> dict[str, float]:
        """The numbers by their usual names: ``AP``, ``AP .5``, ... and for CrowdPose ``AP (easy)``, ..."""
        names = {
            "AP": self.ap, "AP .5": self.ap50, "AP .75": self.ap75, "AP (M)": self.ap_medium, "AP (L)": self.ap_large,
            "AR": self.ar, "AR .5": self.ar50, "AR .75": self.ar75, "AR (M)": self.ar_medium, "AR (L)": self.ar_large,
        }  # fmt: skip
        return {**names, **{f"AP ({level})": value for level, value in self.levels.items()}}


def _mean(values: Array) -> float:
    counted = values[values > NO_VALUE]
    return float(counted.mean()) if len(counted) else NO_VALUE


def average_precision(truth: KeypointTruth, results: KeypointResults, sigmas: Sequence[float]) -> KeypointAP:
    """COCO's ten numbers, and CrowdPose's three if `truth` has crowd indices.

    At most the 20 best detections of an image count. Equal scores keep the order of the input, across images the order
    of `image_ids`.

    Args:
        sigmas: [K] positive, COCO convention: OKS = mean over visible keypoints of exp(-d^2 / (2 (2 sigma)^2 area)).

    Raises:
        ValueError: shapes that do not fit each other.
    """
    widths = _variances(truth, results, sigmas)
    order, rank = _best(truth, results)
    starts, people = _people(truth)
    matched = np.zeros((len(AREA_RANGES), len(THRESHOLDS), len(order)), bool)
    unjudged = np.zeros_like(matched)
    for slots, gts in _chunks(truth, order, rank, starts, people, results, len(widths)):
        _match(truth, results, order, slots, gts, widths, matched, unjudged)

    areas = results.areas[order]
    for a, (low, high) in enumerate(AREA_RANGES):
        unjudged[a] |= ~matched[a] & ((areas < low) | (areas > high))
    scores = results.scores[order]
    by_score = np.argsort(-scores, kind="stable")
    precision, recall = _accumulate(matched, unjudged, by_score, (~_ignored(truth)).sum(1))
    levels = {
        level: average_precision(part, results.of_images(chosen), sigmas).ap for level, chosen, part in _levels(truth)
    }
    return KeypointAP(precision, recall, levels)


def _ignored(truth: KeypointTruth) -> Array:
    """bool [A, M]: who does not count in each range of areas."""
    return np.stack([truth.ignored | (truth.areas < low) | (truth.areas > high) for low, high in AREA_RANGES])


def _levels(truth: KeypointTruth) -> Iterator[tuple[str, Array, KeypointTruth]]:
    if truth.crowd_index is None:
        return
    level = np.digitize(truth.crowd_index, CROWD_LEVELS)
    for i, name in enumerate(("easy", "medium", "hard")):
        part = truth.of_images(level == i)
        fields = (part.image_ids, part.image, part.keypoints, part.visible, part.areas, part.boxes)
        yield name, level == i, KeypointTruth(*fields, part.ignored, part.crowd)


def _variances(truth: KeypointTruth, results: KeypointResults, sigmas: Sequence[float]) -> Array:
    widths = np.asarray(sigmas, np.float64)
    k = truth.visible.shape[1]
    if widths.shape != (k,) or not (widths > 0).all():
        raise ValueError(f"sigmas must be {k} positive numbers, one per keypoint, got {list(sigmas)}")
    if results.keypoints.shape[1] != k:
        raise ValueError(f"results have {results.keypoints.shape[1]} keypoints, the annotations {k}")
    if len(results) and not (results.image.min() >= 0 and results.image.max() < len(truth.image_ids)):
        raise ValueError(f"KeypointResults.image must be positions in the {len(truth.image_ids)} image_ids")
    return np.asarray((widths * 2) ** 2)


def _best(truth: KeypointTruth, results: KeypointResults) -> tuple[Array, Array]:
    """The detections that count, image by image and best first, and the rank of each within its image."""
    order = np.lexsort((np.arange(len(results)), -results.scores, results.image))
    counts = np.bincount(results.image, minlength=len(truth.image_ids))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = rank < MAX_DETECTIONS
    return order[keep], rank[keep]


def _people(truth: KeypointTruth) -> tuple[Array, Array]:
    """`people`: the annotated, image by image; those of image i start at ``starts[i]`` and end at ``starts[i + 1]``."""
    people = np.argsort(truth.image, kind="stable")
    return np.searchsorted(truth.image[people], np.arange(len(truth.image_ids) + 1)), people


def _chunks(
    truth: KeypointTruth, order: Array, rank: Array, starts: Array, people: Array, results: KeypointResults, k: int
) -> Iterator[tuple[Array, Array]]:
    """Images with about as many people, padded to tables: positions in `order` [n, D] and people [n, G], -1: empty."""
    image = results.image[order]
    per_image = np.bincount(image, minlength=len(truth.image_ids))
    first = np.cumsum(per_image) - per_image
    counts = np.diff(starts)
    images = np.flatnonzero((per_image > 0) & (counts > 0))
    images = images[np.argsort(counts[images], kind="stable")]
    at = 0
    while at < len(images):
        width = counts[images[at]]
        # as many images as fit into a table of two million keypoint pairs; larger groups of people end the chunk
        room = max(1, 2_000_000 // (MAX_DETECTIONS * int(width) * k))
        end = at + int(np.searchsorted(counts[images[at : at + room]], max(width + 1, width * 1.3), side="right"))
        part = images[at:end]
        at = end
        g = np.arange(counts[part].max())
        gts = np.where(g < counts[part, None], people[np.minimum(starts[part, None] + g, len(people) - 1)], -1)
        d = np.arange(per_image[part].max())
        yield np.where(d < per_image[part, None], first[part, None] + d, -1), gts


def _match(
    truth: KeypointTruth,
    results: KeypointResults,
    order: Array,
    slots: Array,
    gts: Array,
    widths: Array,
    matched: Array,
    unjudged: Array,
) -> None:
    """Fill `matched` and `unjudged` [A, T, N] for one table of images."""
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    oks = _oks(truth, gts, results.keypoints[order[slots]], widths)  # [n, D, G]
    oks[slots < 0] = -1.0
    oks.transpose(0, 2, 1)[gts < 0] = -1.0
    ignored = _ignored(truth)[:, gts].transpose(1, 0, 2)[:, :, None]  # [n, A, 1, G]
    many = truth.crowd[gts][:, None, None]
    last = gts.shape[1] - 1
    free = np.ones((len(gts), len(AREA_RANGES), len(THRESHOLDS), last + 1), bool)
    for d in range(slots.shape[1]):
        rows = np.flatnonzero(oks[:, d].max(1) >= limits[0, 0])
        if len(rows) == 0:
            continue
        value = oks[rows, d][:, None, None]  # [r, 1, 1, G]
        fits = (free[rows] | many[rows]) & (value >= limits)
        # people that count come first; among equals the last, as in pycocotools' loop
        regular = np.where(fits & ~ignored[rows], value, -1.0)[..., ::-1]
        other = np.where(fits & ignored[rows], value, -1.0)[..., ::-1]
        counts, takes = regular.max(-1) >= 0, fits.any(-1)
        best = last - np.where(counts, regular.argmax(-1), other.argmax(-1))  # [r, A, T]
        r, a, t = np.nonzero(takes)
        free[rows[r], a, t, best[r, a, t]] = False
        at = slots[rows[r], d]
        matched[a, t, at] = True
        unjudged[a, t, at] = ~counts[r, a, t]


def _oks(truth: KeypointTruth, gts: Array, found: Array, widths: Array) -> Array:
    """OKS of every detection and person of the same image: people [n, G], keypoints [n, D, K, 2] -> [n, D, G].

    The distance to a person without labelled keypoints is that to the box of three times the size.
    """
    visible, boxes = truth.visible[gts], truth.boxes[gts]  # [n, G, K], [n, G, 4]
    count = visible.sum(-1)
    delta = found[:, :, None] - truth.keypoints[gts][:, None]  # [n, D, G, K, 2]
    bare = np.argwhere(count == 0)
    if len(bare):
        i, g = bare.T
        low, high = (boxes[i, g, :2] - boxes[i, g, 2:])[:, None, None], (boxes[i, g, :2] + boxes[i, g, 2:] * 2)
        at = found[i]  # [b, D, K, 2]
        delta[i, :, g] = np.maximum(0, low - at) + np.maximum(0, at - high[:, None, None])
    seen = (visible | (count == 0)[..., None])[:, None]
    e = (delta[..., 0] ** 2 + delta[..., 1] ** 2) / widths
    e = e / (truth.areas[gts] + np.spacing(1))[:, None, :, None] / 2
    total = np.where(seen, np.exp(-e), 0.0).sum(-1)
    return np.asarray(total / seen.sum(-1))


def best_matches(truth: KeypointTruth, results: KeypointResults, sigmas: Sequence[float]) -> tuple[Array, Array]:
    """For every annotated person the best OKS of any result on the same image: float64 [M], and which one: int64 [M].

    0 and -1 where the image has no result. Unlike in AP one result may be the best for several people.
    """
    widths = _variances(truth, results, sigmas)
    best, which = np.zeros(len(truth)), np.full(len(truth), -1)
    order = np.argsort(results.image, kind="stable")
    found_starts = np.searchsorted(results.image[order], np.arange(len(truth.image_ids) + 1))
    starts, people = _people(truth)
    for i in range(len(truth.image_ids)):
        found, gts = order[found_starts[i] : found_starts[i + 1]], people[starts[i] : starts[i + 1]]
        if len(found) and len(gts):
            oks = _oks(truth, gts[None], results.keypoints[found][None], widths)[0]  # [D, G]
            best[gts], which[gts] = oks.max(0), found[oks.argmax(0)]
    return best, which


def _accumulate(matched: Array, unjudged: Array, by_score: Array, people: Array) -> tuple[Array, Array]:
    """Precision [T, R, A] and recall [T, A] from flags [A, T, N] and the number of people that count [A]."""
    a_count, t_count, n = matched.shape
    precision = np.full((t_count, len(RECALLS), a_count), NO_VALUE)
    recall = np.full((t_count, a_count), NO_VALUE)
    for a in range(a_count):
        if people[a] == 0:
            continue
        hit, judged = matched[a][:, by_score], ~unjudged[a][:, by_score]
        true, false = np.cumsum(hit & judged, 1, dtype=float), np.cumsum(~hit & judged, 1, dtype=float)
        reached = true / people[a]
        correct = true / (false + true + np.spacing(1))
        correct = np.maximum.accumulate(correct[:, ::-1], axis=1)[:, ::-1]
        recall[:, a] = reached[:, -1] if n else 0.0
        precision[:, :, a] = 0.0
        for t in range(t_count):
            place = np.searchsorted(reached[t], RECALLS, side="left")
            inside = place < n
            precision[t, inside, a] = correct[t, place[inside]]
    return precision, recall


def average_precision_pycocotools(
    truth: KeypointTruth, results: KeypointResults, sigmas: Sequence[float]
) -> KeypointAP:
    """The same by pycocotools' own code, for comparison; ten times slower or more.

    Raises:
        ImportError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("this evaluation needs pycocotools: pip install pycocotools") from error
    _variances(truth, results, sigmas)
    images = [{"id": int(i)} for i in truth.image_ids]
    annotations = [
        {
            "id": i + 1,  # pycocotools takes a match with id 0 for none
            "image_id": int(truth.image_ids[truth.image[i]]),
            "category_id": 1,
            "keypoints": _triples(truth.keypoints[i], truth.visible[i]),
            "num_keypoints": 0 if truth.ignored[i] else 1,
            "iscrowd": int(truth.crowd[i]),
            "area": float(truth.areas[i]),
            "bbox": truth.boxes[i].tolist(),
        }
        for i in range(len(truth))
    ]
    found = [
        {
            "id": i + 1,
            "image_id": int(truth.image_ids[results.image[i]]),
            "category_id": 1,
            "keypoints": _triples(results.keypoints[i], np.ones(len(sigmas))),
            "score": float(results.scores[i]),
            "area": float(results.areas[i]),
        }
        for i in range(len(results))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for people in (annotations, found):
            coco = COCO()
            coco.dataset = {"images": images, "categories": [{"id": 1, "name": "person"}], "annotations": people}
            coco.createIndex()
            sides.append(coco)
        evaluation = COCOeval(*sides, iouType="keypoints")
        evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, np.float64)
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"][:, :, 0, :, 0], evaluation.eval["recall"][:, 0, :, 0]
    levels = {
        level: average_precision_pycocotools(part, results.of_images(chosen), sigmas).ap
        for level, chosen, part in _levels(truth)
    }
    return KeypointAP(precision, recall, levels)


def _triples(points: Array, flags: Array) -> list[float]:
    return [float(v) for v in np.concatenate([points, flags[:, None]], axis=1).reshape(-1)]
