from __future__ import annotations

import pytest
import torch

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.models.x_hrnet import SUSA, XHRNetConfig
from tests.test_models import build, relative


@pytest.mark.parametrize("columns", [False, True])
def test_attention_against_loops(columns):
    susa, x = SUSA(4, 9, columns).double(), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    torch.nn.init.normal_(susa.group_weight)
    with torch.no_grad():
        y = susa(x)
        weight = susa.group_weight.flatten()
        mean = susa.mean_conv.conv.weight.flatten()
        for b in range(2):
            image, got = (t[b].transpose(1, 2) if columns else t[b] for t in (x, y))
            lines, places = image.shape[1:]
            share = [
                (mean[c] * sum(weight[i] * image[c, i] for i in range(lines)) / lines).softmax(0) for c in range(4)
            ]
            for i in range(lines):
                context = torch.stack([sum(share[c][j] * image[c, i, j] for j in range(places)) for c in range(4)])
                value = susa.conv.conv.weight.flatten(1) @ context + susa.conv.conv.bias
                value = (value - value.mean()) / (value.var(unbiased=False) + 1e-5).sqrt()
                gate = (value * susa.ln.weight + susa.ln.bias).sigmoid()
                assert torch.allclose(got[:, i], image[:, i] * gate[:, None], rtol=1e-10)


def test_both_arrangements():
    model = fastpose.create_model("x_hrnet_30", attention="parallel")
    assert count_parameters(model) == 1_781_369 and count_macs(model, (256, 192)) == 295_434_368
    # the published 0.4 G at 256x256
    assert round(count_macs(fastpose.create_model("x_hrnet_30", num_keypoints=16), (256, 256)) / 1e9, 1) == 0.4
    small = {"attention": "parallel", "modules": (1, 1, 1), "blocks": (1, 1, 1), "legacy_fuse": True}
    model, x = build("x_hrnet_30", **small), torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        assert relative(torch.jit.script(model)(x), model(x)) < 1e-5


def test_images_beyond_the_published_size():
    model = fastpose.create_model("x_hrnet_30", modules=(1, 1, 1)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 384, 288)).shape == (1, 17, 96, 72)
        with pytest.raises(ValueError, match="at 1/4 resolution may have at most 72 columns, got 80"):
            model(torch.zeros(1, 3, 256, 320))
        with pytest.raises(ValueError, match="at most 96 rows, got 104"):
            model(torch.zeros(1, 3, 416, 256))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "both"}, "attention must be 'sequential' or 'parallel', got 'both'"),
        (
            {"attention": "parallel", "widths": (42, 80, 160, 320)},
            "widths must be multiples of 4 for parallel attention",
        ),
        ({"max_rows": 4}, "max_rows and max_columns must be at least 8, got 4 and 72"),
        ({"modules": (3, 8)}, "modules must be three positive numbers"),
    ],
)
def test_bad_configurations_say_what_is_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        XHRNetConfig(**changes)
