"""Associative embedding's grouping: known scenes, the compiled code against numpy, and maps that make no sense."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from fastpose import grouping
from fastpose.grouping import assign, default_order, group_people

K = 17


@pytest.fixture(params=["native", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(grouping, "_NATIVE", None)
    elif grouping._NATIVE is None:
        pytest.skip("fastpose._native is not built or switched off")


def draw(heatmaps, tags, keypoint, x, y, value, tag):
    """A bump of height `value` at (x, y) with the tags `tag` around it."""
    height, width = heatmaps.shape[1:]
    v, u = np.mgrid[:height, :width]
    squared = (u - x) ** 2 + (v - y) ** 2
    heatmaps[keypoint] = np.maximum(heatmaps[keypoint], value * np.exp(-squared / 8))
    tags[:, keypoint][:, squared < 16] = np.reshape(tag, (-1, 1))


def scene(people, dims=1, size=(64, 80), missing=0.2, seed=0, step=2.0):
    """Maps of people whose keypoints are far apart, and the truth: heatmaps, tags, cells [P, K, 2], there [P, K]."""
    rng = np.random.default_rng(seed)
    heatmaps = (rng.normal(size=(K, *size)) * 0.02).astype(np.float32)
    tags = (rng.normal(size=(dims, K, *size)) * 0.3).astype(np.float32)
    cells, there = np.zeros((people, K, 2), np.int64), rng.random((people, K)) > missing
    there[:, 0] = True
    spots = np.stack(np.meshgrid(np.arange(5, size[1] - 5, 9), np.arange(5, size[0] - 5, 9)), -1).reshape(-1, 2)
    for k in range(K):
        cells[:, k] = rng.permutation(spots)[:people]
        for p in range(people):
            if there[p, k]:
                tag = step * p + rng.normal(size=dims) * 0.1
                draw(heatmaps, tags, k, *cells[p, k], rng.uniform(0.2, 1), tag)
    return heatmaps, tags, cells, there


@pytest.mark.parametrize(("people", "dims", "step"), [(0, 1, 2.0), (1, 2, 2.0), (7, 1, 2.0), (25, 2, 2.0), (9, 1, 1.0)])
def test_people_are_found(backend, people, dims, step):
    heatmaps, tags, cells, there = scene(people, dims, step=step)
    found, scores = group_people(heatmaps, tags, refine=False)
    assert found.shape == (people, K, 3) and found.dtype == np.float32 and scores.shape == (people,)
    order = [int(np.argmin(np.abs(f[0, :2] - cells[:, 0] - 0.5).sum(1))) for f in found]
    assert sorted(order) == list(range(people))
    for person, p in zip(found, order, strict=True):
        assert np.array_equal(person[:, 2] > 0, there[p])
        assert np.abs(person[:, :2] - cells[p] - 0.5)[there[p]].max() == 0.25
    assert np.allclose(scores, found[:, :, 2].mean(1))
    refined, same_scores = group_people(heatmaps, tags)
    assert np.array_equal(refined[found[:, :, 2] > 0], found[found[:, :, 2] > 0])
    assert np.array_equal(same_scores, scores)
    for person, p in zip(refined, order, strict=True):
        for k in np.flatnonzero(~there[p]):
            mean = np.mean([tags[:, j, y, x] for j, (x, y) in enumerate(cells[p]) if there[p, j]], axis=0)
            fit = heatmaps[k] - np.round(np.linalg.norm(tags[:, k] - mean[:, None, None], axis=0))
            y, x = np.unravel_index(np.argmax(fit), fit.shape)
            if heatmaps[k, y, x] > 0:
                assert np.abs(person[k, :2] - [x + 0.5, y + 0.5]).max() == 0.25 and person[k, 2] == heatmaps[k, y, x]
            else:
                assert not person[k].any()


@pytest.mark.skipif(grouping._NATIVE is None, reason="fastpose._native is not built or switched off")
@pytest.mark.parametrize("seed", range(8))
def test_compiled_and_numpy_agree_to_the_last_bit(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    size, dims = (int(rng.integers(1, 70)), int(rng.integers(1, 70))), int(rng.integers(1, 4))
    for level in (0.02, 0.5):  # the latter: many candidates of noise, far more than people
        heatmaps = rng.normal(size=(K, *size)).astype(np.float32) * np.float32(level)
        tags = rng.normal(size=(dims, K, *size)).astype(np.float32) * 2
        for p in range(6):
            for k in range(K):
                x, y = rng.integers(0, size[1]), rng.integers(0, size[0])
                draw(heatmaps, tags, k, x, y, rng.random(), p + rng.normal(size=dims) * 0.3)
        heatmaps[rng.random(heatmaps.shape) < 0.001] = np.nan
        tags[rng.random(tags.shape) < 0.001] = np.inf
        for settings in ({}, {"max_people": 3, "window": 3}, {"tag_threshold": 0.2, "detection_threshold": 0.0}):
            compiled = group_people(heatmaps, tags, **settings)
            with monkeypatch.context() as m:
                m.setattr(grouping, "_NATIVE", None)
                plain = group_people(heatmaps, tags, **settings)
            assert np.array_equal(compiled[0], plain[0]) and np.allclose(compiled[1], plain[1], atol=1e-6)
            assert np.isfinite(plain[0]).all() and len(plain[0]) <= settings.get("max_people", 30)


def test_assignment_is_the_best():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 12))
        cost = np.round(rng.normal(size=(n, n + int(rng.integers(0, 6)))) * rng.choice([1, 3, 30])) * 100.0
        if rng.random() < 0.5:
            cost += rng.random(cost.shape)
        columns = assign(cost)
        assert len(set(columns.tolist())) == n
        best = cost[optimize.linear_sum_assignment(cost)].sum()
        assert np.isclose(cost[np.arange(n), columns].sum(), best)
    assert assign(np.zeros((0, 3))).shape == (0,)


def test_close_tags_go_to_the_nearest_person(backend):
    """All rounded distances are 0, so any assignment has the same cost by the original's rule."""
    heatmaps, tags = np.zeros((2, 40, 60), np.float32), np.zeros((1, 2, 40, 60), np.float32)
    for p, tag in enumerate((0.0, 0.4, 0.2)):
        draw(heatmaps, tags, 0, 10 + 20 * p, 10, 0.5 + 0.1 * p, tag)
    for p, tag in enumerate((0.39, 0.19, 0.01)):
        draw(heatmaps, tags, 1, 10 + 20 * p, 30, 0.9, tag)
    found, _ = group_people(heatmaps, tags)
    pairs = {(int(f[0, 0]) // 20, int(f[1, 0]) // 20) for f in found}
    assert pairs == {(0, 2), (1, 0), (2, 1)}


def test_a_chain_of_equal_costs_does_not_split_a_person(backend):
    """Tags 0, 4 and candidates 4, 8: by rounded distances (4, 4) costs as much as (8, 0); the match at 0 must stay."""
    heatmaps, tags = np.zeros((2, 40, 60), np.float32), np.zeros((1, 2, 40, 60), np.float32)
    for p, tag in enumerate((0.0, 4.0)):
        draw(heatmaps, tags, 0, 10 + 20 * p, 10, 0.9, tag)
    for p, tag in enumerate((4.0, 8.0)):
        draw(heatmaps, tags, 1, 10 + 20 * p, 30, 0.9, tag)
    found, _ = group_people(heatmaps, tags, refine=False)
    assert [tuple((f[:, 2] > 0).tolist()) for f in found] == [(True, False), (True, True), (False, True)]


def test_the_same_tag_twice_is_two_people(backend):
    heatmaps, tags = np.zeros((1, 40, 60), np.float32), np.zeros((1, 1, 40, 60), np.float32)
    draw(heatmaps, tags, 0, 10, 10, 0.9, 1.0)
    draw(heatmaps, tags, 0, 40, 10, 0.8, 1.0)
    assert len(group_people(heatmaps, tags)[0]) == 2


def test_more_people_than_wanted(backend):
    heatmaps, tags, _, _ = scene(25, 2)
    all_people, all_scores = group_people(heatmaps, tags)
    best, scores = group_people(heatmaps, tags, max_people=25)
    assert np.array_equal(best, all_people)
    # 10 candidates per keypoint, of different people: more than 10 people are begun, the best 10 remain
    few, scores = group_people(heatmaps, tags, max_people=10)
    assert len(few) == 10 and scores.min() > 0 and len(all_scores) == 25


def test_maps_without_sense(backend):
    nothing = group_people(np.zeros((K, 8, 9)), np.zeros((1, K, 8, 9)))
    assert nothing[0].shape == (0, K, 3) and nothing[1].shape == (0,)
    for value in (np.nan, np.inf, -np.inf, -1.0):
        found, _ = group_people(np.full((K, 8, 9), value), np.zeros((1, K, 8, 9)))
        assert len(found) == 0
    assert len(group_people(np.ones((K, 8, 9)), np.full((1, K, 8, 9), np.nan))[0]) == 0
    # a tag at infinity is nobody's
    values, tags = np.array([0.125, 0.875]).reshape(2, 1, 1), np.array([-1739.0, np.inf]).reshape(1, 2, 1, 1)
    found, _ = group_people(values, tags, refine=True)
    assert (found[..., 2] > 0).sum() == 1
    for size in ((1, 1), (1, 7), (0, 5)):
        found, _ = group_people(np.ones((2, *size)), np.zeros((2, 2, *size)), max_people=3)
        assert len(found) == min(1, size[0] * size[1]) and np.isfinite(found).all()
    assert group_people(np.zeros((0, 4, 4)), np.zeros((1, 0, 4, 4)))[0].shape == (0, 0, 3)
    plateau = np.zeros((1, 20, 20))
    plateau[0, 3:6, 3:6] = 0.5
    found, _ = group_people(plateau, np.zeros((1, 1, 20, 20)))  # one, where it begins; all neighbours on one side
    assert found[0, 0].tolist() == [3.75, 3.75, 0.5] and len(found) == 1
    plateau[0, 10, 3] = plateau[0, 12, 1] = 0.5  # 5 rows from the plateau, 2 rows and columns from each other
    assert len(group_people(plateau, np.zeros((1, 1, 20, 20)))[0]) == 2
    # huge tags, strided and double precision input
    heatmaps, tags, _, _ = scene(4)
    found, _ = group_people(heatmaps[:, ::-1].astype(np.float64)[:, ::-1], tags * np.float32(1e30))
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heatmaps": np.zeros((K, 8))}, r"expected heatmaps \[K, H, W\] and tags \[L, K, H, W\], got \[17, 8\]"),
        ({"tags": np.zeros((1, K, 8, 8))}, r"got \[17, 8, 9\] and \[1, 17, 8, 8\]"),
        ({"tags": np.zeros((0, K, 8, 9))}, r"and \[0, 17, 8, 9\]"),
        ({"order": [0, 1]}, "permutation of the 17 keypoints, got"),
        ({"order": [0] * 17}, "permutation"),
        ({"max_people": 0}, "max_people >= 1"),
        ({"window": 4}, "an odd window, got 30, 0.1, 1.0 and 4"),
        ({"detection_threshold": -0.1}, "detection_threshold >= 0"),
        ({"detection_threshold": np.nan}, "detection_threshold >= 0"),
        ({"tag_threshold": 0.0}, "tag_threshold > 0"),
    ],
)
def test_arguments_that_do_not_fit(backend, change, message):
    arguments = {"heatmaps": np.zeros((K, 8, 9)), "tags": np.zeros((1, K, 8, 9)), **change}
    with pytest.raises(ValueError, match=message):
        group_people(**arguments)


def test_order():
    assert default_order(17)[6:10] == [6, 11, 12, 7]
    for k in (0, 1, 14, 17, 23):
        assert sorted(default_order(k)) == list(range(k))


def test_threads_do_not_disturb_each_other(backend):
    heatmaps, tags, _, _ = scene(9)
    expected = group_people(heatmaps, tags)[0]
    results = []
    threads = [threading.Thread(target=lambda: results.append(group_people(heatmaps, tags)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(r, expected) for r in results)
