"""Tracking against plain loops, and what is left of jitter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastpose import ImageError, Poses, Tracker, track
from fastpose.cli import main
from fastpose.skeletons import COCO17, LSP14
from fastpose.video import write_video

SHAPE = np.random.default_rng(3).uniform(0, 1, (14, 2)) * [60, 100]  # a person of 100 pixels


def people(*places, scores=None) -> Poses:
    """Persons of the same shape at `places`, the upper left corners of their boxes."""
    corners = np.array(places, np.float32).reshape(-1, 2)
    keypoints = SHAPE + corners[:, None]
    scores = np.ones(keypoints.shape[:2]) if scores is None else scores
    return Poses(keypoints, scores, np.hstack([corners, corners + [60, 100]]), scores.mean(1), (500, 500), LSP14)


def numbers(tracker, *places, **more):
    return tracker(people(*places), **more).track_ids.tolist()


def test_people_keep_their_numbers():
    tracker = Tracker(25, patience=0.2)
    assert numbers(tracker) == numbers(tracker) == []
    assert numbers(tracker, (0, 0), (200, 0)) == [1, 2]
    assert numbers(tracker, (205, 0), (5, 0)) == [2, 1]  # in whatever order they come
    assert numbers(tracker, (10, 0), (300, 300), (210, 0)) == [1, 3, 2]
    assert numbers(tracker) == []
    assert numbers(tracker, (305, 300)) == [3]
    assert numbers(tracker, (310, 300), (25, 0)) == [3, 1]  # who was away for less than 0.2 s
    for x in range(4):
        assert numbers(tracker, (310 + x, 300)) == [3]
    assert numbers(tracker, (210, 0), (313, 300)) == [4, 3]  # and for more
    assert numbers(tracker, (213, 0), (213, 0)) == [4, 5]  # nobody is two people
    assert numbers(tracker, (400, 0), time=100.0) == [6]


def test_who_was_away_for_just_the_patience_is_still_known():
    """Half a frame is for rounding, and not more."""
    for frames, number in ((5, 1), (6, 2)):
        tracker = Tracker(25, patience=0.2)
        assert numbers(tracker, (0, 0), time=0.0) == [1]
        for i in range(1, frames):
            assert numbers(tracker, time=i / 25) == []
        assert numbers(tracker, (1, 0), time=frames / 25) == [number]


def test_a_person_that_comes_closer_is_measured_by_its_new_size():
    """OKS has the mean area of both poses: of one ten times as large a step of 30 pixels is none."""
    grown = people((0, 0))
    grown.keypoints[:] = SHAPE * 10
    grown.boxes[:] = [0, 0, 600, 1000]
    moved = people((0, 0))
    moved.keypoints[:] = SHAPE * 10 + [40, 0]
    moved.boxes[:] = [40, 0, 640, 1000]
    tracker = Tracker(25, smooth=False)
    assert [tracker(p).track_ids.tolist() for p in (people((0, 0)), grown, moved)] == [[1], [2], [2]]
    assert numbers(Tracker(25), (0, 0)) == [1]
    tracker = Tracker(25, smooth=False)
    assert numbers(tracker, (0, 0)) == [1] and numbers(tracker, (40, 0)) == [2]  # of a small one it is


def similarity(a: Poses, i: int, b: Poses, j: int) -> float:
    """OKS by its definition."""
    area = sum(float(np.prod(p.boxes[n, 2:].astype(float) - p.boxes[n, :2])) for p, n in ((a, i), (b, j))) / 2
    total, common = 0.0, 0
    for k, sigma in enumerate(LSP14.sigmas):
        if a.keypoint_scores[i, k] > 0.1 and b.keypoint_scores[j, k] > 0.1:
            squared = float(((a.keypoints[i, k].astype(float) - b.keypoints[j, k]) ** 2).sum())
            total += math.exp(-squared / (2 * (2 * sigma) ** 2 * area))
            common += 1
    return total / common if common else 0.0


def test_the_most_similar_are_matched_first():
    rng = np.random.default_rng(0)
    matched = 0
    for _ in range(30):
        before, after = (
            people(*rng.uniform(0, 60, (n, 2)), scores=rng.choice([0.0, 0.05, 1.0], (n, 14), p=[0.2, 0.2, 0.6]))
            for n in rng.integers(1, 7, 2)
        )
        tracker = Tracker(25, least_oks=0.3, smooth=False)
        tracker(before)
        pairs = [(similarity(before, i, after, j), i, j) for i in range(len(before)) for j in range(len(after))]
        expected, taken = {}, set()
        for oks, i, j in sorted(pairs, reverse=True):
            if oks > 0.3 and i not in taken and j not in expected:
                expected[j] = i + 1
                taken.add(i)
        got = tracker(after)
        assert np.array_equal(got.keypoints, after.keypoints)
        matched += len(expected)
        for j, number in enumerate(got.track_ids.tolist()):
            assert number == expected.get(j, number) and (j in expected) == (number <= len(before))
    assert matched > 30


def one_euro(values, times, cutoff, beta, unit):
    """The filter of the paper for one number, as its authors' code has it, speeds in units."""

    def alpha(rate, frequency):
        return 1.0 / (1.0 + rate / (2 * math.pi * frequency))

    result, speed = [values[0]], 0.0
    for i in range(1, len(values)):
        rate = 1 / (times[i] - times[i - 1])
        a = alpha(rate, 1.0)
        speed = a * (values[i] - values[i - 1]) * rate + (1 - a) * speed
        a = alpha(rate, cutoff + beta * abs(speed) / unit)
        result.append(a * values[i] + (1 - a) * result[-1])
    return result


def test_keypoints_pass_a_one_euro_filter():
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.02, 0.08, 40))
    path = np.cumsum(rng.normal(0, 2, (40, 2)), 0) + 50
    tracker = Tracker(25, cutoff=0.8, beta=3.0)
    frames = [people(place) for place in path]
    smooth = [tracker(frame, time) for frame, time in zip(frames, times, strict=True)]
    for k, axis in ((0, 0), (7, 1), (13, 0)):
        values = [float(frame.keypoints[0, k, axis]) for frame in frames]
        expected = one_euro(values, times, 0.8, 3.0, 100.0)
        assert np.abs(np.array([s.keypoints[0, k, axis] for s in smooth]) - expected).max() < 1e-3
    assert all(np.array_equal(s.boxes, f.boxes) and s.scores == f.scores for s, f in zip(smooth, frames, strict=True))


def test_jitter_goes_and_movement_stays():
    rng = np.random.default_rng(2)
    for speed, calmer, lag in ((0.0, 0.4, 0.3), (50.0, 0.75, 1.5)):  # pixels per second: half a person
        true = [np.array([50 + speed * t / 25, 50]) for t in range(100)]
        noise = rng.normal(0, 1, (100, 14, 2))
        tracker, found, smooth = Tracker(25), [], []
        for place, error in zip(true, noise, strict=True):
            pose = people(place)
            pose.keypoints[:] += error
            found.append(pose.keypoints[0] - SHAPE - place)
            smooth.append(tracker(pose).keypoints[0] - SHAPE - place)
        jitter = [np.diff(np.array(e)[25:], axis=0).std() for e in (found, smooth)]
        assert jitter[1] < calmer * jitter[0]
        assert abs(np.array(smooth)[25:, :, 0].mean()) < lag  # pixels


def test_keypoints_that_come_and_go_start_anew():
    scores = np.ones((1, 14))
    without = scores.copy()
    without[0, 5] = 0  # bottom-up networks put it at (0, 0) then
    tracker = Tracker(25, cutoff=0.01, beta=0.0)
    tracker(people((100, 100), scores=scores))
    lost = people((102, 100), scores=without)
    lost.keypoints[0, 5] = 0
    got = tracker(lost)
    assert got.track_ids.tolist() == [1] and (got.keypoints[0, 5] == 0).all() and got.keypoints[0, 4, 0] < 101.9 + 60
    back = people((104, 100))
    got = tracker(back)
    assert np.array_equal(got.keypoints[0, 5], back.keypoints[0, 5])
    assert got.keypoints[0, 4, 0] == pytest.approx(back.keypoints[0, 4, 0] - 4, abs=0.1)
    broken = people((104, 100))
    broken.keypoints[0, 4] = np.nan
    got = tracker(broken)
    assert got.track_ids.tolist() == [1] and np.isnan(got.keypoints[0, 4]).all()
    assert np.isfinite(tracker(back).keypoints).all()


def test_of_what_cannot_be_used_nothing_is_known():
    tracker = Tracker(25)
    unsure = people((0, 0), (90, 0), scores=np.array([[0.1] * 14, [0.0] * 13 + [0.2]]))
    for _ in range(2):
        got = tracker(unsure)
        assert got.track_ids.tolist() == [0, 1] and np.array_equal(got.keypoints[0], unsure.keypoints[0])
    error = ImageError("broken")
    frames = [people((0, 0)), error, people((1, 0)), *[error] * 30, people((2, 0))]
    got = list(track(frames, 25))
    assert len(got) == len(frames) and got[1] is error
    assert [p.track_ids.tolist() for p in got if p is not error] == [[1], [1], [1]]
    with pytest.raises(TypeError, match="track takes the results of PoseEstimator.stream, got str"):
        list(track(["clip.mp4"], 25))
    with pytest.raises(ValueError, match="fps must be positive"):
        track(frames, 0)


def test_whoever_is_in_the_next_frame_is_known_however_late_it_comes():
    for tracker in (Tracker(25, patience=0), Tracker(0.2)):
        assert numbers(tracker, (0, 0)) == numbers(tracker, (2, 0)) == [1]
        assert numbers(tracker) == [] and numbers(tracker, (2, 0)) == [2]


def test_later_changes_of_poses_change_nothing():
    tracker, poses = Tracker(25, smooth=False), people((0, 0))
    poses = tracker(poses)
    poses.keypoints[:] = 1e4
    assert numbers(tracker, (1, 0)) == [1]


def test_settings_are_checked():
    for settings, message in (
        ({"fps": 0.0}, "fps must be positive and finite, got 0.0"),
        ({"fps": math.nan}, "fps must be positive and finite, got nan"),
        ({"fps": 25, "cutoff": -1.0}, "cutoff must be positive and finite, got -1.0"),
        ({"fps": 25, "patience": -0.1}, "patience must not be negative, got -0.1"),
        ({"fps": 25, "least_oks": 1.0}, "least_oks must be at least 0 and less than 1, got 1.0"),
        ({"fps": 25, "keypoint_threshold": math.nan}, "keypoint_threshold must be at least 0 and less than 1, got nan"),
        ({"fps": 25, "beta": math.nan}, "beta must not be negative, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Tracker(**settings)
    tracker = Tracker(25)
    tracker(people((0, 0)), 1.0)
    with pytest.raises(ValueError, match=r"frames must come in order: 1\.0 s after 1\.0 s"):
        tracker(people((0, 0)), 1.0)
    with pytest.raises(ValueError, match="frames must come in order: inf s"):
        tracker(people((0, 0)), math.inf)
    with pytest.raises(ValueError, match="the poses before had skeleton lsp14, now it is coco17"):
        tracker(Poses.empty((9, 9), COCO17))
    assert tracker(people((1, 0))).track_ids.tolist() == [1]  # nothing happened
    with pytest.raises(ValueError, match=r"Poses.track_ids must be \[1\], got \[2\]"):
        Poses(**{**vars(people((0, 0))), "track_ids": [1, 2]})


def test_numbers_are_written_and_drawn():
    poses = Tracker(25)(people((100, 100), (300, 100)))
    assert [p["track_id"] for p in poses.to_coco()] == [1, 2] and poses[1].track_ids.tolist() == [2]
    assert [p["track_id"] for p in poses.to_dict()["people"]] == [1, 2]
    assert "track_id" not in people((0, 0)).to_coco()[0] and people((0, 0))[0].track_ids is None
    blank = np.zeros((500, 500, 3), np.uint8)
    plain = Poses(**{**vars(poses), "track_ids": None}).draw(blank)
    changed = (poses.draw(blank) != plain).any(2)
    ys, xs = np.nonzero(changed)
    assert changed[80:110, 95:120].any() and changed[80:110, 295:320].any() and ys.max() < 115 and len(xs) < 2000


def test_a_tracked_video(tmp_path, capsys, monkeypatch):
    photo = cv2.resize(cv2.imread(str(Path(__file__).parent.parent / "docs" / "astronaut.jpg")), (256, 256))
    monkeypatch.chdir(tmp_path)
    with write_video("clip.mp4", 10, (256, 256)) as add:
        for i in range(6):
            add(np.roll(photo[:, :, ::-1], 2 * i, axis=1))
    found = {}
    for name, options in (("plain", []), ("track", ["--track"]), ("smooth", ["--smooth"])):
        assert main(["predict", "clip.mp4", "--detector", "none", "--quiet", "--output", name, *options]) == 0
        found[name] = json.loads((tmp_path / name / "poses.json").read_text())["annotations"]
    assert len(found["plain"]) == 6 and "track_id" not in found["plain"][0]
    for name in ("track", "smooth"):
        assert [a["track_id"] for a in found[name]] == [1] * 6
    assert all(a["keypoints"] == b["keypoints"] for a, b in zip(found["plain"], found["track"], strict=True))
    assert found["smooth"][0]["keypoints"] == found["plain"][0]["keypoints"]
    assert found["smooth"][5]["keypoints"] != found["plain"][5]["keypoints"]
    tracker = Tracker(10)  # as by hand at the video's rate
    for before, after in zip(found["plain"], found["smooth"], strict=True):
        points, filtered = (np.array(a["keypoints"]).reshape(1, 14, 3) for a in (before, after))
        x, y, w, h = before["bbox"]
        box = np.array([[x, y, x + w, y + h]])
        pose = Poses(points[..., :2], points[..., 2], box, np.ones(1), (256, 256), LSP14)
        assert np.abs(tracker(pose).keypoints - filtered[..., :2]).max() < 0.01
    cv2.imwrite("photo.png", photo)
    assert main(["predict", "photo.png", "--track"]) == 2
    assert "--track and --smooth are for videos, of which there is none here" in capsys.readouterr().err


def test_track_counts_in_seconds():
    frames, by_hand = [people((i, 0)) for i in range(5)], Tracker(25)
    expected = [by_hand(frame, i / 25).keypoints for i, frame in enumerate(frames)]
    assert np.array_equal([poses.keypoints for poses in track(frames, 25)], expected)
