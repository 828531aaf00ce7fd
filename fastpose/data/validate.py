"""What is wrong with a data set: what its reader found, and what only the images and everybody together show."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from fastpose.data.base import UNREADABLE, PoseData, Report, read_annotated
from fastpose.images import ImageError

TOLERANCE = 2.0  # pixels


def validate_data(data: PoseData, read_images: bool = True, quiet: bool = True) -> Report:
    """Check `data` as `load_dataset` returned it; the findings join those of the reader in `PoseData.report`.

    Looked for are images that cannot be read or have another size than annotated, keypoints and boxes outside them,
    keypoints that do not fit their person's box, boxes that look like two corners, coordinates that look like fractions
    of the image, people annotated twice and keypoints that nobody has.

    Args:
        read_images: decode every image; without it only the annotations are checked.
    """
    report = data.report
    files = data.image_files()
    sizes = {}
    if data.annotated is not None:
        for path, (height, width) in zip(data.annotated.files, data.annotated.sizes.tolist(), strict=True):
            sizes[path] = (height, width)
    found = {}
    for path in tqdm(files if read_images else [], unit="image", disable=quiet):
        try:
            found[path] = read_annotated(path, sizes.get(path)).shape[:2]
        except ImageError as error:
            if path.exists():  # the missing ones are reported
                report.add(UNREADABLE, error)

    people: dict[object, int] = {}
    with_people = set()
    for i, path in enumerate(data.images):
        labelled = data.labelled[i]
        points = data.keypoints[i][labelled]
        with_people.add(path)
        if data.annotated is None and path in found:
            height, width = found[path]
            if len(points) and ((points < 0).any() or (points > [width, height]).any()):
                report.add("labelled keypoint outside the image", f"{path.name}, person {i}")
            x1, y1, x2, y2 = data.boxes[i]
            if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
                report.add("box outside the image (not estimated)", f"{path.name}, person {i}")
        if len(points) > 2:
            key = (path, labelled.tobytes(), points.tobytes())
            if key in people:
                report.add("person annotated twice", f"{path.name}, people {people[key]} and {i}")
            people.setdefault(key, i)
    _check_boxes(data)
    for path in files:
        if path not in with_people:
            report.add("image without people to estimate", path.name, wrong=False)
    if len(data):
        for k in np.flatnonzero(~data.labelled.any(0)):
            report.add("keypoint that nobody has", data.skeleton.names[k])
    else:
        report.add("nobody to estimate", "the whole split")
    return report


def _check_boxes(data: PoseData) -> None:
    """What does not fit together in the annotations of a person; only data in COCO's format have boxes of their own."""
    if data.annotated is None:
        return
    people, report = data.annotated.people, data.report
    corners, several = 0, 0
    for i in np.flatnonzero(~people.ignored & people.visible.any(1)):
        path = data.annotated.files[people.image[i]]
        height, width = data.annotated.sizes[people.image[i]]
        points, (x, y, w, h) = people.keypoints[i][people.visible[i]], people.boxes[i]
        name = f"{path.name}, person {i}"
        if height and (x + w > width + TOLERANCE or y + h > height + TOLERANCE or min(x, y) < -TOLERANCE):
            report.add("box reaches beyond the image (clipped)", name)
        margin = 0.1 * max(w, h)
        outside = (points < [x - margin, y - margin]) | (points > [x + w + margin, y + h + margin])
        if 2 * outside.any(1).sum() > len(points):
            report.add("most labelled keypoints lie outside the person's box", name)
        if len(points) > 1:
            if np.ptp(points, axis=0).max() < TOLERANCE:
                report.add("all labelled keypoints at one place (fractions of the image instead of pixels?)", name)
            several += 1
            corners += bool(w > x and h > y and (points >= [x, y]).all() and (points <= [w, h]).all())
    if several >= 3 and corners > 0.9 * several:
        report.add("boxes look like [x1, y1, x2, y2], expected [x, y, width, height]", f"{corners} of {several}")
