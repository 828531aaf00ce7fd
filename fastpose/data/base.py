"""What every data set is turned into: one record per annotated person."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpose.average_precision import KeypointTruth
from fastpose.images import ImageError, read_image
from fastpose.skeletons import Skeleton

Array = NDArray[Any]

METRICS = ("PCK@0.2", "PCKh@0.5", "AP")
# kinds of findings that every data set may have
MISSING, UNREADABLE = "image file missing", "image cannot be read"
NOT_FINITE = "labelled keypoint that is not a finite number (not labelled)"
OUTSIDE = "box outside the image (not estimated)"
NO_SIZE = "one labelled position and no box tell no size (not estimated)"


@dataclass
class Finding:
    """Things of one kind: how many, up to ten examples, and whether they are wrong or only worth knowing."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    wrong: bool = True


class Report:
    """What came up while a data set was read, by kind; nothing in it stopped the reading."""

    EXAMPLES = 10

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}

    def add(self, kind: str, example: object, wrong: bool = True) -> None:
        """Count one thing of `kind`; `wrong` is false for what belongs to the data set, such as crowd regions."""
        finding = self.findings.setdefault(kind, Finding(wrong=wrong))
        finding.count += 1
        if len(finding.examples) < self.EXAMPLES:
            finding.examples.append(str(example))

    @property
    def wrong(self) -> int:
        """Number of things that are wrong."""
        return sum(f.count for f in self.findings.values() if f.wrong)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """``{kind: {"count": ..., "wrong": ..., "examples": [...]}}``, ready for JSON."""
        return {k: {"count": f.count, "wrong": f.wrong, "examples": f.examples} for k, f in self.findings.items()}

    def to_text(self, wrong_only: bool = False, examples: int = 3) -> str:
        """One line per kind with its count and the first examples; what is wrong comes first."""
        lines = []
        for kind, f in sorted(self.findings.items(), key=lambda item: not item[1].wrong):
            if f.wrong or not wrong_only:
                shown = ", ".join(f.examples[:examples]) + (", ..." if f.count > examples else "")
                lines.append(f"{'' if f.wrong else 'note: '}{kind}: {f.count} ({shown})")
        return "\n".join(lines)


@dataclass(frozen=True)
class AnnotatedImages:
    """The I images of a data set in COCO's format, whether or not somebody is annotated on them.

    Attributes:
        ids: identifiers as the annotation file has them, which result files use.
        files: paths. sizes: int64 [I, 2], (height, width) as annotated, 0 if it is not said.
        people: everybody annotated, crowds included, in the order of `ids`; what average precision is measured against.
        category: the people's, in the annotation file and in files of results; other_categories: those of the others
            if there are several with the same keypoints.
        hidden: for every image the outlines of crowds and of people without labelled keypoints, put together: a mask
            in pycocotools' run-length code, or None if there is nobody of that kind or one of them has no outline.
            Empty if nobody has one.
    """

    ids: tuple[int | str, ...]
    files: tuple[Path, ...]
    sizes: Array
    people: KeypointTruth
    category: int | str = 1
    hidden: tuple[dict[str, Any] | None, ...] = ()
    other_categories: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.files), len(self.sizes), len(self.people.image_ids)}
        if self.hidden:
            lengths.add(len(self.hidden))
        if len(lengths) != 1:
            raise ValueError(
                f"AnnotatedImages: ids, files, sizes, people and hidden must have one length, got {lengths}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Array) -> AnnotatedImages:
        """The images where the bool [I] `chosen` is true."""
        if chosen.all():
            return self
        at = np.flatnonzero(chosen)
        ids, files = tuple(self.ids[i] for i in at), tuple(self.files[i] for i in at)
        hidden = tuple(self.hidden[i] for i in at) if self.hidden else ()
        return replace(
            self, ids=ids, files=files, sizes=self.sizes[at], people=self.people.of_images(chosen), hidden=hidden
        )

    def read(self, i: int) -> Array:
        """Image `i`: uint8 RGB [H, W, 3], turned as the annotations want it; raises `ImageError`."""
        height, width = self.sizes[i]
        return read_annotated(self.files[i], (int(height), int(width)))


@dataclass(frozen=True)
class PoseData:
    """N people to estimate: annotated ones, or boxes of a detector.

    Attributes:
        skeleton: names, flip pairs and sigmas of the K keypoints.
        images: N paths of image files (one file may occur more than once).
        keypoints: float32 [N, K, 2], (x, y) pixels of the image, meaningless where not labelled.
        labelled: bool [N, K]; all false for a detector's boxes.
        boxes: float32 [N, 4], xyxy.
        box_scores: float32 [N], of the detector; 1 if not given.
        head_sizes: float32 [N], MPII's reference length in pixels, NaN where unknown; None elsewhere.
        annotated: the images with everybody on them (data in COCO's format), None elsewhere.
        image_index: int64 [N], position of each person's image in `annotated`, None without it.
        categories: [N] ids in the annotation file, None where there is one only.
        metric: how the data set is scored, one of `METRICS`.
        report: what was skipped while reading, and why.
    """

    skeleton: Skeleton
    images: tuple[Path, ...]
    keypoints: Array
    labelled: Array
    boxes: Array
    box_scores: Array | None = None
    head_sizes: Array | None = None
    annotated: AnnotatedImages | None = None
    image_index: Array | None = None
    categories: Array | None = None
    metric: str = "PCK@0.2"
    report: Report = field(default_factory=Report, compare=False)

    def __post_init__(self) -> None:
        n, k = len(self.images), self.skeleton.num_keypoints
        if self.box_scores is None:
            object.__setattr__(self, "box_scores", np.ones(n, np.float32))
        shapes = {"keypoints": (n, k, 2), "labelled": (n, k), "boxes": (n, 4), "box_scores": (n,)}
        for name, shape in {**shapes, "head_sizes": (n,), "image_index": (n,), "categories": (n,)}.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"PoseData.{name} must be {list(shape)}, got {list(value.shape)}")
        object.__setattr__(self, "labelled", self.labelled > 0)  # COCO's flags 1 and 2 too
        if (self.annotated is None) != (self.image_index is None):
            raise ValueError("PoseData.annotated and PoseData.image_index belong together")
        if self.metric not in METRICS:
            raise ValueError(f"PoseData.metric must be one of {', '.join(METRICS)}, got {self.metric!r}")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Array) -> PoseData:
        """The people at `indices`, in that order (`annotated` stays as it is)."""
        changes: dict[str, Any] = {"images": tuple(self.images[i] for i in indices)}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                changes[f.name] = value[indices]
        return replace(self, **changes)

    def image_files(self) -> list[Path]:
        """All images in order, each once, also those without people."""
        return list(dict.fromkeys(self.images if self.annotated is None else self.annotated.files))

    def of_images(self, files: Iterable[Path]) -> PoseData:
        """The part on the images `files`: their people, and of `annotated` everybody on them."""
        wanted = set(files)
        part = self.take(np.array([i for i, path in enumerate(self.images) if path in wanted], np.int64))
        if self.annotated is None or self.image_index is None:
            return part
        chosen = np.array([path in wanted for path in self.annotated.files], bool)
        place = np.cumsum(chosen) - 1
        assert part.image_index is not None
        return replace(part, annotated=self.annotated.take(chosen), image_index=place[part.image_index])

    def without_images(self, files: Iterable[Path]) -> PoseData:
        """The part that is not on the images `files`."""
        unwanted = set(files)
        return self.of_images(f for f in self.image_files() if f not in unwanted)

    def first_images(self, count: int) -> PoseData:
        """The part on the first `count` images; everything if `count` is 0."""
        if count < 0:
            raise ValueError(f"the number of images must not be negative, got {count}")
        return self.of_images(self.image_files()[:count]) if count else self

    def read(self, i: int) -> Array:
        """The image of person `i`: uint8 RGB [H, W, 3], turned as the annotations want it; raises `ImageError`."""
        if self.annotated is not None and self.image_index is not None:
            return self.annotated.read(int(self.image_index[i]))
        return read_image(self.images[i])


def read_annotated(path: str | Path, size: tuple[int, int] | None) -> Array:
    """Read an image as its annotations mean it: upright by EXIF, unless only the stored pixels have `size`.

    Some tools annotate what a viewer shows, others the stored pixels; the (height, width) of the annotation file tells.

    Raises:
        ImageError: unreadable, or of another size than `size` (0 in it: not known).
    """
    image = read_image(path)
    if size is None or 0 in size or image.shape[:2] == size:
        return image
    stored = read_image(path, upright=False)
    if stored.shape[:2] == size:
        return stored
    height, width = image.shape[:2]
    raise ImageError(
        f"{path}: the image is {height} x {width} (height x width), its annotation says {size[0]} x {size[1]}"
    )


KEYPOINT_MARGIN = 0.15  # of a box made from keypoints


def boxes_of_keypoints(keypoints: Array, labelled: Array, margin: float, sizes_wh: Array | None = None) -> Array:
    """Boxes [N, 4] xyxy around the labelled keypoints, grown on each side by `margin` of the longer side.

    With `sizes_wh` [N, 2] the boxes are clipped to the images. A person without labelled keypoints gets zeros.
    """
    big = np.float32(np.inf)
    low = np.where(labelled[..., None], keypoints, big).min(1)
    high = np.where(labelled[..., None], keypoints, -big).max(1)
    grow = margin * (high - low).max(1, keepdims=True)
    low, high = low - grow, high + grow
    if sizes_wh is not None:
        low, high = np.clip(low, 0, sizes_wh), np.clip(high, 0, sizes_wh)
    boxes = np.concatenate([low, high], axis=1)
    boxes[~labelled.any(1)] = 0
    return np.asarray(boxes, np.float32)
