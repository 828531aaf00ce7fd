"""Data sets as plain arrays (`PoseData`) and the batches that training draws from them."""

from fastpose.data.base import PoseData
from fastpose.data.lspet import load_lspet

__all__ = ["PoseData", "load_lspet"]
