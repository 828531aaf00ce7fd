from __future__ import annotations

import pytest
import torch

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.models.hrnet import Exchange


def test_other_sizes_and_keypoints():
    small = fastpose.create_model("small_hrnet_w16")
    # printed: 0.54, 1.21 and 0.72, with batch norm and activations, which are 1.1 %
    for size, printed in (((256, 192), 0.54), ((384, 288), 1.21), ((256, 256), 0.72)):
        assert round(1.011 * count_macs(small, size) / 2**30, 2) == printed
    w48 = fastpose.create_model("hrnet_w48", num_keypoints=16)
    assert count_parameters(w48) == 63_595_745 - 49


def test_exchange_sums_what_it_should():
    torch.manual_seed(0)
    exchange = Exchange((4, 6), 2).eval()
    x = [torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)]
    y = exchange(x)
    assert torch.equal(y[0], torch.relu(x[0] + exchange[0][1](x[1])))
    assert torch.equal(y[1], torch.relu(exchange[1][0](x[0]) + x[1]))
    assert [len(exchange(x)), len(Exchange((4, 6), 1)(x))] == [2, 1]


def test_published_state_dict_keys():
    keys = set(fastpose.create_model("small_hrnet_w16").state_dict())
    assert {
        "conv1.weight",
        "bn2.running_var",
        "layer1.0.downsample.1.weight",
        "transition1.0.0.weight",
        "transition1.1.0.1.bias",
        "stage2.0.branches.1.0.conv2.weight",
        "stage3.0.fuse_layers.2.0.0.0.weight",
        "stage3.0.fuse_layers.2.0.1.1.running_mean",
        "stage4.0.fuse_layers.0.3.1.weight",
        "final_layer.bias",
    } <= keys
    assert not any(k.startswith(("stage4.0.fuse_layers.1", "transition2.0")) for k in keys)


def test_wrong_configurations():
    for changes, message in (
        ({"widths": (16, 32)}, "widths must have 4 entries"),
        ({"modules": (1, 1)}, "modules must have 3 positive entries"),
        ({"modules": (1, 0, 1)}, "modules must have 3 positive entries"),
        ({"num_keypoints": 0}, "num_keypoints must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fastpose.create_model("hrnet_w32", **changes)
