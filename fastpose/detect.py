"""Person boxes for the top-down networks.

A detector is any callable ``detector(image) -> boxes`` or ``(boxes, scores)`` with image uint8 RGB [H, W, 3], boxes
[P, 4] xyxy pixels and scores [P] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastpose.images import Array

Detector = Callable[[Array], Any]

HOG_MISSING = (
    "this OpenCV has no HOG people detector (OpenCV 5 moved it to another package): "
    "pip uninstall opencv-python && pip install opencv-contrib-python"
)


def hog_available() -> bool:
    """Whether the installed OpenCV brings the HOG people detector; raises ImportError if OpenCV does not load."""
    import cv2

    return hasattr(cv2, "HOGDescriptor")


def _hog() -> Any:
    import cv2

    if not hasattr(cv2, "HOGDescriptor"):
        raise ImportError(HOG_MISSING)
    hog = cv2.HOGDescriptor()
    people = "HOGDescriptor_getDefaultPeopleDetector"  # absent from the stubs of OpenCV 5
    hog.setSVMDetector(getattr(cv2, people)())
    return hog


class HogDetector:
    """OpenCV's people detector: histograms of oriented gradients, N. Dalal and B. Triggs, CVPR 2005.

    Needs no download and little time, and finds upright, entirely visible people only. Raises ImportError if the
    installed OpenCV does not bring it.
    """

    def __init__(self, max_side: int = 800) -> None:
        self.hog = _hog()
        self.max_side = max_side

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_side,)  # for copies and other processes: OpenCV's object can be neither

    def __call__(self, image: Array) -> tuple[Array, Array]:
        import cv2

        height, width = image.shape[:2]
        zoom = min(1.0, self.max_side / max(height, width))
        small = image
        if zoom < 1:
            size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        if small.shape[0] < 128 or small.shape[1] < 64:  # smaller than the detector's window
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        found, weights = self.hog.detectMultiScale(small, winStride=(8, 8), padding=(16, 16), scale=1.05)
        if len(found) == 0:
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        boxes = np.asarray(found, np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        # the window has a margin of 16 pixels around a person of 96 by 32
        margin = (boxes[:, 2:] - boxes[:, :2]) * np.array([0.15, 0.08], np.float32)
        boxes[:, :2] += margin
        boxes[:, 2:] -= margin
        boxes = np.clip(boxes / zoom, 0, np.array([width, height, width, height], np.float32))
        margins = np.maximum(np.asarray(weights, np.float32).reshape(-1), 0.0)
        return boxes, margins / (1 + margins)


def whole_image(image: Array) -> tuple[Array, Array]:
    """The image is one person."""
    height, width = image.shape[:2]
    return np.array([[0, 0, width, height]], np.float32), np.ones(1, np.float32)


def make_detector(detector: str | Detector | None) -> tuple[Detector, str]:
    """A detector from ``"auto"``, ``"hog"``, ``"none"`` (or None) or a callable, and a one-line notice, usually empty.

    ``"auto"`` is HOG, or the whole image if HOG is not installed. (The estimator also tries the whole image beside
    HOG's boxes: HOG misses close-ups and takes other things for people.)

    Raises:
        ValueError: another string. ImportError: ``"hog"`` without HOG.
    """
    if detector is None or detector == "none":
        return whole_image, ""
    if callable(detector):
        return detector, ""
    if detector == "hog":
        return HogDetector(), ""
    if detector == "auto":
        if not hog_available():
            return whole_image, f"taking each image as one person: {HOG_MISSING}"
        return HogDetector(), ""
    raise ValueError(f"detector must be 'auto', 'hog', 'none' or a callable, got {detector!r}")
