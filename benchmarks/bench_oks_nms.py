"""`oks_nms` on the CPU: duplicate poses of many images removed in one call, and the latency for a single image.

5000 images of 5, 30 and 100 poses (17 COCO keypoints, up to three poses per person), packed arrays with an image index;
and one image of 1 and 5 poses. Competitors:

    fused            fastpose.ops.oks_nms
    reference        the same in vectorised PyTorch, called on as many images at a time as suit the processor's caches,
                     which is faster than all in one call
    numpy greedy     a loop over images, and over kept poses within each, as evaluation scripts have it; "hard" only

The slow two run on some of the images, at most 50 of 100 poses and 555 of 30; times are scaled up, as the note says.

Run: python benchmarks/bench_oks_nms.py [--quick] [--threads 1,2] [--dtype float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import torch
from _timing import Table, check, measure, options, parse, set_threads
from torch import Tensor

from fastpose import get_skeleton
from fastpose.ops import oks_nms, oks_nms_reference

METHODS = {"hard": 0.9, "soft": 0.0, "parallel": 0.0}  # with their thresholds
KEYPOINT_THRESHOLD = 0.1
PART = 2**18  # elements of a pairwise tensor in one call of the reference
PAIRS = 500_000  # pairs of poses for the slow competitors
COLUMNS: dict[str, tuple[int, int | None]] = {
    "images": (6, 0),
    "poses": (5, 0),
    "method": (8, None),
    "threads": (7, 0),
    "competitor": (12, None),
    "ms": (11, 4),
    "p10": (11, 4),
    "p90": (11, 4),
    "x fused": (9, 2),
    "us/image": (9, 1),
    "note": (0, None),
}


def make_poses(images: int, poses: int, dtype: torch.dtype) -> list[Tensor]:
    """Keypoints [N, 17, 2], their scores, pose scores, areas and image index, N = images * poses.

    Each person appears up to three times: as is, with keypoints moved by a pixel ("hard" drops it) and by eight (kept).
    So similarities stay away from the threshold, where rounding would decide.
    """
    k, people = 17, -(-poses // 3)
    person, copy = torch.arange(poses) % people, torch.arange(poses) // people
    corner = torch.rand(images, people, 1, 2) * torch.tensor([640.0, 480.0])
    body = corner + torch.rand(images, people, k, 2) * torch.tensor([80.0, 160.0])
    moved = torch.tensor([0.0, 1.0, 8.0])[copy].view(-1, 1, 1) * torch.randn(images, poses, k, 2)
    keypoints = (body[:, person] + moved).view(-1, k, 2)
    n = images * poses
    floats = [keypoints, torch.rand(n, k), torch.rand(n), torch.full((n,), 80.0 * 160.0)]
    return [t.to(dtype) for t in floats] + [torch.arange(images).repeat_interleave(poses)]


def numpy_greedy(keypoints: Any, keypoint_scores: Any, scores: Any, areas: Any, sigmas: Any, threshold: float) -> Any:
    """Hard OKS-NMS of one image: bool [P], which poses are kept."""
    visible = keypoint_scores > KEYPOINT_THRESHOLD
    variance = 2 * (2 * sigmas) ** 2
    keep = np.zeros(len(scores), bool)
    order = np.argsort(-scores, kind="stable")
    while order.size:
        i, order = order[0], order[1:]
        keep[i] = True
        squared = ((keypoints[order] - keypoints[i]) ** 2).sum(-1)
        both = visible[order] & visible[i]
        area = (areas[order] + areas[i]) / 2
        similarity = np.exp(-squared / (variance * area[:, None])) * both
        oks = similarity.sum(-1) / np.maximum(both.sum(-1), 1)
        order = order[oks <= threshold]
    return keep


def run(table: Table, args: argparse.Namespace, threads: int, images: int, poses: int, method: str) -> None:
    set_threads(threads)
    keypoints, keypoint_scores, scores, areas, index = make_poses(images, poses, args.torch_dtype)
    sigmas = torch.tensor(get_skeleton("coco17").sigmas, dtype=args.torch_dtype)
    threshold = METHODS[method]
    timed = min(images, PAIRS // poses**2)
    some = [t[: timed * poses] for t in (keypoints, keypoint_scores, scores, areas, index)]
    step = max(1, PART // (poses**2 * keypoints.shape[1])) * poses
    parts = list(zip(*(t.split(step) for t in some), strict=True))
    arrays = [t.view(timed, poses, *t.shape[1:]).numpy() for t in some[:4]]

    def fused() -> tuple[Tensor, Tensor]:
        image_index = None if images == 1 else index
        return oks_nms(keypoints, keypoint_scores, scores, areas, sigmas, image_index=image_index, method=method)

    def reference() -> list[tuple[Tensor, Tensor]]:
        return [
            oks_nms_reference(*floats, sigmas, None if images == 1 else image, method, threshold=threshold)
            for *floats, image in parts
        ]

    def greedy() -> list[Any]:
        return [numpy_greedy(*image, sigmas.numpy(), threshold) for image in zip(*arrays, strict=True)]

    new_scores, keep = (t[: timed * poses] for t in fused())
    expected_scores, expected_keep = (torch.cat(column) for column in zip(*reference(), strict=True))
    check(f"{method}: scores", new_scores, expected_scores, 10 * args.tolerance)
    check(f"{method}: keep", keep, expected_keep, 0)
    competitors: dict[str, Any] = {"fused": fused, "reference": reference}
    if method == "hard":
        check("numpy greedy", np.concatenate(greedy()), keep, 0)
        competitors["numpy greedy"] = greedy

    case = {"images": images, "poses": poses, "method": method, "threads": threads}
    for name, t in measure(competitors, args).items():
        scale = 1.0 if name == "fused" else images / timed
        ms, p10, p90 = (seconds * 1e3 * scale for seconds in t[:3])
        values = {"ms": ms, "p10": p10, "p90": p90, "x fused": t.ratio * scale, "us/image": ms * 1e3 / images}
        table.add(**case, competitor=name, **values, note=f"{timed} images timed" if scale > 1 else "")


@torch.inference_mode()
def main() -> None:
    args = parse(options(__doc__, batch=False, compiled=False, dtypes=("float32", "float64")))
    sizes = [(5000, 5), (5000, 30), (5000, 100), (1, 1), (1, 5)]
    if args.quick:
        sizes = [(5000, 5), (500, 30), (500, 100), (1, 1), (1, 5)]
    table = Table(args, COLUMNS)
    for threads, (images, poses), method in itertools.product(args.threads, sizes, METHODS):
        run(table, args, threads, images, poses, method)
    table.finish()


if __name__ == "__main__":
    main()
