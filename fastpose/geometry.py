"""Boxes, affine crops and the maps between image, crop and heatmap coordinates.

Conventions, used everywhere: points are (x, y) in pixels; integer coordinates are pixel *centres*, so the centre of the
top left pixel is (0, 0). Sizes are (height, width). Boxes are xyxy. An affine map is a float64 [2, 3] matrix that takes
(x, y, 1) to (x', y').

Crops. Let a box with centre (cx, cy) be cut out by a rectangle of b_w x b_h image pixels and resized to w x h.
Published networks were trained on crops that lie differently by less than a pixel. All three rules map image pixel
centres to crop pixel centres, and are used for the pixels and for the keypoints alike:

* ``"fastpose"``: ``x' = (x - cx) w / b_w + (w - 1) / 2``. The centre of the rectangle is the centre of the crop.
* ``"hrnet"``, the rule of `get_affine_transform` in SimpleBaseline and HRNet and of `get_warp_matrix` in mmpose:
  ``x' = (x - cx) w / b_w + w / 2``, the former shifted by half a crop pixel to the right and down. `get_final_preds`
  takes heatmap cells k back by the same rule with the heatmap's size, ``x = (k - W / 2) b_w / W + cx``. That equals
  this rule's inverse at crop pixel ``x' = stride * k``, the position that `codecs.MSRAHeatmapCodec` gives.
* ``"udp"``, the rule of `get_udp_warp_matrix` in mmpose and UDP: ``x' = (x - cx) (w - 1) / b_w + (w - 1) / 2``. Lengths
  are counted between pixel centres, so the centre is ours and the magnification smaller by 1 / w in x, 1 / h in y.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CONVENTIONS = ("fastpose", "hrnet", "udp")
MOST_PIXELS = 2**15 - 1  # a side from here on is too long for cv2.warpAffine in OpenCV 4


def crop_matrix(
    box: Array,
    size: tuple[int, int],
    padding: float,
    *,
    rotation: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
    mirror: bool = False,
    convention: str = "fastpose",
) -> Array:
    """Affine map from image pixels to the pixels of the crop around `box`.

    The crop has the aspect ratio of `size`; it is the smallest such rectangle that holds the box, enlarged by
    `padding` and centred on the box. The remaining arguments are for augmentation.

    Args:
        box: [4] xyxy, image pixels.
        size: (height, width) of the crop in pixels.
        padding: factor on the side of the rectangle, e.g. 1.25.
        rotation: degrees; positive turns the image content counter-clockwise.
        scale: further factor on the size of the rectangle (above 1 the person gets smaller).
        shift: (x, y) displacement of the rectangle's centre in units of its width.
        mirror: exchange left and right in the crop.
        convention: where exactly the rectangle's pixels come to lie in the crop: ``"fastpose"``, ``"hrnet"`` or
            ``"udp"``, see the top of this module.

    Returns:
        float64 [2, 3]; the centre of the box maps to the centre of the crop ((w - 1) / 2, (h - 1) / 2), for
        ``"hrnet"`` to (w / 2, h / 2).

    Raises:
        ValueError: unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    height, width = size
    x1, y1, x2, y2 = (float(v) for v in box)
    aspect = width / height
    box_w = max(x2 - x1, (y2 - y1) * aspect, 1e-3) * padding * scale
    centre_x = (x1 + x2) / 2 + shift[0] * box_w
    centre_y = (y1 + y2) / 2 + shift[1] * box_w
    angle = np.deg2rad(rotation)
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, sin], [-sin, cos]]) * (width / box_w)
    centre = np.array([width - 1, height - 1]) / 2
    if convention == "hrnet":
        centre = np.array([width, height]) / 2
    elif convention == "udp":
        linear *= np.array([[1 - 1 / width], [1 - 1 / height]])
    if mirror:
        linear[0] = -linear[0]
    offset = centre - linear @ [centre_x, centre_y]
    return np.concatenate([linear, offset[:, None]], axis=1)


def whole_image_matrix(image_size: tuple[int, int], side: int, multiple: int = 64) -> tuple[Array, tuple[int, int]]:
    """Affine map from an image to the input of a bottom-up network, and that input's size; as in HigherHRNet.

    The image's shorter side becomes `side` pixels (HigherHRNet rounds that up to a multiple of 64: 480 to 512), its
    longer side is scaled alike, filled up with black on both ends to a multiple of `multiple`. The middle of the image,
    rounded to a pixel, comes to lie at half the input's size (the ``"hrnet"`` convention above). Images more than four
    times as long as they are wide, which HigherHRNet has no limit for, are scaled to an input of 4 x `side` instead,
    and filled up across.

    Args:
        image_size: (height, width); multiple: of the longer side, a divisor of 4 x `side`.

    Returns:
        The matrix, float64 [2, 3], and (height, width).

    Raises:
        ValueError: sizes that are not positive.
    """
    height, width = image_size
    if min(height, width, side, multiple) < 1:
        raise ValueError(f"sizes must be positive, got image {image_size}, side {side} and multiple {multiple}")
    short, long = min(height, width), max(height, width)
    if long <= 4 * short:
        zoom = side / short
        # not quite the next multiple: up to one pixel over is dropped
        long_side = max(int((zoom * long + multiple - 1) // multiple * multiple), side)
    else:
        zoom, long_side = 4 * side / long, 4 * side
    size = (long_side, side) if height > width else (side, long_side)
    centre_x, centre_y = int(width / 2 + 0.5), int(height / 2 + 0.5)
    offset = [size[1] / 2 - zoom * centre_x, size[0] / 2 - zoom * centre_y]
    return np.array([[zoom, 0.0, offset[0]], [0.0, zoom, offset[1]]]), size


def invert_affine(matrix: Array) -> Array:
    """Inverse of affine maps, [..., 2, 3] -> [..., 2, 3]."""
    linear = np.linalg.inv(matrix[..., :2])
    return np.concatenate([linear, -linear @ matrix[..., 2:]], axis=-1)


def apply_affine(matrix: Array, points: Array) -> Array:
    """Map points [..., N, 2] by matrices [..., 2, 3]; float64 [..., N, 2]."""
    return np.asarray(points @ np.swapaxes(matrix[..., :2], -1, -2) + np.swapaxes(matrix[..., 2:], -1, -2))


def warp_crop(image: Array, matrix: Array, size: tuple[int, int], antialias: bool = True) -> Array:
    """Crop `image` (uint8 [H, W, 3]) by the affine `matrix`; pixels outside the image are black.

    Bilinear sampling takes four source pixels, whatever the scale. Where the crop shrinks the image by more than half
    as much again, the part of the image under the crop is first reduced by area averaging, so that nothing aliases.
    Published networks were trained without that: `antialias` false.
    """
    import cv2

    height, width = size
    zoom = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    reducing = antialias and zoom < 1 / 1.5
    if reducing or max(image.shape[:2]) >= MOST_PIXELS:
        corners = np.array([[-1, -1], [width, -1], [width, height], [-1, height]], np.float64)
        corners = apply_affine(invert_affine(matrix), corners)
        x1, y1 = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        x2, y2 = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, [image.shape[1], image.shape[0]])
        if x2 - x1 < 1 or y2 - y1 < 1:
            return np.zeros((height, width, 3), np.uint8)
        part = image[y1:y2, x1:x2]
        if not reducing and max(part.shape[:2]) < MOST_PIXELS:
            zoom = 1.0  # the part is enough
        small = (max(1, round(part.shape[1] * zoom)), max(1, round(part.shape[0] * zoom)))
        image = cv2.resize(part, small, interpolation=cv2.INTER_AREA)
        # full-resolution pixel x is at (x - x1 + 0.5) * ratio - 0.5 of the reduced part
        ratio = np.array([small[0] / part.shape[1], small[1] / part.shape[0]])
        back = np.array([[1 / ratio[0], 0, x1 - 0.5 + 0.5 / ratio[0]], [0, 1 / ratio[1], y1 - 0.5 + 0.5 / ratio[1]]])
        matrix = matrix @ np.concatenate([back, [[0, 0, 1]]])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)
