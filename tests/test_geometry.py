from __future__ import annotations

import numpy as np
import pytest

from fastpose.geometry import apply_affine, crop_matrix, invert_affine, warp_crop


def test_crop_matrix_centres_the_box_and_keeps_the_aspect():
    matrix = crop_matrix(np.array([10.0, 20, 50, 180]), (256, 192), 1.25)
    centre = apply_affine(matrix, np.array([[30.0, 100.0]]))[0]
    assert np.allclose(centre, [(192 - 1) / 2, (256 - 1) / 2])
    # the box is taller than 4:3, so its height times 1.25 is the crop's
    assert np.allclose(matrix[:, :2], np.eye(2) * 256 / (160 * 1.25))


def test_rotation_and_mirror():
    box = np.array([0.0, 0, 100, 100])
    turned = crop_matrix(box, (100, 100), 1.0, rotation=90)
    up = apply_affine(turned, np.array([[90.0, 50.0]]))[0]  # counter-clockwise: right goes up
    assert np.allclose(up, [49.5, 9.5], atol=1e-9)
    mirrored = crop_matrix(box, (100, 100), 1.0, mirror=True)
    assert np.allclose(apply_affine(mirrored, np.array([[90.0, 50.0]]))[0], [9.5, 49.5])


def test_inverse():
    matrix = crop_matrix(
        np.array([3.0, 4, 70, 90]), (64, 48), 1.3, rotation=33, scale=0.8, shift=(0.1, -0.2), mirror=True
    )
    points = np.random.default_rng(0).random((7, 2)) * 50
    assert np.allclose(apply_affine(invert_affine(matrix), apply_affine(matrix, points)), points)


@pytest.mark.parametrize("side", [40, 100, 400, 1600])
def test_warp_puts_image_content_where_the_matrix_says(side):
    """A bright square around a point appears around the mapped point, also where the crop shrinks the image much."""
    image = np.zeros((side, side, 3), np.uint8)
    x, y, half = 0.6 * side, 0.3 * side, max(1, round(0.04 * side))
    image[round(y) - half : round(y) + half + 1, round(x) - half : round(x) + half + 1] = 255
    matrix = crop_matrix(np.array([0.1 * side, 0.1 * side, 0.9 * side, 0.9 * side]), (96, 96), 1.1)
    crop = warp_crop(image, matrix, (96, 96))[:, :, 0].astype(float)
    assert crop.shape == (96, 96)
    rows, columns = np.indices(crop.shape)
    got = [(columns * crop).sum() / crop.sum(), (rows * crop).sum() / crop.sum()]
    assert np.allclose(got, apply_affine(matrix, np.array([[round(x), round(y)]]))[0], atol=0.35)


def test_warp_outside_is_black_and_tiny_images_work():
    matrix = crop_matrix(np.array([-0.5, -0.5, 0.5, 0.5]), (63, 63), 1.0)
    assert warp_crop(np.full((1, 1, 3), 200, np.uint8), matrix, (63, 63)).max() == 200
    far = crop_matrix(np.array([5000.0, 5000, 9000, 9000]), (64, 64), 1.0)
    assert warp_crop(np.full((10, 10, 3), 200, np.uint8), far, (64, 64)).max() == 0
