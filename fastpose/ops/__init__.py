"""The operators: each file has the reference, the public function and the registrations of one op."""

from fastpose.ops._backend import set_fused, use_fused
from fastpose.ops.dw_upsample import dw_upsample, dw_upsample_reference
from fastpose.ops.ghost_cheap import ghost_cheap, ghost_cheap_reference
from fastpose.ops.oks_nms import oks_nms, oks_nms_reference, rescore
from fastpose.ops.run_plan import run_plan

__all__ = [
    "dw_upsample",
    "dw_upsample_reference",
    "ghost_cheap",
    "ghost_cheap_reference",
    "oks_nms",
    "oks_nms_reference",
    "rescore",
    "run_plan",
    "set_fused",
    "use_fused",
]
