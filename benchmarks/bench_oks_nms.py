"""`oks_nms` on the CPU: duplicate poses of many images removed in one call, and the latency for a single image.

5000 images of 5, 30 and 100 poses (17 COCO keypoints, up to three poses per person), packed arrays with an image index;
and one image of 1 and 5 poses. Competitors:

    fused            fastpose.ops.oks_nms
    reference        the same in vectorised PyTorch, called on parts of the images where its tensors [images, poses,
                     poses, keypoints] would be too large
    numpy greedy     a loop over images, and over kept poses within each, as evaluation scripts have it. "hard" only,
                     timed on at most 50 images and scaled up (the note says from how many)

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
PART = 2**25  # most elements of the reference's pairwise tensors
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
    keypoints, keypoint_scores, scores, areas, index = data = make_poses(images, poses, args.torch_dtype)
    sigmas = torch.tensor(get_skeleton("coco17").sigmas, dtype=args.torch_dtype)
    image_index = None if images == 1 else index
    threshold = METHODS[method]
    step = max(1, PART // (poses * poses * 17)) * poses
    parts = list(zip(*(t.split(step) for t in data), strict=True))

    def fused() -> tuple[Tensor, Tensor]:
        return oks_nms(keypoints, keypoint_scores, scores, areas, sigmas, image_index=image_index, method=method)

    def reference() -> list[tuple[Tensor, Tensor]]:
        return [
            oks_nms_reference(*floats, sigmas, image if images > 1 else None, method, threshold=threshold)
            for *floats, image in parts
        ]

    competitors: dict[str, Any] = {"fused": fused, "reference": reference}
    new_scores, keep = fused()
    for name, got, column in (("scores", new_scores, 0), ("keep", keep, 1)):
        expected = torch.cat([result[column] for result in reference()])
        # rounding may swap two poses of almost equal score, which "soft" then treats differently
        near = (got.double() - expected.double()).abs() <= 20 * args.tolerance
        if method != "soft" or (~near).double().mean() > 1e-4:
            check(f"{method}: {name}", got, expected, 20 * args.tolerance)

    notes = {"reference": f"in {len(parts)} parts" if len(parts) > 1 else ""}
    scale = 1.0
    if method == "hard":
        timed = min(images, 50)
        scale = images / timed
        notes["numpy greedy"] = f"{timed} images timed, scaled to {images}" if timed < images else ""
        arrays = [a.numpy()[: timed * poses].reshape(timed, poses, *a.shape[1:]) for a in data[:4]]
        s = sigmas.numpy()

        def greedy() -> list[Any]:
            return [numpy_greedy(*image, s, threshold) for image in zip(*arrays, strict=True)]

        check("numpy greedy", np.concatenate(greedy()), keep[: timed * poses], 0)
        competitors["numpy greedy"] = greedy

    case = {"images": images, "poses": poses, "method": method, "threads": threads}
    for name, t in measure(competitors, args.rounds).items():
        factor = scale if name == "numpy greedy" else 1.0
        ms, p10, p90, ratio = t.median * 1e3, t.p10 * 1e3, t.p90 * 1e3, t.ratio
        values = {"ms": ms * factor, "p10": p10 * factor, "p90": p90 * factor, "x fused": ratio * factor}
        values["us/image"] = values["ms"] * 1e3 / images
        table.add(**case, competitor=name, **values, note=notes.get(name, ""))


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
