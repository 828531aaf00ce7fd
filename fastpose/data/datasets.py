"""`load_dataset`: every data set by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpose.data.base import METRICS, PoseData
from fastpose.data.coco import load_coco, load_crowdpose, load_custom
from fastpose.data.lsp import load_lsp
from fastpose.data.lspet import load_lspet
from fastpose.data.mpii import load_mpii
from fastpose.skeletons import COCO17, CROWDPOSE14, Skeleton, get_skeleton, read_skeleton

DATASETS = ("coco", "crowdpose", "custom", "lsp", "lspet", "mpii")
IN_COCO_FORMAT = ("coco", "crowdpose", "custom")


def usual_metric(name: str) -> str:
    """How the data set `name` is scored, one of `METRICS`."""
    return {"lsp": "PCK@0.2", "lspet": "PCK@0.2", "mpii": "PCKh@0.5"}.get(name, "AP")


def load_dataset(
    name: str,
    root: str | Path,
    split: str,
    *,
    skeleton: str | Path | Skeleton | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    detections: str | Path | list[Any] | None = None,
    least_score: float = 0.0,
    keep_missing: bool = False,
    limit: int = 0,
    metric: str | None = None,
) -> PoseData:
    """The `split` of a data set unpacked at `root`; `PoseData.report` says what was skipped and why.

    Args:
        name: one of `DATASETS`. How each is laid out on disk and what its splits are called is said at `load_coco`,
            `load_crowdpose`, `load_custom` (any skeleton), `load_lsp`, `load_lspet` and `load_mpii`.
        skeleton: for "custom": a `Skeleton`, the name of a built-in one, or a file for `read_skeleton`. Without it
            ``skeleton.toml`` or ``skeleton.json`` at `root`, or else what the annotation file says.
        annotations, images: other places of the annotation file and the image folder (not for LSP and LSPET).
        detections, least_score, keep_missing: see `load_coco_format`; only for data in COCO's format.
        limit: only the first images of the split (0: all); the report is about whole annotation files.
        metric: one of `METRICS`, if not the data set's own (PCK for LSP, PCKh for MPII, AP otherwise).

    Raises:
        FileNotFoundError: the annotations, or all images, are missing.
        ValueError: unknown name, split or metric, or an option that the data set does not have.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if name not in IN_COCO_FORMAT and (detections is not None or keep_missing):
        raise ValueError(f"detections are for data in COCO's format ({', '.join(IN_COCO_FORMAT)}), not {name!r}")
    if name != "custom" and skeleton is not None:
        raise ValueError(f"a skeleton can be given for dataset 'custom' only, not {name!r}")
    if name in ("lsp", "lspet") and (annotations or images):
        raise ValueError(f"dataset {name!r} has fixed places; annotations and images cannot be given")
    if metric is not None and metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if detections is not None and metric not in (None, "AP"):
        raise ValueError(f"a detector's boxes can be scored by AP only, got {metric!r}")
    options: dict[str, Any] = {"annotations": annotations, "images": images}
    in_coco_format = {**options, "detections": detections, "least_score": least_score, "keep_missing": keep_missing}
    if name == "coco":
        data = load_coco(root, split, skeleton=COCO17, **in_coco_format)
    elif name == "crowdpose":
        data = load_crowdpose(root, split, skeleton=CROWDPOSE14, **in_coco_format)
    elif name == "custom":
        data = load_custom(root, split, skeleton=find_skeleton(skeleton, root), **in_coco_format)
    elif name == "mpii":
        data = load_mpii(root, split, **options)
    else:
        data = (load_lsp if name == "lsp" else load_lspet)(root, split, limit)
    return replace(data.first_images(limit), metric=metric or data.metric)


def find_skeleton(skeleton: str | Path | Skeleton | None, root: str | Path = ".") -> Skeleton | None:
    """The skeleton meant by an argument of `load_dataset`; None: as the annotation file says."""
    if isinstance(skeleton, Skeleton):
        return skeleton
    if skeleton is not None:
        is_file = isinstance(skeleton, Path) or Path(skeleton).suffix.lower() in (".toml", ".json")
        return read_skeleton(skeleton) if is_file else get_skeleton(str(skeleton))
    for name in ("skeleton.toml", "skeleton.json"):
        if (Path(root) / name).is_file():
            return read_skeleton(Path(root) / name)
    return None
