"""The whole pipeline, JPEG files and boxes in, poses out, on the CPU against loops as others have them and its network.

Files of 640x480 with boxes for some people each are made for the purpose (smooth noise: whether somebody is to be seen
makes no difference to the time). All run the same network, as `fastpose.optimize` makes it, without the flip test
unless --flip-test is given. Poses are compared before anything is timed. Competitors:

    stream        PoseEstimator.stream: reading, cropping and the network overlap, batches are filled across images
    per image     one after the other: read, crop the image's people, network on them as one batch, decode
    per person    the same with a batch of one per person, as the common per-person libraries have it
    network       nothing but the network, on batches of ready crops: the ceiling

"% network" is the share of a competitor's time during which the network runs.

Run: python benchmarks/bench_pipeline.py [--quick] [--images 32] [--people 4] [--batch 32] [--threads 1,2] [--flip-test]
     [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from _timing import Call, Table, check, measure, options, parse, set_threads
from torch import Tensor, nn

from fastpose import PoseEstimator
from fastpose.geometry import apply_affine, crop_matrix, invert_affine, warp_crop
from fastpose.images import read_image
from fastpose.pipeline import estimate_crops
from fastpose.preprocess import normalize

COLUMNS: dict[str, tuple[int, int | None]] = {
    "model": (18, None),
    "batch": (5, 0),
    "threads": (7, 0),
    "competitor": (12, None),
    "images/s": (9, 1),
    "ms/image": (9, 2),
    "p10": (9, 2),
    "p90": (9, 2),
    "x stream": (9, 2),
    "% network": (10, 1),
}


class Clock(nn.Module):
    """A network that counts the seconds it takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Any:
        start = time.perf_counter()
        result = self.network(x)
        self.seconds += time.perf_counter() - start
        return result

    def watch(self, call: Call, shares: list[float]) -> Call:
        """`call`, which appends the network's share of its time to `shares`."""

        def watched() -> Any:
            start, before = time.perf_counter(), self.seconds
            result = call()
            shares.append((self.seconds - before) / (time.perf_counter() - start))
            return result

        return watched


def make_images(folder: Path, count: int, people: int) -> tuple[list[Path], list[Any]]:
    """JPEG files and boxes [people, 4] for each."""
    rng = np.random.default_rng(0)
    paths, boxes = [], []
    for i in range(count):
        small = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        path = folder / f"{i:05d}.jpg"
        cv2.imwrite(str(path), cv2.resize(small, (640, 480), interpolation=cv2.INTER_CUBIC))
        size = rng.uniform([80, 150], [260, 400], (people, 2))
        corner = rng.uniform(0, [640, 480] - size)
        paths.append(path)
        boxes.append(np.concatenate([corner, corner + size], axis=1).astype(np.float32))
    return paths, boxes


def make_loop(pose: PoseEstimator, paths: list[Path], boxes: list[Any], each: bool) -> Callable[[], Any]:
    """Image after image; with `each` also person after person. The call returns keypoints of everybody, [N, K, 2]."""
    info, codec = pose.info, pose.info.codec
    flip_indices = pose.skeleton.flip_indices if pose.flip_test else None

    def estimate(image: Any, part: Any) -> Any:
        matrices = [crop_matrix(b, info.input_size, info.padding, convention=codec.convention) for b in part]
        crops = np.stack([warp_crop(image, m, info.input_size, info.antialias) for m in matrices])
        points, _ = estimate_crops(pose.model, torch.from_numpy(crops).permute(0, 3, 1, 2), codec, flip_indices)
        return apply_affine(invert_affine(np.stack(matrices)), points.double().numpy())

    def run() -> Any:
        found = []
        for path, people in zip(paths, boxes, strict=True):
            image = read_image(path)
            found += [estimate(image, person[None]) for person in people] if each else [estimate(image, people)]
        return np.concatenate(found)

    return run


def make_network(pose: PoseEstimator, people: int, batch: int) -> Callable[[], Any]:
    """The network on so many crops; with the flip test twice."""
    height, width = pose.info.input_size
    crops = torch.randint(0, 256, (min(batch, people), height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    x = normalize(crops).contiguous(memory_format=torch.channels_last)
    sizes = [batch] * (people // batch) + [people % batch] * (people % batch > 0)

    @torch.inference_mode()
    def run() -> None:
        for size in sizes * (2 if pose.flip_test else 1):
            pose.model(x[:size])

    return run


def run(table: Table, args: argparse.Namespace, pose: PoseEstimator, files: tuple[Any, Any], threads: int) -> None:
    set_threads(threads)
    paths, boxes = files
    competitors: dict[str, Any] = {
        "stream": lambda: np.concatenate([poses.keypoints for poses in pose.stream(paths, boxes)]),
        "per image": make_loop(pose, paths, boxes, each=False),
        "per person": make_loop(pose, paths, boxes, each=True),
    }
    expected = competitors["per person"]()
    for name, call in competitors.items():
        check(name, call(), expected, args.tolerance)
    competitors["network"] = make_network(pose, sum(map(len, boxes)), pose.batch_size)
    clock = Clock(pose.model)
    pose.model = clock
    shares: dict[str, list[float]] = {name: [] for name in competitors}
    for name, t in measure({name: clock.watch(call, shares[name]) for name, call in competitors.items()}, args).items():
        assert not isinstance(t, str)
        share = 100 * statistics.median(shares[name])
        times = {key: 1e3 * s / len(paths) for key, s in (("ms/image", t.median), ("p10", t.p10), ("p90", t.p90))}
        values = {"images/s": len(paths) / t.median, **times, "x stream": t.ratio, "% network": share}
        table.add(model=pose.model_name, batch=pose.batch_size, threads=threads, competitor=name, **values)
    pose.model = clock.network


def main() -> None:
    parser = options(__doc__, compiled=False, dtypes=["float32"])
    parser.add_argument("--images", type=int, metavar="N", help="files (default: 32; quick: 16)")
    parser.add_argument("--people", type=int, default=4, metavar="N", help="boxes per file (default: %(default)s)")
    parser.add_argument("--flip-test", action="store_true", help="average with the mirrored crop")
    args = parse(parser)
    args.images = args.images or (16 if args.quick else 32)
    if args.images < 1 or args.people < 1:
        parser.error(f"--images and --people must be at least 1, got {args.images} and {args.people}")
    table = Table(args, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        files = make_images(Path(folder), args.images, args.people)
        for batch, threads in itertools.product(args.batch, args.threads):
            pose = PoseEstimator(batch_size=batch, detector="none", flip_test=args.flip_test, optimize=True)
            run(table, args, pose, files, threads)
    table.finish()


if __name__ == "__main__":
    main()
