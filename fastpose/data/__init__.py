"""Data sets as plain arrays (`PoseData`) and the batches that training draws from them."""

from fastpose.data.base import METRICS, MISSING, UNREADABLE, AnnotatedImages, PoseData, Report, read_annotated
from fastpose.data.coco import from_results, load_coco_format, skeleton_of_annotations, to_results
from fastpose.data.datasets import DATASETS, IN_COCO_FORMAT, load_dataset, usual_metric
from fastpose.data.lspet import load_lspet

__all__ = [
    "DATASETS",
    "IN_COCO_FORMAT",
    "METRICS",
    "MISSING",
    "UNREADABLE",
    "AnnotatedImages",
    "PoseData",
    "Report",
    "from_results",
    "load_coco_format",
    "load_dataset",
    "load_lspet",
    "read_annotated",
    "skeleton_of_annotations",
    "to_results",
    "usual_metric",
]
