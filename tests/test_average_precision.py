"""Average precision against pycocotools, number by number, and by hand; PCKh by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fastpose.average_precision import (
    KeypointResults,
    KeypointTruth,
    average_precision,
    average_precision_pycocotools,
)
from fastpose.metrics import head_sizes, pckh
from fastpose.skeletons import COCO17, CROWDPOSE14, MPII16


def scene(seed: int, images=12, people=6, k=17, ties=False, noise=0.1, extra=4, crowds=0.1):
    """People of all sizes, crowds, people without keypoints or area, empty images; detections good and bad."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, people + 1, images)
    counts[rng.random(images) < 0.25] = 0
    image = rng.permutation(np.repeat(np.arange(images), counts))
    m = len(image)
    size = np.exp(rng.uniform(np.log(8), np.log(300), (m, 1)))
    keypoints = rng.uniform(0, 500, (m, 1, 2)) + rng.uniform(0, 1, (m, k, 2)) * size[:, None]
    visible = rng.random((m, k)) < rng.choice([0.0, 0.05, 0.5, 1.0], (m, 1))
    boxes = np.concatenate([keypoints.min(1), size, size], axis=1)
    crowd = rng.random(m) < crowds
    truth = KeypointTruth(
        np.sort(rng.choice(10_000, images, replace=False)), image, keypoints, visible,
        np.where(rng.random(m) < 0.05, 0.0, size[:, 0] ** 2 * 0.6), boxes, crowd | ~visible.any(1), crowd,
    )  # fmt: skip
    copies = np.repeat(np.arange(m), rng.integers(0, 3, m))
    found = keypoints[copies] + rng.normal(size=(len(copies), k, 2)) * noise * size[copies][:, None] * rng.random(
        (len(copies), 1, 1)
    )
    strays = rng.uniform(0, 500, (extra * images, k, 2))
    found = np.concatenate([found, strays])
    at = np.concatenate([image[copies], rng.integers(0, images, len(strays))])
    scores = rng.random(len(found))
    if ties:
        scores = np.round(scores, 1)
    areas = np.exp(rng.uniform(3, 12, len(found)))
    return truth, KeypointResults(at, found, scores, areas)


def assert_same(a, b):
    assert np.abs(a.precision - b.precision).max() <= 1e-9
    assert np.abs(a.recall - b.recall).max() <= 1e-9
    x, y = a.to_dict(), b.to_dict()
    assert list(x) == list(y) and max(abs(x[n] - y[n]) for n in x) <= 1e-9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ties", [False, True])
def test_equals_pycocotools(seed, ties):
    pytest.importorskip("pycocotools")
    truth, results = scene(seed, ties=ties, noise=(0.0, 0.05, 0.2, 0.5)[seed % 4], extra=(0, 4, 40, 4)[seed % 4])
    sigmas = COCO17.sigmas if seed % 2 else np.random.default_rng(seed).uniform(0.01, 0.3, 17)
    own = average_precision(truth, results, sigmas)
    assert_same(own, average_precision_pycocotools(truth, results, sigmas))
    assert len(own.to_dict()) == 10


def test_exact_ties_of_oks_and_thresholds_equal_pycocotools():
    """OKS that hits thresholds exactly (3 of 5 keypoints perfect, the others far away), the same person labelled
    twice, the same detection twice."""
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(0)
    keypoints = rng.integers(0, 200, (30, 20, 2)).astype(float)
    keypoints[1::2] = keypoints[::2]
    boxes = np.tile([0.0, 0, 200, 200], (30, 1))
    ignored = rng.random(30) < 0.3
    crowd = ignored & (rng.random(30) < 0.5)
    visible = np.ones((30, 20), bool)
    image = np.repeat(np.arange(5), 6)
    truth = KeypointTruth(np.arange(5), image, keypoints, visible, np.full(30, 9216.0), boxes, ignored, crowd)
    found = np.repeat(keypoints, 2, axis=0)
    for i in range(60):
        found[i, : rng.integers(0, 11)] += 1e5
    results = KeypointResults(np.repeat(image, 2), found, np.round(rng.random(60), 1), np.full(60, 9216.0))
    sigmas = np.full(20, 0.05)
    own = average_precision(truth, results, sigmas)
    assert 0 < own.ap < 1
    assert_same(own, average_precision_pycocotools(truth, results, sigmas))


@pytest.mark.parametrize("what", ["nobody", "nothing found", "no images", "only crowds", "other images"])
def test_nothing_there_equals_pycocotools(what):
    pytest.importorskip("pycocotools")
    truth, results = scene(3)
    none = np.zeros(len(truth.image_ids), bool)
    if what in ("nobody", "no images", "only crowds"):
        chosen = truth.crowd if what == "only crowds" else np.zeros(len(truth), bool)
        truth = KeypointTruth(
            truth.image_ids, truth.image[chosen], truth.keypoints[chosen], truth.visible[chosen], truth.areas[chosen],
            truth.boxes[chosen], truth.ignored[chosen], truth.crowd[chosen],
        )  # fmt: skip
    if what == "no images":
        truth, results = truth.of_images(none), results.of_images(none)
    if what == "nothing found":
        results = results.of_images(none)
    if what == "other images":
        empty = np.bincount(truth.image, minlength=len(none)) == 0
        results = KeypointResults(
            np.full(len(results), np.flatnonzero(empty)[0]), results.keypoints, results.scores, results.areas
        )
    own = average_precision(truth, results, COCO17.sigmas)
    assert_same(own, average_precision_pycocotools(truth, results, COCO17.sigmas))
    assert own.ap == (0 if what in ("nothing found", "other images") else -1)


def test_crowdpose_levels_equal_pycocotools_on_their_images():
    pytest.importorskip("pycocotools")
    truth, results = scene(5, images=60, k=14)
    index = np.random.default_rng(0).uniform(0, 1, 60)
    index[:3] = 0.0, 0.2, 0.8  # the limits belong to the harder side
    truth = KeypointTruth(
        truth.image_ids, truth.image, truth.keypoints, truth.visible, truth.areas, truth.boxes, truth.ignored,
        truth.crowd, index,
    )  # fmt: skip
    own = average_precision(truth, results, CROWDPOSE14.sigmas)
    assert_same(own, average_precision_pycocotools(truth, results, CROWDPOSE14.sigmas))
    assert list(own.levels) == ["easy", "medium", "hard"]
    medium = (index >= 0.2) & (index < 0.8)
    part = average_precision(truth.of_images(medium), results.of_images(medium), CROWDPOSE14.sigmas)
    assert own.levels["medium"] == part.ap


def test_truth_as_prediction_is_exactly_one():
    truth, _ = scene(1, images=40, crowds=0.0)
    at = ~truth.ignored
    results = KeypointResults(truth.image[at], truth.keypoints[at], np.ones(at.sum()), truth.areas[at])
    own = average_precision(truth, results, COCO17.sigmas).to_dict()
    assert set(own.values()) == {1.0}


def test_by_hand():
    """Two people, one found with OKS 1, one missed; a stray with a lower score: precision 1 up to recall 0.5."""
    keypoints = np.zeros((2, 17, 2))
    keypoints[1] += 500
    truth = KeypointTruth(
        np.array([7]), np.zeros(2), keypoints, np.ones((2, 17), bool), np.full(2, 5000.0), np.ones((2, 4)),
        np.zeros(2, bool), np.zeros(2, bool),
    )  # fmt: skip
    found = np.stack([keypoints[0], keypoints[0] + 9999])
    own = average_precision(truth, KeypointResults(np.zeros(2), found, np.array([0.9, 0.8]), np.ones(2)), COCO17.sigmas)
    assert own.ap == pytest.approx(51 / 101) and own.ar == 0.5 and own.ap_medium == own.ap and own.ap_large == -1
    # 0.1 of the way down: OKS = exp(-d^2 / (2 (2 sigma)^2 area)) for all keypoints
    d = np.sqrt(-2 * np.log(0.72) * 5000) * 2 * np.asarray(COCO17.sigmas)
    moved = keypoints[0] + np.stack([d, np.zeros(17)], 1)
    own = average_precision(truth, KeypointResults(np.zeros(1), moved[None], np.ones(1), np.ones(1)), COCO17.sigmas)
    assert own.recall[:, 0].tolist() == [0.5] * 5 + [0.0] * 5  # thresholds 0.5 to 0.7


def test_wrong_arrays_are_named():
    truth, results = scene(0)
    with pytest.raises(ValueError, match="sigmas must be 17 positive numbers"):
        average_precision(truth, results, COCO17.sigmas[:16])
    with pytest.raises(ValueError, match="results have 14 keypoints, the annotations 17"):
        fewer = KeypointResults(results.image, results.keypoints[:, :14], results.scores, results.areas)
        average_precision(truth, fewer, COCO17.sigmas)
    bad = results.keypoints.copy()
    bad[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match=r"KeypointResults.keypoints must be finite, got nan at \[3, 2, 1\]"):
        KeypointResults(results.image, bad, results.scores, results.areas)
    with pytest.raises(ValueError, match="image_ids must be ascending and unique"):
        KeypointTruth(np.array([3, 3]), *[None] * 7)
    with pytest.raises(ValueError, match="KeypointTruth.visible|KeypointTruth.keypoints must be"):
        KeypointTruth(np.array([3]), np.zeros(1), np.zeros((1, 5, 2)), np.ones((1, 4), bool), np.ones(1),
                      np.ones((1, 4)), np.zeros(1), np.zeros(1))  # fmt: skip
    with pytest.raises(ValueError, match="positions in the 12 image_ids"):
        beyond = KeypointResults(results.image + 12, results.keypoints, results.scores, results.areas)
        average_precision(truth, beyond, COCO17.sigmas)


def test_crowds_are_never_missed():
    truth, results = scene(0)
    same = KeypointTruth(truth.image_ids, truth.image, truth.keypoints, truth.visible, truth.areas, truth.boxes,
                         truth.ignored & ~truth.crowd, truth.crowd)  # fmt: skip
    assert truth.crowd.any() and (same.ignored == truth.ignored).all()


def test_pckh_by_hand():
    keypoints = np.random.default_rng(0).uniform(0, 100, (3, 16, 2))
    labelled = np.ones((3, 16), bool)
    labelled[1, 4] = False
    sizes = head_sizes(np.array([[0, 0, 30, 40], [10, 10, 40, 50], [0, 0, 0, 0]]))
    assert sizes.tolist() == [30, 30, 0]
    assert pckh(keypoints, keypoints, labelled, sizes, MPII16)[0] == 100
    predictions = keypoints.copy()
    predictions[0, 0, 0] += 15.0001  # beyond half a head
    predictions[0, 6] += 99  # the pelvis is left out of the total
    predictions[2] += 99  # nobody's head
    predictions[0, 1, 1] += 3.2  # between 0.1 and 0.11
    total, per_keypoint = pckh(predictions, keypoints, labelled, sizes, MPII16)
    assert total == pytest.approx(100 * 26 / 27)  # 2 people, 14 keypoints, one unlabelled
    assert per_keypoint[0] == 50 and per_keypoint[6] == 50 and per_keypoint[4] == 100
    assert pckh(predictions, keypoints, labelled, sizes, MPII16, 0.1)[0] == pytest.approx(100 * 25 / 27)
    assert pckh(predictions, keypoints, labelled, sizes, MPII16, 0.11)[0] == pytest.approx(100 * 26 / 27)
