from __future__ import annotations

import pytest
import torch

from fastpose.preprocess import MEAN, STD, normalize


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 1, 1), (3, 3, 64, 1), (0, 3, 4, 4)])
def test_normalize(shape):
    whole = torch.randint(0, 256, (shape[0], shape[2], 2 * shape[3], 3), dtype=torch.uint8)
    for crops in (torch.randint(0, 256, shape, dtype=torch.uint8), whole.permute(0, 3, 1, 2)[..., ::2]):
        before = crops.clone()
        got = normalize(crops)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
        expected = (crops.double() / 255 - mean) / std
        assert got.shape == expected.shape and got.dtype == torch.float32 and torch.equal(crops, before)
        assert torch.allclose(got.double(), expected, atol=1e-6)
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert normalize(torch.zeros(shape)).sum() == normalize(torch.zeros(shape, dtype=torch.uint8)).sum()
