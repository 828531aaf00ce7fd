"""Reading and writing image files, and turning what users pass into RGB arrays."""

from __future__ import annotations

import glob
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpose.files import write_atomically

Array = NDArray[Any]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}


class ImageError(ValueError):
    """An image that cannot be used; the message names it and the reason."""


def read_image(path: str | Path, upright: bool = True) -> Array:
    """Read an image file as uint8 RGB [H, W, 3], turned upright by its EXIF orientation unless `upright` is false.

    Grey, alpha and 16-bit images are converted (alpha is dropped).

    Raises:
        ImageError: missing, unreadable, empty, truncated or not an image.
    """
    import cv2

    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder, expected an image file") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data:
        raise ImageError(f"{path}: the file is empty")
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[len(data) // 2 :]:
        raise ImageError(f"{path}: truncated JPEG (no end marker)")
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        with _SILENCE:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{path}: cannot be decoded: {str(error).strip().splitlines()[-1]}") from None
    if image is None:
        raise ImageError(f"{path}: not an image that OpenCV can decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class _Silence:
    """OpenCV logs decoder trouble to stderr; the exception says it once instead.

    The level is one for all threads, so the first to come lowers it and the last to go restores it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.level: Any = None

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.level = self._set()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self._set(self.level)

    @staticmethod
    def _set(level: Any = None) -> Any:
        """Set the level, to silent by default; returns the one before."""
        import cv2

        try:
            log = cv2.utils.logging
            before = log.getLogLevel()
            log.setLogLevel(log.LOG_LEVEL_SILENT if level is None else level)
        except AttributeError:  # builds without the logging bindings
            return None
        return before


_SILENCE = _Silence()


def check_suffix(path: str | Path) -> None:
    """Raise ValueError if `write_image` would not know the format of `path`."""
    import cv2

    try:
        known = cv2.haveImageWriter(str(path))
    except cv2.error:
        known = False
    if not known:
        raise ValueError(f"{path}: OpenCV cannot write images with suffix {Path(path).suffix!r}")


def write_image(path: str | Path, image: Array) -> None:
    """Write uint8 RGB [H, W, 3] atomically; the suffix decides the format. Raises ValueError for an unknown suffix."""
    import cv2

    path = Path(path)
    try:
        ok, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error:
        ok, data = False, None
    if not ok or data is None:
        raise ValueError(f"{path}: OpenCV cannot write images with suffix {path.suffix!r}")
    write_atomically(path, lambda p: p.write_bytes(data.tobytes()))


def channels_first(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is [3, H, W] or [1, H, W] rather than [H, W, C]."""
    return len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3, 4)


def to_rgb(image: Any, channel_order: str) -> Array:
    """Turn a path, array, PIL image, tensor or a function that returns one of these into uint8 RGB [H, W, 3].

    Arrays may be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha is dropped), uint8 or uint16 (scaled down); tensors
    may also be [3, H, W] or [1, H, W]. `channel_order` ("rgb" or "bgr") applies to arrays and tensors only. Files are
    turned upright as their EXIF orientation says; a PIL image is taken as it is (`PIL.ImageOps.exif_transpose`).

    Raises:
        ImageError: any other shape or dtype, or no pixels.
    """
    if callable(image):
        image = image()
    if isinstance(image, (str, Path)):
        return read_image(image)
    if type(image).__module__.partition(".")[0] == "PIL":
        if image.mode in ("I", "F"):  # Pillow would cut off all above 255, whatever the range is
            raise ImageError(
                f"PIL image of mode {image.mode!r} has no known range; scale it to 0..255 and convert to 'L'"
            )
        try:
            deep = image.mode.startswith("I;16")  # convert would cut off all above 255
            image = np.asarray(image).astype(np.uint16) if deep else np.asarray(image.convert("RGB"))
            channel_order = "rgb"
        except (OSError, SyntaxError, ValueError) as error:  # files are opened before they are decoded
            raise ImageError(f"PIL image {getattr(image, 'filename', '')!r} cannot be decoded: {error}") from None
    if hasattr(image, "detach"):  # torch.Tensor
        try:
            image = image.detach().cpu().numpy()
        except TypeError:  # bfloat16, which numpy does not have
            raise ImageError(f"image must be uint8 (or uint16), got {image.dtype}") from None
        if channels_first(image.shape):
            image = image.transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise ImageError(f"image must be a path, array, PIL image or tensor, got {type(image).__name__}")
    image = np.asarray(image)  # np.matrix stays two-dimensional whatever is done to it
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ImageError(f"image must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(image.shape)}")
    if image.size == 0:
        raise ImageError(f"image has no pixels: {list(image.shape)}")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ImageError(f"image must be uint8 (or uint16), got {image.dtype}; scale floats to 0..255 and convert")
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    elif channel_order == "bgr":
        image = image[:, :, 2::-1]
    return np.ascontiguousarray(image[:, :, :3])


def find_images(source: str) -> list[Path]:
    """Image files meant by a path, folder or glob, sorted; a folder is not searched recursively.

    Raises:
        ImageError: nothing there: missing path, folder without images, pattern without matches; a pipe.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise ImageError(f"{source}: the folder has no image files ({', '.join(sorted(SUFFIXES))})")
        return found
    if path.exists() and not path.is_file():
        raise ImageError(f"{path} is neither a file nor a folder; write what comes through a pipe to a file first")
    if path.exists():
        return [path]
    if glob.has_magic(source):
        found = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
        if not found:
            raise ImageError(f"{source}: no file matches the pattern")
        return found
    raise ImageError(f"{source}: no such file or folder")
