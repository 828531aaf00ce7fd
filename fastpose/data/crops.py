"""Training crops: decoded people kept in memory, one affine warp per sample."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from fastpose.data.base import OUTSIDE, UNREADABLE, Array, PoseData
from fastpose.geometry import apply_affine, crop_matrix, warp_crop
from fastpose.images import ImageError
from fastpose.skeletons import Skeleton

T = TypeVar("T")


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes. The defaults change nothing.

    Attributes:
        any_rotation: probability of a rotation drawn from all directions (-180 to 180 degrees).
        rotation_sd: standard deviation in degrees of the rotation otherwise; rotation: it is uniform in +- this.
        log_scale: the crop's size is multiplied by exp(u), u uniform in +- this; scale: by a number uniform between
            these two. A person gets smaller in a larger crop.
        shift: displacement of the crop in x and y, uniform in +- this fraction of its width.
        mirror: probability of exchanging left and right.
        law: ``"uniform"``: rotation and scale are drawn as said; ``"hrnet"``: as in HRNet's code, where their ranges
            are those of normal distributions: in six cases of ten the rotation has the standard deviation `rotation`
            and is clipped at twice that, else it is 0; the standard deviation of the scale, around the middle of
            `scale`, is half that range, at whose ends it is clipped.
        half_body: probability of cropping around the keypoints above or below the waist only, of people with more than
            8 labelled keypoints; not for whole images.
        contrast: factor uniform in exp(+- this); gain: standard deviation of a factor per colour channel;
        brightness: uniform +- this, in grey levels; grey: probability of removing colour.
        erase: probability of covering one random rectangle with one random colour.
    """

    any_rotation: float = 0.0
    rotation_sd: float = 0.0
    rotation: float = 0.0
    log_scale: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    mirror: float = 0.0
    half_body: float = 0.0
    contrast: float = 0.0
    gain: float = 0.0
    brightness: float = 0.0
    grey: float = 0.0
    erase: float = 0.0
    law: str = "uniform"

    def __post_init__(self) -> None:
        for name in ("any_rotation", "mirror", "half_body", "grey", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability, between 0 and 1, got {getattr(self, name)}")
        for name in ("rotation_sd", "rotation", "log_scale", "shift", "contrast", "gain", "brightness"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augment.{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augment.scale must be two positive factors, the lesser first, got {list(self.scale)}")
        if self.rotation_sd and self.rotation:
            raise ValueError("augment: choose rotation_sd (normal) or rotation (uniform), not both")
        if self.law not in ("uniform", "hrnet"):
            raise ValueError(f"augment.law must be 'uniform' or 'hrnet', got {self.law!r}")

    @property
    def zoom(self) -> float:
        """How much larger than without a change a person gets at most; half a body fills a crop that was for all."""
        return (1.7 if self.half_body else 1.0) * math.exp(self.log_scale) / self.scale[0]

    def reach(self, size: tuple[int, int]) -> float:
        """Side of the square around a person in which all changed crops of `size` lie, in units of the longer side of
        the padded box; without half bodies, whose crops are smaller and elsewhere.
        """
        aspect = max(size) / min(size)
        return math.exp(self.log_scale) * self.scale[1] * (math.hypot(1, aspect) + 2 * self.shift * aspect)

    def draw(self, rng: np.random.Generator) -> Change:
        """The geometric part of a change, at random."""
        mirror = bool(rng.random() < self.mirror)
        turn = rng.random() < self.any_rotation
        rotation = float(rng.uniform(-180, 180) if turn else rng.normal() * self.rotation_sd)
        if self.rotation and not turn:
            rotation = float(rng.uniform(-self.rotation, self.rotation))
            if self.law == "hrnet":
                rotation = _clipped_normal(rng, 0.0, self.rotation, 2 * self.rotation) if rng.random() < 0.6 else 0.0
        half = ("upper" if rng.random() < 0.7 else "lower") if rng.random() < self.half_body else ""
        scale = float(np.exp(rng.uniform(-self.log_scale, self.log_scale)))
        if self.scale != (1.0, 1.0) and self.law == "hrnet":
            spread = (self.scale[1] - self.scale[0]) / 2
            scale *= _clipped_normal(rng, self.scale[0] + spread, spread, spread)
        elif self.scale != (1.0, 1.0):
            scale *= float(rng.uniform(*self.scale))
        shift = (rng.uniform(-self.shift, self.shift), rng.uniform(-self.shift, self.shift))
        return Change(rotation, scale, shift, mirror, half)


def _clipped_normal(rng: np.random.Generator, mean: float, sd: float, reach: float) -> float:
    return mean + float(np.clip(rng.normal() * sd, -reach, reach))


@dataclass(frozen=True)
class Change:
    """One change of a crop: the arguments of `fastpose.geometry.crop_matrix`, and the half of the body to crop to."""

    rotation: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    mirror: bool = False
    half: str = ""

    def matrix(self, box: Array, size: tuple[int, int], padding: float, convention: str) -> Array:
        """The map from image to changed crop, float64 [2, 3]."""
        return crop_matrix(
            box,
            size,
            padding,
            rotation=self.rotation,
            scale=self.scale,
            shift=self.shift,
            mirror=self.mirror,
            convention=convention,
        )


@dataclass(frozen=True)
class _Person:
    image: Array  # uint8 [h, w, 3] RGB, the surroundings of the person
    keypoints: Array  # float32 [K, 2] in pixels of `image`
    labelled: Array  # bool [K]
    box: Array  # float32 [4] in pixels of `image`


class OutsideError(ImageError):
    """A person who is not on their image."""


class DecodedStore(ABC, Generic[T]):
    """Decoded parts of a data set, kept in memory up to `memory` bytes; the others are read from their files each time.

    In place of an image that cannot be read, or of a person beside theirs, another one is taken, always the same. It is
    reported in `data.report`, and if that happens after the beginning, on stderr. `quiet`: no progress bar while the
    first ones are read.

    Raises:
        ValueError: nothing can be used.
    """

    def __init__(self, data: PoseData, count: int, memory: float, quiet: bool) -> None:
        self.data = data
        self.kept: list[T | None] = [None] * count
        self.unusable = torch.zeros(count, dtype=torch.bool).share_memory_()  # also what other processes found out
        self.told: set[int] = set()
        self.reported: set[str] = set()
        found = False
        for i in tqdm(range(count), desc="reading", unit="image", disable=quiet):
            if memory <= 0 and found:
                break
            item = self._read(i, announce=False)
            found |= item is not None
            if memory > 0 and item is not None:
                self.kept[i] = item
                memory -= self._bytes(item)
        if not found:
            raise ValueError(f"nobody is left: none of {count} can be used: {data.report.to_text(wrong_only=True)}")

    def __len__(self) -> int:
        return len(self.kept)

    @abstractmethod
    def _load(self, i: int) -> T: ...

    @staticmethod
    @abstractmethod
    def _bytes(item: T) -> int: ...

    def get(self, i: int) -> T:
        """Item `i`, from memory or file, or one in its place; raises `ImageError` if none can be read any more."""
        item = self._read(i)
        if item is not None:
            return item
        # anywhere: images that cannot be read often come in a row, and all would be replaced by the one after them
        for other in np.random.default_rng(i).permutation(len(self)).tolist():
            item = self._read(other)
            if item is not None:
                return item
        raise ImageError(f"none of the {len(self)} images and people of the data set can be read any more")

    def _read(self, i: int, announce: bool = True) -> T | None:
        item = self.kept[i]
        if item is not None or self.unusable[i]:
            return item
        try:
            return self._load(i)
        except ImageError as error:
            self.unusable[i] = True
            self._report(i, error, announce)
        return None

    def _report(self, i: int, error: ImageError, announce: bool) -> None:
        self.told.add(i)
        if str(error) in self.reported:
            return
        self.reported.add(str(error))
        self.data.report.add(OUTSIDE if isinstance(error, OutsideError) else UNREADABLE, error)
        if announce:
            tqdm.write(f"fastpose: trained without {error}", file=sys.stderr)

    def report_others(self) -> None:
        """Take into `data.report` what other processes, whose reports are their own, could not use and have told."""
        for i in set(torch.nonzero(self.unusable).flatten().tolist()) - self.told:
            try:
                self._load(i)
            except ImageError as error:
                self._report(i, error, announce=False)


class CropStore(DecodedStore[_Person]):
    """The decoded surroundings of every person, reduced to at most `side` pixels per padded box side.

    `reach` padded box sides are kept around each person: those of `Augmentation.reach`, at least 2.2, in which half
    bodies are.
    """

    def __init__(
        self,
        data: PoseData,
        padding: float,
        side: int,
        memory: float = math.inf,
        quiet: bool = True,
        reach: float = 2.2,
    ) -> None:
        self.padding, self.side, self.reach = padding, side, max(reach, 2.2)
        super().__init__(data, len(data), memory, quiet)

    @staticmethod
    def _bytes(item: _Person) -> int:
        return item.image.nbytes

    def _load(self, i: int) -> _Person:
        image, side = self.data.read(i), self.side
        box = self.data.boxes[i].astype(np.float64)
        centre = (box[:2] + box[2:]) / 2
        extent = max(box[2] - box[0], box[3] - box[1], 1.0) * self.padding
        half = self.reach * extent / 2
        x1, y1 = np.maximum(np.floor(centre - half).astype(int), 0)
        x2, y2 = np.minimum(np.ceil(centre + half).astype(int) + 1, [image.shape[1], image.shape[0]])
        if x1 >= x2 or y1 >= y2:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise OutsideError(f"{self.data.images[i]}: nothing of the box {box.tolist()} is in the {size} image")
        part, ratio = reduce(image[y1:y2, x1:x2], side / extent)
        origin = np.array([x1, y1], np.float64)
        points = (self.data.keypoints[i] - origin + 0.5) * ratio - 0.5
        box = (box - np.tile(origin, 2) + 0.5) * np.tile(ratio, 2) - 0.5
        labelled = self.data.labelled[i]
        return _Person(np.ascontiguousarray(part), points.astype(np.float32), labelled, box.astype(np.float32))


def reduce(image: Array, zoom: float) -> tuple[Array, Array]:
    """`image` reduced to about `zoom` of its size (not enlarged), and the exact ratio [2] in x and y.

    Pixel x of the image is at ``(x + 0.5) * ratio - 0.5`` of the reduced one.
    """
    if zoom >= 1:
        return image, np.ones(2)
    size = (max(1, round(image.shape[1] * zoom)), max(1, round(image.shape[0] * zoom)))
    ratio = np.array(size) / [image.shape[1], image.shape[0]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), ratio


class CropDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples (crop uint8 [3, h, w], keypoints float32 [K, 2] in crop pixels, valid bool [K]).

    A keypoint is valid if it is labelled and, unless `outside`, inside the crop. Every sample is drawn with its own
    random generator, seeded by (`seed`, index); an index encodes epoch and person (`epoch * len(store) + person`), so
    that a sample depends neither on the number of workers nor on where training was resumed. `convention`: see
    `fastpose.geometry.crop_matrix`.
    """

    def __init__(
        self,
        store: CropStore,
        size: tuple[int, int],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        convention: str = "fastpose",
        outside: bool = False,
    ) -> None:
        self.store = store
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        self.convention = convention
        self.outside = outside

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        person_index = index % len(self)
        person = self.store.get(person_index)
        valid, box, change = person.labelled, person.box, Change()
        skeleton = self.store.data.skeleton
        height, width = self.size
        a = self.augmentation
        rng = np.random.default_rng((self.seed, index))
        if a is not None:
            change = a.draw(rng)
            if change.half:
                upper, padding = change.half == "upper", self.store.padding
                box = half_body_box(person.keypoints, valid, skeleton, upper, box, padding)
        matrix = change.matrix(box, self.size, self.store.padding, self.convention)
        crop = warp_crop(person.image, matrix, self.size)
        if a is not None:
            crop = change_colours(crop, a, rng)
        points = apply_affine(matrix, person.keypoints)
        if change.mirror:
            points, valid = points[skeleton.flip_indices], valid[skeleton.flip_indices]
        inside = self.outside | (points > -0.5).all(1) & (points < [width - 0.5, height - 0.5]).all(1)
        chw = np.ascontiguousarray(crop.transpose(2, 0, 1))
        return torch.from_numpy(chw), torch.from_numpy(points.astype(np.float32)), torch.from_numpy(valid & inside)


def half_body_box(
    keypoints: Array, labelled: Array, skeleton: Skeleton, upper: bool, box: Array, padding: float
) -> Array:
    """Box of one half of the body as in HRNet: around the mean of its labelled keypoints, 1.5 times their extent.

    Args:
        keypoints: [K, 2]; labelled: bool [K]; upper: which half, the other if this one has fewer than 3 labels.
        box: returned if no more than 8 keypoints are labelled, or fewer than 2 in either half.
        padding: by which the crop will be larger than its box; this one is that much smaller, not to be padded again.
    """
    half = np.zeros(skeleton.num_keypoints, bool)
    half[list(skeleton.upper_body)] = True
    if labelled.sum() <= 8:
        return box
    above, below = keypoints[half & labelled], keypoints[~half & labelled]
    points = above if upper and len(above) > 2 else below if len(below) > 2 else above
    if len(points) < 2:
        return box
    centre = points.mean(0)
    reach = 0.75 * np.maximum(points.max(0) - points.min(0), 1.0) / padding
    return np.concatenate([centre - reach, centre + reach])


def change_colours(crop: Array, a: Augmentation, rng: np.random.Generator) -> Array:
    """`crop` (uint8 RGB, may be overwritten) with the changes of colour drawn at random."""
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
