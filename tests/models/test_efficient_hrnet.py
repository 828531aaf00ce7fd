from __future__ import annotations

import math

import pytest
import torch

import fastpose
from fastpose.counting import count_parameters
from fastpose.models._registry import model_entry
from fastpose.models.efficient_hrnet import MBConv, SameConv, backbone_width, branch_widths
from tests.models.published import macs_by_output


@pytest.mark.parametrize("name", [f"efficient_hrnet_h{i}" for i in range(5)])
def test_published_sizes_are_those_of_the_authors_counter(name):
    published = model_entry(name).published[0]
    with torch.device("meta"):
        model = fastpose.create_model(name)
    # the counter adds the parameters of each inverted residual block to those of its layers, and prints truncated
    twice = count_parameters(model) + sum(count_parameters(m) for m in model.modules() if isinstance(m, MBConv))
    assert math.floor(twice / 1e5) / 10 == published.parameters
    assert round(macs_by_output(model, published.input_size[0]) / 1e9, 1) == published.gflops


def test_widths():
    assert [backbone_width(c, 0) for c in (16, 24, 40, 80, 112, 192, 320)] == [16, 24, 40, 80, 112, 192, 320]
    assert [backbone_width(c, -1) for c in (16, 24, 40, 80, 112, 192, 320)] == [16, 24, 40, 72, 104, 176, 288]
    assert [backbone_width(c, -2) for c in (16, 24, 40, 80, 112, 192, 320)] == [16, 24, 32, 64, 96, 160, 264]
    assert [branch_widths(r) for r in (0, -1, -2)] == [(32, 64, 128, 256), (26, 52, 103, 206), (21, 42, 83, 166)]


@pytest.mark.parametrize("name", [f"efficient_hrnet_h{i}" for i in range(5)])
def test_the_backbone_is_tapped_at_all_four_resolutions(name):
    model = fastpose.create_model(name).eval()
    x, found = torch.zeros(1, 3, 64, 96), []
    for i, block in enumerate(model.features):
        x = block(x)
        if i in model.taps:
            found.append(tuple(x.shape[1:]))
    r = model.config.r
    assert found == [(backbone_width(c, r), 64 // s, 96 // s) for c, s in ((24, 4), (40, 8), (112, 16), (320, 32))]
    assert model.taps[-1] == len(model.features) - 1


@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (3, 1), (5, 1), (3, 2), (5, 2)])
def test_padding_is_smaller_in_front(kernel_size, stride):
    conv = SameConv(1, 1, kernel_size, stride).eval()
    x = torch.randn(1, 1, 8, 12)
    front, back = (kernel_size - stride) // 2, (kernel_size - stride + 1) // 2
    padded = torch.zeros(1, 1, 8 + front + back, 12 + front + back)
    padded[:, :, front : front + 8, front : front + 12] = x
    weight = conv[1].weight[0, 0]
    expected = torch.nn.functional.silu((padded[0, 0, :kernel_size, :kernel_size] * weight).sum() / (1 + 1e-5) ** 0.5)
    assert conv(x).shape == (1, 1, 8 // stride, 12 // stride)
    torch.testing.assert_close(conv(x)[0, 0, 0, 0], expected)


def test_residuals_are_dropped_in_training_only():
    block = MBConv(4, 4, expansion=6, kernel_size=3, stride=1, drop=0.5)
    x = torch.randn(64, 4, 4, 4)
    dropped = (block(x) == x).flatten(1).all(1)
    assert 8 < int(dropped.sum()) < 56
    block.eval()
    assert not (block(x) == x).flatten(1).all(1).any()


def test_options():
    for changes, message in (
        ({"r": 1}, "r must be 0 or negative, got 1"),
        ({"modules": (1, 2)}, r"modules must have 3 positive entries, .* got \(1, 2\)"),
        ({"drop_connect": 1.0}, "drop_connect must be at least 0 and below 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            fastpose.create_model("efficient_hrnet_h4", **changes)
