from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpose
from fastpose.counting import count_macs


def macs_by_output(model: nn.Module, size: tuple[int, int]) -> int:
    """As the published figures count: a transposed convolution by its output positions, four times its input's."""
    totals = []

    def add(layer, inputs, output):
        totals.append(layer.weight.numel() * (output[0, 0].numel() - inputs[0][0, 0].numel()))

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.ConvTranspose2d)]
    macs = count_macs(model, size)
    for hook in hooks:
        hook.remove()
    return macs + sum(totals)


@pytest.mark.parametrize(("name", "printed"), [("simplebaseline_resnet50", 8.90), ("simplebaseline_resnet152", 15.7)])
def test_printed_cost(name, printed):
    macs = macs_by_output(fastpose.create_model(name), (256, 192))
    assert macs / 2**30 == pytest.approx(printed, rel=0.011)


def test_published_state_dict_keys():
    model = fastpose.create_model("simplebaseline_resnet50", blocks=(1, 1, 1, 1))
    state = model.state_dict()
    assert state["layer4.0.conv2.weight"].shape == (512, 512, 3, 3)
    assert state["head.deconv_layers.0.weight"].shape == (2048, 256, 4, 4)
    assert state["head.deconv_layers.7.running_mean"].shape == (256,)
    assert state["head.final_layer.weight"].shape == (17, 256, 1, 1)
    # the stride is in the 3x3 convolution
    assert model.layer2[0].conv2.stride == (2, 2) and model.layer2[0].conv1.stride == (1, 1)


def test_options():
    model = fastpose.create_model("simplebaseline_resnet50", blocks=(1, 1, 1, 1), deconv_width=32, num_keypoints=3)
    assert model(torch.zeros(2, 3, 64, 32)).shape == (2, 3, 16, 8)
    with pytest.raises(ValueError, match="blocks must have 4 positive entries"):
        fastpose.create_model("simplebaseline_resnet50", blocks=(3, 4, 6))
