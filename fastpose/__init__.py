"""fastpose: human pose estimation that is small, fast and easy to install."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastpose")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0.0.0"

from fastpose.checkpoints import load_checkpoint
from fastpose.images import ImageError
from fastpose.models import create_model, list_models
from fastpose.ops import set_fused, use_fused
from fastpose.pipeline import BoxError, PoseEstimator
from fastpose.plan import NotOptimizable, Optimized, optimize
from fastpose.poses import Poses
from fastpose.skeletons import Skeleton, get_skeleton
from fastpose.tracking import Tracker, track
from fastpose.video import Video

__all__ = [
    "BoxError",
    "ImageError",
    "PoseEstimator",
    "Poses",
    "Skeleton",
    "Tracker",
    "Video",
    "create_model",
    "get_skeleton",
    "NotOptimizable",
    "Optimized",
    "list_models",
    "load_checkpoint",
    "optimize",
    "set_fused",
    "track",
    "use_fused",
]
