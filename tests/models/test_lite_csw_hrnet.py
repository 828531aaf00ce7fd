from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.models.lite_csw_hrnet import (
    CrossResolutionCSW,
    LiteCSWHRNetConfig,
    SingleResolutionCSW,
    kernel_size,
)
from tests.test_models import build, relative


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gates(x: np.ndarray, kernel: np.ndarray, window: np.ndarray, serial: bool) -> np.ndarray:
    """M_c * M_s of one image [C, H, W] by loops over channels and pixels (Eqs. 6, 9 and 10)."""
    c, h, w = x.shape
    k, r = len(kernel), len(kernel) // 2
    channel = np.zeros(c)
    for vector in (x.mean((1, 2)), x.max((1, 2))):
        padded = np.pad(vector, r)
        channel += [padded[i : i + k] @ kernel for i in range(c)]
    channel = sigmoid(channel)[:, None, None]
    seen = x * channel if serial else x
    padded = np.pad(np.stack([seen.mean(0), seen.max(0)]), ((0, 0), (3, 3), (3, 3)))
    spatial = [[(padded[:, i : i + 7, j : j + 7] * window).sum() for j in range(w)] for i in range(h)]
    return channel * sigmoid(np.array(spatial))


@pytest.mark.parametrize("order", ["parallel", "serial"])
@pytest.mark.parametrize("cross_weight", ["gates", "features"])
def test_weightings_against_loops(order, cross_weight):
    config = LiteCSWHRNetConfig(order=order, cross_weight=cross_weight)
    single, cross = SingleResolutionCSW(20, config).double(), CrossResolutionCSW((20, 6), config).double()
    x = [torch.randn(1, 20, 8, 6, dtype=torch.float64), torch.randn(1, 6, 4, 3, dtype=torch.float64)]

    def weight(module, features):
        kernel, window = module.gate.channel.conv.weight[0, 0], module.gate.spatial.conv.weight[0]
        return torch.from_numpy(gates(features[0].numpy(), kernel.numpy(), window.numpy(), order == "serial"))

    with torch.no_grad():
        assert torch.allclose(single(x[0])[0], x[0][0] * weight(single, x[0]), rtol=1e-12)
        z = torch.cat([F.avg_pool2d(x[0], 2), x[1]], 1)
        w = weight(cross, z)
        if cross_weight == "features":
            w = w * z[0]
        first, second = cross(x)
        assert torch.allclose(first[0], x[0][0] * w[:20].repeat_interleave(2, 1).repeat_interleave(2, 2), rtol=1e-12)
        assert torch.allclose(second[0], x[1][0] * w[20:], rtol=1e-12)


def test_kernel_sizes():
    usual = {c: kernel_size(c, 2, 1) for c in (20, 40, 80, 60, 160, 140, 300)}
    assert usual == {20: 3, 40: 3, 80: 3, 60: 3, 160: 5, 140: 5, 300: 5}
    literal = {kernel_size(c, 1, 2) for c in usual}
    assert literal == {7, 9, 11}


def test_readings_of_the_paper():
    """Parameters, and at 384x288 multiply-accumulates, of the readings named in the module."""
    model = fastpose.create_model("lite_csw_hrnet")
    assert round(count_macs(model, (384, 288)) / 1e6, 1) == 430.0
    blocks = fastpose.create_model("lite_csw_hrnet", blocks=(2, 2, 1))
    assert round(count_parameters(blocks) / 1e3) == 885
    literal = fastpose.create_model("lite_csw_hrnet", gamma=1.0, offset=2.0)
    assert 0 < count_parameters(literal) - count_parameters(model) < 1000


def test_lite_hrnet_weights_fit_all_but_the_weightings():
    model, lite = fastpose.create_model("lite_csw_hrnet"), fastpose.create_model("lite_hrnet_18")
    missing, unexpected = model.load_state_dict(lite.state_dict(), strict=False)
    assert missing and unexpected
    for key in (*missing, *unexpected):
        assert "cross_resolution_weighting" in key or "spatial_weighting" in key


@pytest.mark.parametrize("changes", [{"order": "serial"}, {"cross_weight": "features"}, {"legacy_fuse": True}])
def test_options_change_the_result_and_can_be_scripted(changes):
    model, other = build("lite_csw_hrnet"), build("lite_csw_hrnet", **changes)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        expected = other(x)
        assert relative(model(x), expected) > 1e-3
        assert relative(torch.jit.script(other)(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "both"}, "order must be 'parallel' or 'serial', got 'both'"),
        ({"cross_weight": "z"}, "cross_weight must be 'gates' or 'features', got 'z'"),
        ({"gamma": 0.0}, "gamma must be positive and offset not negative, got 0.0 and 1.0"),
        ({"blocks": (2, 2)}, "blocks must be three positive numbers"),
    ],
)
def test_bad_configurations_say_what_is_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        LiteCSWHRNetConfig(**changes)
