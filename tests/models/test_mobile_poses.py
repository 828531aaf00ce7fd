"""Classification networks with the head of SimpleBaseline."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.layers import SqueezeExcite
from fastpose.models._registry import model_entry
from fastpose.models.ghostnet_pose import GhostBottleneck
from fastpose.models.mobilenetv3_pose import PAPER_ROWS
from fastpose.models.shufflenetv2_pose import StridedUnit

NAMES = ["ghostnet_pose", "mobilenetv2_pose", "mobilenetv3_pose", "shufflenetv2_pose"]


def published_cost(model: nn.Module, size: tuple[int, int]) -> float:
    """As the published figures count: two for every output of a batch norm and one for every output of an activation.

    In units of 2^30.
    """
    weights = {nn.BatchNorm2d: 2, nn.ReLU: 1, nn.ReLU6: 1, nn.Hardswish: 1}
    total = count_macs(model, size)
    for module in model.modules():
        if type(module) in weights:
            module.register_forward_hook(lambda m, _, output: outputs.append(weights[type(m)] * output.numel()))
    outputs: list[int] = []
    with torch.no_grad():
        fastpose.set_fused(model.eval(), False)(torch.zeros(1, 3, *size))
    return (total + sum(outputs)) / 2**30


@pytest.mark.parametrize("name", NAMES)
def test_published_table(name):
    for published in model_entry(name).published:
        model = fastpose.create_model(name)
        assert count_parameters(model) / 1e6 == pytest.approx(published.parameters, abs=0.051)
        assert published_cost(model, published.input_size) == pytest.approx(published.gflops, abs=0.0059)


def test_mobilenetv3_as_in_its_paper():
    model = fastpose.create_model("mobilenetv3_pose", rows=PAPER_ROWS)
    assert round(count_parameters(model) / 1e6, 3) == 9.005
    assert round(published_cost(model, (256, 256)), 3) == 1.784


def test_published_state_dict_keys():
    state = fastpose.create_model("mobilenetv2_pose").state_dict()
    assert state["layer1.0.conv.0.conv.weight"].shape == (32, 1, 3, 3)
    assert state["layer4.3.conv.2.bn.running_var"].shape == (64,)
    assert state["conv2.conv.weight"].shape == (1280, 320, 1, 1)
    assert state["head.deconv_layers.6.weight"].shape == (256, 256, 4, 4)
    state = fastpose.create_model("shufflenetv2_pose").state_dict()
    assert state["layers.0.0.branch1.1.conv.weight"].shape == (58, 24, 1, 1)
    assert state["layers.1.7.branch2.1.conv.weight"].shape == (116, 1, 3, 3)
    assert state["layers.3.bn.weight"].shape == (1024,)


def test_shuffle_unit_against_its_parts():
    unit, x = StridedUnit(6, 8).eval(), torch.randn(2, 6, 8, 4)
    with torch.no_grad():
        y, left, right = unit(x), unit.branch1(x), unit.branch2(x)
    assert y.shape == (2, 8, 4, 2)
    # channels of the two branches alternate
    assert torch.equal(y[:, 0::2], left) and torch.equal(y[:, 1::2], right)


def test_ghost_bottleneck():
    same = GhostBottleneck(16, (3, 48, 16, False, 1), 4)
    assert isinstance(same.shortcut, nn.Identity) and isinstance(same.depthwise, nn.Identity)
    strided = GhostBottleneck(24, (5, 72, 40, True, 2), 4)
    assert strided(torch.randn(2, 24, 8, 4)).shape == (2, 40, 4, 2)
    # hidden widths of the squeeze-and-excitation are multiples of four
    assert strided.se.reduce.weight.shape[0] == 20
    hidden = [
        m.reduce.weight.shape[0] for m in fastpose.create_model("ghostnet_pose").modules() if type(m) is SqueezeExcite
    ]
    assert hidden == [20, 32, 120, 168, 168, 240, 240]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mobilenetv2_pose", {"rows": ((1, 16, 1, 1),)}, "rows must be the seven of Table 2, got 1"),
        ("mobilenetv2_pose", {"rows": ((1, 16, 1, 1),) * 7}, r"four rows must have stride 2 and the others 1, got \[1"),
        ("mobilenetv2_pose", {"last_width": 0}, "widths must be positive, got 0 and 256"),
        ("mobilenetv3_pose", {"rows": PAPER_ROWS[:12]}, "four rows must have stride 2 and the others 1"),
        ("mobilenetv3_pose", {"deconv_width": 0}, "widths must be positive, got 960 and 0"),
        ("shufflenetv2_pose", {"widths": (116, 232)}, r"widths must be three even numbers, one per stage, got \(116"),
        ("shufflenetv2_pose", {"blocks": (4, 0, 4)}, "blocks must be three positive numbers"),
        ("shufflenetv2_pose", {"last_width": 0}, "widths must be positive, got 0 and 256"),
        ("ghostnet_pose", {"rows": ((3, 16, 16, False, 1),)}, "four rows must have stride 2 and the others 1"),
        ("ghostnet_pose", {"rows": ((3, 16, 15, False, 2),) * 4}, "the widths of all rows must be even"),
        ("ghostnet_pose", {"last_width": 0}, "widths must be positive, got 0 and 256"),
    ],
)
def test_bad_configurations_say_what_is_expected(name, changes, message):
    with pytest.raises(ValueError, match=message):
        fastpose.create_model(name, **changes)
    with pytest.raises(ValueError, match="num_keypoints must be at least 1, got 0"):
        fastpose.create_model(name, num_keypoints=0)
