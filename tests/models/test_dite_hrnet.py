from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.models._registry import model_entry
from fastpose.models.dite_hrnet import (
    CellPool,
    DiteHRNetConfig,
    DynamicSplitConv,
    GlobalContext,
    KernelAggregation,
    LegacyCellPool,
)
from tests.test_models import build, relative


@pytest.mark.parametrize(("k", "stride", "groups"), [(1, 1, 1), (3, 2, 6), (5, 1, 6)])
def test_every_image_is_convolved_with_its_own_kernel(k, stride, groups):
    conv = KernelAggregation(6, 6, k, stride, groups, kernels=4).double()
    x, mix = torch.randn(3, 6, 8, 6, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    with torch.no_grad():
        y = conv(x, mix)
        for b in range(3):
            kernel = sum(mix[b, i] * conv.weight[i] for i in range(4)).view(6, 6 // groups, k, k)
            assert torch.allclose(y[b], F.conv2d(x[b : b + 1], kernel, None, stride, k // 2, 1, groups)[0], rtol=1e-12)


def test_split_convolution_grows_its_kernels():
    conv = DynamicSplitConv(8, groups=4, kernels=1)
    assert [m.conv.kernel_size for m in conv.conv] == [(3, 3), (5, 5), (7, 7), (9, 9)]
    assert DynamicSplitConv(8, groups=1, kernels=2)(torch.randn(2, 8, 5, 4)).shape == (2, 8, 5, 4)


def test_pooling_of_cells_against_loops():
    x, mask = torch.randn(2, 3, 8, 4, dtype=torch.float64), torch.randn(2, 1, 8, 4, dtype=torch.float64)
    y, legacy = CellPool(2)(x, mask), LegacyCellPool(2)(x, mask)
    assert y.shape == legacy.shape == (2, 3, 4, 2)
    for b in range(2):
        softmax = mask[b].flatten().softmax(0)
        for cell in range(8):
            i, j = cell // 2, cell % 2
            weight = mask[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten().softmax(0)
            for c in range(3):
                pixels = x[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
                assert torch.allclose(y[b, c, i, j], (pixels * weight).sum(), rtol=1e-12)
                # as published: four consecutive numbers of the map of all channels
                start = (cell * 3 + c) * 4
                pixels = x[b].flatten()[start : start + 4]
                expected = (pixels * softmax[cell * 4 : cell * 4 + 4]).sum()
                assert torch.allclose(legacy[b, c, i, j], expected, rtol=1e-12)


def test_global_context_is_the_pooling_of_a_single_cell():
    module, x = GlobalContext(8, 4).double().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        context = CellPool(4)(x, module.conv_mask(x))
        assert torch.allclose(module(x), module.bn(x * module.channel_attention(context)), rtol=1e-12)


def test_published_table():
    model = fastpose.create_model("dite_hrnet_30")
    for published in model_entry("dite_hrnet_30").published:
        assert published.parameters <= count_parameters(model) / 1e6 < published.parameters + 0.1
        assert 0.95 < count_macs(model, published.input_size) / 1e9 / published.gflops < 0.98
    # Dite-HRNet-18: published 1.1 M and 209.8 M
    small = fastpose.create_model("dite_hrnet_30", modules=(2, 4, 2))
    assert count_parameters(small) == 1_185_477
    assert 0.95 < count_macs(small, (256, 192)) / 209.8e6 < 0.98


def test_legacy_flags_change_the_result():
    small = {"modules": (1, 1, 1), "blocks": (1, 1, 1)}
    plain, x = build("dite_hrnet_30", **small), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for changes in ({"legacy_fuse": True}, {"legacy_pool": True}):
            other = build("dite_hrnet_30", **small, **changes)
            other.load_state_dict(plain.state_dict())
            expected = other(x)
            assert relative(plain(x), expected) > 1e-3
            assert relative(torch.jit.script(other)(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": (1, 1, 2)}, r"groups must be four positive numbers, one per branch, got \(1, 1, 2\)"),
        ({"kernels": (4, 4, 2, 0)}, "kernels must be four positive numbers"),
        ({"groups": (3, 1, 1, 1)}, "half of each width must be a multiple of its groups"),
        ({"stem_kernels": 0}, "stem_kernels and dense_ratio must be positive, got 0 and 8"),
        ({"widths": (40,)}, "widths must have four entries"),
    ],
)
def test_bad_configurations_say_what_is_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        DiteHRNetConfig(**changes)
