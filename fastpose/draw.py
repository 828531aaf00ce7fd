"""Drawing skeletons."""

from __future__ import annotations

import numpy as np

from fastpose.poses import Array, Poses

# RGB; the person's right side orange, left side blue, middle green: left and right must be told apart at a glance
RIGHT, LEFT, MIDDLE = (255, 140, 0), (30, 120, 255), (60, 200, 90)


def side_colour(name: str) -> tuple[int, int, int]:
    """Colour of a keypoint by its name."""
    return RIGHT if name.startswith("right_") else LEFT if name.startswith("left_") else MIDDLE


def draw_poses(image: Array, poses: Poses, threshold: float) -> Array:
    """A copy of `image` (uint8 RGB [H, W, 3]) with links between and dots on keypoints that score at least `threshold`.

    Line width follows the size of each person's box, in whose corner the number of a tracked person stands.
    """
    import cv2

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"draw: image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    canvas = np.ascontiguousarray(image).copy()
    names = poses.skeleton.names
    colours = [side_colour(name) for name in names]
    bits = 4  # fractional bits of cv2's coordinates
    limit = 2**20
    numbers = np.zeros(len(poses), int) if poses.track_ids is None else poses.track_ids
    people = zip(poses.keypoints, poses.keypoint_scores, poses.boxes, numbers, strict=True)
    for points, scores, box, number in people:
        x1, y1, x2, y2 = np.clip(np.nan_to_num(box), -limit, limit)
        size = float(max(x2 - x1, y2 - y1, 1.0))
        width = int(np.clip(round(size / 90), 1, 12))
        visible = (scores >= threshold) & np.isfinite(points).all(-1)
        at = [tuple(int(v) for v in np.clip(np.nan_to_num(xy), -limit, limit) * 2**bits) for xy in points]
        for a, b in poses.skeleton.links:
            if visible[a] and visible[b]:
                colour = colours[a] if colours[a] != MIDDLE else colours[b]
                cv2.line(canvas, at[a], at[b], (0, 0, 0), width + 2, cv2.LINE_AA, bits)
                cv2.line(canvas, at[a], at[b], colour, width, cv2.LINE_AA, bits)
        for i in np.flatnonzero(visible):
            cv2.circle(canvas, at[i], (width + 2) * 2**bits, (0, 0, 0), -1, cv2.LINE_AA, bits)
            cv2.circle(canvas, at[i], (width + 1) * 2**bits, colours[i], -1, cv2.LINE_AA, bits)
        if poses.track_ids is not None and visible.any():
            scale = float(np.clip(size / 200, 0.4, 2.0))
            corner = [int(v) for v in np.clip(np.nan_to_num(box[:2]), [0, 24 * scale], limit)]
            width = max(1, round(2 * scale))
            for colour, line in (((0, 0, 0), width + 3), ((255, 255, 255), width)):
                cv2.putText(canvas, str(number), corner, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, line, cv2.LINE_AA)
    return canvas
