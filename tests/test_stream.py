"""Images as a stream: the order, errors in between, the end before the end, and the same poses as one by one."""

from __future__ import annotations

import threading
import time

import cv2
import numpy as np
import pytest

from fastpose import BoxError, ImageError, PoseEstimator, Poses
from fastpose.images import read_image
from fastpose.stream import run_ahead


@pytest.fixture(scope="module")
def estimator() -> PoseEstimator:
    return PoseEstimator(detector="none", optimize=False, batch_size=3, flip_test=False)


@pytest.fixture
def scenes(photo):
    """Images of different sizes with 0 to 7 boxes each."""
    images = [np.roll(photo[: 240 - 10 * i], 30 * i, axis=1).copy() for i in range(6)]
    boxes = [[[5 * j, 3 * j, 150 + 9 * j, 170] for j in range(n)] for n in (2, 0, 7, 1, 0, 3)]
    return images, boxes


def same(got, expected):
    return len(got) == len(expected) and all(
        np.allclose(getattr(got, name), getattr(expected, name), atol=1e-2) for name in ("keypoints", "boxes", "scores")
    )


def own_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fastpose")]


def test_frames_in_memory_that_is_used_again(estimator, photo):
    frames = [np.roll(photo, 25 * i, axis=1) for i in range(8)]
    boxes = np.array([[20.0, 10, 200, 220]], np.float32)

    def camera():
        frame = np.empty_like(photo)
        for f in frames:
            frame[:] = f
            yield frame

    def finder():
        box = boxes.copy()
        for i in range(8):
            box[:] = boxes + [i, 0, i, 0]
            yield box

    got = list(estimator.stream(camera(), finder()))
    for i, poses in enumerate(got):
        expected = estimator(frames[i], boxes + [i, 0, i, 0])
        assert np.allclose(poses.keypoints, expected.keypoints, atol=1e-2) and (poses.boxes == expected.boxes).all()
    boxes_given = boxes.copy()
    poses = estimator(photo, boxes_given)
    boxes_given += 9
    assert (poses.boxes == boxes).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 4, 100])
def test_work_ahead_comes_in_order(ahead, threads):
    def slow(n):
        time.sleep(0.001 * (n % 3))
        return n

    assert list(run_ahead(slow, iter(range(20)), ahead, threads)) == list(range(20))
    assert list(run_ahead(slow, [], ahead, threads)) == []
    assert not own_threads()


def test_no_more_is_taken_than_asked_for():
    taken, held = [], []

    def items():
        for n in range(1000):
            taken.append(n)
            yield n

    results = run_ahead(held.append, items(), 4)
    next(results), next(results)
    assert len(taken) == 6
    results.close()
    assert len(taken) == 6 and not own_threads()


def test_errors_come_when_due_and_end_the_threads():
    results = run_ahead(lambda n: 6 // n, [2, 1, 0, 3], 3)
    assert [next(results), next(results)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not own_threads()


def test_stream_gives_what_single_calls_give(estimator, scenes):
    images, boxes = scenes
    expected = [estimator(image, entry) for image, entry in zip(images, boxes, strict=True)]
    for got in (estimator(images, boxes), list(estimator.stream(iter(images), iter(boxes)))):
        assert [len(p) for p in got] == [2, 0, 7, 1, 0, 3]
        assert all(map(same, got, expected))
        assert [p.image_size for p in got] == [i.shape[:2] for i in images]
    again = estimator(images, boxes)
    assert all(np.array_equal(a.keypoints, b.keypoints) for a, b in zip(got, again, strict=True))
    assert list(estimator.stream([])) == []


def test_batches_are_full_across_images(estimator, scenes, monkeypatch):
    sizes, forward = [], estimator._forward
    monkeypatch.setattr(estimator, "_forward", lambda crops: sizes.append(len(crops)) or forward(crops))
    estimator(*scenes)
    assert sizes == [3, 3, 3, 3, 1]
    sizes.clear()
    nobody = [[]] * 50
    images = [scenes[0][0]] * 52
    found = estimator.stream(images, [scenes[1][0][:1], *nobody, scenes[1][0][:1]])
    next(found)  # does not wait for a batch that images without people will not fill
    assert sizes == [1]
    assert [len(p) for p in found] == [0] * 50 + [1]


def test_crops_of_crowds_are_cut_later(estimator, photo, monkeypatch):
    boxes = [[j, j, 150 + j, 170 + j] for j in range(9)]
    expected = estimator(photo, boxes)
    monkeypatch.setattr("fastpose.pipeline.AHEAD", 4)
    assert same(estimator(photo, boxes), expected)


def test_what_cannot_be_used_is_told_in_its_place(estimator, scenes, tmp_path):
    images, boxes = scenes
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(paths, images, strict=True):
        cv2.imwrite(str(path), image[:, :, ::-1])
    expected = estimator(paths, boxes)
    paths[2].write_bytes(b"broken")
    bad = [*boxes[:3], [[0, 0, np.nan, 5]], *boxes[4:]]
    found = list(estimator.stream(paths, bad))
    assert isinstance(found[2], ImageError) and "2.png: not an image" in str(found[2])
    assert isinstance(found[3], BoxError) and "box 0 (0, 0, nan, 5) is not finite" in str(found[3])
    assert all(same(found[i], expected[i]) for i in (0, 1, 4, 5))
    with pytest.raises(ImageError, match="2.png"):
        estimator(paths, bad)
    assert not own_threads()


def test_stopping_early_leaves_nothing_behind(estimator, photo):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield photo

    for i, poses in enumerate(estimator.stream(endless())):
        assert isinstance(poses, Poses)
        if i == 4:
            break
    del poses
    assert not own_threads() and len(taken) < 20
    with pytest.raises(RuntimeError, match="network"):
        for _ in estimator.stream(endless()):
            raise RuntimeError("of the network, say")
    assert not own_threads()


def test_reading_and_the_network_overlap(estimator, photo, monkeypatch):
    """The fourth image is not read before the network has begun with three, which does not end before it is read."""
    begun, read, find = threading.Event(), threading.Event(), estimator._find
    found = []

    def slow_find(job):
        found.append(job)
        if len(found) == 4:
            assert begun.wait(20)
            read.set()
        return find(job)

    def slow_forward(crops):
        begun.set()
        assert read.wait(20)
        return [(np.zeros((14, 2), np.float32), np.zeros(14, np.float32))] * len(crops)

    monkeypatch.setattr(estimator, "_find", slow_find)
    monkeypatch.setattr(estimator, "_forward", slow_forward)
    assert len(estimator([photo] * 6, [[[10, 10, 100, 100]]] * 6)) == 6


def test_own_detectors_are_called_in_the_calling_thread(photo):
    seen = []

    def detector(image):
        seen.append(threading.current_thread())
        return [[10, 10, 100, 200]]

    pose = PoseEstimator(detector=detector, optimize=False, flip_test=False)
    assert [len(p) for p in pose([photo] * 4, [None, None, [[1, 2, 30, 40]], None])] == [1] * 4
    assert seen == [threading.main_thread()] * 3
    pose.detector = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        pose([photo, photo])


def test_wrong_streams(estimator, photo):
    for images in (photo, "photo.png"):
        with pytest.raises(ValueError, match="stream takes several images"):
            estimator.stream(images)
    with pytest.raises(BoxError, match="one entry per image, 2, got 1"):
        estimator.stream([photo, photo], [None])
    with pytest.raises(ValueError, match="shorter"):
        list(estimator.stream(iter([photo, photo]), iter([None])))


def test_decoders_are_silenced_in_all_threads(tmp_path):
    level = cv2.utils.logging.getLogLevel()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)

    def read(_):
        with pytest.raises(ImageError):
            read_image(tmp_path / "bad.png")

    list(run_ahead(read, range(200), 50, 8))
    assert cv2.utils.logging.getLogLevel() == level


def test_a_source_that_fails_costs_nothing_that_came_before(estimator, photo):
    def camera():
        yield from [photo] * 7
        raise OSError("unplugged")

    got = []
    with pytest.raises(OSError, match="unplugged"):
        for poses in estimator.stream(camera()):
            got.append(poses)
    assert [len(poses) for poses in got] == [1] * 7

    def numbers():
        yield from range(5)
        raise OSError("unplugged")

    got.clear()
    with pytest.raises(OSError, match="unplugged"):
        for number in run_ahead(lambda n: 2 * n, numbers(), 3):
            got.append(number)
    assert got == [0, 2, 4, 6, 8] and not own_threads()


def test_paths_of_a_generator_are_not_copied(estimator, photo, tmp_path):
    """Paths of Python 3.14 have a method of that name, which copies the file."""

    class Path314(type(tmp_path)):
        def copy(self, target):
            raise AssertionError("a path is no image")

    cv2.imwrite(str(tmp_path / "a.png"), photo)
    assert len(list(estimator.stream(Path314(p) for p in [tmp_path / "a.png"]))[0]) == 1


def test_boxes_in_a_list_that_is_used_again(estimator, photo):
    def boxes():
        entry = [[10, 10, 100, 200]]
        for i in range(6):
            entry[0][0] = 10 * i
            yield entry

    got = [poses.boxes[0, 0] for poses in estimator.stream((photo for _ in range(6)), boxes())]
    assert got == [0, 10, 20, 30, 40, 50]
