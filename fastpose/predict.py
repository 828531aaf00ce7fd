"""Poses in files: images and videos in, poses and drawings out."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastpose.boxes import BoxesOfImage
from fastpose.data import read_annotated
from fastpose.images import Array, ImageError
from fastpose.pipeline import PoseEstimator
from fastpose.poses import Poses
from fastpose.tracking import Tracker
from fastpose.video import Video, write_video

File = Path | Video
Report = Callable[[Path, str], None]


@dataclass(frozen=True)
class Found:
    """The poses in an image, or in frame number `frame`, from 0, of a video, whose pixels are `pixels`.

    A video ends with an entry without poses; its `frame` is the number of frames.
    """

    path: Path
    frame: int | None = None
    pixels: Array | None = None
    poses: Poses | None = None


def estimate_files(
    estimator: PoseEstimator,
    files: Sequence[File],
    boxes: Sequence[BoxesOfImage] | None,
    report: Report,
    advance: Callable[[], object],
    make_tracker: Callable[[float], Tracker] | None = None,
) -> Iterator[Found]:
    """What is found in `files`, in order.

    `boxes`: one entry per file, for images only; their scores go into those of the poses, and images are turned as they
    mean them. `report` is told of what cannot be used, `advance` is called for every image and frame. `make_tracker`
    makes of its frames per second what a video's poses go through.
    """
    asked: deque[Found] = deque()  # not answered yet
    videos = {file.path: file for file in files if isinstance(file, Video)}
    trackers = {path: make_tracker(video.fps) for path, video in videos.items()} if make_tracker else {}

    def images() -> Iterator[Path | Array | Callable[[], Array]]:
        sizes = [(0, 0)] * len(files) if boxes is None else [entry.size for entry in boxes]
        for file, size in zip(files, sizes, strict=True):
            if isinstance(file, Video):
                frame = -1
                for frame, pixels in enumerate(file):
                    asked.append(Found(file.path, frame, pixels))
                    yield pixels
                asked.append(Found(file.path, frame + 1))
                if frame + 1 < 0.9 * file.count:  # which is an estimate in some formats
                    report(file.path, f"{file.path}: only {frame + 1} of {file.count} frames can be decoded")
            else:
                asked.append(Found(file))
                yield partial(read_annotated, file, size)

    def ends() -> Iterator[Found]:
        while asked and asked[0].frame is not None and asked[0].pixels is None:
            yield asked.popleft()

    # of a list the estimator knows the length, and treats all of it alike
    given: Any = images() if any(isinstance(file, Video) for file in files) else list(images())
    scores = None if boxes is None else iter([np.asarray(entry.scores, np.float32) for entry in boxes])
    for poses in estimator.stream(given, None if boxes is None else [entry.boxes for entry in boxes]):
        yield from ends()
        item = asked.popleft()
        advance()
        of_boxes = None if scores is None else next(scores)
        if isinstance(poses, Poses):
            if of_boxes is not None:
                poses = replace(poses, scores=poses.scores * of_boxes)
            if item.path in trackers and item.frame is not None:
                poses = trackers[item.path](poses, item.frame / videos[item.path].fps)
            yield replace(item, poses=poses)
        else:
            where = item.path if item.frame is None else f"{item.path}, frame {item.frame}"
            report(item.path, str(poses) if isinstance(poses, ImageError) else f"{where}: {poses}")
    yield from ends()


class Drawings:
    """Pictures and videos with skeletons, written to `folder`: ``a_pose.png``, ``clip_pose.mp4``.

    Where that is the name of an input or of another picture, the number of the input is put before it.

    Use as a context; what is not complete at its end is not there.
    """

    def __init__(self, folder: Path, files: Sequence[File], threshold: float, report: Report) -> None:
        self.threshold, self.report = threshold, report
        paths = [file.path if isinstance(file, Video) else file for file in files]
        same = Counter(path.stem for path in paths)
        self.videos = {file.path: file for file in files if isinstance(file, Video)}
        self.drawn: dict[Path, Path] = {}
        taken = {path.resolve() for path in paths}  # what is drawn must not take the place of what is read
        for i, path in enumerate(paths, 1):
            name = path.stem if same[path.stem] == 1 else f"{i:06d}_{path.stem}"
            suffix = "_pose.mp4" if path in self.videos else "_pose.png"
            while (folder / (name + suffix)).resolve() in taken:
                name = f"{i:06d}_{name}"
            self.drawn[path] = folder / (name + suffix)
            taken.add(self.drawn[path].resolve())
        self.open = contextlib.ExitStack()
        self.add: Callable[[Array], None] | None = None

    def __enter__(self) -> Drawings:
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)

    def draw(self, found: Found) -> Found:
        """Draw one after the other, in the order in which they are found; returns `found` without pixels."""
        path = self.drawn[found.path]
        if found.path in self.videos:
            self._draw_frame(found, path)
        elif found.poses is not None:
            try:  # read again: images are not kept until their batch is done
                pixels = read_annotated(found.path, found.poses.image_size)
                found.poses.save(path, pixels, self.threshold)
            except (ValueError, OSError) as error:  # ImageError is a ValueError
                self.report(found.path, f"not drawn: {error}")
        return replace(found, pixels=None)

    def _draw_frame(self, found: Found, path: Path) -> None:
        if found.poses is None:
            self.open.close()
            self.add = None
            return
        if self.add is None:
            video = self.videos[found.path]
            try:
                self.add = self.open.enter_context(write_video(path, video.fps, video.size))
            except (ValueError, OSError) as error:
                self.report(found.path, f"not drawn: {error}")
                self.add = lambda pixels: None
        if found.pixels is not None:
            try:
                self.add(found.poses.draw(found.pixels, self.threshold))
            except ValueError as error:
                self.report(found.path, f"not drawn from frame {found.frame} on: {error}")
                self.add = lambda pixels: None
