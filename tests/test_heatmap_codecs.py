"""The codecs of published networks against slow loops in float64, written from the papers' formulas."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import torch

from fastpose.checkpoints import WeightsInfo, read_info, save_weights
from fastpose.codecs import (
    DarkHeatmapCodec,
    MSRAHeatmapCodec,
    SoftmaxHeatmapCodec,
    UDPHeatmapCodec,
    heatmap_mse,
)
from fastpose.config import read_config
from fastpose.geometry import apply_affine, crop_matrix, invert_affine
from fastpose.skeletons import COCO17
from fastpose.train import TrainConfig

CODECS = [MSRAHeatmapCodec(), MSRAHeatmapCodec(edges="mmpose"), DarkHeatmapCodec(), UDPHeatmapCodec()]
ALL = [SoftmaxHeatmapCodec(), *CODECS]


def blobs(b=3, k=5, height=20, width=15, seed=0):
    """Maps with a few bumps each and a little noise, also at the border: float32 [B, K, H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    maps = np.zeros((b, k, height, width))
    for _ in range(2):
        cx, cy = rng.uniform(-1, width, (b, k, 1, 1)), rng.uniform(-1, height, (b, k, 1, 1))
        s = rng.uniform(1.2, 3, (b, k, 1, 1))
        maps += rng.uniform(0.3, 1, (b, k, 1, 1)) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * s**2))
    return torch.from_numpy(maps + rng.normal(size=maps.shape) * 0.01).float()


def decode_slowly(codec, heatmap):
    """(x, y) in crop pixels of one map [H, W] in float64."""
    h = np.asarray(heatmap, np.float64)
    height, width = h.shape
    y, x = np.unravel_index(h.argmax(), h.shape)
    if not h[y, x] > 0:
        return np.zeros(2)
    if isinstance(codec, MSRAHeatmapCodec):
        dx = np.sign(h[y, x + 1] - h[y, x - 1]) * 0.25 if 1 < x < width - 1 else 0.0
        dy = np.sign(h[y + 1, x] - h[y - 1, x]) * 0.25 if 1 < y < height - 1 else 0.0
        if codec.edges == "hrnet" and not (1 < x < width - 1 and 1 < y < height - 1):
            dx = dy = 0.0
        if codec.edges == "mmpose":
            dx, dy = dx * (y > 0), dy * (x > 0)
        return np.array([x + dx, y + dy]) * codec.stride
    taps = cv2.getGaussianKernel(codec.kernel, 0, cv2.CV_64F)[:, 0]
    smooth = np.zeros_like(h)
    for i, u in enumerate(taps):
        for j, v in enumerate(taps):
            moved = np.zeros_like(h)
            dy, dx = i - len(taps) // 2, j - len(taps) // 2
            ys, xs = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
            moved[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)] = h[ys, xs]
            smooth += u * v * moved
    if smooth.max() <= 0:
        step = (4, 4) if isinstance(codec, DarkHeatmapCodec) else codec.pixels_per_cell(height, width)
        return np.array([x, y]) * step
    smooth *= h.max() / smooth.max()
    if isinstance(codec, DarkHeatmapCodec):
        if not (1 < x < width - 2 and 1 < y < height - 2):
            return np.array([x, y]) * codec.stride
        f = np.log(np.maximum(smooth, 1e-10))
        at, cell, step = (lambda dx, dy: f[y + dy, x + dx]), np.array([4.0, 4.0]), 2
    else:
        f = np.pad(np.log(np.clip(smooth, 1e-3, 50)), 1, mode="edge")
        at = lambda dx, dy: f[y + 1 + dy, x + 1 + dx]  # noqa: E731
        cell, step = np.array([(4 * width - 1) / (width - 1), (4 * height - 1) / (height - 1)]), 1
    g = np.array([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)]) / 2
    xx, yy = ((at(step * a, step * b) - 2 * at(0, 0) + at(-step * a, -step * b)) / step**2 for a, b in ((1, 0), (0, 1)))
    if isinstance(codec, DarkHeatmapCodec):
        xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    else:
        xy = (at(1, 1) + at(-1, -1) + 2 * at(0, 0) - at(1, 0) - at(0, 1) - at(-1, 0) - at(0, -1)) / 2
    return (np.array([x, y]) - np.linalg.solve(np.array([[xx, xy], [xy, yy]]), g)) * cell


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("size", [(20, 15), (7, 33), (5, 5)])
def test_decoding_equals_the_loop(codec, size):
    maps = blobs(4, 9, *size)
    maps[0, 0] = -1.0
    maps[0, 0, 2, 3] = 0.5  # positive, but not once it is smoothed
    points, scores = codec.decode(maps)
    assert points.dtype == scores.dtype == torch.float32
    for b in range(4):
        for k in range(9):
            assert np.allclose(points[b, k], decode_slowly(codec, maps[b, k]), atol=2e-3), (b, k)
    assert torch.equal(scores, maps.amax((2, 3)))


def encode_slowly(codec, point, height, width):
    """Target map of one keypoint, or None if it does not count."""
    sx, sy = (4.0, 4.0) if not isinstance(codec, UDPHeatmapCodec) else codec.pixels_per_cell(height, width)
    cx, cy = point[0] / sx, point[1] / sy
    nx, ny = math.floor(cx + 0.5), math.floor(cy + 0.5)
    if isinstance(codec, MSRAHeatmapCodec):
        cx, cy = nx, ny
    target = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            if isinstance(codec, DarkHeatmapCodec) or max(abs(x - nx), abs(y - ny)) <= 3 * codec.sigma:
                target[y, x] = math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * codec.sigma**2))
    reach = 3 * codec.sigma
    far = cx - reach >= width or cy - reach >= height or cx + reach + 1 < 0 or cy + reach + 1 < 0
    counts = not far if isinstance(codec, DarkHeatmapCodec) else target.max() > 0
    return target if counts else None


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_targets_equal_the_loop(codec):
    points = torch.rand(3, 40, 2, dtype=torch.float64) * torch.tensor([120.0, 140.0]) - 30
    valid = torch.rand(3, 40) < 0.9
    target, weight = codec.encode(points, valid, (20, 15))
    assert target.shape == (3, 40, 20, 15) and target.dtype == torch.float64
    kinds = set()
    for b in range(3):
        for k in range(40):
            expected = encode_slowly(codec, points[b, k].tolist(), 20, 15) if valid[b, k] else None
            kinds.add(expected is None)
            assert float(weight[b, k]) == (expected is not None)
            assert np.allclose(target[b, k], 0 if expected is None else expected, atol=1e-12)
    assert kinds == {True, False}


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_decoding_inverts_encoding(codec):
    height, width = 64, 48
    points = torch.rand(4, 50, 2) * torch.tensor([width * 4 - 49.0, height * 4 - 49.0]) + 24
    target, weight = codec.encode(points, torch.ones(4, 50, dtype=torch.bool), (height, width))
    assert bool((weight == 1).all())
    decoded, scores = codec.decode(target)
    worst = float((decoded - points).abs().max())
    # MSRA's targets are rounded to the cell, and without a slope there is no quarter either
    assert worst <= (2.0 + 1e-3 if isinstance(codec, MSRAHeatmapCodec) else 0.1), worst
    assert bool((scores > 0.9 if codec.convention != "fastpose" else scores > 0.7).all())


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_the_flip_test_is_unbiased_to_the_accuracy_of_the_codec(codec):
    """Targets of a crop and of the mirrored crop, averaged, give the position back; pairs change places."""
    height, width = 64, 48
    points = torch.rand(2, 17, 2) * torch.tensor([width * 4 - 49.0, height * 4 - 49.0]) + 24
    valid = torch.ones(2, 17, dtype=torch.bool)
    order = COCO17.flip_indices
    mirrored = (torch.tensor([width * 4 - 1.0, 0.0]) - points * torch.tensor([1.0, -1.0]))[:, order]
    both = [codec.encode(p, valid, (height, width))[0] for p in (points, mirrored)]
    decoded, _ = codec.decode(codec.average_flipped(*both, order))
    error = (decoded - points)[..., 0]
    # a quarter of a cell is left of the misalignment by three quarters after the shift by one, half of it in the mean
    exact = codec.flip_shift == 0
    assert float(error.abs().max()) < (0.1 if exact else 2.1)
    if isinstance(codec, DarkHeatmapCodec):
        assert torch.allclose(error, torch.full_like(error, 0.5), atol=0.05)


@pytest.mark.parametrize("make", [MSRAHeatmapCodec, DarkHeatmapCodec])
def test_the_flip_test_without_shift(make):
    """HRNet's SHIFT_HEATMAP: false."""
    maps, mirrored, order = torch.rand(2, 17, 8, 6), torch.rand(2, 17, 8, 6), COCO17.flip_indices
    plain = mirrored.flip(3)[:, list(order)]
    assert torch.equal(make(flip_shift=0).average_flipped(maps, mirrored.clone(), order), (maps + plain) / 2)
    shifted = torch.cat([plain[..., :1], plain[..., :-1]], 3)
    assert torch.equal(make().average_flipped(maps, mirrored.clone(), order), (maps + shifted) / 2)
    assert make().flip_shift == 1 and UDPHeatmapCodec().flip_shift == SoftmaxHeatmapCodec().flip_shift == 0


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_awkward_maps(codec):
    points, scores = codec.decode(torch.zeros(0, 17, 8, 6))
    assert points.shape == (0, 17, 2) and scores.shape == (0, 17)
    for maps in (torch.full((1, 2, 8, 6), torch.nan), torch.full((1, 2, 8, 6), -1.0), torch.zeros(1, 2, 8, 6)):
        points, scores = codec.decode(maps)
        origin = 1.5 if isinstance(codec, SoftmaxHeatmapCodec) else 0.0
        assert torch.equal(scores, torch.zeros(1, 2))
        if not (isinstance(codec, SoftmaxHeatmapCodec) and float(maps.nansum()) < 0):
            assert torch.equal(points, torch.full((1, 2, 2), origin))
    maps = blobs()
    expected = codec.decode(maps)[0]
    maps[1, 2, 3, 4] = torch.nan
    points, scores = codec.decode(maps)
    assert points.isfinite().all() and scores.isfinite().all()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[1, 2] = False
    assert torch.allclose(points[others], expected[others], atol=1e-5)
    for size in ((1, 1), (1, 9), (2, 2)):
        points, scores = codec.decode(torch.rand(2, 3, *size))
        assert points.isfinite().all() and points.shape == (2, 3, 2)
    assert codec.decode(maps.half())[0].dtype == torch.float32
    target, weight = codec.encode(torch.full((1, 2, 2), torch.nan), torch.zeros(1, 2, dtype=torch.bool), (8, 6))
    assert torch.equal(target, torch.zeros(1, 2, 8, 6)) and torch.equal(weight, torch.zeros(1, 2))
    assert codec.encode(torch.zeros(0, 2, 2), torch.zeros(0, 2, dtype=torch.bool), (8, 6))[0].shape == (0, 2, 8, 6)


@pytest.mark.parametrize("hardest", [0, 3, 8])
def test_mean_squared_error_and_hardest_keypoints(hardest):
    codec = MSRAHeatmapCodec(hardest=hardest)
    outputs = torch.randn(4, 5, 12, 9, dtype=torch.float64, requires_grad=True)
    points = torch.rand(4, 5, 2, dtype=torch.float64) * 36
    valid = torch.rand(4, 5) < 0.7
    points[~valid] = torch.nan
    target, weight = codec.encode(points, valid, (12, 9))
    losses = np.zeros((4, 5))
    for b in range(4):
        for k in range(5):
            difference = (outputs[b, k] - target[b, k]).detach().numpy() * float(weight[b, k])
            losses[b, k] = 0.5 * (difference**2).sum() / (12 * 9)
    expected = np.sort(losses, axis=1)[:, ::-1][:, : hardest or 5].mean()
    loss = codec.loss(outputs, points, valid)
    assert math.isclose(float(loss.detach()), expected, rel_tol=1e-12)
    loss.backward()
    assert outputs.grad.isfinite().all() and float(outputs.grad[~valid].abs().sum()) == 0
    assert codec.loss(outputs, points, torch.zeros_like(valid)).item() == 0
    assert heatmap_mse(outputs[:0], target[:0], weight[:0]).item() == 0
    with pytest.raises(ValueError, match=r"weight \[B, K\], got .*\[4, 5, 12, 9\], \[4\]"):
        heatmap_mse(outputs, target, weight[:, 0])


def test_conventions_of_the_crop():
    box, (h, w) = np.array([17.0, 30, 140, 260]), (256, 192)
    (cx, cy), bw = (78.5, 145), 230 * 0.75 * 1.25
    bh = bw / 0.75
    points = np.random.default_rng(0).uniform(0, 300, (9, 2))
    x, y = points[:, 0], points[:, 1]
    expected = {
        "fastpose": np.stack([(x - cx) * w / bw + (w - 1) / 2, (y - cy) * h / bh + (h - 1) / 2], 1),
        "hrnet": np.stack([(x - cx) * w / bw + w / 2, (y - cy) * h / bh + h / 2], 1),
        "udp": np.stack([(x - cx) * (w - 1) / bw + (w - 1) / 2, (y - cy) * (h - 1) / bh + (h - 1) / 2], 1),
    }
    for convention, value in expected.items():
        matrix = crop_matrix(box, (h, w), 1.25, convention=convention)
        assert np.allclose(apply_affine(matrix, points), value)
        # mirroring the crop is mirroring the image about the box
        mirrored = crop_matrix(box, (h, w), 1.25, convention=convention, mirror=True)
        assert np.allclose(apply_affine(mirrored, np.stack([2 * cx - x, y], 1)), value)
    # HRNet takes cells back with the heatmap's size, MSRAHeatmapCodec gives pixels and the crop's matrix leads back
    cells = np.array([[3.0, 5], [47, 63], [10.25, 8.75]])
    back = invert_affine(crop_matrix(box, (h, w), 1.25, convention="hrnet"))
    by_heatmap = np.stack([(cells[:, 0] - 24) * bw / 48 + cx, (cells[:, 1] - 32) * bh / 64 + cy], 1)
    assert np.allclose(apply_affine(back, cells * 4), by_heatmap)
    with pytest.raises(ValueError, match="convention must be one of fastpose, hrnet, udp, got 'mmpose'"):
        crop_matrix(box, (h, w), 1.25, convention="mmpose")


@pytest.mark.parametrize("codec", [*ALL, UDPHeatmapCodec(sigma=3.0, hardest=8, kernel=17)], ids=str)
def test_codecs_travel_in_weights_files(codec, tmp_path):
    info = WeightsInfo("mobileposenet", 14, "lsp14", (64, 48), 1.25, codec, antialias=False)
    save_weights(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, info)
    assert read_info(tmp_path / "a.safetensors") == info


def test_codecs_in_settings(tmp_path):
    read = lambda *settings: read_config(TrainConfig, None, ["data=a", "output=b", *settings]).codec  # noqa: E731
    assert read("codec.sigma=2.0") == SoftmaxHeatmapCodec(sigma=2.0)
    assert read("codec.type=msra", "codec.hardest=8") == MSRAHeatmapCodec(hardest=8)
    assert read("codec.type=udp", "codec.kernel=7", "codec.sigma=1") == UDPHeatmapCodec(sigma=1.0, kernel=7)
    for setting, message in (
        ("codec.type=simcc", "'codec.type' must be one of softmax, msra, dark, udp, associative, got 'simcc'"),
        ("codec.kernel=3", "unknown setting 'codec.kernel'"),
        ("codec=msra", "'codec' is a group: choose codec.type from softmax, msra, .*, got 'msra'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(setting)
    # files from before there was a choice
    old = {"model": "m", "num_keypoints": 1, "skeleton": "s", "input_size": [8, 8], "padding": 1.0,
           "codec": {"stride": 4, "sigma": 1.5, "blur": 0.0}}  # fmt: skip
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", {"fastpose": json.dumps(old)})
    assert read_info(tmp_path / "old.safetensors").codec == SoftmaxHeatmapCodec(sigma=1.5, blur=0.0)
    for make, message in (
        (lambda: MSRAHeatmapCodec(edges="x"), "edges must be"),
        (lambda: DarkHeatmapCodec(kernel=4), "odd number of taps, got 4"),
        (lambda: UDPHeatmapCodec(sigma=0.0), "codec.sigma must be above 0, got 0.0"),
        (lambda: SoftmaxHeatmapCodec(sigma=math.nan), "codec.sigma must be above 0, got nan"),
        (lambda: SoftmaxHeatmapCodec(blur=-1.0), "codec.blur must be at least 0, got -1.0"),
        (lambda: SoftmaxHeatmapCodec(stride=0), "codec.stride must be at least 1, got 0"),
        (lambda: MSRAHeatmapCodec(hardest=-8), "codec.hardest must be at least 0, got -8"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("codec", ALL, ids=lambda c: c.type)
def test_imitation_is_the_loss_with_another_networks_heatmaps(codec):
    """The targets that the labels give are imitated at the price of the loss, and nothing is better than the target."""
    points, valid = torch.rand(3, 5, 2) * 40 + 8, torch.ones(3, 5, dtype=torch.bool)
    outputs = torch.randn(3, 5, 20, 15)
    target, _ = codec.encode(points, valid, (20, 15))
    imitation = codec.imitation_loss(outputs, target)
    assert torch.allclose(imitation, codec.loss(outputs, points, valid), rtol=1e-5)
    same = (target.clamp(min=1e-30).log() if codec.type == "softmax" else target).requires_grad_()
    (gradient,) = torch.autograd.grad(codec.imitation_loss(same, target.detach()), same)
    assert gradient.abs().max() < 1e-6
    assert torch.isfinite(codec.imitation_loss(outputs, torch.zeros_like(outputs)))


@pytest.mark.parametrize("codec", ALL, ids=lambda c: c.type)
def test_nothing_to_learn_from(codec):
    """No people and no cells: losses of 0, targets that weigh nothing."""
    keypoints, valid = torch.rand(2, 5, 2), torch.ones(2, 5, dtype=torch.bool)
    maps = torch.rand(0, 5, 8, 6, requires_grad=True)
    for loss in (codec.loss(maps, keypoints[:0], valid[:0]), codec.imitation_loss(maps, maps.detach())):
        loss.backward()
        assert loss == 0
    target, weight = codec.encode(keypoints, valid, (0, 5))
    assert target.shape == (2, 5, 0, 5) and (codec.type == "softmax" or not weight.any())
