"""Video files, read and written through OpenCV, whose wheels bring FFmpeg along."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastpose.files import replacing
from fastpose.images import Array, ImageError

SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}


class Video:
    """The frames of a video file, uint8 RGB [H, W, 3], upright: ``for frame in Video("clip.mp4")``.

    They are decoded one by one as they are asked for, from the beginning in every loop. A file that is damaged in the
    middle ends there: compare with `count`.

    Attributes:
        path: the file.
        size: (height, width) of the frames.
        fps: frames per second, 30 if the file does not say.
        count: number of frames by the file's own account, 0 if it does not say.

    Raises:
        ImageError: missing, not a video, or nothing in it can be decoded.
    """

    def __init__(self, path: str | Path) -> None:
        import cv2

        self.path = Path(path)
        if not self.path.is_file():
            raise ImageError(f"{path}: {'is a folder, expected a video' if self.path.is_dir() else 'no such file'}")
        capture = self._open()
        fps, count = float(capture.get(cv2.CAP_PROP_FPS)), float(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        there, first = capture.read()
        capture.release()
        if not there:
            raise ImageError(f"{path}: not a video that OpenCV can decode")
        self.size = (first.shape[0], first.shape[1])
        self.fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else 30.0
        self.count = int(count) if math.isfinite(count) and count > 0 else 0

    def __iter__(self) -> Iterator[Array]:
        import cv2

        capture = self._open()
        try:
            while True:
                there, frame = capture.read()
                if not there:
                    return
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()

    def _open(self) -> Any:
        import cv2

        _silence_ffmpeg()
        return cv2.VideoCapture(str(self.path))


@contextlib.contextmanager
def write_video(path: str | Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[Array], None]]:
    """A function that adds a frame, uint8 RGB [H, W, 3] of `size` (H, W), to an MPEG-4 video.

    MPEG-4 has even sides only: the last row or column of an odd one is there twice.
    The file is there, whole, when the context ends without an exception; otherwise what was there before is.

    Raises:
        ValueError: OpenCV cannot write such a file; a frame of another size.
    """
    import cv2

    _silence_ffmpeg()
    path = Path(path)

    def add(frame: Array) -> None:
        if frame.shape != (*size, 3):
            raise ValueError(f"{path}: a frame must be {[*size, 3]}, got {list(frame.shape)}")
        even = cv2.copyMakeBorder(frame, 0, height - size[0], 0, width - size[1], cv2.BORDER_REPLICATE)
        writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))

    height, width = (side + side % 2 for side in size)
    # MPEG-4 counts time in parts of a second, of which there are 65535 at most
    fps = round(fps, next((digits for digits in (3, 2, 1) if fps * 10**digits <= 65535), 0))
    with replacing(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
        if not writer.isOpened():
            what = f"with suffix {path.suffix!r}, {width} x {height} pixels and {fps:g} frames per second"
            raise ValueError(f"{path}: OpenCV cannot write a video {what}")
        try:
            yield add
        finally:
            writer.release()


def _silence_ffmpeg() -> None:
    """FFmpeg prints what is wrong with a file; the exception says it once instead. Read when it is first used."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
