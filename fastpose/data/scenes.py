"""Whole images with several people, for training bottom-up networks; and mosaics, where such images are scarce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastpose.data.base import Array, PoseData
from fastpose.data.coco import load_coco_format
from fastpose.data.crops import Augmentation, Change, CropStore, DecodedStore, change_colours, reduce
from fastpose.files import write_json
from fastpose.geometry import apply_affine, crop_matrix, warp_crop
from fastpose.images import write_image
from fastpose.skeletons import Skeleton, skeleton_to_dict


@dataclass(frozen=True)
class Scene:
    """An image uint8 [H, W, 3] RGB with N people: keypoints float32 [N, K, 2] in pixels, labelled bool [N, K].

    ignored: float32 [M, 4], boxes xyxy of crowds and of people without labelled keypoints, unless there is `hidden`:
    uint8 [H, W], 255 within their outlines.
    """

    image: Array
    keypoints: Array
    labelled: Array
    ignored: Array
    hidden: Array | None = None


class Scenes(Protocol):
    """Where scenes come from: `index` counts on from epoch to epoch, `rng` is the sample's own."""

    @property
    def skeleton(self) -> Skeleton: ...
    def __len__(self) -> int: ...
    def scene(self, index: int, rng: np.random.Generator) -> Scene: ...


class SceneStore(DecodedStore[Scene]):
    """The images of a data set on which somebody is annotated, each with everybody on it.

    That may be nobody with a labelled keypoint: as in HigherHRNet's code there is something to learn from the
    background too. Decoded images are kept with a shorter side of at most 1.5 `side` pixels, which is enough for a
    network's input of that side and crops of down to 0.67 of it.

    Raises:
        ValueError: the data set does not say who else is on its images, or nobody has a labelled keypoint.
    """

    def __init__(self, data: PoseData, side: int, memory: float = math.inf, quiet: bool = True) -> None:
        if data.annotated is None:
            raise ValueError("scenes need a data set with everybody annotated on its images, in COCO's format")
        self.side, self.annotated = side, data.annotated
        people = self.annotated.people
        self.unknown = people.ignored | ~people.visible.any(1)
        if self.unknown.all():
            raise ValueError("nobody in the data set has a labelled keypoint")
        self.indices = np.unique(people.image)
        super().__init__(data, len(self.indices), memory, quiet)

    @property
    def skeleton(self) -> Skeleton:
        return self.data.skeleton

    def scene(self, index: int, rng: np.random.Generator) -> Scene:
        return self.get(index % len(self))

    @staticmethod
    def _bytes(item: Scene) -> int:
        return item.image.nbytes + (0 if item.hidden is None else item.hidden.nbytes)

    def _load(self, i: int) -> Scene:
        annotated, at = self.annotated, int(self.indices[i])
        people, image = annotated.people, annotated.read(at)
        here = people.image == at
        # also those who are not among the people to estimate, for want of a box on the image
        keypoints, labelled = people.keypoints[here & ~self.unknown], people.visible[here & ~self.unknown]
        ignored, hidden = np.zeros((0, 4)), None
        code = annotated.hidden[at] if annotated.hidden else None
        if code is not None and tuple(code["size"]) == image.shape[:2]:
            from pycocotools import mask

            hidden = np.ascontiguousarray(255 * mask.decode(code))
        else:
            x, y, width, height = people.boxes[here & self.unknown].T
            ignored = np.stack([x, y, x + width, y + height], axis=1)
        image, ratio = reduce(image, 1.5 * self.side / min(image.shape[:2]))
        if hidden is not None:
            hidden = cv2.resize(hidden, image.shape[1::-1], interpolation=cv2.INTER_AREA)
        return Scene(
            np.ascontiguousarray(image),
            ((keypoints + 0.5) * ratio - 0.5).astype(np.float32),
            labelled,
            ((ignored + 0.5) * np.tile(ratio, 2) - 0.5).astype(np.float32),
            hidden,
        )


class Mosaics:
    """Scenes of one to `people` people of a data set, each in a cell of a grid with their surroundings.

    Scene number i shows person i and others at random, so that an epoch of ``len`` scenes has everybody. Grids have at
    most twice as many rows as columns or the other way round; where its lines lie and how large people are in their
    cells varies. Nobody hides another person, which only real images teach.

    Args:
        store: the people. size: (height, width) of the scenes.
    """

    def __init__(self, store: CropStore, size: tuple[int, int], people: int) -> None:
        if people < 1:
            raise ValueError(f"a mosaic needs at least one person, got {people}")
        self.store, self.size = store, size
        self.grids = [
            (rows, columns)
            for rows in range(1, people + 1)
            for columns in range(1, people // rows + 1)
            if max(rows, columns) <= 2 * min(rows, columns)
        ]

    @property
    def skeleton(self) -> Skeleton:
        return self.store.data.skeleton

    def __len__(self) -> int:
        return len(self.store)

    def scene(self, index: int, rng: np.random.Generator) -> Scene:
        rows, columns = self.grids[int(rng.integers(len(self.grids)))]
        lines = [_grid_lines(n, parts, rng) for n, parts in zip(self.size, (rows, columns), strict=True)]
        chosen = [index % len(self), *rng.integers(len(self), size=rows * columns - 1).tolist()]
        rng.shuffle(chosen)
        image = np.zeros((*self.size, 3), np.uint8)
        keypoints, labelled = [], []
        for cell, i in enumerate(chosen):
            person = self.store.get(i)
            (top, bottom), (left, right) = (at[c : c + 2] for at, c in zip(lines, divmod(cell, columns), strict=True))
            size = (bottom - top, right - left)
            # the longer side of the person fits, with some room
            matrix = crop_matrix(person.box, size, self.store.padding, scale=float(rng.uniform(1.0, 1.5)))
            image[top:bottom, left:right] = warp_crop(person.image, matrix, size)
            points = apply_affine(matrix, person.keypoints)
            inside = (points > -0.5).all(1) & (points < [size[1] - 0.5, size[0] - 0.5]).all(1)
            keypoints.append(points + [left, top])
            labelled.append(person.labelled & inside)
        people = np.array(keypoints, np.float32), np.array(labelled, bool)
        return Scene(image, *people, np.zeros((0, 4), np.float32))


def _grid_lines(length: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Pixels at which `parts` cells begin and end; inner lines vary by 15 % of a cell."""
    inner = (np.arange(1, parts) + rng.uniform(-0.15, 0.15, parts - 1)) * length / parts
    return [0, *np.round(inner).astype(int).tolist(), length]


SceneSample = tuple[Tensor, Tensor, Tensor, Tensor]


class SceneDataset(Dataset[SceneSample]):
    """Samples (image uint8 [3, h, w], keypoints float32 [N, K, 2] in its pixels, valid bool [N, K], mask bool [h, w]).

    One affine map takes the whole scene to the input: the square on its shorter side, or what `augmentation` makes of
    it, with HigherHRNet's convention (see `fastpose.geometry.whole_image_matrix`). The mask is false where
    `Scene.hidden` is set, as in HigherHRNet's code; without outlines in the boxes of `Scene.ignored`, but then true
    around the labelled keypoints of others. It is true beyond the image.

    A sample depends on (`seed`, index) only, as in `CropDataset`.
    """

    AROUND = 24  # pixels around keypoints in which there is something to learn: three sigma of two cells of four pixels

    def __init__(
        self,
        scenes: Scenes,
        size: tuple[int, int],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.scenes, self.size, self.augmentation, self.seed = scenes, size, augmentation, seed

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> SceneSample:
        rng = np.random.default_rng((self.seed, index))
        scene, skeleton = self.scenes.scene(index, rng), self.scenes.skeleton
        change = Change() if self.augmentation is None else self.augmentation.draw(rng)
        height, width = scene.image.shape[:2]
        margin = (np.array([width, height]) - min(width, height)) / 2
        box = np.concatenate([margin, [width, height] - margin])
        matrix = change.matrix(box, self.size, 1.0, "hrnet")
        image = warp_crop(scene.image, matrix, self.size)
        if self.augmentation is not None:
            image = change_colours(image, self.augmentation, rng)
        points, valid = apply_affine(matrix, scene.keypoints.reshape(-1, 2)), scene.labelled
        points = points.reshape(scene.keypoints.shape)
        if change.mirror:
            points, valid = points[:, skeleton.flip_indices], valid[:, skeleton.flip_indices]
        valid = valid & (points >= 0).all(2) & (points < [self.size[1], self.size[0]]).all(2)
        mask = self._mask(scene, matrix, points[valid])
        return (
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            torch.from_numpy(points.astype(np.float32)),
            torch.from_numpy(valid),
            torch.from_numpy(mask),
        )

    def _mask(self, scene: Scene, matrix: Array, points: Array) -> Array:
        if scene.hidden is not None:
            return np.asarray(cv2.warpAffine(scene.hidden, matrix, self.size[::-1], flags=cv2.INTER_LINEAR) < 128)
        mask = np.ones(self.size, np.uint8)
        for corners in apply_affine(matrix, _corners(scene.ignored)):
            cv2.fillConvexPoly(mask, np.round(np.clip(corners, -1e4, 1e4)).astype(np.int32), 0)
        if len(scene.ignored):
            for x, y in np.round(points).astype(int).tolist():
                cv2.circle(mask, (x, y), self.AROUND, 1, -1)
        return mask.astype(bool)


def _corners(boxes: Array) -> Array:
    """Corners [N, 4, 2] of boxes xyxy [N, 4]."""
    return boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]


def collate_scenes(samples: Sequence[SceneSample]) -> SceneSample:
    """A batch: images [B, 3, h, w], keypoints [B, N, K, 2] and valid [B, N, K] with N the greatest number of people."""
    images, points, valid, masks = zip(*samples, strict=True)
    people, k = max(len(p) for p in points), points[0].shape[1]
    all_points, all_valid = torch.zeros(len(samples), people, k, 2), torch.zeros(len(samples), people, k).bool()
    for b, (p, v) in enumerate(zip(points, valid, strict=True)):
        all_points[b, : len(p)], all_valid[b, : len(v)] = p, v
    return torch.stack(images), all_points, all_valid, torch.stack(masks)


def write_mosaics(mosaics: Mosaics, folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` mosaics below `folder` as a data set for ``--dataset custom --split all``, always the same ones."""
    skeleton = mosaics.skeleton
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        scene = mosaics.scene(i, np.random.default_rng((seed, i)))
        height, width = scene.image.shape[:2]
        name = f"{i:06d}.png"
        write_image(folder / "images" / name, scene.image)
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        for points, labelled in zip(scene.keypoints, scene.labelled, strict=True):
            triples = np.concatenate([points * labelled[:, None], 2 * labelled[:, None]], axis=1).round(2)
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0}
            annotations.append({**entry, "keypoints": triples.reshape(-1).tolist()})
    links = [[a + 1, b + 1] for a, b in skeleton.links]
    category = {"id": 1, "name": "person", "keypoints": list(skeleton.names), "skeleton": links}
    content = {"images": images, "annotations": annotations, "categories": [category]}
    write_json(folder / "skeleton.json", skeleton_to_dict(skeleton))
    write_json(folder / "annotations.json", content)  # last: with them the data set is complete


def load_mosaics(folder: Path, skeleton: Skeleton) -> PoseData:
    """What `write_mosaics` wrote."""
    return load_coco_format(folder / "annotations.json", [folder / "images"], skeleton)
