"""Shared parameters: tolerances, seeds, and what is skipped when the compiled operators are not used."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fastpose.ops import _backend

# relative to 1 + |expected|; half types are computed in float32 and rounded once
TOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

needs_kernels = pytest.mark.skipif(not _backend.LOADED, reason=f"compiled operators: {_backend.WHY_NOT}")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FASTPOSE_FUSED") == "1" and not _backend.LOADED:
        raise pytest.UsageError("FASTPOSE_FUSED=1 but the kernels are not loaded: nothing would be tested")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest |got - expected| / (1 + |expected|) within the tolerance, NaN where and only where expected is NaN."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    got, expected = got.double(), expected.double()
    assert torch.equal(got.isnan(), expected.isnan())
    same = (got == expected) | got.isnan()
    error = torch.where(same, 0.0, (got - expected).abs() / (1 + expected.abs()))
    assert error.numel() == 0 or float(error.max()) <= tolerance, float(error.max())


@pytest.fixture
def photo() -> np.ndarray:
    """A synthetic photo: smooth noise, uint8 RGB [240, 320, 3]."""
    import cv2

    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
