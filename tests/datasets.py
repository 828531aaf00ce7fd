"""Small made-up data sets on disk, and ways to break them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fastpose.skeletons import COCO17, CROWDPOSE14, MPII16

HEIGHT, WIDTH = 90, 120


def picture(path: Path, points: np.ndarray, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """An image with a coloured dot per keypoint, one colour per index."""
    colours = np.random.default_rng(seed).integers(40, 256, (64, 3))
    image = np.zeros((*size, 3), np.uint8)
    for person in points:
        for (x, y), colour in zip(person, colours, strict=False):
            cv2.circle(image, (round(float(x)), round(float(y))), 3, colour.tolist(), -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def coco_content(names: tuple[str, ...], images: int = 6, people: int = 2, seed: int = 0) -> dict[str, Any]:
    """Contents of an annotation file in COCO's format; image 1 has nobody, the others `people`."""
    rng = np.random.default_rng(seed)
    k = len(names)
    content: dict[str, Any] = {
        "images": [
            {"id": 10 * i + 10, "file_name": f"{i:03d}.png", "height": HEIGHT, "width": WIDTH} for i in range(images)
        ],
        "annotations": [],
        "categories": [{"id": 1, "name": "person", "keypoints": list(names), "skeleton": [[1, 2]]}],
    }
    for i in range(images):
        for _ in range(people if i != 1 else 0):
            corner, side = rng.uniform(5, 20, 2), rng.uniform(40, 60, 2)
            points = corner + rng.uniform(0.1, 0.9, (k, 2)) * side
            flags = rng.choice([0, 1, 2], (k, 1), p=[0.1, 0.2, 0.7])
            flags[0] = 2
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 * i + 10,
                    "category_id": 1,
                    "keypoints": np.round(np.concatenate([points * (flags > 0), flags], 1), 2).reshape(-1).tolist(),
                    "num_keypoints": int((flags > 0).sum()),
                    "bbox": np.round(np.concatenate([corner, side]), 2).tolist(),
                    "area": round(float(side.prod()) * 0.6, 2),
                    "iscrowd": 0,
                }
            )
    return content


def write_coco(folder: Path, content: dict[str, Any], annotation_file: str, images: str, seed: int = 0) -> Path:
    """Write annotations and pictures below `folder`; returns it."""
    for entry in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        k = len(own[0]["keypoints"]) // 3 if own else 1
        points = np.array([a["keypoints"] for a in own], float).reshape(-1, k, 3)[..., :2]
        picture(folder / images / entry["file_name"], points, seed)
    (folder / annotation_file).parent.mkdir(parents=True, exist_ok=True)
    (folder / annotation_file).write_text(json.dumps(content))
    return folder


def write_standard_coco(folder: Path, **options: Any) -> dict[str, Any]:
    """COCO's layout, split "val"."""
    content = coco_content(COCO17.names, **options)
    write_coco(folder, content, "annotations/person_keypoints_val2017.json", "val2017")
    return content


def write_crowdpose(folder: Path, images: int = 9) -> dict[str, Any]:
    """CrowdPose's layout, split "val"; crowd indices 0, 0.1, ..."""
    content = coco_content(CROWDPOSE14.names, images)
    for i, entry in enumerate(content["images"]):
        entry["crowdIndex"] = i / 10
    for annotation in content["annotations"]:
        del annotation["area"]
    write_coco(folder, content, "json/crowdpose_val.json", "images")
    return content


def mpii_people(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joints [N, 16, 2] counted from 1, labelled [N, 16], head boxes [N, 4]."""
    rng = np.random.default_rng(seed)
    joints = np.round(rng.uniform(15, 80, (count, 16, 2)), 1)
    labelled = rng.random((count, 16)) < 0.9
    heads = np.concatenate([joints[:, 9] - 5, joints[:, 9] + [7, 9]], axis=1)
    return joints, labelled, heads


def write_mpii(folder: Path, count: int = 6, split: str = "valid") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The HRNet repository's layout, with head boxes for "valid"."""
    joints, labelled, heads = mpii_people(count)
    entries = [
        {
            "image": f"{i:05d}.png",
            "center": [60.0 + i, 45.0],
            "scale": 0.4,
            "joints": np.where(labelled[i][:, None], joints[i], -1).tolist(),
            "joints_vis": labelled[i].astype(int).tolist(),
        }
        for i in range(count)
    ]
    (folder / "annot").mkdir(parents=True, exist_ok=True)
    (folder / "annot" / f"{split}.json").write_text(json.dumps(entries))
    for i in range(count):
        picture(folder / "images" / f"{i:05d}.png", joints[i : i + 1] - 1)
    if split == "valid":
        from scipy.io import savemat

        savemat(
            folder / "annot" / "gt_valid.mat",
            {
                "pos_gt_src": joints.transpose(1, 2, 0),
                "jnt_missing": 1 - labelled.T.astype(float),
                "headboxes_src": heads.reshape(count, 2, 2).transpose(1, 2, 0),
            },
        )
    return joints, labelled, heads


def write_mpii_official(
    folder: Path, count: int = 9, odd: dict[int, dict[str, Any]] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The official .mat: `count` training images with one person, then one without position, and a test image.

    odd: fields of people by image.
    """
    from scipy.io import savemat

    joints, labelled, heads = mpii_people(count)
    records = []
    for i in range(count):
        points = [
            {"x": joints[i, k, 0], "y": joints[i, k, 1], "id": k, "is_visible": 1.0}
            for k in range(16)
            if labelled[i, k]
        ]
        person = dict(zip(("x1", "y1", "x2", "y2"), heads[i], strict=True))
        person |= {"scale": 0.4, "objpos": {"x": 60.0, "y": 45.0}, "annopoints": {"point": _struct(points)}}
        person |= (odd or {}).get(i, {})
        records.append({"image": {"name": f"{i:05d}.png"}, "annorect": _struct([person])})
        picture(folder / "images" / f"{i:05d}.png", joints[i : i + 1] - 1)
    records.append({"image": {"name": "00000.png"}, "annorect": _struct([{"scale": 1.0}])})
    records.append({"image": {"name": "test.png"}, "annorect": np.zeros((0, 0))})
    train = np.array([1] * (count + 1) + [0])
    content = {"annolist": _struct(records), "img_train": train, "version": "12"}
    savemat(folder / "mpii_human_pose_v1_u12_1.mat", {"RELEASE": content})
    assert set(MPII16.names) >= {"pelvis", "thorax"}
    return joints, labelled, heads


def _struct(records: list[dict[str, Any]]) -> np.ndarray:
    """A MATLAB struct array."""
    array = np.empty((1, len(records)), dtype=[(name, object) for name in records[0]])
    for i, record in enumerate(records):
        array[0, i] = tuple(record.values())
    return array
