"""Decoding of heatmaps, and grouping by associative embedding, on the CPU.

Decoding: 17 heatmaps of 64x48 for each of 1, 32 and 256 crops, one bump and a little noise per map. Competitors:

    fastpose      the codec's `decode`, all maps at once
    numpy loop    one map after the other, smoothed by cv2.GaussianBlur, as evaluation scripts have it

Grouping: 1, 5 and 30 people whose 17 keypoints are found four times out of five, on maps of 128x128 and 512x704 cells
with two tags each (the flip test), including the search for missing keypoints. Competitors:

    compiled      fastpose.grouping.group_people with fastpose._native; one thread, whatever --threads says
    numpy         the same without it

Run: python benchmarks/bench_codecs.py [--quick] [--threads 1,2] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from _timing import Table, check, measure, options, parse, set_threads

from fastpose import grouping
from fastpose.codecs import DarkHeatmapCodec, HeatmapCodec, MSRAHeatmapCodec, SoftmaxHeatmapCodec, UDPHeatmapCodec

COLUMNS: dict[str, tuple[int, int | None]] = {
    "task": (8, None),
    "size": (8, None),
    "items": (6, 0),
    "threads": (7, 0),
    "competitor": (12, None),
    "ms": (10, 3),
    "p10": (10, 3),
    "p90": (10, 3),
    "x first": (9, 2),
    "us/item": (9, 1),
}
K = 17


def make_heatmaps(crops: int, height: int = 64, width: int = 48) -> torch.Tensor:
    """Maps [crops, 17, 64, 48] with a maximum inside."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    centres = rng.uniform(8, [width - 8, height - 8], (crops, K, 2))[..., None, None]
    maps = np.exp(-((x - centres[:, :, 0]) ** 2 + (y - centres[:, :, 1]) ** 2) / 8)
    return torch.from_numpy(maps + rng.uniform(0, 0.01, maps.shape)).float()


def decode_in_a_loop(codec: HeatmapCodec, heatmaps: Any) -> Any:
    """Keypoints [B, 17, 2] in crop pixels; maxima are taken to be away from the border."""
    points = np.zeros((*heatmaps.shape[:2], 2))
    height, width = heatmaps.shape[2:]
    for b, k in np.ndindex(heatmaps.shape[:2]):
        h = heatmaps[b, k]
        y, x = np.unravel_index(np.argmax(h), h.shape)
        if isinstance(codec, MSRAHeatmapCodec):
            step = 0.25 * np.sign([h[y, x + 1] - h[y, x - 1], h[y + 1, x] - h[y - 1, x]])
            points[b, k] = (np.array([x, y]) + step) * codec.stride
            continue
        assert isinstance(codec, (DarkHeatmapCodec, UDPHeatmapCodec))
        border = codec.kernel // 2
        smooth = cv2.GaussianBlur(np.pad(h, border), (codec.kernel, codec.kernel), 0)[border:-border, border:-border]
        smooth *= h.max() / smooth.max()
        if isinstance(codec, DarkHeatmapCodec):
            f, n, scale = np.log(np.maximum(smooth, 1e-10)), 2, np.array([codec.stride, codec.stride])
            mixed = (f[y + 1, x + 1] - f[y - 1, x + 1] - f[y + 1, x - 1] + f[y - 1, x - 1]) / 4
        else:
            f, n, scale = np.log(np.clip(smooth, 1e-3, 50)), 1, np.array(codec.pixels_per_cell(height, width))
            cross = f[y, x + 1] + f[y + 1, x] + f[y, x - 1] + f[y - 1, x]
            mixed = (f[y + 1, x + 1] + f[y - 1, x - 1] + 2 * f[y, x] - cross) / 2
        gradient = np.array([f[y, x + 1] - f[y, x - 1], f[y + 1, x] - f[y - 1, x]]) / 2
        xx = (f[y, x + n] - 2 * f[y, x] + f[y, x - n]) / n**2
        yy = (f[y + n, x] - 2 * f[y, x] + f[y - n, x]) / n**2
        points[b, k] = (np.array([x, y]) - np.linalg.solve([[xx, mixed], [mixed, yy]], gradient)) * scale
    return points


def make_scene(people: int, height: int, width: int) -> tuple[Any, Any]:
    """Heatmaps [17, H, W] and tags [2, 17, H, W]; bumps of one keypoint do not overlap."""
    rng = np.random.default_rng(0)
    heatmaps = rng.uniform(0, 0.02, (K, height, width)).astype(np.float32)
    tags = (rng.normal(size=(2, K, height, width)) * 0.3).astype(np.float32)
    side = max(height, width) // 11
    spots = np.stack(np.meshgrid(*(np.arange(side, n - side, side) for n in (width, height))), -1).reshape(-1, 2)
    y, x = np.mgrid[:height, :width]
    for k in range(K):
        for p, (cx, cy) in enumerate(rng.permutation(spots)[:people]):
            if k == 0 or rng.random() < 0.8:
                squared = (x - cx - rng.uniform(-0.4, 0.4)) ** 2 + (y - cy - rng.uniform(-0.4, 0.4)) ** 2
                bump = rng.uniform(0.3, 1) * np.exp(-squared / (side / 2))
                heatmaps[k] = np.maximum(heatmaps[k], bump)
                tags[:, k][:, squared < (side / 2) ** 2] = (2 * p + rng.normal(size=2) * 0.1)[:, None]
    return heatmaps, tags


def without_native(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        native, grouping._NATIVE = grouping._NATIVE, None
        try:
            return call()
        finally:
            grouping._NATIVE = native

    return run


def rows(table: Table, args: argparse.Namespace, case: dict[str, Any], competitors: dict[str, Any]) -> None:
    for name, t in measure(competitors, args).items():
        ms, p10, p90 = (seconds * 1e3 for seconds in t[:3])
        table.add(
            **case,
            competitor=name,
            ms=ms,
            p10=p10,
            p90=p90,
            **{"x first": t.ratio, "us/item": ms * 1e3 / case["items"]},
        )


def decoding(table: Table, args: argparse.Namespace, threads: int) -> None:
    for codec in (MSRAHeatmapCodec(), DarkHeatmapCodec(), UDPHeatmapCodec(), SoftmaxHeatmapCodec()):
        for crops in (1, 32) if args.quick else (1, 32, 256):
            heatmaps = make_heatmaps(crops)
            competitors = {"fastpose": lambda codec=codec, h=heatmaps: codec.decode(h)}
            if not isinstance(codec, SoftmaxHeatmapCodec):
                array = heatmaps.numpy()
                check(codec.type, codec.decode(heatmaps)[0], decode_in_a_loop(codec, array), 1e-5)
                competitors["numpy loop"] = lambda codec=codec, a=array: decode_in_a_loop(codec, a)
            rows(table, args, {"task": codec.type, "size": "64x48", "items": crops, "threads": threads}, competitors)


def grouping_people(table: Table, args: argparse.Namespace) -> None:
    for height, width in ((128, 128), (512, 704)):
        for people in (1, 5, 30):
            heatmaps, tags = make_scene(people, height, width)
            call = lambda h=heatmaps, t=tags: grouping.group_people(h, t)  # noqa: E731
            found, scores = call()
            assert len(found) == people, (len(found), people)
            expected = without_native(call)()
            check("keypoints", found, expected[0], 0)
            check("scores", scores, expected[1], args.tolerance)
            case = {"task": "group", "size": f"{height}x{width}", "items": people, "threads": 1}
            rows(table, args, case, {"compiled": call, "numpy": without_native(call)})


@torch.inference_mode()
def main() -> None:
    args = parse(options(__doc__, batch=False, compiled=False, dtypes=("float32",)))
    if grouping._NATIVE is None:
        raise SystemExit("nothing to compare: fastpose._native is not built or of another version")
    table = Table(args, COLUMNS)
    for threads in args.threads:
        set_threads(threads)
        decoding(table, args, threads)
    grouping_people(table, args)
    table.finish()


if __name__ == "__main__":
    main()
