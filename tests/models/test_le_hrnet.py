from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.models.le_hrnet import CMFFM, MCAM, FusionLink

SIZE = (256, 192)


def unused_macs(model) -> int:
    """Multiply-accumulates of the outputs of the last fusion that are built and never evaluated."""
    x = [torch.zeros(1, c, SIZE[0] // 4 >> i, SIZE[1] // 4 >> i) for i, c in enumerate(model.config.widths)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for output in model.unused_outputs:
            if model.config.cmffm:
                output(x)
            else:
                for link, y in zip(output, x, strict=True):
                    link(y)
    return counter.get_total_flops() // 2


# options: parameters and multiply-accumulates with all outputs of the last fusion, parameters in M as printed
ABLATIONS = [
    ({}, 5_270_405, 1_603_325_856, 5.4),
    ({"cmffm": False}, 6_298_481, 2_063_194_112, 6.7),
    ({"mcam": False, "cmffm": False}, 5_302_129, 1_796_161_536, 5.3),
]


@pytest.mark.parametrize(("options", "parameters", "macs", "printed"), ABLATIONS)
def test_published_size(options, parameters, macs, printed):
    model = fastpose.create_model("le_hrnet", published_size=True, **options)
    assert count_parameters(model) == parameters
    assert parameters / 1e6 == pytest.approx(printed, rel=0.065)
    used = count_macs(model, SIZE)
    assert used + unused_macs(model) == macs
    default = fastpose.create_model("le_hrnet", **options)
    assert count_macs(default, SIZE) == used
    assert count_parameters(default) == parameters - count_parameters(model.unused_outputs)
    model.load_state_dict(default.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), default.eval()(x))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({"fc_layers": 1}, 4.304), ({"mcam_groups": 2, "fc_layers": 1}, 5.023), ({"mcam_groups": 2}, 5.990)],
)
def test_readings(options, parameters):
    model = fastpose.create_model("le_hrnet", published_size=True, **options)
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, abs=6e-4)


@pytest.mark.parametrize("options", [{"fc_layers": 1}, {"mcam": False}, {"cmffm": False}])
def test_options_have_no_unused_parameters(options):
    model = fastpose.create_model("le_hrnet", num_keypoints=3, **options)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("channels", "parameters"), [(32, 1_312), (64, 3_872), (128, 11_840), (256, 40_288)])
def test_mcam_is_equations_5_to_10_per_group(channels, parameters):
    mcam = MCAM(channels)
    assert count_parameters(mcam) == parameters
    x, c = torch.randn(2, channels, 6, 5), channels // 4
    outputs = []
    for g in range(4):
        own = slice(g * c, (g + 1) * c)
        sub = x[:, own]
        z = torch.cat([sub.mean(3), sub.mean(2)], 2)[..., None]
        gates = torch.sigmoid(F.conv2d(z, mcam.coordinate.weight[own], mcam.coordinate.bias[own]))
        coord = sub * gates[:, :, :6] * gates[:, :, 6:].transpose(2, 3)
        features = []
        for part, conv in zip(sub.split(mcam.split, 1), mcam.scales, strict=True):
            n = part.shape[1]
            weight = conv.weight[g * n : (g + 1) * n]
            features.append(F.conv2d(part, weight, padding=weight.shape[2] // 2, groups=n))
        multi = F.conv2d(torch.cat(features, 1), mcam.mix.weight[own], mcam.mix.bias[own])
        query = torch.softmax(coord.mean((2, 3)), 1)
        outputs.append(sub * torch.sigmoid(torch.einsum("bc,bchw->bhw", query, multi))[:, None])
    expected = torch.cat(outputs, 1)
    torch.testing.assert_close(mcam(x), expected)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mcam.to(memory_format=torch.channels_last)(last), expected)


def test_cmffm_adds_gated_channel_means():
    fusion = CMFFM((4, 6, 8), 3).eval()
    x = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2)]
    y = fusion(x)
    for i, output in enumerate(fusion):
        mean, total = x[i].mean((2, 3), keepdim=True), x[i].clone()
        for j, link in zip([j for j in range(3) if j != i], output.links, strict=True):
            source = x[j]
            for layer in link.down:
                source = layer(source)
            assert len(link.down) == max(0, i - j)
            one = source.mean(1, keepdim=True)
            if j > i:
                one = one.repeat_interleave(2 ** (j - i), 2).repeat_interleave(2 ** (j - i), 3)
            total += link.gate(mean) * one
        torch.testing.assert_close(y[i], F.relu(total * output.attention(total)))
    assert [len(CMFFM((4, 6), 1)(x[:2])), y[2].shape[1]] == [1, 8]


def test_gate():
    mean = torch.randn(2, 6, 1, 1)
    one, two = FusionLink(4, 6, 1, 1), FusionLink(4, 6, 1, 2)
    # the equation's gate never falls below one half
    assert one.gate(mean).min() >= 0.5 and two.gate(10 * mean).min() < 0.5
    down = FusionLink(4, 6, -2, 2).eval().down
    assert down(torch.randn(1, 4, 8, 8)).shape == (1, 4, 2, 2)
    assert (down[0](torch.randn(1, 4, 8, 8)) >= 0).all() and (down[1](torch.randn(1, 4, 8, 8)) < 0).any()


def test_wrong_configurations():
    with pytest.raises(ValueError, match="mcam_groups must divide all widths .* got 16 for width 32"):
        fastpose.create_model("le_hrnet", mcam_groups=16)
    with pytest.raises(ValueError, match="fc_layers must be 1 or 2, got 3"):
        fastpose.create_model("le_hrnet", fc_layers=3)
