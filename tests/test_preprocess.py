from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from fastpose.geometry import apply_affine, crop_matrix, invert_affine, warp_crop
from fastpose.preprocess import MEAN, STD, normalize, planes_on, warp_crops
from tests.conftest import DEVICES


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 1, 1), (3, 3, 64, 1), (0, 3, 4, 4)])
def test_normalize(shape):
    whole = torch.randint(0, 256, (shape[0], shape[2], 2 * shape[3], 3), dtype=torch.uint8)
    for crops in (torch.randint(0, 256, shape, dtype=torch.uint8), whole.permute(0, 3, 1, 2)[..., ::2]):
        before = crops.clone()
        got = normalize(crops)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
        expected = (crops.double() / 255 - mean) / std
        assert got.shape == expected.shape and got.dtype == torch.float32 and torch.equal(crops, before)
        assert torch.allclose(got.double(), expected, atol=1e-6)
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert normalize(torch.zeros(shape)).sum() == normalize(torch.zeros(shape, dtype=torch.uint8)).sum()


def sampled(image, matrix, size):
    """Bilinear samples [h, w, 3] one by one in float64, black outside."""
    h, w = image.shape[:2]
    crop = np.zeros((*size, 3))
    for y, x in np.ndindex(size):
        u, v = apply_affine(invert_affine(matrix), np.array([[x, y]], np.float64))[0]
        for j in (int(np.floor(v)), int(np.floor(v)) + 1):
            for i in (int(np.floor(u)), int(np.floor(u)) + 1):
                if 0 <= i < w and 0 <= j < h:
                    crop[y, x] += image[j, i] * (1 - abs(u - i)) * (1 - abs(v - j))
    return crop


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(40, 31), (1, 1), (1, 50), (50, 1), (2, 3)])
def test_crops_on_the_device_are_exact_samples(shape, device):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    box = np.array([-2.0, -1, shape[1] + 1, shape[0] - 0.5])
    matrices = np.stack(
        [
            crop_matrix(box, (24, 18), 1.1, rotation=r, scale=s, mirror=r > 9)
            for r, s in ((0, 1), (30, 0.3), (-170, 0.1))
        ]
    )
    for planes in (torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(image).permute(2, 0, 1).contiguous()):
        crops = warp_crops(planes.to(device), matrices, (24, 18), antialias=False)
        assert crops.shape == (3, 3, 24, 18) and crops.dtype == torch.uint8 and crops.device.type == device
        for crop, matrix in zip(crops.cpu(), matrices, strict=True):
            assert np.abs(crop.permute(1, 2, 0).numpy() - sampled(image, matrix, (24, 18))).max() < 0.52


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("box", [70, 100, 150, 230, 480], ids=lambda side: f"box{side}")
def test_crops_on_the_device_are_smoothed_like_those_of_opencv(box, device):
    """Of a smooth image they are equal; of noise, they are as smooth."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 20)
    smooth = ((smooth - smooth.min()) * (255.0 / np.ptp(smooth))).astype(np.uint8)
    matrix = crop_matrix(np.array([300.0, 200, 300 + box, 200 + box]), (64, 48), 1.1, rotation=20)
    for image, limit in ((smooth, 2), (noise, 20)):
        crop = warp_crops(torch.from_numpy(image).permute(2, 0, 1).to(device), matrix[None], (64, 48))[0]
        difference = crop.cpu().permute(1, 2, 0).numpy().astype(float) - warp_crop(image, matrix, (64, 48))
        inside = warp_crop(np.full_like(image, 255), matrix, (64, 48)) == 255  # the edge is as wide as what is averaged
        inside = cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        assert inside.any() and np.abs(difference[inside]).mean() < limit


def test_crops_on_the_device_refuse_what_is_no_image():
    image, matrices = torch.zeros(3, 4, 5, dtype=torch.uint8), np.zeros((0, 2, 3))
    assert warp_crops(image, matrices, (6, 7)).shape == (0, 3, 6, 7)
    tiny = crop_matrix(np.array([-4e4, -4e4, 4e4, 4e4]), (6, 7), 1.0)
    assert warp_crops(torch.full((3, 1, 1), 200, dtype=torch.uint8), tiny[None], (6, 7)).sum() < 2
    for bad in (image.float(), image[:2], image[None], image[:, :0]):
        with pytest.raises(ValueError, match=r"image must be uint8 \[3, H, W\] with pixels, got"):
            warp_crops(bad, matrices, (6, 7))
    with pytest.raises(ValueError, match=r"matrices must be \[B, 2, 3\], got \[2, 3\]"):
        warp_crops(image, np.eye(3)[:2], (6, 7))


def test_images_that_are_on_the_device():
    cpu, image = torch.device("cpu"), torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8)
    assert planes_on(cpu, image, "rgb").data_ptr() == image.data_ptr()
    assert torch.equal(planes_on(cpu, image.permute(1, 2, 0), "bgr"), image.flip(0))
    for other in (image.numpy(), image.float(), image[:1], image[0], image[:, :0], "photo.jpg"):
        assert planes_on(cpu, other, "rgb") is None
    assert planes_on(torch.device("meta"), image, "rgb") is None
