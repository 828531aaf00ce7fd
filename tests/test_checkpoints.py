"""Checkpoints of other packages: recognised by their keys, loaded strictly, refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastpose
from fastpose.checkpoints import WeightsInfo, read_info, save_weights
from fastpose.cli import main
from fastpose.codecs import SoftmaxHeatmapCodec
from tests.test_models import build

HEAD = "final_layer"


def as_published(state: dict[str, torch.Tensor], layout: str) -> dict[str, object]:
    """`state` of an HRNet as the three public formats would hold it."""
    head = {"mmpose 1.x": "head.", "mmpose 0.x": "keypoint_head."}.get(layout, "")
    body = "backbone." if head else ""
    renamed = {(head if k.startswith(HEAD) else body) + k: v for k, v in state.items()}
    meta = {"epoch": 210, "best": np.float64(0.75), "log": np.zeros(2)}
    return {"state_dict": renamed, "meta": meta} if head else renamed


@pytest.fixture(scope="module")
def hrnet() -> torch.nn.Module:
    return build("hrnet_w32", num_keypoints=3)


@pytest.mark.parametrize("layout", ["mmpose 1.x", "mmpose 0.x", "original"])
def test_formats_of_others(hrnet, layout, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(as_published(hrnet.state_dict(), layout), path)
    model = fastpose.create_model("auto", weights=path)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), hrnet(x)) and not model.training
    other = fastpose.create_model("hrnet_w32", num_keypoints=3)
    assert fastpose.load_checkpoint(other, path) == layout


def test_data_parallel_prefix_and_missing_step_counters(hrnet, tmp_path):
    state = {f"module.{k}": v for k, v in hrnet.state_dict().items() if "num_batches" not in k}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    model = fastpose.create_model("hrnet_w32", weights=tmp_path / "a.pth")
    assert torch.equal(model.final_layer.weight, hrnet.final_layer.weight)


def test_misfits_are_refused_and_named(hrnet, tmp_path):
    path = tmp_path / "a.pth"
    state = as_published(hrnet.state_dict(), "mmpose 1.x")
    torch.save(state, path)
    with pytest.raises(
        ValueError,
        match=r"mmpose 1.x weights .*a.pth do not fit this MobilePoseNet: missing .*; and \d+ more; "
        r"it is a 'hrnet_w32' with num_keypoints=3",
    ):
        fastpose.create_model("mobileposenet", weights=path)
    model = fastpose.create_model("hrnet_w32", num_keypoints=17)
    before = model.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"final_layer.weight: expected \[17, 32, 1, 1\], got \[3, 32, 1, 1\]"):
        fastpose.load_checkpoint(model, path)
    assert torch.equal(model.conv1.weight, before)  # nothing was loaded
    del state["state_dict"]["backbone.conv1.weight"]
    state["state_dict"]["backbone.extra.weight"] = torch.zeros(2)
    torch.save(state, path)
    with pytest.raises(ValueError, match="missing conv1.weight; unexpected backbone.extra.weight"):
        fastpose.create_model("hrnet_w32", num_keypoints=3, weights=path)
    with pytest.raises(ValueError, match="cannot tell the architecture .* nearest: 'hrnet_w32'"):
        fastpose.create_model("auto", weights=path)
    with pytest.raises(ValueError, match="give weights=path"):
        fastpose.create_model("auto")


class Surprise:
    def __reduce__(self):
        return (print, ("code from a checkpoint was run",))


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    model = fastpose.create_model("mobileposenet")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth.*no such file"):
        fastpose.load_checkpoint(model, tmp_path / "nowhere.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Surprise()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code.pth holds a Python object \(\S*print\) beside its tensors"):
        fastpose.load_checkpoint(model, tmp_path / "code.pth")
    assert "code from a checkpoint" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds no state dict"):
        fastpose.load_checkpoint(model, tmp_path / "list.pth")
    for name, content in (("empty.pth", b""), ("text.pth", b"hello world"), ("cut.safetensors", b"\xff" * 8 + b"{")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name} is (not a safetensors file|neither a safetensors file nor a PyT)"
        ):
            fastpose.load_checkpoint(model, tmp_path / name)


def test_config_options_travel_with_the_weights(tmp_path):
    model = build("mobileposenet", num_keypoints=14, se_position="expand")
    info = WeightsInfo(
        "mobileposenet", 14, "lsp14", (128, 128), 1.25, SoftmaxHeatmapCodec(), options={"se_position": "expand"}
    )
    save_weights(tmp_path / "a.safetensors", model.state_dict(), info)
    assert read_info(tmp_path / "a.safetensors") == info
    again = fastpose.create_model("auto", weights=tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_pretrained_for_other_keypoints(tmp_path):
    """Everything but the last layer is taken; a network of another kind is refused."""
    from fastpose.checkpoints import load_pretrained

    torch.save(build("mobileposenet", num_keypoints=17).state_dict(), tmp_path / "w.pth")
    given = torch.load(tmp_path / "w.pth", weights_only=True)
    model = build("mobileposenet", num_keypoints=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    left = load_pretrained(model, "mobileposenet", 5, tmp_path / "w.pth")
    assert left and len(left) <= 2
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in left else given[key]), key
    same = build("mobileposenet", num_keypoints=17)
    assert load_pretrained(same, "mobileposenet", 17, tmp_path / "w.pth") == []
    assert all(torch.equal(v, given[k]) for k, v in same.state_dict().items())
    with pytest.raises(ValueError, match="do not fit"):
        load_pretrained(build("hrnet_w32", num_keypoints=5), "hrnet_w32", 5, tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["fastpose", "original"])
def test_a_file_is_read_once(kind, tmp_path, monkeypatch):
    from fastpose import checkpoints

    path, state = tmp_path / "w", build("mobileposenet", num_keypoints=14).state_dict()
    if kind == "fastpose":
        save_weights(path, state, WeightsInfo("mobileposenet", 14, "lsp14", (64, 64), 1.25, SoftmaxHeatmapCodec()))
    else:
        torch.save(state, path)
    opened = []

    def counted(function):
        def call(*args, **kwargs):
            opened.append(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(checkpoints, "safe_open", counted(checkpoints.safe_open))
    monkeypatch.setattr(torch, "load", counted(torch.load))
    for use in (
        lambda: fastpose.create_model("mobileposenet", weights=path),
        lambda: fastpose.create_model("auto", weights=path),
        lambda: fastpose.load_checkpoint(fastpose.create_model("mobileposenet", num_keypoints=14), path),
        lambda: checkpoints.load_pretrained(build("mobileposenet", num_keypoints=5), "mobileposenet", 5, path),
        lambda: fastpose.PoseEstimator("auto", path, skeleton="lsp14", detector="none", optimize=False),
    ):
        opened.clear()
        use()
        assert len(opened) == 1


@pytest.mark.parametrize("name", ["lite_hrnet_18", "naive_lite_hrnet_18", "x_hrnet_30", "dite_hrnet_30"])
def test_weights_of_others_compute_what_they_were_trained_with(tmp_path, name):
    """The exchange of the published code, whose parameters have the same names and shapes as ours."""
    flags = {"legacy_fuse": True} | ({"legacy_pool": True} if name.startswith("dite") else {})
    theirs, ours = build(name, **flags), build(name)
    path, x = tmp_path / "w.pth", torch.randn(1, 3, 64, 96)
    torch.save(theirs.state_dict(), path)
    before = list(ours.parameters())
    assert fastpose.load_checkpoint(ours, path) == "original" and ours.config == theirs.config
    assert all(a is b for a, b in zip(before, ours.parameters(), strict=True))  # an optimizer may hold them
    made, plain = (fastpose.create_model(name, weights=path, **more) for more in ({}, {"legacy_fuse": False}))
    file = str(tmp_path / "w.safetensors")
    assert main(["export", "--format", "safetensors", "--model", name, "--weights", str(path), file]) == 0
    again = fastpose.create_model("auto", weights=file)
    with torch.no_grad():
        expected = theirs(x)
        for model in (ours, made, torch.jit.script(ours)):
            assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert (again(x) - expected).abs().max() < 0.02 * expected.abs().max()  # 16 bits
        assert (plain(x) - expected).abs().max() > 0.1 * expected.abs().max()
