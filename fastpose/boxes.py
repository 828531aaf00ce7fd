"""Reading person boxes from JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXPECTED = (
    'expected {"file name": [[x1, y1, x2, y2], ...]}, a COCO annotation file, or a list of '
    '{"file_name": ..., "bbox": [x, y, width, height]}'
)


def read_boxes(path: str | Path) -> dict[str, list[Any]]:
    """Boxes [P][4] xyxy by image file name.

    Accepts ``{"name.jpg": [[x1, y1, x2, y2], ...]}``, a COCO file (``images`` and ``annotations`` with ``bbox`` [x, y,
    width, height]) and a list of ``{"file_name": ..., "bbox": [x, y, width, height]}``. The numbers are checked against
    their image later.

    Raises:
        FileNotFoundError: no such file. ValueError: not JSON, or another structure.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"boxes {path}: no such file")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"boxes {path}: not valid JSON: {error}") from None
    try:
        if isinstance(content, dict) and "images" in content and "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            found: dict[str, list[Any]] = {name: [] for name in names.values()}
            for annotation in content["annotations"]:
                found[names[annotation["image_id"]]].append(_xyxy(annotation["bbox"]))
            return found
        if isinstance(content, dict):
            for name, boxes in content.items():
                if not isinstance(boxes, list):
                    raise ValueError(f"the entry {name!r} is {boxes!r:.60}, not a list of boxes")
            return content
        if isinstance(content, list):
            found = {}
            for entry in content:
                found.setdefault(entry["file_name"], []).append(_xyxy(entry["bbox"]))
            return found
    except (KeyError, TypeError, ValueError) as error:
        reason = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"boxes {path}: {reason}; {EXPECTED}") from None
    raise ValueError(f"boxes {path}: holds a {type(content).__name__}; {EXPECTED}")


def _xyxy(bbox: Any) -> list[float]:
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError(f"bbox must be [x, y, width, height], got {bbox!r:.60}")
    x, y, w, h = (float(v) for v in bbox)
    return [x, y, x + w, y + h]
