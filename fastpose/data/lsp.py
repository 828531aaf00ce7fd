"""Leeds Sports Pose: S. Johnson, M. Everingham, "Clustered Pose and Nonlinear Appearance Models for Human Pose
Estimation", BMVC 2010. 2,000 images with one annotated person and 14 keypoints each.

The archive has `joints.mat` (3 x 14 x 2000: x, y, occluded) and `images/im0001.jpg` ... `im2000.jpg`. In the third row
1 means occluded; the position is given all the same, so every keypoint counts as labelled. (In LSPET it is the other
way round.) The first 1,000 images are for training, the others for testing. Boxes are made as for LSPET.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastpose.data.base import PoseData, Report
from fastpose.data.lspet import people_of_images, read_joints


def load_lsp(root: str | Path, split: str, limit: int = 0) -> PoseData:
    """Read the `split` ("train" or "test" (also "val"): 1,000 people each) of the LSP archive unpacked at `root`.

    limit: see `load_lspet`.

    Raises:
        FileNotFoundError: `joints.mat` or all images are missing. ValueError: unknown split or another `joints.mat`.
    """
    root = Path(root)
    if split not in ("train", "val", "test"):
        raise ValueError(f"LSP split must be 'train' or 'test', got {split!r}")
    ids = np.arange(1, 1001) if split == "train" else np.arange(1001, 2001)
    joints = read_joints(root / "joints.mat", (3, 14, 2000)).transpose(2, 1, 0)[ids - 1, :, :2]
    files = tuple(root / "images" / f"im{i:04d}.jpg" for i in ids)
    return people_of_images(files, joints, np.ones(joints.shape[:2], bool), Report(), limit)
