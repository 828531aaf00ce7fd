"""Associative embedding: targets, losses and aggregation against loops, and `PoseEstimator` with bottom-up networks."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastpose
from fastpose import BoxError, PoseEstimator
from fastpose.checkpoints import WeightsInfo, read_info, save_weights
from fastpose.codecs import AssociativeEmbeddingCodec
from fastpose.geometry import apply_affine, whole_image_matrix
from fastpose.models._registry import is_bottom_up
from fastpose.skeletons import COCO17
from tests.test_grouping import draw

CODEC = AssociativeEmbeddingCodec()


def people(b=2, n=4, k=3, side=64):
    points = torch.rand(b, n, k, 2, dtype=torch.float64) * (side + 20) - 10
    return points, torch.rand(b, n, k) < 0.7


def test_targets_equal_the_loop():
    points, valid = people()
    points[0, 0, 0], points[0, 0, 1] = torch.tensor([-0.5, 5.0]), torch.tensor([63.9, 0.0])
    valid[0, 0, :2] = True
    heatmaps, index = CODEC.encode(points, valid, (16, 16), 4)
    expected = np.zeros((2, 3, 16, 16))
    for b, n, k in np.ndindex(2, 4, 3):
        x, y = (math.floor(v / 4) for v in points[b, n, k])
        if valid[b, n, k] and 0 <= x < 16 and 0 <= y < 16:
            assert int(index[b, n, k]) == y * 16 + x
            for v, u in np.ndindex(16, 16):
                if max(abs(u - x), abs(v - y)) <= 7:
                    value = math.exp(-((u - x) ** 2 + (v - y) ** 2) / 8)
                    expected[b, k, v, u] = max(expected[b, k, v, u], value)
        else:
            assert int(index[b, n, k]) == -1
    assert np.allclose(heatmaps, expected, atol=1e-12) and int(index[0, 0, 0]) == -1 and int(index[0, 0, 1]) == 15


@pytest.mark.parametrize(("background", "position"), [(1.0, 0.0), (0.1, 0.0), (0.1, 0.05)])
def test_losses_equal_the_loop(background, position):
    codec = replace(CODEC, background=background, position=position)
    points, valid = people()
    valid[1, 1:] = False  # one person
    outputs = [torch.randn(2, 6, 16, 16, dtype=torch.float64), torch.randn(2, 3, 32, 32, dtype=torch.float64)]
    for output in outputs:
        output.requires_grad_()
    mask = torch.ones(2, 64, 64)
    mask[:, :32, :16] = 0
    heatmap, push, pull = codec.losses(outputs, points, valid, mask)
    expected = 0.0
    for output, stride in zip(outputs, (4, 2), strict=True):
        target, index = CODEC.encode(points, valid, tuple(output.shape[2:]), stride)
        weight = (target > 0).double()
        squared = (output[:, :3] - target) ** 2 * (weight + background * (1 - weight))
        squared[:, :, : 32 // stride, : 16 // stride] = 0
        expected += float(squared.mean().detach())
        entropies, counts = [], torch.ones(target.shape[2:], dtype=torch.bool)
        counts[: 32 // stride, : 16 // stride] = False
        for b, k in np.ndindex(2, 3):
            wanted, got = target[b, k][counts], 10 * output[b, k].detach()[counts]
            if wanted.sum() > 0:
                entropies.append(float(-(wanted / wanted.sum() * got.log_softmax(0)).sum()))
        assert len(entropies) > 2
        expected += position * float(np.mean(entropies))
        if stride == 4:
            first = index
    assert math.isclose(heatmap.item(), expected, rel_tol=1e-12)
    pushes, pulls = [], []
    for b in range(2):
        tags = [
            [outputs[0][b, 3 + k].flatten()[first[b, n, k]].item() for k in range(3) if first[b, n, k] >= 0]
            for n in range(4)
        ]
        means = [np.mean(t) for t in tags if t]
        pulls.append(np.mean([np.mean((np.array(t) - np.mean(t)) ** 2) for t in tags if t]))
        pairs = [math.exp(-((p - q) ** 2)) for i, p in enumerate(means) for j, q in enumerate(means) if i != j]
        pushes.append(sum(pairs) / (2 * len(means) * (len(means) - 1)) if pairs else 0.0)
    assert math.isclose(push.item(), np.mean(pushes), rel_tol=1e-12)
    assert math.isclose(pull.item(), np.mean(pulls), rel_tol=1e-12)
    loss = codec.loss(outputs, points, valid, mask)
    assert math.isclose(loss.item(), heatmap.item() + 1e-3 * (push.item() + pull.item()), rel_tol=1e-12)
    loss.backward()
    assert all(o.grad.isfinite().all() for o in outputs)
    with pytest.raises(ValueError, match=r"mask must be \[B, 64, 64\], got \[2, 9, 9\]"):
        codec.losses(outputs, points, valid, mask[:, :9, :9])
    for setting, message in (
        ({"background": -0.1}, "codec.background must be at least 0, got -0.1"),
        ({"sigma": 0.0}, "codec.sigma must be above 0, got 0.0"),
        ({"max_people": 0}, "codec.max_people must be at least 1, got 0"),
        ({"window": 4}, "codec.window must be an odd number of cells, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CODEC, **setting)


def test_nobody_to_train_on():
    outputs = [torch.randn(2, 6, 8, 8, requires_grad=True)]
    for points, valid in (
        (torch.full((2, 4, 3, 2), torch.nan), torch.zeros(2, 4, 3, dtype=torch.bool)),
        (torch.zeros(2, 0, 3, 2), torch.zeros(2, 0, 3, dtype=torch.bool)),
    ):
        heatmap, push, pull = replace(CODEC, position=1.0).losses(outputs, points, valid)
        assert math.isclose(heatmap.item(), float(outputs[0][:, :3].detach().square().mean()), rel_tol=1e-5)
        assert push.item() == 0 and pull.item() == 0
    CODEC.loss(outputs, points, valid).backward()
    assert outputs[0].grad.isfinite().all()
    assert CODEC.loss([outputs[0][:0]], points[:0], valid[:0]).item() == 0


@pytest.mark.parametrize("finer", [True, False])
def test_aggregation(finer):
    maps, mirrored = torch.rand(2, 34, 8, 12), torch.rand(2, 34, 8, 12)
    outputs = (maps, torch.rand(2, 17, 16, 24)) if finer else (maps,)
    others = (mirrored, torch.rand(2, 17, 16, 24)) if finer else (mirrored,)
    heatmaps, tags = CODEC.aggregate(outputs)
    assert heatmaps.shape == (2, 17, 32, 48) and tags.shape == (2, 1, 17, 32, 48)
    both, both_tags = CODEC.aggregate(outputs, others, COCO17.flip_indices)
    assert both_tags.shape == (2, 2, 17, 32, 48) and torch.allclose(both_tags[:, :1], tags)

    def up(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    def by_hand(o):
        if not finer:
            return up(o[0][:, :17], (32, 48)), up(o[0][:, 17:], (32, 48))
        mean = (up(o[0][:, :17], (16, 24)) + o[1]) / 2
        return up(mean, (32, 48)), up(up(o[0][:, 17:], (16, 24)), (32, 48))

    assert torch.allclose(heatmaps, by_hand(outputs)[0]) and torch.allclose(tags[:, 0], by_hand(outputs)[1])
    back = [m.flip(3)[:, COCO17.flip_indices] for m in by_hand(others)]
    assert torch.allclose(both, (heatmaps + back[0]) / 2, atol=1e-6) and torch.allclose(both_tags[:, 1], back[1])


@pytest.mark.parametrize("image_size", [(240, 320), (333, 250), (100, 101), (500, 500), (7, 23), (1, 1), (1, 9000)])
def test_whole_image_matrix(image_size):
    matrix, (height, width) = whole_image_matrix(image_size, 256)
    assert min(height, width) == 256 and max(height, width) % 64 == 0 and max(height, width) <= 1024
    h, w = image_size
    middle = np.array([[int(w / 2 + 0.5), int(h / 2 + 0.5)]])
    assert np.allclose(apply_affine(matrix, middle), [[width / 2, height / 2]])
    if max(h, w) <= 4 * min(h, w):
        assert np.allclose(matrix[:, :2], np.eye(2) * 256 / min(h, w))
    corners = apply_affine(matrix, np.array([[0.0, 0.0], [w - 1, h - 1]]))
    zoom = matrix[0, 0]
    assert corners.min() > -zoom - 0.51 and (corners[1] < [width + zoom, height + zoom]).all()


def test_whole_image_matrix_refuses_nothing():
    with pytest.raises(ValueError, match=r"sizes must be positive, got image \(0, 5\)"):
        whole_image_matrix((0, 5), 256)


class TwoPeople(torch.nn.Module):
    """A stand-in for a network: people's keypoints on a grid, at the same place of any input."""

    def __init__(self, finer: bool) -> None:
        super().__init__()
        self.finer = finer

    def forward(self, x):
        b, _, height, width = x.shape
        outputs = []
        for stride in (4, 2) if self.finer else (4,):
            size = (height // stride, width // stride)
            heatmaps, tags = np.zeros((17, *size), np.float32), np.zeros((1, 17, *size), np.float32)
            for p in range(2):
                for k in range(17 - p):  # the second person lacks a keypoint
                    cell = np.floor(self.position(p, k) / stride)
                    draw(heatmaps, tags, k, *cell, 0.9 - 0.2 * p, 3.0 * p + 1)
            maps = np.concatenate([heatmaps, tags[0]]) if stride == 4 else heatmaps
            outputs.append(torch.from_numpy(maps).expand(b, -1, -1, -1))
        return tuple(outputs)

    @staticmethod
    def position(person, keypoint):
        return np.array([26.0 + 120 * person + 16 * (keypoint % 4), 34.0 + 16 * (keypoint // 4)])


@pytest.mark.parametrize("finer", [True, False])
def test_people_in_images_of_many_sizes(finer, tmp_path, photo):
    name = "higher_hrnet_w32" if finer else "hrnet_w32_ae"
    path = tmp_path / "a.pth"
    torch.save(fastpose.create_model(name).state_dict(), path)
    pose = PoseEstimator(name, path, input_size=(256, 256), flip_test=False, batch_size=16)
    assert pose.info.codec == CODEC and pose.bottom_up and pose.notice == "" and not pose.info.antialias
    pose.model = TwoPeople(finer)
    images = [photo, photo[:200, :200], photo.transpose(1, 0, 2), photo, photo[:50], photo[:1, :1]]
    results = pose([np.ascontiguousarray(i) for i in images])
    for image, poses in zip(images, results, strict=True):
        assert len(poses) == 2 and poses.image_size == image.shape[:2]
        assert poses.scores[0] > poses.scores[1] > 0.5
        matrix, _ = whole_image_matrix(image.shape[:2], 256)
        for p in range(2):
            seen = np.arange(17) < 17 - p
            expected = np.stack([TwoPeople.position(p, k) for k in range(17)])
            # in the middle of a coarse cell, at the edge of a fine one; a quarter of a pixel is added or taken away
            error = np.abs(apply_affine(matrix, poses.keypoints[p]) - expected)[seen]
            assert error.max() < (1.3 if finer else 0.8)
            found = poses.keypoints[p][poses.keypoint_scores[p] > 0]
            assert np.allclose(poses.boxes[p], [*found.min(0), *found.max(0)])
    with pytest.raises(BoxError, match="finds people itself"):
        pose(photo, [[1, 2, 30, 40]])
    assert pose([]) == []


def test_fastpose_files_of_bottom_up_networks(tmp_path, photo):
    model = fastpose.create_model("lightweight_hrnet_448", num_keypoints=14)
    info = WeightsInfo(
        "lightweight_hrnet_448", 14, "lsp14", (448, 448), 1.0, AssociativeEmbeddingCodec(max_people=2, refine=False)
    )
    save_weights(tmp_path / "a.safetensors", model.state_dict(), info)
    assert read_info(tmp_path / "a.safetensors") == info
    pose = PoseEstimator("auto", tmp_path / "a.safetensors", input_size=(64, 64))
    for poses in pose([photo, photo[:100]]):
        assert len(poses) <= 2 and np.isfinite(poses.keypoints).all() and poses.skeleton.name == "lsp14"
        # missing keypoints: no score, and the origin, as in COCO's files
        assert not poses.keypoints[poses.keypoint_scores == 0].any()
    assert len(PoseEstimator("auto", tmp_path / "a.safetensors", codec=CODEC, input_size=(64, 64))(photo)) <= 30


def test_network_and_codec_belong_together(tmp_path):
    assert is_bottom_up("higher_hrnet_w32") and not is_bottom_up("hrnet_w32")
    torch.save(fastpose.create_model("hrnet_w32_ae").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="hrnet_w32_ae is a bottom-up network, for which codec 'msra' is not made"):
        PoseEstimator("hrnet_w32_ae", tmp_path / "a.pth", codec="msra")
    with pytest.raises(ValueError, match="mobileposenet is a top-down network, for which codec 'associative'"):
        PoseEstimator(codec="associative")
    torch.save(fastpose.create_model("hrnet_w32_ae", num_keypoints=14).state_dict(), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="have 14 keypoints, but do not say which"):
        PoseEstimator("hrnet_w32_ae", tmp_path / "b.pth")


@pytest.fixture
def small_network(tmp_path):
    torch.save(fastpose.create_model("lightweight_hrnet_448", num_keypoints=17).state_dict(), tmp_path / "a.pth")
    return lambda flip_test: PoseEstimator(
        "lightweight_hrnet_448", tmp_path / "a.pth", input_size=(64, 64), flip_test=flip_test
    )


def test_the_flip_test_sees_the_mirrored_image(small_network, photo):
    pose = small_network(True)
    seen, network = [], pose.model
    pose.model = lambda x: seen.append(x.clone()) or network(x)
    pose(photo)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1].flip(3)) and not torch.equal(*seen)


def test_weights_of_others_see_images_as_they_were_trained_with(small_network, photo, monkeypatch):
    pose, seen = small_network(False), []
    forward = pose._forward
    monkeypatch.setattr(pose, "_forward", lambda crops: seen.append(crops) or forward(crops))
    pose(photo)
    matrix, (height, width) = whole_image_matrix(photo.shape[:2], 64)
    expected = cv2.warpAffine(photo, matrix, (width, height), flags=cv2.INTER_LINEAR)
    assert (seen[0][0].permute(1, 2, 0).numpy() == expected).all()
