"""Videos: frames in, poses and a drawn video out."""

from __future__ import annotations

import contextlib
import json

import cv2
import numpy as np
import pytest

from fastpose import ImageError, PoseEstimator, Video, predict
from fastpose.cli import main
from fastpose.video import write_video


def write(path, frames, fps=12.5):
    height, width = frames[0].shape[:2]
    with write_video(path, fps, (height, width)) as add:
        for frame in frames:
            add(frame)


@pytest.fixture
def frames(photo):
    """Nine frames [240, 320, 3] RGB in which the photo moves to the right."""
    return [np.roll(photo[:, :, ::-1], 8 * i, axis=1) for i in range(9)]


def test_frames_come_in_order_as_often_as_asked(tmp_path, frames):
    write(tmp_path / "clip.mp4", frames)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    video = Video(tmp_path / "clip.mp4")
    assert video.size == (240, 320) and video.fps == 12.5 and video.count == 9
    for _ in range(2):
        got = list(video)
        assert len(got) == 9 and all(f.dtype == np.uint8 and f.shape == (240, 320, 3) for f in got)
        for i, frame in enumerate(got):  # compressed: not the same, but nearer to its own than to its neighbours
            errors = [np.abs(frame.astype(float) - other).mean() for other in frames]
            assert np.argmin(errors) == i and errors[i] < 6


def test_a_video_that_is_not_finished_leaves_the_old_one(tmp_path, frames):
    path = tmp_path / "clip.mp4"
    write(path, frames)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a frame must be \[240, 320, 3\], got \[10, 320, 3\]"):
        write(path, [frames[0], frames[1][:10]])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="OpenCV cannot write a video with suffix '.nothing', 320 x 240 pixels "):
        write(tmp_path / "clip.nothing", frames)


def test_odd_sides_lose_nothing(tmp_path):
    frame = np.zeros((61, 81, 3), np.uint8)
    frame[60:], frame[:, 80:] = 200, 200
    write(tmp_path / "odd.mp4", [frame] * 3)
    (got, *_) = Video(tmp_path / "odd.mp4")
    assert got.shape == (62, 82, 3) and got[60, :70].mean() > 120 and got[:50, 80].mean() > 120


def test_a_video_that_cannot_be_drawn_stops_nothing(tmp_path, frames, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "clip.mp4", frames[:2])
    cv2.imwrite("z.png", frames[0])

    @contextlib.contextmanager
    def fail(path, fps, size):
        raise ValueError(f"{path}: OpenCV cannot write a video")
        yield

    monkeypatch.setattr(predict, "write_video", fail)
    assert main(["predict", "clip.mp4", "z.png", "--detector", "none", "--save-images"]) == 2
    assert capsys.readouterr().err.count("not drawn: ") == 1
    assert len(json.loads((tmp_path / "poses" / "poses.json").read_text())["annotations"]) == 3
    assert (tmp_path / "poses" / "z_pose.png").is_file()


def test_what_is_no_video_is_named(tmp_path, frames, capfd):
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 200)
    (tmp_path / "empty.mp4").touch()
    write(tmp_path / "half.mp4", frames)
    (tmp_path / "half.mp4").write_bytes((tmp_path / "half.mp4").read_bytes()[:3000])
    for name in ("junk", "empty", "half"):
        with pytest.raises(ImageError, match=rf"{name}\.mp4: not a video that OpenCV can decode"):
            Video(tmp_path / f"{name}.mp4")
    assert capfd.readouterr().err == ""  # FFmpeg says nothing itself
    with pytest.raises(ImageError, match="no such file"):
        Video(tmp_path / "none.mp4")
    with pytest.raises(ImageError, match="is a folder"):
        Video(tmp_path)


def test_poses_in_videos_are_those_in_their_frames(tmp_path, frames, photo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "clip.mp4", frames)
    write(tmp_path / "short.avi", frames[:2], 25)
    cv2.imwrite("photo.png", photo)
    (tmp_path / "junk.mov").write_bytes(b"junk")
    arguments = ["predict", "clip.mp4", "photo.png", "junk.mov", "short.avi", "--detector", "none", "--save-images"]
    arguments += ["--threshold", "0"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "clip.mp4: 9 frames, 9 poses" in said.out and "short.avi: 2 frames, 2 poses" in said.out
    assert "photo.png: 1 person" in said.out and "12 poses in 12 images" in said.out
    assert "junk.mov: not a video that OpenCV can decode" in said.err and "1 of 4 inputs failed" in said.err
    result = json.loads((tmp_path / "poses" / "poses.json").read_text())
    named = [(image["file_name"], image.get("frame")) for image in result["images"]]
    expected = [("clip.mp4", i) for i in range(9)] + [("photo.png", None), ("short.avi", 0), ("short.avi", 1)]
    assert named == expected and [a["image_id"] for a in result["annotations"]] == list(range(1, 13))
    pose = PoseEstimator(detector="none")
    for poses, annotation in zip(pose.stream(Video("clip.mp4")), result["annotations"], strict=False):
        assert np.allclose(poses.to_coco()[0]["keypoints"], annotation["keypoints"], atol=0.02)
    names = sorted(p.name for p in (tmp_path / "poses").iterdir())
    assert names == ["clip_pose.mp4", "photo_pose.png", "poses.json", "short_pose.mp4"]
    drawn = Video(tmp_path / "poses" / "clip_pose.mp4")
    assert drawn.fps == 12.5 and drawn.count == 9
    for before, after in zip(Video("clip.mp4"), drawn, strict=True):
        changed = np.abs(before.astype(int) - after).max(2) > 60  # the skeleton, and little else
        assert 0.002 < changed.mean() < 0.3


def test_videos_and_boxes(tmp_path, frames, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "clip.mp4", frames[:2])
    (tmp_path / "boxes.json").write_text(json.dumps({"clip.mp4": [[1, 1, 50, 50]]}))
    assert main(["predict", "clip.mp4", "--boxes", "boxes.json"]) == 2
    assert "clip.mp4: a video cannot have --boxes, which are those of images" in capsys.readouterr().err


def test_a_video_that_ends_early_or_changes_its_size(tmp_path, frames, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "clip.mp4", frames)

    class Damaged(Video):
        def __iter__(self):
            for i, frame in enumerate(super().__iter__()):
                if i == 6:
                    return
                yield frame if i < 4 else frame[:100]

    monkeypatch.setattr("fastpose.video.Video", Damaged)
    monkeypatch.setattr(predict, "Video", Damaged)
    assert main(["predict", "clip.mp4", "--detector", "none"]) == 2
    said = capsys.readouterr()
    assert "clip.mp4: only 6 of 9 frames can be decoded" in said.err
    assert "not drawn from frame 4 on: " in said.err and said.err.count("not drawn") == 1
    assert len(json.loads((tmp_path / "poses" / "poses.json").read_text())["annotations"]) == 6
    assert Video(tmp_path / "poses" / "clip_pose.mp4").count == 4


@pytest.mark.parametrize("fps", [59.94, 119.913, 240.123, 1000.0, 23.976])
def test_frame_rates_of_phones(tmp_path, fps):
    with write_video(tmp_path / "a.mp4", fps, (64, 64)) as add:
        for _ in range(5):
            add(np.zeros((64, 64, 3), np.uint8))
    assert abs(Video(tmp_path / "a.mp4").fps - fps) < 0.01
