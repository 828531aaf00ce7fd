"""`Poses`: what an estimator returns for one image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpose.files import write_atomically
from fastpose.skeletons import Skeleton

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Poses:
    """The P people found in one image; P = 0 is a normal answer.

    Attributes:
        keypoints: float32 [P, K, 2], (x, y) in pixels of the original image, integer = pixel centre.
        keypoint_scores: float32 [P, K], from 0 to 1. How sure the network is of the position; it does not tell a
            visible keypoint from a hidden one. Where it is the maximum of a heatmap that was trained as such, as in
            most published networks, it can exceed 1 a little.
        boxes: float32 [P, 4], xyxy pixels.
        scores: float32 [P], the instance scores: box score times mean keypoint score.
        image_size: (height, width) of the image.
        skeleton: names, links, flip pairs and sigmas of the K keypoints.
        track_ids: int64 [P], who is who from frame to frame, see `fastpose.Tracker`; None if nobody asked.
    """

    keypoints: Array
    keypoint_scores: Array
    boxes: Array
    scores: Array
    image_size: tuple[int, int]
    skeleton: Skeleton
    track_ids: Array | None = None

    def __post_init__(self) -> None:
        p, k = len(self.scores), self.skeleton.num_keypoints
        shapes = {"keypoints": (p, k, 2), "keypoint_scores": (p, k), "boxes": (p, 4), "scores": (p,)}
        for name, shape in shapes.items():
            value = np.asarray(getattr(self, name), np.float32)
            if value.shape != shape:
                raise ValueError(f"Poses.{name} must be {list(shape)}, got {list(value.shape)}")
            object.__setattr__(self, name, value)
        if self.track_ids is not None:
            ids = np.asarray(self.track_ids, np.int64)
            if ids.shape != (p,):
                raise ValueError(f"Poses.track_ids must be {[p]}, got {list(ids.shape)}")
            object.__setattr__(self, "track_ids", ids)

    @staticmethod
    def empty(image_size: tuple[int, int], skeleton: Skeleton) -> Poses:
        """Nobody."""
        k = skeleton.num_keypoints
        return Poses(np.zeros((0, k, 2)), np.zeros((0, k)), np.zeros((0, 4)), np.zeros(0), image_size, skeleton)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int | slice | Array | list[int]) -> Poses:
        """The people at `index` (an int keeps the first dimension: one person)."""
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"person {index} of {len(self)}")
            index = [int(index)]
        return Poses(
            self.keypoints[index],
            self.keypoint_scores[index],
            self.boxes[index],
            self.scores[index],
            self.image_size,
            self.skeleton,
            None if self.track_ids is None else self.track_ids[index],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "image_size": list(self.image_size),
            "keypoint_names": list(self.skeleton.names),
            "people": [
                {
                    **({} if self.track_ids is None else {"track_id": int(self.track_ids[i])}),
                    "score": round(float(self.scores[i]), 5),
                    "box": [round(float(v), 3) for v in self.boxes[i]],
                    "keypoints": [[round(float(v), 3) for v in xy] for xy in self.keypoints[i]],
                    "keypoint_scores": [round(float(v), 5) for v in self.keypoint_scores[i]],
                }
                for i in range(len(self))
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_coco(self, image_id: int | str = 0, category_id: int = 1) -> list[dict[str, Any]]:
        """One COCO keypoint result per person: keypoints [x, y, score, ...], bbox [x, y, width, height], score.

        Poses of a `fastpose.Tracker` have a track_id besides.
        """
        results = []
        for i in range(len(self)):
            flat = np.concatenate([self.keypoints[i], self.keypoint_scores[i, :, None]], axis=1).reshape(-1)
            x1, y1, x2, y2 = (float(v) for v in self.boxes[i])
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "keypoints": [round(float(v), 4) for v in flat],
                    "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(float(self.scores[i]), 5),
                    **({} if self.track_ids is None else {"track_id": int(self.track_ids[i])}),
                }
            )
        return results

    def draw(self, image: Array, threshold: float = 0.25) -> Array:
        """A copy of `image` (uint8 [H, W, 3]) with the skeletons of keypoints that score at least `threshold`."""
        from fastpose.draw import draw_poses

        return draw_poses(image, self, threshold)

    def save(self, path: str | Path, image: Any = None, threshold: float = 0.25) -> None:
        """Write ``*.json``, or the drawing on `image` (path, RGB array, PIL image or tensor) to an image file.

        Written atomically.

        Raises:
            ValueError: an image file without `image` or with one of another size, or a suffix that OpenCV cannot write.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            write_atomically(path, lambda p: p.write_text(self.to_json() + "\n"))
            return
        if image is None:
            raise ValueError(f"save to {str(path)!r}: drawing needs the image (or give a path that ends in .json)")
        from fastpose.images import to_rgb, write_image

        pixels = to_rgb(image, "rgb")
        if pixels.shape[:2] != tuple(self.image_size):
            size, own = pixels.shape[:2], tuple(self.image_size)
            raise ValueError(f"save to {str(path)!r}: these poses are of an image of {own} (height, width), got {size}")
        write_image(path, self.draw(pixels, threshold))
