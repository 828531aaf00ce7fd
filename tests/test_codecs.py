from __future__ import annotations

import math

import pytest
import torch

from fastpose.codecs import SoftmaxHeatmapCodec


def gaussian_maps(centres, height, width, sigma=1.0):
    """Probability maps [1, K, H, W] with a Gaussian at each (x, y) in cells."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    maps = [torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2)) for cx, cy in centres]
    return torch.stack([m / m.sum() for m in maps])[None]


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_decoding_inverts_encoding_below_the_cell(blur):
    codec = SoftmaxHeatmapCodec(blur=blur)
    centres = [(10.0, 7.0), (10.3, 7.4), (20.49, 12.0), (15.75, 20.25)]
    points, scores = codec.decode(gaussian_maps(centres, 32, 40))
    expected = torch.tensor(centres) * 4 + 1.5
    assert torch.allclose(points[0], expected.float(), atol=0.02)
    # relative to a keypoint in the middle of its cell
    assert (scores > 0.7).all() and (scores <= 1).all() and scores[0, 0] > 0.99


def test_border_and_single_cell_maps():
    codec = SoftmaxHeatmapCodec()
    points, _ = codec.decode(gaussian_maps([(0, 0), (39, 31)], 32, 40))
    assert torch.allclose(points[0], torch.tensor([[1.5, 1.5], [39 * 4 + 1.5, 31 * 4 + 1.5]]), atol=2.1)
    points, scores = codec.decode(torch.ones(2, 3, 1, 1))
    assert torch.equal(points, torch.full((2, 3, 2), 1.5)) and scores.shape == (2, 3)


def test_empty_and_nan_maps():
    codec = SoftmaxHeatmapCodec()
    points, scores = codec.decode(torch.zeros(0, 14, 8, 6))
    assert points.shape == (0, 14, 2) and scores.shape == (0, 14)
    points, scores = codec.decode(torch.full((1, 2, 8, 6), float("nan")))
    assert points.isfinite().all() and torch.equal(scores, torch.zeros(1, 2))


def test_a_broad_bump_beats_a_spike():
    maps = 0.7 * gaussian_maps([(10, 10)], 32, 32, sigma=1.5)
    maps[0, 0, 25, 25] = 0.3 * 0.2
    assert maps[0, 0].argmax() == 25 * 32 + 25
    points, _ = SoftmaxHeatmapCodec(blur=1.5).decode(maps)
    assert torch.allclose(points[0, 0], torch.tensor([41.5, 41.5]), atol=0.5)


def test_loss_is_the_cross_entropy_with_a_normalised_gaussian():
    codec = SoftmaxHeatmapCodec()
    logits = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    points = torch.rand(2, 3, 2, dtype=torch.float64) * 24
    valid = torch.tensor([[True, False, True], [True, True, False]])
    total = 0.0
    for b, k in valid.nonzero().tolist():
        centre = (points[b, k] - 1.5) / 4
        target = gaussian_maps([centre.tolist()], 9, 7)[0, 0]
        log_p = logits[b, k].flatten().log_softmax(0).view(9, 7)
        total -= float((target * log_p).sum())
    assert math.isclose(float(codec.loss(logits, points, valid)), total / 4, rel_tol=1e-9)
    points[~valid] = float("nan")  # unlabelled joints may hold anything
    logits.requires_grad_()
    codec.loss(logits, points, valid).backward()
    assert logits.grad.isfinite().all() and (logits.grad[~valid] == 0).all()
    assert codec.loss(logits, points, torch.zeros_like(valid)).item() == 0.0
