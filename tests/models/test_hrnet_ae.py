from __future__ import annotations

import pytest
import torch

import fastpose
from fastpose.counting import count_parameters
from fastpose.models.hrnet_ae import higher_head
from tests.models.published import macs_by_output


@pytest.mark.parametrize(
    "changes, size, parameters, gflops",
    [({}, 512, 28.6, 47.9), ({"widths": (48, 96, 192, 384)}, 640, 63.8, 154.3)],
)
def test_higher_hrnet_has_the_published_cost(changes, size, parameters, gflops):
    with torch.device("meta"):
        model = fastpose.create_model("higher_hrnet_w32", **changes)
    assert round(count_parameters(model) / 1e6, 1) == parameters
    assert round(macs_by_output(model, size) / 1e9, 1) == pytest.approx(gflops, abs=0.06)


def test_maps():
    x = torch.randn(2, 3, 64, 96)
    (maps,) = fastpose.create_model("hrnet_w32_ae", num_keypoints=5, modules=(1, 1, 1))(x)
    assert maps.shape == (2, 10, 16, 24)
    maps, heatmaps = fastpose.create_model("higher_hrnet_w32", num_keypoints=5, modules=(1, 1, 1))(x)
    assert maps.shape == (2, 10, 16, 24) and heatmaps.shape == (2, 5, 32, 48)


def test_hrnet_and_its_bottom_up_variants_share_the_body():
    body = fastpose.create_model("hrnet_w32")
    x = torch.randn(1, 3, 64, 64)
    for name in ("hrnet_w32_ae", "higher_hrnet_w32"):
        model = fastpose.create_model(name).eval()
        state = {k: v for k, v in body.state_dict().items() if not k.startswith("final_layer")}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and all(k.startswith(("final_layer", "deconv_layers")) for k in missing)
        with torch.no_grad():
            assert torch.equal(model.features(x), body.eval().features(x))


def test_head_keys_are_those_of_the_published_checkpoints():
    keys = set(fastpose.create_model("higher_hrnet_w32", head_blocks=1).state_dict())
    assert {k.rsplit(".", 1)[0] for k in keys if k.startswith(("final", "deconv"))} == {
        "final_layers.0",
        "final_layers.1",
        "deconv_layers.0.0.0",
        "deconv_layers.0.0.1",
        *(f"deconv_layers.0.1.0.{k}" for k in ("conv1", "bn1", "conv2", "bn2")),
    }
    assert "final_layer.weight" in fastpose.create_model("hrnet_w32_ae").state_dict()


def test_head_blocks():
    final, deconv = higher_head(channels=6, num_keypoints=2, width=8, blocks=0)
    assert deconv[0](torch.randn(1, 10, 4, 4)).shape == (1, 8, 8, 8) and len(final) == 2
    with pytest.raises(ValueError, match="head_blocks must not be negative, got -1"):
        fastpose.create_model("higher_hrnet_w32", head_blocks=-1)
