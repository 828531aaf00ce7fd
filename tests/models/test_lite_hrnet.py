from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.models._registry import model_entry
from fastpose.models.hrnet import Exchange
from fastpose.models.lite_hrnet import GateBranches, LegacyExchange, LiteHRNetConfig, ToSmallestGrid, separable_link
from tests.test_models import build

WIDTHS = (6, 8, 10, 12)


def branches(*widths: int) -> list[torch.Tensor]:
    """Random branches of a smallest grid of 3 x 2."""
    n = len(widths)
    return [torch.randn(2, w, 3 << (n - 1 - j), 2 << (n - 1 - j), dtype=torch.float64) for j, w in enumerate(widths)]


def terms(rows, x, i: int) -> list[torch.Tensor]:
    """What every branch sends to branch i."""
    return [x[j] if i == j else rows[i][j](x[j]) for j in range(len(x))]


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("inplace_relu", [False, True])
def test_exchange_against_a_loop(n, inplace_relu):
    legacy = LegacyExchange(WIDTHS[:n], inplace_relu).double().eval()
    clean = Exchange(WIDTHS[:n], n, down=separable_link).double().eval()
    clean.load_state_dict(legacy.state_dict())
    x = branches(*WIDTHS[:n])
    with torch.no_grad():
        for i, y in enumerate(clean(x)):
            assert torch.allclose(y, sum(terms(clean, x, i)).relu(), rtol=1e-12)
        seen = 2 * x[0] + sum(terms(legacy, x, 0)[1:])
        expected = [seen.relu()]
        if inplace_relu:
            seen = seen.relu()
        for i in range(1, n):
            sent = terms(legacy, [seen, *x[1:]], i)
            expected.append((sent[0] + sum(sent)).relu())
        for y, e in zip(legacy(x), expected, strict=True):
            assert torch.allclose(y, e, rtol=1e-12)
        assert not torch.allclose(clean(x)[-1], expected[-1], rtol=1e-3)


def test_legacy_fuse_is_off_unless_asked_for():
    plain, legacy = build("naive_lite_hrnet_18"), build("naive_lite_hrnet_18", legacy_fuse=True)
    legacy.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert (legacy(x) - plain(x)).std() > 0.1 * plain(x).std()
    scripted = torch.jit.script(legacy)
    with torch.no_grad():
        assert torch.allclose(scripted(x), legacy(x), rtol=1e-4, atol=1e-4)


def test_smallest_grid_equals_adaptive_pooling_and_nearest_upsampling():
    x = branches(*WIDTHS)
    pooled = torch.cat([F.adaptive_avg_pool2d(s, (3, 2)) for s in x], 1)
    assert torch.allclose(ToSmallestGrid(4)(x), pooled, rtol=1e-12)
    gates = torch.split(pooled, list(WIDTHS), 1)
    for y, s, g in zip(GateBranches(WIDTHS)(x, pooled), x, gates, strict=True):
        assert torch.equal(y, s * F.interpolate(g, size=s.shape[2:]))


@pytest.mark.parametrize("name", ["lite_hrnet_18", "lite_hrnet_30", "naive_lite_hrnet_18", "wider_naive_lite_hrnet_18"])
def test_published_table(name):
    model = fastpose.create_model(name)
    for published in model_entry(name).published:
        assert abs(count_parameters(model) / 1e6 - published.parameters) < 0.07
        # the printed figures contain batch norm, activations and pooling
        assert 0.94 < count_macs(model, published.input_size) / 1e9 / published.gflops < 0.98


def test_keys_are_those_of_the_published_checkpoints():
    keys = set(fastpose.create_model("lite_hrnet_18").state_dict())
    for key in (
        "stem.branch1.0.conv.weight",
        "stem.linear_conv.bn.running_var",
        "transition0.0.2.weight",
        "transition2.3.0.1.running_mean",
        "stage2.0.fuse_layers.3.0.1.3.num_batches_tracked",
        "stage0.1.layers.1.cross_resolution_weighting.conv2.bn.bias",
        "stage1.3.layers.0.depthwise_convs.2.conv.weight",
        "stage2.1.layers.1.spatial_weighting.3.conv1.conv.bias",
        "stage2.0.fuse_layers.0.3.1.weight",
        "head_layer.projects.3.pointwise_conv.conv.weight",
        "final_layer.bias",
    ):
        assert key in keys, key
    naive = set(fastpose.create_model("naive_lite_hrnet_18").state_dict())
    assert "stage2.1.layers.3.1.branch2.2.bn.weight" in naive


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "full"}, "block must be 'lite' or 'naive', got 'full'"),
        ({"widths": (40, 80)}, r"widths must have four entries, one per branch, got \(40, 80\)"),
        ({"widths": (41, 80, 160, 320)}, "must be even"),
        ({"modules": (2, 4)}, r"modules must be three positive numbers, one per stage, got \(2, 4\)"),
        ({"blocks": (2, 0, 2)}, r"blocks must be three positive numbers, one per stage, got \(2, 0, 2\)"),
        ({"reduce_ratio": 61}, "reduce_ratio must be between 1 and 60"),
        ({"spatial_ratio": 0}, "spatial_ratio must be between 1 and 20"),
        ({"num_keypoints": 0}, "num_keypoints must be at least 1, got 0"),
    ],
)
def test_bad_configurations_say_what_is_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        LiteHRNetConfig(**changes)
