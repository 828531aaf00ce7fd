"""`run_plan`: the operator behind `fastpose.optimize`, a whole network in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpose.ops import _backend


def run_plan(x: Tensor, program: Tensor, weights: Tensor, outputs: list[int]) -> list[Tensor]:
    """Run an instruction list on images.

    Args:
        x: float32 [B, C, H, W] on the CPU, contiguous, channels-last or strided.
        program: int64 [n], instructions; weights: float32 [m], folded and packed: as ``csrc/cpu/run_plan.h`` describes.
        outputs: three numbers per output: channels c and size as a fraction p / q of the images', or 0 and 0 if it is
            none; then nothing that traces can tell it.

    Returns:
        One tensor [B, c, H p / q, W p / q] per output, channels-last if `x` is.

    Raises:
        ValueError: a wrong dtype or shape, a damaged program, or images the network cannot take.
        RuntimeError: somebody differentiates it.
    """
    if not torch.jit.is_scripting():
        _backend.refuse_tangents("run_plan", x)
    return torch.ops.fastpose.run_plan(x, program, weights, outputs)


def _fake(x: Tensor, program: Tensor, weights: Tensor, outputs: list[int]) -> list[Tensor]:
    results = []
    for i in range(0, len(outputs), 3):
        c, p, q = outputs[i : i + 3]
        height, width = x.shape[2] * p, x.shape[3] * p
        if q == 0 or (q > 1 and (height % q != 0 or width % q != 0)):
            raise RuntimeError(
                "run_plan: an optimised network cannot be traced by torch.compile or torch.export for images of "
                f"{x.shape[2]} x {x.shape[3]}, of which its output is no fixed fraction; trace the network itself"
            )
        results.append(_backend.empty_like_layout(x, [x.shape[0], c, height // q, width // q]))
    return results


def _elsewhere(x: Tensor, program: Tensor, weights: Tensor, outputs: list[int]) -> list[Tensor]:
    raise ValueError(f"an optimised network runs on the CPU, got images on {x.device}; use the network itself there")


if _backend.LOADED:
    _backend.register("run_plan", fake=_fake, reference=_elsewhere, autocast="float32")
