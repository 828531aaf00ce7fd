"""Leeds Sports Pose Extended: S. Johnson, M. Everingham, "Learning Effective Human Pose Estimation from Inaccurate
Annotation", CVPR 2011. 10,000 images with one annotated person and 14 keypoints each.

The archive has `joints.mat` (14 x 3 x 10000: x, y, labelled) and `images/im00001.jpg` ... `im10000.jpg`. In LSPET the
third row is 1 for a labelled joint and 0 for one that is occluded or cut off; the latter's coordinates mean nothing.
The data set has no boxes: they are the labelled keypoints' extent grown by 15 % of its longer side, clipped.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fastpose.data.base import (
    KEYPOINT_MARGIN,
    MISSING,
    NO_SIZE,
    NOT_FINITE,
    UNREADABLE,
    Array,
    PoseData,
    Report,
    boxes_of_keypoints,
)
from fastpose.images import ImageError, read_image
from fastpose.skeletons import LSP14


def load_lspet(root: str | Path, split: str, limit: int = 0) -> PoseData:
    """Read the `split` ("train": 8,500 people, "val": 500) of the LSPET archive unpacked at `root`.

    The split travels with the package: no two near-duplicate photos lie on different sides of it. The remaining 1,000
    images are a reserve for independent tests and belong to no split. `limit`: images after the first so many that can
    be used are not looked at (0: all are).

    Raises:
        FileNotFoundError: `joints.mat` or all images are missing.
        ValueError: unknown split, or a `joints.mat` that is not LSPET's.
    """
    root = Path(root)
    if split not in ("train", "val"):
        raise ValueError(f"LSPET split must be 'train' or 'val', got {split!r}")
    lists = json.loads(resources.files("fastpose.data").joinpath("lspet_split.json").read_text())
    ids = np.array(lists["val"])
    if split == "train":
        ids = np.setdiff1d(np.arange(1, 10001), np.array(lists["val"] + lists["reserved"]))
    joints = read_joints(root / "joints.mat", (14, 3, 10000)).transpose(2, 0, 1)[ids - 1]
    files = tuple(root / "images" / f"im{i:05d}.jpg" for i in ids)
    report = Report()
    for i in np.flatnonzero(~np.isin(joints[..., 2], (0, 1)).all(1)):
        report.add("keypoint flag other than 0 or 1 (above 0 is read as labelled)", files[i].name)
    return people_of_images(files, joints[..., :2], joints[..., 2] > 0, report, limit)


def people_of_images(
    files: tuple[Path, ...], keypoints: Array, labelled: Array, report: Report, limit: int = 0
) -> PoseData:
    """One person per image with a box around their keypoints; what cannot be used is reported and left out.

    Args:
        keypoints: float64 [N, 14, 2] pixels; labelled: bool [N, 14]; report: added to; limit: of images with somebody
            (0: all).

    Raises:
        FileNotFoundError: no image can be read. ValueError: nobody is on them.
    """
    with np.errstate(over="ignore"):
        keypoints = keypoints.astype(np.float32)
    broken = labelled & ~np.isfinite(keypoints).all(-1)
    for i, j in np.argwhere(broken):
        report.add(NOT_FINITE, f"{files[i].name} {LSP14.names[j]}")
    labelled = labelled & ~broken
    good: list[int] = []
    sizes = np.zeros((len(files), 2), np.float32)
    for i, path in enumerate(files):
        if 0 < limit <= len(good):
            break
        try:
            image = read_image(path)
        except ImageError as error:
            report.add(UNREADABLE if path.exists() else MISSING, error)
            continue
        sizes[i] = image.shape[1], image.shape[0]
        if labelled[i].any():
            good.append(i)
        else:
            report.add("person without labelled keypoints", path.name, wrong=False)
    if not sizes.any():
        raise FileNotFoundError(f"none of the {len(files)} images can be read, e.g. {files[0]}")
    boxes = boxes_of_keypoints(keypoints, labelled, KEYPOINT_MARGIN, sizes)
    for i in [i for i in good if not np.ptp(keypoints[i][labelled[i]], axis=0).any()]:
        report.add(NO_SIZE, files[i].name)
        good.remove(i)
    if not good:
        raise ValueError(f"nobody to estimate on {len(files)} images, e.g. {files[0]}: {report.to_text()}")
    return PoseData(LSP14, files, keypoints, labelled, boxes, report=report).take(np.array(good))


def read_joints(path: Path, shape: tuple[int, int, int]) -> Array:
    """The variable ``joints`` of a MATLAB file, float64 of the given shape."""
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path} do not exist; expected the archive's joints.mat")
    joints = loadmat(path).get("joints")
    if joints is None or joints.shape != shape:
        got = "no such variable" if joints is None else list(joints.shape)
        raise ValueError(f"{path}: expected the variable 'joints' of shape {list(shape)}, got {got}")
    return np.asarray(joints, np.float64)


def loadmat(path: Path) -> Any:
    """Variables of a MATLAB file by name, structs as objects; ImportError without SciPy, ValueError if unreadable."""
    try:
        from scipy import io
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs SciPy: pip install scipy") from error
    try:
        return io.loadmat(path, struct_as_record=False)
    except Exception as error:  # whatever the damage happens to cause in the reader
        raise ValueError(f"{path} is not a MATLAB file that SciPy can read: {error}") from None
