from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.layers import CBAM
from fastpose.models.hr_litenet import LBasic

# options: parameters in M and multiply-accumulates in G that the readings of the paper cost
READINGS = [
    ({"widening": "none"}, 1.860, 1.405),
    ({"widening": "concat"}, 1.864, 1.419),
    ({"widening": "none", "dense_exchange": True}, 2.240, 1.570),
    ({"widening": "none", "dense_transitions": True}, 2.377, 1.829),
    ({"widening": "none", "modules": (1, 4, 3)}, 4.001, 1.890),
    ({"widening": "none", "cbam_ratio": 8}, 1.971, 1.405),
    ({"cbam_after_add": True}, 1.877, 1.472),
]


@pytest.mark.parametrize(("options", "parameters", "macs"), READINGS)
def test_readings(options, parameters, macs):
    model = fastpose.create_model("hr_litenet", **options)
    got = count_parameters(model) / 1e6, count_macs(model, (256, 256)) / 1e9
    assert got == (pytest.approx(parameters, abs=6e-4), pytest.approx(macs, abs=6e-4))


def test_published_figures():
    model = fastpose.create_model("hr_litenet")
    assert count_parameters(model) / 1e6 == pytest.approx(1.92, rel=0.03)
    assert count_macs(model, (256, 256)) / 1e9 == pytest.approx(1.46, rel=0.01)


def test_cbam_is_a_channel_gate_and_then_a_spatial_gate():
    cbam = CBAM(32, 8)
    x = torch.randn(2, 32, 6, 5)

    def mlp(v):
        return F.linear(F.relu(F.linear(v, cbam.reduce.weight[:, :, 0, 0])), cbam.expand.weight[:, :, 0, 0])

    y = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[:, :, None, None]
    maps = torch.stack([y.mean(1), y.amax(1)], 1)
    y = y * torch.sigmoid(F.conv2d(maps, cbam.spatial.conv.weight, padding=3))
    torch.testing.assert_close(cbam(x), y)
    with pytest.raises(ValueError, match="ratio must be between 1 and 32"):
        CBAM(32, 33)


def test_l_basic_is_a_sum_of_three():
    block = LBasic(32, 16).eval()
    x = torch.randn(1, 32, 8, 8)
    torch.testing.assert_close(block(x), F.relu(x + block.separable2(block.separable1(x)) + block.cbam(x)))
    assert (block.separable2(x) < 0).any(), "no ReLU before the sum"


@pytest.mark.parametrize("after", [False, True])
def test_l_block(after):
    first, second = fastpose.create_model("hr_litenet", cbam_after_add=after).eval().layer1[:2]
    x = torch.randn(1, 64, 8, 8)
    t = first.separable(first.reduce(x))
    wide = first.features.conv(t) + first.features.ghost(t)
    left = first.left(x)
    expected = F.relu(first.cbam(wide + left) if after else first.cbam(wide) + left)
    torch.testing.assert_close(first(x), expected)
    t = second.features(second.separable(second.reduce(expected)))
    result = second.cbam(t + expected) if after else second.cbam(t) + expected
    torch.testing.assert_close(second(expected), F.relu(result))


def test_options():
    for options in ({"widening": "concat"}, {"dense_exchange": True, "dense_transitions": True}):
        model = fastpose.create_model("hr_litenet", **options)
        sum(y.sum() for y in model(torch.randn(2, 3, 64, 32))).backward()
        assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="widening must be 'add', 'concat' or 'none', got 'both'"):
        fastpose.create_model("hr_litenet", widening="both")
    with pytest.raises(ValueError, match="cbam_ratio must be between 1 and the smallest width 32, got 33"):
        fastpose.create_model("hr_litenet", cbam_ratio=33)
