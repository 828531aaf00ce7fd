"""Reading person boxes from JSON files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpose.data.coco import image_size

EXPECTED = (
    'expected {"file name": [[x1, y1, x2, y2], ...]}, a COCO annotation file, or a list of '
    '{"file_name": ..., "bbox": [x, y, width, height]}'
)


@dataclass
class BoxesOfImage:
    """Boxes [P][4] xyxy, which are checked against their image later, and as many scores, 1 where none is given.

    size: (height, width) of the image that they are for, (0, 0) if it is not said.
    """

    boxes: list[Any] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)


def read_boxes(path: str | Path) -> dict[str, BoxesOfImage]:
    """Boxes by image file name.

    Accepts ``{"name.jpg": [[x1, y1, x2, y2], ...]}``, a COCO file (``images`` and ``annotations`` with ``bbox`` [x, y,
    width, height]) and a list of ``{"file_name": ..., "bbox": [x, y, width, height]}``; the latter two with a ``score``
    for each box if there is one. Of a COCO file crowds are left out, and, if one of its categories is called person,
    all others.

    Raises:
        FileNotFoundError: no such file. ValueError: not JSON, or another structure.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():  # a pipe will do
        raise FileNotFoundError(f"boxes {path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"boxes {path}: not valid JSON: {error}") from None
    try:
        if isinstance(content, dict) and "images" in content and "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            people = {c["id"] for c in content.get("categories") or [] if c.get("name") == "person"}
            found = {image["file_name"]: BoxesOfImage(size=image_size(image)) for image in content["images"]}
            for annotation in content["annotations"]:
                if annotation.get("iscrowd") or (people and annotation.get("category_id") not in people):
                    continue
                _add(found[names[annotation["image_id"]]], annotation)
            return found
        if isinstance(content, dict):
            for name, boxes in content.items():
                if not isinstance(boxes, list):
                    raise ValueError(f"the entry {name!r} is {boxes!r:.60}, not a list of boxes")
                if len(boxes) == 4 and not any(isinstance(box, (list, dict)) for box in boxes):
                    content[name] = [boxes]  # one box, as `PoseEstimator` takes it
            return {name: BoxesOfImage(boxes, [1.0] * len(boxes)) for name, boxes in content.items()}
        if isinstance(content, list):
            found = {}
            for entry in content:
                _add(found.setdefault(entry["file_name"], BoxesOfImage()), entry)
            return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"boxes {path}: {reason}; {EXPECTED}") from None
    raise ValueError(f"boxes {path}: holds a {type(content).__name__}; {EXPECTED}")


def boxes_for(found: dict[str, BoxesOfImage], path: Path, namesakes: list[Path]) -> BoxesOfImage | None:
    """Those of the image at `path`, by as much of its path as is known; None if nothing is.

    Raises:
        ValueError: what is known is the end of the path of one of the `namesakes`, too.
    """
    for i in range(len(path.parts)):
        name = str(Path(*path.parts[i:]))
        if name in found:
            known = len(path.parts) - i
            same = [p for p in namesakes if p != path and p.parts[-known:] == path.parts[i:] and str(p) not in found]
            if i > 0 and same:
                raise ValueError(f"{path}: {name!r} may be {same[0]} as well; give more of the path")
            return found[name]
    return None


def _add(image: BoxesOfImage, entry: dict[str, Any]) -> None:
    score = float(entry.get("score", 1.0))
    if not math.isfinite(score):
        raise ValueError(f"score must be finite, got {score}")
    image.boxes.append(_xyxy(entry["bbox"]))
    image.scores.append(score)


def _xyxy(bbox: Any) -> list[float]:
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError(f"bbox must be [x, y, width, height], got {bbox!r:.60}")
    x, y, w, h = (float(v) for v in bbox)
    return [x, y, x + w, y + h]
