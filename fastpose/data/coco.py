"""Annotations in COCO's JSON format: COCO, CrowdPose, and data sets of one's own with any skeleton.

T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; J. Li et al., "CrowdPose: Efficient Crowded
Scenes Pose Estimation and A New Benchmark", CVPR 2019.

Only ``images`` (``id``, ``file_name``) and ``annotations`` (``image_id``, ``keypoints`` [x, y, v, ...] with v = 0 for
not labelled) are needed. What is missing is filled in: ``bbox`` from the keypoints, ``area`` as 0.53 times the box (the
share of a person in their box that CrowdPose uses), ``num_keypoints`` by counting. Malformed and impossible entries are
counted in the report and left out; the rest is read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpose.average_precision import KeypointResults, KeypointTruth
from fastpose.data.base import (
    KEYPOINT_MARGIN,
    MISSING,
    NO_SIZE,
    OUTSIDE,
    AnnotatedImages,
    Array,
    PoseData,
    Report,
    boxes_of_keypoints,
)
from fastpose.skeletons import UNDEFINED, Skeleton, skeleton_from_dict, unpaired_sides

AREA_SHARE = 0.53  # of a box
NO_RESULT = "no result is left"
NO_DETECTION = "no detection is left"


@dataclass(frozen=True)
class _Person:
    image: int | str
    keypoints: Array  # float64 [K, 3]
    box: Array  # float64 [4], x, y, width, height
    area: float
    ignored: bool
    crowd: bool
    usable: bool  # for training and as a box to estimate
    category: int | str
    outline: dict[str, Any] | None = None  # run-length code; of those only who are hidden from training


def read_json(path: str | Path, what: str) -> Any:
    """Contents of a JSON file; FileNotFoundError or ValueError, starting with `what`, if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {path} is not valid JSON: {error}") from None


def skeleton_of_annotations(
    content: dict[str, Any], name: str = UNDEFINED, category: int | None = None, report: Report | None = None
) -> Skeleton:
    """Skeleton from ``categories`` of an annotation file: its ``keypoints`` (names) and ``skeleton`` (pairs from 1).

    Pairs of left and right are found by the names, sigmas are 0.07 (see `fastpose.skeletons.read_skeleton`). Links that
    cannot be are left out and counted in `report`: some files have those of another skeleton, or count from 0.

    Raises:
        ValueError: no category has keypoint names.
    """
    for entry in _category_list(content):
        names = _keypoint_names(entry)
        if names and category in (None, entry.get("id")):
            pairs, links = entry.get("skeleton"), []
            for pair in pairs if isinstance(pairs, list) else []:
                two = isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]
                if two and all(type(end) is int and 1 <= end <= len(names) for end in pair):
                    links.append((pair[0] - 1, pair[1] - 1))
                elif report is not None:
                    report.add(f"link in 'skeleton' that is not two keypoints from 1 to {len(names)}", pair)
            return skeleton_from_dict({"name": name, "names": names, "links": links})
    raise ValueError("no category has 'keypoints', the names; add them or give a skeleton file")


def _keypoint_names(category: dict[str, Any]) -> list[Any]:
    names = category.get("keypoints")
    return names if isinstance(names, list) else []


def _category_list(content: dict[str, Any]) -> list[dict[str, Any]]:
    categories = content.get("categories")
    return [c for c in categories if isinstance(c, dict)] if isinstance(categories, list) else []


def load_coco_format(
    annotations: str | Path | dict[str, Any],
    image_folders: list[Path],
    skeleton: Skeleton | None = None,
    *,
    area_from_box: bool = False,
    detections: str | Path | list[Any] | None = None,
    least_score: float = 0.0,
    keep_missing: bool = False,
) -> PoseData:
    """People of an annotation file in COCO's format, or the boxes of a detector on its images.

    Everybody with a box and a labelled keypoint who is not a crowd is a person to estimate; everybody at all is in
    `PoseData.annotated`. Boxes are clipped to the image.

    Args:
        annotations: path of the file, or its contents.
        image_folders: where images may lie; the folder that has most of them is taken.
        skeleton: what the keypoints are; None: as the file's categories say.
        area_from_box: areas for OKS are 0.53 of the box whatever the file says, CrowdPose's rule.
        detections: path or contents of a list ``{"image_id", "bbox" [x, y, width, height], "score"}``: its boxes
            scoring at least `least_score` are the people to estimate, not clipped, in the order of the file. Then the
            annotation file, like those of COCO's test sets, needs no ``annotations``.
        keep_missing: keep images whose file does not exist (they are reported either way).

    Raises:
        FileNotFoundError: the file, or all images, are missing.
        ValueError: not JSON, no ``images`` or ``annotations``, or no usable entry among them.
    """
    where = "annotations" if isinstance(annotations, dict) else str(annotations)
    content = annotations if isinstance(annotations, dict) else read_json(annotations, "annotation file")
    if detections is not None and isinstance(content, dict) and isinstance(content.get("images"), list):
        content = {"annotations": [], **content}  # image lists of test sets have none
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{where}: expected COCO's format, a JSON object with the list {key!r}")
    report = Report()
    if skeleton is None:
        try:
            skeleton = skeleton_of_annotations(content, report=report)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    for keypoint in unpaired_sides(skeleton):
        report.add("keypoint of one side without that of the other", keypoint, wrong=False)
    images = _images(content["images"], report)
    if not images:
        raise ValueError(f"{where}: has no usable image entry; {report.to_text() or 'the list is empty'}")
    files = _locate(images, image_folders, report)
    kept = [i for i in images if keep_missing or files[i] is not None]
    if all(f is None for f in files.values()) and not keep_missing:
        tried = ", ".join(str(f) for f in image_folders)
        raise FileNotFoundError(f"none of the {len(images)} images of {where} exists, e.g. "
                                f"{next(iter(images.values()))['file_name']!r}; looked in {tried}")  # fmt: skip

    categories = _categories(content, skeleton, report)
    people = _people(content["annotations"], images, skeleton, categories, area_from_box, report)
    for category in sorted(categories, key=str) if len(categories) > 1 else ():
        report.add("category with the same keypoints as another (they are scored as one)", category, wrong=False)
    order = {image: i for i, image in enumerate(kept)}
    categories = categories or {p.category for p in people}  # which tell nothing of keypoints
    people = [p for p in people if p.image in order]
    people.sort(key=lambda p: order[p.image])
    paths = tuple(files[i] or image_folders[0] / images[i]["file_name"] for i in kept)
    sizes = np.array([images[i]["size"] for i in kept], np.int64).reshape(-1, 2)
    truth = _truth(people, order, skeleton.num_keypoints, _crowd_index([images[i] for i in kept]))
    category = 1 if not categories or 1 in categories else min(categories, key=str)
    others = tuple(sorted(categories - {category}, key=str))
    annotated = AnnotatedImages(tuple(kept), paths, sizes, truth, category, _hidden(people, order), others)
    if detections is not None:
        return _detected(detections, least_score, annotated, categories or {1}, skeleton, report)

    at = np.flatnonzero([p.usable for p in people])
    places, boxes = truth.image[at], truth.boxes[at]
    xyxy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return PoseData(
        skeleton,
        tuple(paths[i] for i in places),
        truth.keypoints[at].astype(np.float32),
        truth.visible[at],
        _clip(xyxy, sizes[places]).astype(np.float32),
        annotated=annotated,
        image_index=places,
        categories=_ids([people[i].category for i in at]),
        metric="AP",
        report=report,
    )


def _ids(values: list[Any]) -> Array:
    """As an array of objects, whatever they are: numpy would make texts of all if one is."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _truth(people: list[_Person], order: dict[Any, int], k: int, crowd_index: Array | None) -> KeypointTruth:
    """Everybody in arrays; `order` gives the position of each image by its id, in ascending positions."""
    points = np.array([p.keypoints for p in people], np.float64).reshape(-1, k, 3)
    # ids that are not numbers in ascending order are replaced by positions
    numbers = np.array([i if isinstance(i, int) else -1 for i in order], np.int64)
    return KeypointTruth(
        numbers if (np.diff(numbers) > 0).all() and (numbers >= 0).all() else np.arange(len(order)),
        np.array([order[p.image] for p in people], np.int64),
        points[..., :2],
        points[..., 2] > 0,
        np.array([p.area for p in people], np.float64),
        np.array([p.box for p in people], np.float64).reshape(-1, 4),
        np.array([p.ignored for p in people], bool),
        np.array([p.crowd for p in people], bool),
        crowd_index,
    )


def _clip(boxes: Array, sizes: Array) -> Array:
    """Boxes xyxy [N, 4] within images (height, width) [N, 2]; images of unknown size change nothing."""
    limit = np.where(sizes > 0, sizes - 1.0, np.inf)[:, ::-1]
    low = np.where(sizes > 0, 0.0, -np.inf)[:, ::-1]
    return np.asarray(np.clip(boxes, np.tile(low, 2), np.tile(limit, 2)))


def _images(entries: list[Any], report: Report) -> dict[int | str, dict[str, Any]]:
    """Usable image entries by id, ids ascending: file_name, size (height, width), crowdIndex."""
    found: dict[int | str, dict[str, Any]] = {}
    names: set[str] = set()
    for i, entry in enumerate(entries):
        known = isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and entry["file_name"]
        if not known or not _is_id(entry.get("id")):
            report.add("image entry without id or file_name", f"images[{i}]")
            continue
        if entry["id"] in found:
            report.add("image id used twice (the first counts)", entry["id"])
            continue
        size = image_size(entry)
        if size == (0, 0):
            report.add("image without height and width", entry["file_name"], wrong="height" in entry)
        if entry["file_name"] in names:
            report.add("image file with two ids (both count)", entry["file_name"])
        names.add(entry["file_name"])
        found[entry["id"]] = {"file_name": entry["file_name"], "size": size, "crowdIndex": entry.get("crowdIndex")}
    numbers = all(isinstance(i, int) for i in found)
    return {i: found[i] for i in (sorted(found) if numbers else found)}


def image_size(entry: dict[str, Any]) -> tuple[int, int]:
    """(height, width) that an image entry tells, (0, 0) if it does not."""
    height, width = (entry[key] if is_number(entry.get(key)) else 0 for key in ("height", "width"))
    return (int(height), int(width)) if min(height, width) >= 1 else (0, 0)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and abs(value) < 2**63)


def is_number(value: Any) -> bool:
    """Whether a value from a JSON file is a finite number of a sensible size."""
    return type(value) in (int, float) and abs(value) < 1e15  # also false for NaN


def _numbers(value: Any, length: int) -> Array | None:
    if not isinstance(value, (list, tuple)) or len(value) != length or not all(is_number(v) for v in value):
        return None
    return np.array(value, np.float64)


def _crowd_index(images: list[dict[str, Any]]) -> Array | None:
    values = [image["crowdIndex"] for image in images]
    return np.array(values, np.float64) if values and all(is_number(v) for v in values) else None


def _locate(images: dict[int | str, dict[str, Any]], folders: list[Path], report: Report) -> dict[Any, Path | None]:
    """Path of each image, None if it does not exist."""
    names = [image["file_name"] for image in images.values()]
    some = names[:: max(1, len(names) // 50)]
    base = max(folders, key=lambda folder: sum(os.path.isfile(folder / name) for name in some))
    listed: dict[Path, set[str]] = {}
    found: dict[Any, Path | None] = {}
    for i, image in images.items():
        path = base / image["file_name"]
        if path.parent not in listed:
            listed[path.parent] = set(os.listdir(path.parent)) if os.path.isdir(path.parent) else set()
        found[i] = path if path.name in listed[path.parent] else None
        if found[i] is None:
            report.add(MISSING, path)
    return found


def _categories(content: dict[str, Any], skeleton: Skeleton, report: Report) -> set[Any]:
    """Ids of the categories with as many keypoints as the skeleton; empty: any.

    Raises:
        ValueError: none has so many, or the skeleton has their names in another order.
    """
    categories = _category_list(content)
    counts = [len(_keypoint_names(c)) for c in categories]
    fitting = [
        c
        for c, count in zip(categories, counts, strict=True)
        if count == skeleton.num_keypoints and _is_id(c.get("id"))
    ]
    # of several, those with the very names, if there are such: as many keypoints may be those of something else
    exact = [c for c in fitting if tuple(_keypoint_names(c)) == skeleton.names]
    if not fitting and any(counts):
        raise ValueError(
            f"skeleton {skeleton.name!r} has {skeleton.num_keypoints} keypoints, the annotations' categories {counts}"
        )
    if exact:
        return {c["id"] for c in exact}
    for category in fitting:
        names = _keypoint_names(category)
        moved = [n for n in skeleton.names if n in names and names.index(n) != skeleton.names.index(n)]
        if moved:
            raise ValueError(
                f"skeleton {skeleton.name!r} has {moved[0]!r} at position {skeleton.names.index(moved[0])}, the "
                f"annotations' category {category.get('name', category['id'])!r} at {names.index(moved[0])}; all of "
                f"them: {', '.join(skeleton.names)}; and {', '.join(map(str, names))}"
            )
        if not set(names) & set(skeleton.names):
            report.add("category with other keypoints than the skeleton's", category.get("name", category["id"]))
    return {c["id"] for c in fitting}


def _people(
    entries: list[Any],
    images: dict[int | str, dict[str, Any]],
    skeleton: Skeleton,
    categories: set[Any],
    area_from_box: bool,
    report: Report,
) -> list[_Person]:
    people: list[_Person] = []
    seen: set[Any] = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            report.add("annotation is not an object", f"annotations[{i}]")
            continue
        name = f"annotation {entry['id']}" if "id" in entry else f"annotations[{i}]"
        category: Any = entry.get("category_id", next(iter(categories), None))
        if categories and not (_is_id(category) and category in categories):
            report.add("annotation of another category", name, wrong=False)
            continue
        if _is_id(entry.get("id")):
            if entry["id"] in seen:
                report.add("annotation id used twice (the first counts)", name)
                continue
            seen.add(entry["id"])
        if not _is_id(entry.get("image_id")) or entry["image_id"] not in images:
            report.add("annotation of an unknown image", name)
            continue
        category = category if _is_id(category) else 1  # categories may say nothing, and so may this
        person = _person(entry, name, images[entry["image_id"]]["size"], skeleton, area_from_box, report, category)
        if person is not None:
            people.append(person)
    return people


def _person(
    entry: dict[str, Any],
    name: str,
    size: tuple[int, int],
    skeleton: Skeleton,
    area_from_box: bool,
    report: Report,
    category: int | str,
) -> _Person | None:
    k = skeleton.num_keypoints
    stated_crowd = entry.get("iscrowd")
    if stated_crowd is not None and not (isinstance(stated_crowd, (bool, int, float)) and stated_crowd in (0, 1)):
        report.add("iscrowd other than 0 or 1 (read as one person)", name)
        stated_crowd = 0
    crowd = bool(stated_crowd)
    flat = _numbers(entry.get("keypoints", [0] * (3 * k) if crowd else None), 3 * k)
    if flat is None:
        given = entry.get("keypoints")
        got = f"{len(given)} values" if isinstance(given, list) else "none"
        report.add(f"keypoints are not {k} x (x, y, v) finite numbers", f"{name}: {got}")
        return None
    points = flat.reshape(k, 3)
    labelled = points[:, 2] > 0
    if not np.isin(points[:, 2], (0, 1, 2)).all():
        report.add("keypoint flag other than 0, 1 or 2 (above 0 is read as labelled)", name)
    count = int(labelled.sum())
    stated = entry.get("num_keypoints", count)
    if stated != count:
        # CrowdPose does not count head and neck
        wrong = not area_from_box
        report.add("num_keypoints differs from the labelled keypoints", f"{name}: {stated}, labelled {count}", wrong)
    if count and size[0]:
        outside = labelled & ((points[:, :2] < 0).any(1) | (points[:, 0] > size[1]) | (points[:, 1] > size[0]))
        for j in np.flatnonzero(outside):
            report.add("labelled keypoint outside the image", f"{name} {skeleton.names[j]}")

    box = _numbers(entry.get("bbox"), 4)
    usable = not crowd and count > 0 and stated != 0
    empty = box is not None and (box[2:] <= 0).any()
    if box is None or (empty and usable):
        if empty:
            report.add("bbox without area (keypoints give the box)", name)
        elif "bbox" in entry:
            report.add("bbox is not [x, y, width, height] in finite numbers (keypoints give the box)", name)
        else:
            report.add("no bbox (keypoints give the box)", name, wrong=False)
        wh = np.array([[size[1], size[0]]], np.float64) - 1 if size[0] else None
        x1, y1, x2, y2 = boxes_of_keypoints(points[None, :, :2], labelled[None], KEYPOINT_MARGIN, wh)[0].tolist()
        box = np.array([x1, y1, x2 - x1, y2 - y1], np.float64)
    corner = np.concatenate([box[:2], box[:2] + box[2:]])[None]
    x1, y1, x2, y2 = _clip(corner, np.array([size]))[0]
    if usable and (box[2:] <= 0).any():
        report.add(OUTSIDE if np.ptp(points[labelled, :2], axis=0).any() else NO_SIZE, name)
        usable = False
    elif usable and (x2 <= x1 or y2 <= y1):
        report.add(OUTSIDE, name)
        usable = False
    if crowd:
        report.add("crowd region", name, wrong=False)
    elif count == 0:
        report.add("person without labelled keypoints", name, wrong=False)

    area = float(box[2:].clip(0).prod() * AREA_SHARE)
    stated_area = float(entry["area"]) if is_number(entry.get("area")) else -1.0
    # no pose is like that of somebody without area; 0 is left to those whose box has none either
    if not area_from_box and (stated_area > 0 or stated_area == area == 0):
        area = stated_area
    elif not area_from_box:
        report.add("no area (0.53 of the box is taken)", name, wrong="area" in entry)
    outline = None if count and not crowd and stated != 0 else _outline(entry.get("segmentation"), size)
    return _Person(entry["image_id"], points, box, area, crowd or stated == 0, crowd, usable, category, outline)


def _outline(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """A COCO ``segmentation``, polygons or uncompressed run lengths, as a mask in run-length code; None if it is
    something else, or pycocotools is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        return None
    height, width = size
    if not height or not width:
        return None
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
            return None
        if segmentation.get("size") != [height, width] or sum(counts) != height * width:
            return None
        return dict(mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    if not isinstance(segmentation, list):
        return None
    polygons = [
        _numbers(p, len(p)) if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 else None for p in segmentation
    ]
    # far outside the image pycocotools would take long
    known = [p.clip(-max(size), 2 * max(size)).tolist() for p in polygons if p is not None]
    if not known or len(known) < len(polygons):
        return None
    return dict(mask.merge(mask.frPyObjects(known, height, width)))


def _hidden(people: list[_Person], order: dict[Any, int]) -> tuple[dict[str, Any] | None, ...]:
    """`AnnotatedImages.hidden`; `order` gives the position of each image by its id."""
    outlines: list[list[dict[str, Any] | None]] = [[] for _ in order]
    for p in people:
        if p.ignored or not (p.keypoints[:, 2] > 0).any():
            outlines[order[p.image]].append(p.outline)
    if not any(o is not None for here in outlines for o in here):
        return ()
    from pycocotools import mask

    return tuple(dict(mask.merge(here)) if here and None not in here else None for here in outlines)


def _detected(
    detections: str | Path | list[Any],
    least: float,
    annotated: AnnotatedImages,
    categories: set[Any],
    skeleton: Skeleton,
    report: Report,
) -> PoseData:
    where = "detections" if isinstance(detections, list) else Path(detections).name
    content = detections if isinstance(detections, list) else read_json(detections, "detection file")
    if not isinstance(content, list):
        raise ValueError(f'{detections}: expected a list of {{"image_id", "category_id", "bbox", "score"}}')
    place = {i: n for n, i in enumerate(annotated.ids)}
    at, boxes, scores, kinds = [], [], [], []
    for i, entry in enumerate(content):
        box = _numbers(entry.get("bbox"), 4) if isinstance(entry, dict) else None
        known = box is not None and _is_id(entry.get("image_id")) and _is_id(entry.get("category_id", 1))
        if box is None or not known or not is_number(entry.get("score")):
            report.add("detection without image_id, bbox [x, y, width, height] or score", f"{where}[{i}]")
        elif entry.get("category_id", annotated.category) not in categories:
            report.add("detection of another category", f"{where}[{i}]", wrong=False)
        elif entry["image_id"] not in place:
            report.add("detection on an image that is not evaluated", entry["image_id"], wrong=False)
        elif entry["score"] < least:
            report.add(f"detection scores below {least}", f"{where}[{i}]", wrong=False)
        elif (box[2:] <= 0).any() or _outside(box, annotated.sizes[place[entry["image_id"]]]):
            report.add("detection without area in the image", f"{where}[{i}]")
        else:
            at.append(place[entry["image_id"]])
            boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
            scores.append(entry["score"])
            kinds.append(entry.get("category_id", annotated.category))
    n, k = len(at), skeleton.num_keypoints
    if content and n == 0:
        report.add(NO_DETECTION, where)
    return PoseData(
        skeleton,
        tuple(annotated.files[i] for i in at),
        np.zeros((n, k, 2), np.float32),
        np.zeros((n, k), bool),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        annotated=annotated,
        image_index=np.array(at, np.int64),
        categories=_ids(kinds),
        metric="AP",
        report=report,
    )


def _outside(box: Array, size: Array) -> bool:
    height, width = size
    return bool(box[0] + box[2] <= 0 or box[1] + box[3] <= 0 or (height and (box[0] >= width or box[1] >= height)))


def load_coco(
    root: str | Path,
    split: str,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    skeleton: Skeleton,
    **options: Any,
) -> PoseData:
    """COCO keypoints: `root` has ``annotations/person_keypoints_val2017.json`` and ``val2017/`` or ``images/val2017/``.

    `split` is "train", "val" (of 2017) or a name such as "val2014". `annotations` and `images` override the places;
    `options` are those of `load_coco_format`.
    """
    root = Path(root)
    split = {"train": "train2017", "val": "val2017"}.get(split, split)
    path = annotations or root / "annotations" / f"person_keypoints_{split}.json"
    folders = [Path(images)] if images else [root / split, root / "images" / split, root / "images", root]
    return load_coco_format(path, folders, skeleton, **options)


def load_crowdpose(
    root: str | Path,
    split: str,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    skeleton: Skeleton,
    **options: Any,
) -> PoseData:
    """CrowdPose: `root` has ``images/`` and ``json/`` (or ``annotations/``) with ``crowdpose_val.json``.

    `split` is "train", "val", "trainval" or "test". Areas for OKS are 0.53 of the box. Otherwise as `load_coco`.
    """
    root = Path(root)
    name = f"crowdpose_{split}.json"
    places = [root / "json" / name, root / "annotations" / name, root / name, root / "annotations" / f"mmpose_{name}"]
    path = annotations or next((p for p in places if p.is_file()), places[0])
    folders = [Path(images)] if images else [root / "images", root]
    return load_coco_format(path, folders, skeleton, area_from_box=True, **options)


def load_custom(
    root: str | Path,
    split: str,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    skeleton: Skeleton | None = None,
    **options: Any,
) -> PoseData:
    """A data set of one's own: `root` has ``images/`` (or the images themselves) and annotations in COCO's format.

    The annotations are ``train.json`` and ``val.json``, or one ``annotations.json``; both may lie in ``annotations/``.
    Of the one file every fifth image, from the first on and in the order of the ids, is in the split "val", the others
    are in "train"; "all" is everything. Otherwise as `load_coco`.
    """
    root = Path(root)
    here = (root, root / "annotations")
    folders = [Path(images)] if images else [root / "images", root / split, root / "images" / split, root]
    own = next((p for p in (folder / f"{split}.json" for folder in here) if p.is_file()), None)
    path = (
        annotations or own or next((f / "annotations.json" for f in here if (f / "annotations.json").is_file()), None)
    )
    if path is None:
        parts = [p.name for folder in here for p in (folder / "train.json", folder / "val.json") if p.is_file()]
        hint = f"; it has {' and '.join(parts)}, which are splits of their own" if parts else ""
        raise FileNotFoundError(f"{root} has neither {split}.json nor annotations.json, there or in annotations/{hint}")
    data = load_coco_format(path, folders, skeleton, **options)
    if own is not None or annotations or split == "all":
        return data
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train', 'val' or 'all' for {path}, got {split!r}")
    files = data.image_files()
    chosen = [f for i, f in enumerate(files) if (i % 5 == 0) == (split == "val")]
    if not chosen:
        raise ValueError(
            f"{path} has too few images, {len(files)}, for the split {split!r}: of every five the first is in "
            "'val', the others are in 'train'"
        )
    return data.of_images(chosen)


def to_results(
    annotated: AnnotatedImages,
    image_index: Array,
    keypoints: Array,
    keypoint_scores: Array,
    scores: Array,
    categories: Array | None = None,
) -> list[dict[str, Any]]:
    """Result entries in COCO's submission format: image_id, category_id, keypoints [x, y, score, ...], score.

    Args:
        image_index: [N] positions in `annotated`; keypoints: [N, K, 2] pixels; keypoint_scores: [N, K]; scores: [N].
        categories: [N], if they are not all of the annotations' first.
    """
    kinds = [annotated.category] * len(scores) if categories is None else list(categories)
    triples = np.concatenate([keypoints, keypoint_scores[..., None]], axis=2).astype(np.float64)
    flat = triples.reshape(len(scores), 3 * keypoints.shape[1])
    return [
        {
            "image_id": annotated.ids[int(i)],
            "category_id": kind,
            "keypoints": [round(v, 3) for v in row],
            "score": float(score),
        }
        for i, kind, row, score in zip(image_index, kinds, flat.tolist(), scores, strict=True)
    ]


def from_results(entries: list[Any], annotated: AnnotatedImages, report: Report | None = None) -> KeypointResults:
    """Result entries as arrays for `average_precision`; malformed ones and other images' are counted in `report`.

    As in pycocotools the area is that of ``bbox`` if the first entry has one, and of the keypoints' extent otherwise.
    """
    report = Report() if report is None else report
    k = annotated.people.visible.shape[1]
    accepted = (annotated.category, *annotated.other_categories)
    which = " or ".join(map(str, accepted))
    place = {i: n for n, i in enumerate(annotated.ids)}
    at, points, scores, areas = [], [], [], []
    has_box = bool(entries) and isinstance(entries[0], dict) and bool(entries[0].get("bbox"))
    for i, entry in enumerate(entries):
        flat = _numbers(entry.get("keypoints"), 3 * k) if isinstance(entry, dict) else None
        box = _numbers(entry.get("bbox"), 4) if has_box and flat is not None else None
        known = flat is not None and _is_id(entry.get("image_id")) and _is_id(entry.get("category_id", 1))
        if flat is None or not known or not is_number(entry.get("score")) or (has_box and box is None):
            report.add(f"result without image_id, {k} x (x, y, score), score or bbox", f"results[{i}]")
            continue
        if entry["image_id"] not in place:
            report.add("result for an image that is not evaluated", entry["image_id"], wrong=False)
            continue
        if entry.get("category_id", annotated.category) not in accepted:
            report.add(f"result of another category than {which}", entry["category_id"], wrong=False)
            continue
        xy = flat.reshape(k, 3)[:, :2]
        extent = xy.max(0) - xy.min(0) if box is None else box[2:]
        at.append(place[entry["image_id"]])
        points.append(xy)
        scores.append(entry["score"])
        areas.append(extent[0] * extent[1])
    if entries and not at:
        report.add(NO_RESULT, f"of {len(entries)}")
    return KeypointResults(
        np.array(at, np.int64), np.array(points, np.float64).reshape(-1, k, 2), np.array(scores, np.float64),
        np.array(areas, np.float64),
    )  # fmt: skip
