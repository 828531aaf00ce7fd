"""Training crops: decoded people kept in memory, one affine warp per sample."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from fastpose.data.base import UNREADABLE, Array, PoseData
from fastpose.geometry import apply_affine, crop_matrix, warp_crop
from fastpose.images import ImageError
from fastpose.skeletons import Skeleton


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes. The defaults change nothing.

    Attributes:
        any_rotation: probability of a rotation drawn from all directions (-180 to 180 degrees).
        rotation_sd: standard deviation in degrees of the rotation otherwise.
        log_scale: the crop's size is multiplied by exp(u), u uniform in +- this.
        shift: displacement of the crop in x and y, uniform in +- this fraction of its width.
        mirror: probability of exchanging left and right.
        half_body: probability of cropping around the keypoints above or below the waist only.
        contrast: factor uniform in exp(+- this); gain: standard deviation of a factor per colour channel;
        brightness: uniform +- this, in grey levels; grey: probability of removing colour.
        erase: probability of covering one random rectangle with noise.
    """

    any_rotation: float = 0.0
    rotation_sd: float = 0.0
    log_scale: float = 0.0
    shift: float = 0.0
    mirror: float = 0.0
    half_body: float = 0.0
    contrast: float = 0.0
    gain: float = 0.0
    brightness: float = 0.0
    grey: float = 0.0
    erase: float = 0.0


@dataclass(frozen=True)
class _Person:
    image: Array  # uint8 [h, w, 3] RGB, the surroundings of the person
    keypoints: Array  # float32 [K, 2] in pixels of `image`
    labelled: Array  # bool [K]
    box: Array  # float32 [4] in pixels of `image`


class CropStore:
    """The decoded surroundings of every person, reduced to at most `side` pixels per padded box side.

    2.2 box sides are kept around each person, enough for every rotation, scale and shift. People are kept in memory up
    to `memory` bytes; the others are read from their files every time. Of an image that cannot be read the people are
    black crops without labels: it is reported in `data.report`, and if that happens later, on stderr.
    """

    REACH = 2.2

    def __init__(self, data: PoseData, padding: float, side: int, memory: float = math.inf) -> None:
        self.data = data
        self.padding = padding
        self.side = side
        self.people: list[_Person | None] = [None] * len(data)
        self.unreadable: set[Path] = set()
        for i in range(len(data)):
            if memory <= 0:
                break
            person = self.people[i] = self.person(i, announce=False)
            memory -= person.image.nbytes

    def __len__(self) -> int:
        return len(self.people)

    def person(self, i: int, announce: bool = True) -> _Person:
        """Person `i`, from memory or file."""
        known = self.people[i]
        if known is not None:
            return known
        try:
            return self._load(i)
        except ImageError as error:
            if self.data.images[i] not in self.unreadable:
                self.unreadable.add(self.data.images[i])
                self.data.report.add(UNREADABLE, error)
                if announce:
                    tqdm.write(f"fastpose: trained without {error}", file=sys.stderr)
        k = self.data.skeleton.num_keypoints
        box = np.array([0, 0, 8, 8], np.float32)
        return _Person(np.zeros((8, 8, 3), np.uint8), np.zeros((k, 2), np.float32), np.zeros(k, bool), box)

    def _load(self, i: int) -> _Person:
        image, side = self.data.read(i), self.side
        box = self.data.boxes[i].astype(np.float64)
        centre = (box[:2] + box[2:]) / 2
        extent = max(box[2] - box[0], box[3] - box[1], 1.0) * self.padding
        zoom = min(1.0, side / extent)
        half = self.REACH * extent / 2
        x1, y1 = np.maximum(np.floor(centre - half).astype(int), 0)
        x2, y2 = np.minimum(np.ceil(centre + half).astype(int) + 1, [image.shape[1], image.shape[0]])
        part = image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
        origin = np.array([x1, y1], np.float64)
        points, box = self.data.keypoints[i] - origin, box - np.tile(origin, 2)
        if zoom < 1:
            size = (max(1, round(part.shape[1] * zoom)), max(1, round(part.shape[0] * zoom)))
            ratio = np.array(size) / [part.shape[1], part.shape[0]]
            part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
            points = (points + 0.5) * ratio - 0.5
            box = (box + 0.5) * np.tile(ratio, 2) - 0.5
        labelled = self.data.labelled[i]
        return _Person(np.ascontiguousarray(part), points.astype(np.float32), labelled, box.astype(np.float32))


class CropDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples (crop uint8 [3, h, w], keypoints float32 [K, 2] in crop pixels, valid bool [K]).

    A keypoint is valid if it is labelled and inside the crop. Every sample is drawn with its own random generator,
    seeded by (`seed`, index); an index encodes epoch and person (`epoch * len(store) + person`), so that a sample
    depends neither on the number of workers nor on where training was resumed. `convention`: of the crops, see
    `fastpose.geometry.crop_matrix`.
    """

    def __init__(
        self,
        store: CropStore,
        size: tuple[int, int],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        convention: str = "fastpose",
    ) -> None:
        self.store = store
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        self.convention = convention

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        person_index = index % len(self)
        person = self.store.person(person_index)
        valid = person.labelled
        height, width = self.size
        a = self.augmentation
        if a is None:
            matrix = crop_matrix(person.box, self.size, self.store.padding, convention=self.convention)
            crop = warp_crop(person.image, matrix, self.size)
            mirror = False
        else:
            rng = np.random.default_rng((self.seed, index))
            mirror = bool(rng.random() < a.mirror)
            turn = rng.random() < a.any_rotation
            rotation = rng.uniform(-180, 180) if turn else rng.normal() * a.rotation_sd
            box = person.box
            if rng.random() < a.half_body:
                upper = rng.random() < 0.7
                box = half_body_box(person.keypoints, valid, self.store.data.skeleton, upper, box)
            matrix = crop_matrix(
                box,
                self.size,
                self.store.padding,
                rotation=rotation,
                scale=float(np.exp(rng.uniform(-a.log_scale, a.log_scale))),
                shift=(rng.uniform(-a.shift, a.shift), rng.uniform(-a.shift, a.shift)),
                mirror=mirror,
                convention=self.convention,
            )
            crop = _change_colours(warp_crop(person.image, matrix, self.size), a, rng)
        points = apply_affine(matrix, person.keypoints)
        if mirror:
            order = self.store.data.skeleton.flip_indices
            points, valid = points[order], valid[order]
        inside = (points > -0.5).all(1) & (points < [width - 0.5, height - 0.5]).all(1)
        chw = np.ascontiguousarray(crop.transpose(2, 0, 1))
        return torch.from_numpy(chw), torch.from_numpy(points.astype(np.float32)), torch.from_numpy(valid & inside)


def half_body_box(keypoints: Array, labelled: Array, skeleton: Skeleton, upper: bool, box: Array) -> Array:
    """Box around the labelled keypoints of one half of the body with a quarter of its longer side around them.

    Args:
        keypoints: [K, 2]; labelled: bool [K]; upper: which half; box: returned if that half has fewer than 4 labels.
    """
    half = np.zeros(skeleton.num_keypoints, bool)
    half[list(skeleton.upper_body)] = True
    points = keypoints[(half == upper) & labelled]
    if len(points) < 4:
        return box
    low, high = points.min(0), points.max(0)
    margin = 0.25 * max(float((high - low).max()), 1.0)
    return np.concatenate([low - margin, high + margin])


def _change_colours(crop: Array, a: Augmentation, rng: np.random.Generator) -> Array:
    gain = np.exp(rng.uniform(-a.contrast, a.contrast)) * (1 + a.gain * rng.normal(size=3))
    offset = 128 * (1 - gain.mean()) + rng.uniform(-a.brightness, a.brightness)
    # per channel: gain and offset as one affine colour transform, which saturates to uint8 in the same pass
    colour = np.diag(gain)
    if rng.random() < a.grey:
        colour = colour @ np.tile([0.299, 0.587, 0.114], (3, 1))
    crop = cv2.transform(crop, np.concatenate([colour, np.full((3, 1), offset)], axis=1))
    if rng.random() < a.erase:
        height, width = crop.shape[:2]
        h, w = int(height * rng.uniform(0.1, 0.35)), int(width * rng.uniform(0.1, 0.35))
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        crop[y : y + h, x : x + w] = rng.integers(0, 256, 3, dtype=np.uint8)
    return crop


class ResumableBatches(Sampler[list[int]]):
    """Index lists of the batches from `first_step` on: a new permutation per epoch, without its incomplete last batch.

    Of `world` processes the one numbered `rank` gets every `world`-th element of each batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if length < batch_size:
            raise ValueError(f"batch_size {batch_size} is larger than the data set ({length} people)")
        if batch_size % world != 0:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the number of processes, {world}")
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.first_step, self.rank, self.world = first_step, rank, world

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // self.batch_size
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            start = step % per_epoch * self.batch_size
            batch = order[start : start + self.batch_size][self.rank :: self.world]
            yield [int(epoch * self.length + i) for i in batch]
