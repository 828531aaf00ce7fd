"""Shared parameters: tolerances, seeds, and what is skipped when the compiled operators are not used."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import library as torch_library

from fastpose.ops import _backend

opcheck = torch_library.opcheck

# relative to 1 + |expected|; half types are computed in float32 and rounded once
TOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

needs_kernels = pytest.mark.skipif(not _backend.LOADED, reason=f"compiled operators: {_backend.WHY_NOT}")


CUDA_REASON = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else "the operator library has no CUDA kernels"
    if not _backend.has_kernel("dw_upsample", "cuda")
    else ""
)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(bool(CUDA_REASON), reason=CUDA_REASON)]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where an operator is tested: on the CPU, and on a CUDA device if there is one and kernels for it."""
    torch.backends.cudnn.allow_tf32 = False  # the reference must be exact
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FASTPOSE_FUSED") == "1" and not _backend.LOADED:
        raise pytest.UsageError("FASTPOSE_FUSED=1 but the kernels are not loaded: nothing would be tested")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest |got - expected| / (1 + |expected|) within the tolerance, NaN where and only where expected is NaN."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert torch.equal(got.isnan(), expected.isnan())
    same = (got == expected) | got.isnan()
    error = torch.where(same, 0.0, (got - expected).abs() / (1 + expected.abs()))
    assert error.numel() == 0 or float(error.max()) <= tolerance, float(error.max())


def shifted(t: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy with the same strides that begins `offset` values into its storage."""
    storage = torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, t.stride(), offset).copy_(t)


@pytest.fixture
def photo() -> np.ndarray:
    """A synthetic photo: smooth noise, uint8 RGB [240, 320, 3]."""
    import cv2

    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
