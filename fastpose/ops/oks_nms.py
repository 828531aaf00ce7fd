"""`oks_nms`: suppression of duplicate poses by object keypoint similarity (OKS), batched over images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpose.ops import _backend

METHODS = ("hard", "soft", "parallel")
DECAYS = ("linear", "gaussian")
DEFAULT_THRESHOLD = {"hard": 0.9, "soft": 0.0, "parallel": 0.0}


def oks_nms(
    keypoints: Tensor,
    keypoint_scores: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    *,
    image_index: Tensor | None = None,
    method: str = "parallel",
    threshold: float | None = None,
    keypoint_threshold: float = 0.1,
    decay: str = "linear",
    gaussian_sigma: float = 0.5,
    overlap_threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of poses that duplicate better ones. Poses of different images never meet.

    With O_ij = sum_m v_m exp(-d_m^2 / (2 (2 sigma_m)^2 (a_i + a_j) / 2)) / sum_m v_m, where d_m is the distance of
    keypoint m in the two poses and v_m = 1 if its score exceeds `keypoint_threshold` in both (O_ij = 0 if none does),
    and "above" meaning a higher score, or an equal one and a lower index:

    * ``"hard"``: greedy. A pose is dropped if its OKS with a kept pose above it exceeds `threshold` (default 0.9).
    * ``"soft"``: sequential Soft-NMS. The best remaining pose is taken; every other is multiplied by 1 - O (where
      O > `overlap_threshold`) or, gaussian, by exp(-O^2 / gaussian_sigma); repeat.
    * ``"parallel"``: S. Niu et al. 2021, Section 3.3, in the corrected form: decay_j is the minimum over i above j of
      (1 - O_ij) / (1 - c_i) or, gaussian, exp(-(O_ij^2 - c_i^2) / gaussian_sigma), at most 1, where c_i is the largest
      O_li over all l above i. (As printed, the equations lack sigma, divide by a product of areas, and end in 0 / 0.)

    Args:
        keypoints: [N, K, 2], (x, y) pixels; float32 or float64. A NaN or infinite keypoint counts as not visible.
        keypoint_scores: [N, K].
        scores: pose scores [N], used as they are (see `rescore` for Eq. 6). A NaN score drops the pose: result 0.
        areas: [N] in square pixels; NaN and negative areas count as 0. With both areas 0 the OKS of a keypoint is 1 if
            the positions coincide and 0 otherwise.
        sigmas: [K], the skeleton's (COCO convention).
        image_index: int64 [N], image of each pose in any order; None: all in one image.
        threshold: ``hard``: OKS above which a pose is dropped. ``soft``, ``parallel``: new score above which a pose is
            kept (default 0).

    Returns:
        new_scores [N] (``hard``: 0 for dropped poses) and keep, bool [N], both in the order of the input.

    Raises:
        ValueError: a shape, dtype or setting that does not fit; names the argument, what was expected and given.
    """
    check_threshold(method, threshold)
    limit = DEFAULT_THRESHOLD[method] if threshold is None else float(threshold)
    _backend.refuse_tangents("oks_nms", keypoints, keypoint_scores, scores, areas)
    fn = torch.ops.fastpose.oks_nms if _backend.LOADED else oks_nms_reference
    return fn(
        keypoints, keypoint_scores, scores, areas, sigmas, image_index, method, decay, limit, keypoint_threshold,
        overlap_threshold, gaussian_sigma,
    )  # fmt: skip


def check_threshold(method: str, threshold: float | None) -> None:
    """Raise ValueError for what `oks_nms` does not take."""
    if method not in METHODS:
        raise ValueError(f"oks_nms: method must be 'hard', 'soft' or 'parallel', got {method!r}")
    if threshold is None:
        return
    if method == "hard" and not 0 <= threshold <= 1:
        raise ValueError(f"oks_nms: threshold of method 'hard' is an OKS, from 0 to 1, got {threshold}")
    if math.isnan(threshold):
        raise ValueError(f"oks_nms: threshold must be a number, got {threshold}")


def rescore(keypoint_scores: Tensor, box_scores: Tensor, keypoint_threshold: float = 0.1) -> Tensor:
    """Pose scores (Eq. 6): box score times the mean of the keypoint scores above the threshold, 0 if there are none.

    keypoint_scores [N, K], box_scores [N] -> [N].
    """
    above = keypoint_scores > keypoint_threshold
    total = torch.where(above, keypoint_scores, torch.zeros_like(keypoint_scores)).sum(1)
    return box_scores * total / above.sum(1).clamp(min=1)


def oks_matrix(keypoints: Tensor, visible: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """Pairwise OKS: keypoints [..., P, K, 2], visible bool [..., P, K], areas [..., P] -> [..., P, P]."""
    delta = keypoints.unsqueeze(-3) - keypoints.unsqueeze(-4)
    squared = delta.square().sum(-1)
    area = ((areas.unsqueeze(-1) + areas.unsqueeze(-2)) / 2).clamp(min=1e-30)
    both = (visible.unsqueeze(-2) & visible.unsqueeze(-3)).to(keypoints.dtype)
    similarity = torch.exp(-squared / (2 * (2 * sigmas) ** 2) / area.unsqueeze(-1)) * both
    common = both.sum(-1)
    return torch.where(common > 0, similarity.sum(-1) / common.clamp(min=1), torch.zeros_like(common))


def oks_nms_reference(
    keypoints: Tensor,
    keypoint_scores: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    image_index: Tensor | None = None,
    method: str = "parallel",
    decay: str = "linear",
    threshold: float = 0.0,
    keypoint_threshold: float = 0.1,
    overlap_threshold: float = 0.0,
    gaussian_sigma: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: images padded to a common number of poses [G, P], whole matrices at once."""
    _check(keypoints, keypoint_scores, scores, areas, sigmas, image_index, method, decay, gaussian_sigma)
    n = scores.shape[0]
    if n == 0:
        return scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
    # rank within the image by descending score; sorting by the least significant key first, stably
    dropped = scores.isnan()
    order = torch.argsort(torch.where(dropped, -math.inf, scores), descending=True, stable=True)
    order = order[torch.argsort(dropped[order].to(torch.int8), stable=True)]
    if image_index is None:
        image = torch.zeros(n, dtype=torch.long, device=scores.device)
    else:
        image = torch.unique(image_index, return_inverse=True)[1]
    order = order[torch.argsort(image[order], stable=True)]
    counts = torch.bincount(image)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.arange(n, device=scores.device) - starts[image[order]]
    slots = torch.full((len(counts), int(counts.max())), -1, dtype=torch.long, device=scores.device)
    slots[image[order], rank] = order
    real = (slots >= 0) & ~dropped[slots.clamp(min=0)]
    at = slots.clamp(min=0)

    visible = (keypoint_scores > keypoint_threshold) & keypoints.isfinite().all(-1)
    points = torch.where(visible.unsqueeze(-1), keypoints, torch.zeros_like(keypoints))
    area = torch.where(areas > 0, areas, torch.zeros_like(areas))
    overlap = oks_matrix(points[at], visible[at] & real.unsqueeze(-1), area[at], sigmas)  # [G, P, P]
    score = torch.where(real, scores[at], torch.zeros_like(scores[at]))
    upper = torch.ones_like(overlap, dtype=torch.bool).triu(1) & real.unsqueeze(-1) & real.unsqueeze(-2)
    upper_overlap = torch.where(upper, overlap, torch.zeros_like(overlap))

    if method == "parallel":
        cover = upper_overlap.amax(1).unsqueeze(-1)  # c_i: largest overlap with anyone above, on row i
        if decay == "linear":
            ratio = (1 - upper_overlap) / (1 - cover).clamp(min=1e-12)
        else:
            ratio = torch.exp(-(upper_overlap.square() - cover.square()) / gaussian_sigma)
        new = score * torch.where(upper, ratio, torch.ones_like(ratio)).amin(1).clamp(max=1)
        kept = new > threshold
    elif method == "hard":
        kept = real.clone()
        for i in range(slots.shape[1]):
            kept &= ~((upper_overlap[:, i] > threshold) & kept[:, i : i + 1])
        new = torch.where(kept, score, torch.zeros_like(score))
    else:
        new = _soft(score, real, overlap, slots, decay, overlap_threshold, gaussian_sigma)
        kept = new > threshold

    flat = slots[slots >= 0]
    new_scores, keep = torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    new_scores[flat] = torch.where(real, new, torch.zeros_like(new))[slots >= 0]
    keep[flat] = (kept & real)[slots >= 0]
    return new_scores, keep


def _soft(
    score: Tensor, real: Tensor, overlap: Tensor, slots: Tensor, decay: str, overlap_threshold: float, sigma: float
) -> Tensor:
    """Sequential Soft-NMS of all images side by side: one round takes the best remaining pose of each."""
    if decay == "linear":
        factor = torch.where(overlap > overlap_threshold, 1 - overlap, torch.ones_like(overlap))
    else:
        factor = torch.exp(-overlap.square() / sigma)
    current, taken = score.clone(), ~real
    for _ in range(slots.shape[1]):
        open_scores = torch.where(taken | current.isnan(), torch.full_like(current, -math.inf), current)  # inf times 0
        best_score = open_scores.amax(1, keepdim=True)
        # among equals the lowest index of the input
        tied = (open_scores == best_score) & ~taken
        best = torch.where(tied, slots, torch.full_like(slots, torch.iinfo(torch.long).max)).argmin(1, keepdim=True)
        active = (~taken).any(1, keepdim=True)
        taken = taken | (torch.zeros_like(taken).scatter(1, best, True) & active)
        row = factor.gather(1, best.unsqueeze(-1).expand(-1, 1, factor.shape[2])).squeeze(1)
        current = torch.where(taken | ~active, current, current * row)
    return current


def _check(
    keypoints: Tensor,
    keypoint_scores: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    image_index: Tensor | None,
    method: str,
    decay: str,
    gaussian_sigma: float,
) -> None:
    if keypoints.dim() != 3 or keypoints.shape[2] != 2:
        raise ValueError(f"oks_nms: keypoints must be [N, K, 2], got {list(keypoints.shape)}")
    if keypoints.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"oks_nms: keypoints must be float32 or float64, got {keypoints.dtype}")
    n, k = keypoints.shape[:2]
    expected = {
        "keypoint_scores": (keypoint_scores, [n, k]),
        "scores": (scores, [n]),
        "areas": (areas, [n]),
        "sigmas": (sigmas, [k]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"oks_nms: {name} must be {shape}, got {list(tensor.shape)}")
        if tensor.dtype != keypoints.dtype:
            raise ValueError(f"oks_nms: {name} must have the dtype of keypoints, {keypoints.dtype}, got {tensor.dtype}")
    if image_index is not None and (list(image_index.shape) != [n] or image_index.dtype != torch.int64):
        raise ValueError(f"oks_nms: image_index must be int64 [{n}], got {image_index.dtype} {list(image_index.shape)}")
    if method not in METHODS:
        raise ValueError(f"oks_nms: method must be 'hard', 'soft' or 'parallel', got {method!r}")
    if decay not in DECAYS:
        raise ValueError(f"oks_nms: decay must be 'linear' or 'gaussian', got {decay!r}")
    if not gaussian_sigma > 0:
        raise ValueError(f"oks_nms: gaussian_sigma must be positive, got {gaussian_sigma}")


def _fake(keypoints: Tensor, keypoint_scores: Tensor, scores: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores), torch.empty_like(scores, dtype=torch.bool)


if _backend.LOADED:
    _backend.register("oks_nms", fake=_fake, reference=oks_nms_reference, autocast="float32")
