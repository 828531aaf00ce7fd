"""MPII Human Pose: M. Andriluka et al., "2D Human Pose Estimation: New Benchmark and State of the Art Analysis",
CVPR 2014. 16 keypoints; scored with PCKh.

Two formats are read. The one of the HRNet repository: ``annot/train.json``, ``valid.json``, ``trainval.json`` and, for
scoring, ``annot/gt_valid.mat`` with the head boxes; the published numbers on "valid" are from this. And the official
``mpii_human_pose_v1_u12_1.mat``, which has the head boxes too but no validation split: there "valid" is every eighth
image of the training images and "train" the others, our own choice.

MPII counts pixels from 1; here the first one is 0. A person has no box but a position and a scale (height / 200): the
box is a square of 200 scales, centred 15 scales below the position so that the feet are inside, as in HRNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastpose.data.base import MISSING, NOT_FINITE, Array, PoseData, Report
from fastpose.data.coco import is_number, read_json
from fastpose.data.lspet import loadmat
from fastpose.metrics import head_sizes
from fastpose.skeletons import MPII16

OFFICIAL = "mpii_human_pose_v1_u12_1.mat"
SPLITS = ("train", "valid", "trainval")


def load_mpii(
    root: str | Path, split: str, *, annotations: str | Path | None = None, images: str | Path | None = None
) -> PoseData:
    """MPII: `root` has ``images/`` and ``annot/valid.json`` (and ``annot/gt_valid.mat``), or the official .mat file.

    Args:
        split: "train", "valid" (also "val") or "trainval". annotations: another .json or .mat file; head boxes of a
            json file are read from ``gt_<its name>.mat`` beside it. images: another folder of images.

    Raises:
        FileNotFoundError: no annotations, or none of their images. ValueError: another structure.
        ImportError: SciPy is missing.
    """
    root = Path(root)
    split = "valid" if split == "val" else split
    if split not in SPLITS and annotations is None:
        raise ValueError(f"MPII split must be one of {', '.join(SPLITS)}, got {split!r}")
    places = [Path(annotations)] if annotations else [root / "annot" / f"{split}.json", root / OFFICIAL]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"MPII annotations do not exist: looked for {' and '.join(str(p) for p in places)}")
    report = Report()
    rows = list(_from_json(path, report) if path.suffix == ".json" else _from_mat(path, split, report))
    if not rows:
        raise ValueError(f"{path}: no usable person; {report.to_text() or 'the file is empty'}")
    folder = Path(images) if images else root / "images"
    names, centres, scales, joints, labelled, heads = (list(column) for column in zip(*rows, strict=True))
    files = [folder / name for name in names]
    exists = {f: f.is_file() for f in dict.fromkeys(files)}
    for f, there in exists.items():
        if not there:
            report.add(MISSING, f)
    if not any(exists.values()):
        raise FileNotFoundError(f"none of the {len(exists)} images of {path} exists, e.g. {files[0]}")
    scale = np.array(scales, np.float64)[:, None]
    # one pixel less: from counting from 1 to counting from 0
    centre = np.array(centres, np.float64) + np.concatenate([0 * scale, 15 * scale], axis=1) - 1
    data = PoseData(
        MPII16,
        tuple(files),
        (np.array(joints, np.float64) - 1).astype(np.float32),
        np.array(labelled, bool),
        np.concatenate([centre - 100 * scale, centre + 100 * scale], axis=1).astype(np.float32),
        head_sizes=head_sizes(np.array(heads, np.float64)),
        metric="PCKh@0.5",
        report=report,
    )
    return data.without_images(f for f, there in exists.items() if not there)


Row = tuple[
    str, Array, float, Array, Array, Array
]  # image, position, scale, joints [16, 2], labelled [16], head box [4]


def _from_json(path: Path, report: Report) -> Iterator[Row]:
    entries = read_json(path, "annotation file")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of people as the HRNet repository has them")
    truth = _ground_truth(path.with_name(f"gt_{path.stem}.mat"), len(entries))
    for i, entry in enumerate(entries):
        try:
            joints = np.array(entry["joints"], np.float64)
            labelled = np.array(entry["joints_vis"], np.float64) > 0
            centre, scale = np.array(entry["center"], np.float64), entry["scale"]
            right = joints.shape == (16, 2) and labelled.shape == (16,) and centre.shape == (2,)
            joints = np.where(labelled[:, None], joints, 0.0) if right else joints
            right = right and bool((np.abs(joints) < 1e6).all() and (np.abs(centre) < 1e6).all())
            right = right and isinstance(entry["image"], str) and is_number(scale) and scale < 1e4
        except (KeyError, TypeError, ValueError):
            right = False
        if not right:
            report.add("person without image, center, scale, joints [16][2] or joints_vis [16]", f"{path.name}[{i}]")
            continue
        if scale <= 0 or centre[0] < 0:
            report.add("person without position or scale (not estimated)", f"{path.name}[{i}]")
            continue
        head = np.full(4, np.nan)
        if truth is not None:
            joints, labelled, head = truth[0][i], truth[1][i], truth[2][i]
            broken = labelled & ~np.isfinite(joints).all(1)
            for j in np.flatnonzero(broken):
                report.add(NOT_FINITE, f"{path.name}[{i}] {MPII16.names[j]}")
            labelled = labelled & ~broken
            if not (np.isfinite(head).all() and (head[2:] != head[:2]).any()):
                report.add("head box without size (the person is not scored)", f"{path.name}[{i}]")
        elif not labelled.any():
            report.add("person without labelled keypoints", f"{path.name}[{i}]", wrong=False)
            continue
        yield entry["image"], centre, float(scale), joints, labelled, head


def _ground_truth(path: Path, people: int) -> tuple[Array, Array, Array] | None:
    """Joints [N, 16, 2] counted from 1, labelled [N, 16] and head boxes [N, 4] of ``gt_valid.mat``; None without it."""
    if not path.is_file():
        return None
    content = loadmat(path)
    try:
        joints, missing = content["pos_gt_src"], content["jnt_missing"]
        head = content["headboxes_src"]
    except KeyError as error:
        raise ValueError(f"{path}: expected the variables pos_gt_src, jnt_missing, headboxes_src; no {error}") from None
    if joints.shape != (16, 2, people) or missing.shape != (16, people) or head.shape != (2, 2, people):
        raise ValueError(
            f"{path}: expected pos_gt_src [16, 2, N], jnt_missing [16, N] and headboxes_src [2, 2, N] with "
            f"N = {people} people as in the json file, got {joints.shape}, {missing.shape}, {head.shape}"
        )
    boxes = head.astype(np.float64).transpose(2, 0, 1).reshape(people, 4)  # x1, y1, x2, y2
    return joints.astype(np.float64).transpose(2, 0, 1), missing.T == 0, boxes


def _from_mat(path: Path, split: str, report: Report) -> Iterator[Row]:
    content = loadmat(path)
    if "RELEASE" not in content:
        raise ValueError(f"{path}: expected the variable RELEASE of MPII's official annotations")
    release = next(iter(np.asarray(content["RELEASE"]).reshape(-1)), None)
    train, images = (np.asarray(getattr(release, name, [])).reshape(-1) for name in ("img_train", "annolist"))
    if not len(images) or len(train) != len(images):
        raise ValueError(
            f"{path}: expected a struct RELEASE with as many img_train as annolist, got {len(train)} and {len(images)}"
        )
    number = -1
    for is_train, image in zip(train == 1, images, strict=True):
        if not is_train:
            continue  # test images have no keypoints
        number += 1
        if split != "trainval" and (number % 8 == 0) != (split == "valid"):
            continue
        name = str(_field(_field(image, "image"), "name", ""))
        for j, person in enumerate(np.asarray(getattr(image, "annorect", [])).reshape(-1)):
            try:
                row = _mat_person(person)
            except (TypeError, ValueError):
                report.add("person whose numbers cannot be read", f"{name} person {j + 1}")
                continue
            if row is None:
                report.add("person without keypoints, position or scale", f"{name} person {j + 1}", wrong=False)
            else:
                yield (name, *row)


def _field(record: Any, name: str, default: Any = None) -> Any:
    """A field of a MATLAB struct as scalar, array or struct; `default` if it is absent or empty."""
    value = getattr(record, name, None)
    if value is None or np.size(value) == 0:
        return default
    value = np.asarray(value)
    return value.reshape(-1)[0] if value.size == 1 else value


def _mat_person(person: Any) -> tuple[Array, float, Array, Array, Array] | None:
    points = getattr(_field(person, "annopoints"), "point", None)
    position, scale = _field(person, "objpos"), _field(person, "scale")
    if points is None or position is None or scale is None or np.size(points) == 0:
        return None
    joints, labelled = np.zeros((16, 2)), np.zeros(16, bool)
    for point in np.asarray(points).reshape(-1):
        k = int(_field(point, "id", -1))
        x, y = _field(point, "x"), _field(point, "y")
        if 0 <= k < 16 and x is not None and y is not None:
            joints[k], labelled[k] = (float(x), float(y)), True
    if not labelled.any() or not float(scale) > 0:
        return None
    corners = [_field(person, name) for name in ("x1", "y1", "x2", "y2")]
    head = np.array([np.nan if c is None else float(c) for c in corners])
    centre = np.array([float(_field(position, "x")), float(_field(position, "y"))])
    if not (np.isfinite(joints).all() and np.isfinite(centre).all() and np.isfinite(float(scale))):
        raise ValueError("not finite")
    return centre, float(scale), joints, labelled, head
