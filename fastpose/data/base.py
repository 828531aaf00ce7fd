"""What every data set is turned into: one record per annotated person."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpose.skeletons import Skeleton

Array = NDArray[Any]


@dataclass(frozen=True)
class PoseData:
    """N annotated people.

    Attributes:
        skeleton: names, flip pairs and sigmas of the K keypoints.
        images: N paths of image files (one file may occur more than once).
        keypoints: float32 [N, K, 2], (x, y) pixels of the image, meaningless where not labelled.
        labelled: bool [N, K].
        boxes: float32 [N, 4], xyxy.
    """

    skeleton: Skeleton
    images: tuple[Path, ...]
    keypoints: Array
    labelled: Array
    boxes: Array

    def __post_init__(self) -> None:
        n, k = len(self.images), self.skeleton.num_keypoints
        for name, shape in (("keypoints", (n, k, 2)), ("labelled", (n, k)), ("boxes", (n, 4))):
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(f"PoseData.{name} must be {list(shape)}, got {list(got)}")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Array) -> PoseData:
        """The people at `indices`, in that order."""
        return PoseData(
            self.skeleton,
            tuple(self.images[i] for i in indices),
            self.keypoints[indices],
            self.labelled[indices],
            self.boxes[indices],
        )


def boxes_of_keypoints(keypoints: Array, labelled: Array, margin: float, sizes_wh: Array | None = None) -> Array:
    """Boxes [N, 4] xyxy around the labelled keypoints, grown on each side by `margin` of the longer side.

    With `sizes_wh` [N, 2] the boxes are clipped to the images. A person without labelled keypoints gets zeros.
    """
    big = np.float32(np.inf)
    low = np.where(labelled[..., None], keypoints, big).min(1)
    high = np.where(labelled[..., None], keypoints, -big).max(1)
    grow = margin * (high - low).max(1, keepdims=True)
    low, high = low - grow, high + grow
    if sizes_wh is not None:
        low, high = np.clip(low, 0, sizes_wh), np.clip(high, 0, sizes_wh)
    boxes = np.concatenate([low, high], axis=1)
    boxes[~labelled.any(1)] = 0
    return np.asarray(boxes, np.float32)
