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

import numpy as np

from fastpose.data.base import Array, PoseData, boxes_of_keypoints
from fastpose.skeletons import LSP14


def load_lspet(root: str | Path, split: str) -> PoseData:
    """Read the `split` ("train": 8,500 people, "val": 500) of the LSPET archive unpacked at `root`.

    The split travels with the package: no two near-duplicate photos lie on different sides of it. The remaining 1,000
    images are a reserve for independent tests and belong to no split.

    Raises:
        FileNotFoundError: `joints.mat` or an image is missing; names the first missing file.
        ValueError: unknown split, an unreadable image, or a `joints.mat` that is not LSPET's.
    """
    import cv2

    root = Path(root)
    if split not in ("train", "val"):
        raise ValueError(f"LSPET split must be 'train' or 'val', got {split!r}")
    lists = json.loads(resources.files("fastpose.data").joinpath("lspet_split.json").read_text())
    ids = np.array(lists["val"])
    if split == "train":
        ids = np.setdiff1d(np.arange(1, 10001), np.array(lists["val"] + lists["reserved"]))
    joints = _read_joints(root / "joints.mat")[ids - 1]
    keypoints, labelled = joints[..., :2].astype(np.float32), joints[..., 2] > 0
    images = tuple(root / "images" / f"im{i:05d}.jpg" for i in ids)
    sizes = np.empty((len(ids), 2), np.float32)
    for i, path in enumerate(images):
        if not path.is_file():
            raise FileNotFoundError(f"LSPET image {path} does not exist; expected images/im00001.jpg ... under {root}")
        image = cv2.imread(str(path))
        if image is None:
            raise ValueError(f"LSPET image {path} cannot be decoded")
        sizes[i] = image.shape[1], image.shape[0]
    return PoseData(LSP14, images, keypoints, labelled, boxes_of_keypoints(keypoints, labelled, 0.15, sizes))


def _read_joints(path: Path) -> Array:
    """float64 [10000, 14, 3]."""
    if not path.is_file():
        raise FileNotFoundError(f"LSPET annotations {path} do not exist; expected the archive's joints.mat")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("reading joints.mat needs SciPy: pip install 'fastpose[train]'") from error
    content = loadmat(path)
    joints = content.get("joints")
    if joints is None or joints.shape != (14, 3, 10000):
        got = "no such variable" if joints is None else list(joints.shape)
        raise ValueError(f"{path}: expected the variable 'joints' of shape [14, 3, 10000], got {got}")
    return np.asarray(joints.transpose(2, 0, 1), np.float64)
