from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastpose.ops import oks_nms, oks_nms_reference, rescore
from tests.conftest import needs_kernels, opcheck

METHODS = [
    ("hard", "linear"),
    ("soft", "linear"),
    ("soft", "gaussian"),
    ("parallel", "linear"),
    ("parallel", "gaussian"),
]

# Worked example: four poses of three keypoints; the last keypoint of pose 2 is not visible.
SIGMAS = torch.tensor([0.025, 0.05, 0.1], dtype=torch.float64)
AREAS = torch.tensor([2000.0, 2200, 2400, 1800], dtype=torch.float64)
BOX_SCORES = torch.tensor([0.95, 0.9, 0.9, 0.8], dtype=torch.float64)
KEYPOINTS = torch.tensor(
    [
        [[10.0, 10], [20, 30], [20, 60]],
        [[12, 10], [20, 33], [24, 60]],
        [[16, 12], [24, 38], [30, 64]],
        [[110, 10], [120, 30], [120, 60]],
    ],
    dtype=torch.float64,
)
KEYPOINT_SCORES = torch.tensor(
    [[0.9, 0.9, 0.9], [0.8, 0.9, 0.7], [0.8, 0.7, 0.05], [0.9, 0.6, 0.6]], dtype=torch.float64
)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def run(method, decay="linear", fn=oks_nms, device="cpu", **settings):
    """The worked example; results on the CPU."""
    scores = rescore(KEYPOINT_SCORES, BOX_SCORES)
    inputs = [t.to(device) for t in (KEYPOINTS, KEYPOINT_SCORES, scores, AREAS, SIGMAS)]
    return tuple(t.cpu() for t in fn(*inputs, method=method, decay=decay, **settings))


def test_rescore_is_equation_6():
    assert torch.allclose(rescore(KEYPOINT_SCORES, BOX_SCORES), f64([0.855, 0.72, 0.675, 0.56]), atol=1e-12)
    assert rescore(torch.tensor([[0.05, 0.1]]), torch.tensor([1.0])).item() == 0.0


@pytest.mark.parametrize(
    ("method", "decay", "expected"),
    [
        ("parallel", "linear", [0.855, 0.144123692986, 0.611324350201, 0.56]),
        ("parallel", "gaussian", [0.855, 0.200296926804, 0.663092681866, 0.56]),
        ("soft", "linear", [0.855, 0.101910327575, 0.611324350201, 0.56]),
        ("soft", "gaussian", [0.855, 0.168717185345, 0.663092681866, 0.56]),
        ("hard", "linear", [0.855, 0.0, 0.675, 0.56]),
    ],
)
def test_worked_example(method, decay, expected, device):
    threshold = 0.5 if method == "hard" else 0.0
    new, keep = run(method, decay, device=device, threshold=threshold)
    assert torch.allclose(new, f64(expected), atol=1e-11, rtol=0)
    assert keep.tolist() == [v > 0 for v in expected]


def test_hard_thresholds_of_the_worked_example(device):
    assert run("hard", device=device, threshold=0.9)[1].tolist() == [True] * 4
    assert run("hard", device=device, threshold=0.3)[1].tolist() == [True, False, True, True]
    # OKS of poses 0 and 1, planted just under and just over
    assert run("hard", device=device, threshold=0.799828204186 + 1e-9)[1].tolist() == [True] * 4
    assert run("hard", device=device, threshold=0.799828204186 - 1e-9)[1].tolist() == [True, False, True, True]


def matrix_nms_oracle(overlap, scores, method, decay, threshold=0.5, sigma=0.5):
    """The definitions as loops over Python floats."""
    n = len(scores)
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    if method == "hard":
        kept = []
        for j in order:
            if all(overlap[i][j] <= threshold for i in kept):
                kept.append(j)
        return [scores[i] if i in kept else 0.0 for i in range(n)]
    new = list(scores)
    if method == "soft":
        left, current = list(range(n)), list(scores)
        while left:
            best = max(left, key=lambda i: (current[i], -i))
            left.remove(best)
            new[best] = current[best]
            for j in left:
                o = overlap[best][j]
                current[j] *= math.exp(-(o**2) / sigma) if decay == "gaussian" else 1 - o
        return new
    for at, j in enumerate(order):
        factor = 1.0
        for before, i in enumerate(order[:at]):
            c = max((overlap[m][i] for m in order[:before]), default=0.0)
            o = overlap[i][j]
            ratio = math.exp(-(o**2 - c**2) / sigma) if decay == "gaussian" else (1 - o) / max(1 - c, 1e-12)
            factor = min(factor, ratio)
        new[j] = scores[j] * factor
    return new


def oks_oracle(keypoints, visible, areas, sigmas):
    n, k = visible.shape
    matrix = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            common = [m for m in range(k) if visible[i, m] and visible[j, m]]
            area = max((areas[i] + areas[j]) / 2, 1e-30)
            for m in common:
                d2 = ((keypoints[i, m] - keypoints[j, m]) ** 2).sum()
                matrix[i][j] += math.exp(-d2 / (2 * (2 * sigmas[m]) ** 2 * area)) / len(common)
    return matrix


@pytest.mark.parametrize(("method", "decay"), METHODS)
def test_compensation_and_order_change(method, decay, device):
    """A matrix with overlaps .8, .3, .6 and .5: pose 2 is excused for overlapping the suppressed pose 1."""
    matrix = [[1, 0.8, 0.3, 0], [0.8, 1, 0.6, 0], [0.3, 0.6, 1, 0.5], [0, 0, 0.5, 1]]
    scores = [0.9, 0.8, 0.7, 0.6]
    expected = {
        ("parallel", "linear"): [0.9, 0.16, 0.49, 0.6],
        ("parallel", "gaussian"): [0.9, 0.222429840363, 0.584689147988, 0.6],
        ("soft", "linear"): [0.9, 0.064, 0.245, 0.6],
        ("soft", "gaussian"): [0.9, 0.108268226589, 0.354631894656, 0.6],
        ("hard", "linear"): [0.9, 0, 0.7, 0.6],
    }[method, decay]
    assert np.allclose(matrix_nms_oracle(matrix, scores, method, decay), expected, atol=1e-11)
    keypoints, keypoint_scores = poses_with_overlaps(matrix)
    k = keypoints.shape[1]
    inputs = [t.to(device) for t in (keypoints, keypoint_scores, f64(scores), f64([1.0] * 4), f64([0.1] * k))]
    new, _ = oks_nms(*inputs, method=method, decay=decay, threshold=0.5 if method == "hard" else 0.0)
    assert np.allclose(new.cpu().numpy(), expected, atol=1e-11)


def poses_with_overlaps(matrix):
    """Poses with the given OKS matrix (multiples of 0.1): every pair has ten keypoints that only these two show,
    of which ten times the OKS coincide and the others are far apart."""
    pairs = [(i, j) for i in range(len(matrix)) for j in range(i)]
    keypoints = torch.zeros(len(matrix), 10 * len(pairs), 2).double()
    keypoint_scores = torch.zeros(len(matrix), 10 * len(pairs)).double()
    for at, (i, j) in enumerate(pairs):
        keypoint_scores[[i, j], 10 * at : 10 * at + 10] = 1.0
        keypoints[i, 10 * at + round(10 * matrix[i][j]) : 10 * at + 10] = 1e6
    return keypoints, keypoint_scores


def random_poses(n, k=17, dtype=torch.float64, images=3, device="cpu"):
    g = torch.Generator().manual_seed(n)
    keypoints = torch.randn(n, k, 2, generator=g, dtype=torch.float64) * 4 + 100
    keypoint_scores = torch.rand(n, k, generator=g, dtype=torch.float64)
    scores = (torch.rand(n, generator=g, dtype=torch.float64) * 20).round() / 20  # many ties
    areas = torch.rand(n, generator=g, dtype=torch.float64) * 9000
    sigmas = torch.rand(k, generator=g, dtype=torch.float64) * 0.1 + 0.02
    image = torch.randint(0, images, (n,), generator=g) * 7 - 5
    tensors = [t.to(dtype).to(device) for t in (keypoints, keypoint_scores, scores, areas, sigmas)]
    return tensors, image.to(device)


@pytest.mark.parametrize("fn", [oks_nms, oks_nms_reference], ids=["op", "reference"])
@pytest.mark.parametrize(("method", "decay"), METHODS)
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 60])
def test_equals_the_loop_oracle_image_by_image(n, method, decay, fn, device):
    (keypoints, keypoint_scores, scores, areas, sigmas), image = random_poses(n)
    threshold = 0.4 if method == "hard" else 0.0
    inputs = [t.to(device) for t in (keypoints, keypoint_scores, scores, areas, sigmas)]
    new, keep = fn(*inputs, image_index=image.to(device), method=method, decay=decay, threshold=threshold)
    assert new.shape == keep.shape == (n,) and keep.dtype == torch.bool
    new, keep = new.cpu(), keep.cpu()
    for i in image.unique().tolist():
        at = (image == i).nonzero()[:, 0]
        matrix = oks_oracle(
            keypoints[at].numpy(), (keypoint_scores[at] > 0.1).numpy(), areas[at].numpy(), sigmas.numpy()
        )
        expected = matrix_nms_oracle(matrix, scores[at].tolist(), method, decay, threshold)
        assert np.allclose(new[at].numpy(), expected, atol=1e-12, rtol=1e-10)
        if method != "hard":
            assert torch.equal(keep[at], new[at] > 0)


@pytest.mark.parametrize(("method", "decay"), METHODS)
@pytest.mark.parametrize("k", [0, 17, 133])
def test_images_of_every_size_together(k, method, decay, device):
    """From one pose to more than fit into the fastest memory, in any order, and all poses in one image."""
    sizes = [1, 5, 6, 7, 12, 1, 22, 23, 30] if k > 100 else [1, 39, 40, 41, 42, 1, 83, 2, 31, 32, 33, 160, 40]
    image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    tensors, _ = random_poses(len(image), k)
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(3))
    settings = {"method": method, "decay": decay, "threshold": 0.4 if method == "hard" else 0.0}
    for index in (image, image[order] * 1000 - 5, None):
        some = tensors if index is not None else [*(t[: max(sizes)] for t in tensors[:4]), tensors[4]]
        on_device = None if index is None else index.to(device)
        new, keep = oks_nms(*(t.to(device) for t in some), image_index=on_device, **settings)
        expected, expected_keep = oks_nms_reference(*some, image_index=index, **settings)
        assert torch.allclose(new.cpu(), expected, atol=1e-11) and torch.equal(keep.cpu(), expected_keep)


@pytest.mark.parametrize(("method", "decay"), METHODS)
def test_float32_and_permutation(method, decay, device):
    tensors, image = random_poses(70, dtype=torch.float32, device=device)
    tensors[2] = torch.randperm(70, generator=torch.Generator().manual_seed(1)).float().to(device) / 70  # all distinct
    exact = oks_nms(*(t.double() for t in tensors), image_index=image, method=method, decay=decay)[0]
    new, keep = oks_nms(*tensors, image_index=image, method=method, decay=decay)
    assert torch.allclose(new.double(), exact, atol=2e-5)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2)).to(device)
    moved = [t[order] for t in tensors[:4]]
    again, keep_again = oks_nms(*moved, tensors[4], image_index=image[order], method=method, decay=decay)
    assert torch.equal(again, new[order]) and torch.equal(keep_again, keep[order])


@pytest.mark.parametrize("fn", [oks_nms, oks_nms_reference], ids=["op", "reference"])
@pytest.mark.parametrize(("method", "decay"), METHODS)
def test_odd_inputs_are_defined(method, decay, fn, device):
    nan, inf = float("nan"), float("inf")
    keypoints = torch.zeros(6, 2, 2).double()
    keypoints[4, 0, 0], keypoints[4, 1, 1] = nan, inf  # no usable keypoint: duplicates nobody
    keypoints[5] = 50.0
    confidence = torch.ones(6, 2).double()
    scores = f64([0.5, 0.5, nan, 0.4, 0.3, 0.2])
    areas = f64([0.0, 0.0, 5.0, nan, 10.0, -3.0])
    sigmas = f64([0.1, 0.1])
    inputs = [t.to(device) for t in (keypoints, confidence, scores, areas, sigmas)]
    new, keep = fn(*inputs, method=method, decay=decay)
    assert not new.isnan().any()
    assert new[0] == 0.5 and keep[0]  # of equals the lower index wins
    assert new[2] == 0 and not keep[2]  # NaN score: dropped, and suppresses nobody
    assert new[4] == 0.3 and keep[4] and new[5] == 0.2 and keep[5]
    if decay == "linear":  # exact duplicates: OKS 1 although all areas count as 0
        assert new[1] == 0 and not keep[1] and new[3] == 0 and not keep[3]
    if method == "hard":
        for pair in ([inf, inf], [1.0, -inf]):
            new, _ = fn(*inputs[:2], f64([*pair, 0.0, 0.0, 0.0, 0.0]).to(device), *inputs[3:], method=method)
            assert new[0] == pair[0] and new[1] == 0  # not inf times 0


@pytest.mark.parametrize("fn", [oks_nms, oks_nms_reference], ids=["op", "reference"])
def test_an_infinite_score_decayed_to_nothing_comes_last(fn, device):
    """Infinity times 0 is no number, and decays nobody before its turn."""
    keypoints = torch.zeros(3, 2, 2).double()
    keypoints[2] = 3.0
    given = (keypoints, torch.ones(3, 2).double(), f64([math.inf, math.inf, 0.9]), f64([100.0] * 3), f64([0.1, 0.1]))
    new, _ = fn(*(t.to(device) for t in given), method="soft", decay="linear")
    overlap = math.exp(-18 / (2 * 100 * 0.2**2))
    assert new[0] == math.inf and float(new[2]) == pytest.approx(0.9 * (1 - overlap), rel=1e-9)


@pytest.mark.parametrize("method", ["hard", "soft", "parallel"])
def test_batch_equals_single_images(method, device):
    tensors, image = random_poses(200, images=25, device=device)
    together = oks_nms(*tensors, image_index=image, method=method)
    for i in image.unique().tolist():
        at = image == i
        alone = oks_nms(*(t[at] for t in tensors[:4]), tensors[4], method=method)
        assert torch.equal(alone[0], together[0][at]) and torch.equal(alone[1], together[1][at])


@needs_kernels
def test_threads_change_nothing():
    tensors, image = random_poses(3000, images=150)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(oks_nms(*tensors, image_index=image)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernels
def test_opcheck_and_autocast(device):
    tensors, image = random_poses(9, dtype=torch.float32, device=device)
    op = torch.ops.fastpose.oks_nms.default
    opcheck(op, (*tensors, image, "parallel", "linear", 0.0, 0.1, 0.0, 0.5))
    opcheck(op, (*tensors, None, "hard", "linear", 0.5, 0.1, 0.0, 0.5))
    with torch.autocast(device, dtype=torch.bfloat16):
        new, _ = oks_nms(tensors[0].bfloat16(), *tensors[1:])
    assert new.dtype == torch.float32


def test_bad_arguments_name_the_problem():
    tensors, image = random_poses(4)
    cases = [
        ({0: tensors[0][0]}, {}, r"keypoints must be \[N, K, 2\], got \[17, 2\]"),
        ({1: tensors[1][:3]}, {}, "keypoint_scores must be"),
        ({2: tensors[2].float()}, {}, "scores must have the dtype of keypoints"),
        ({3: tensors[3][:2]}, {}, "areas must be"),
        ({4: tensors[4][:2]}, {}, "sigmas must be"),
        ({0: tensors[0].half()}, {}, "keypoints must be float32 or float64"),
        ({}, {"image_index": image.int()}, "image_index must be int64"),
        ({}, {"method": "fast"}, "method must be 'hard', 'soft' or 'parallel', got 'fast'"),
        ({}, {"decay": "cubic"}, "decay must be 'linear' or 'gaussian', got 'cubic'"),
        ({}, {"gaussian_sigma": 0.0}, "gaussian_sigma must be positive"),
    ]
    for changed, settings, message in cases:
        arguments = [changed.get(i, t) for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=message):
            oks_nms(*arguments, **settings)


def test_hard_nms_keeps_similarities_of_less_than_nine_tenths():
    assert run("hard")[1].tolist() == [True] * 4  # the two nearest have 0.8
