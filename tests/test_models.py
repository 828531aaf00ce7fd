from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastpose
from fastpose.counting import count_macs, count_parameters
from fastpose.layers import DWUpsampleBNAct, GhostModule
from fastpose.models._registry import model_entry
from tests.conftest import needs_kernels

# name: exact (parameters, multiply-accumulates) at the paper's input size and number of keypoints
COUNTS = {
    "dite_hrnet_30": (1_860_041, 317_658_664),
    "efficient_hrnet_h0": (19_725_359, 23_958_286_848),
    "efficient_hrnet_h1": (13_004_446, 13_130_000_048),
    "efficient_hrnet_h2": (8_263_495, 7_029_956_920),
    "efficient_hrnet_h3": (5_360_390, 3_758_983_969),
    "efficient_hrnet_h4": (2_764_706, 1_807_480_224),
    "ghostnet_pose": (8_706_388, 1_791_236_928),
    "higher_hrnet_w32": (28_645_331, 46_203_404_288),
    "hr_litenet": (1_877_264, 1_472_103_936),
    "hrnet_w32": (28_536_113, 7_645_003_776),
    "hrnet_w32_ae": (28_536_674, 40_782_266_368),
    "hrnet_w48": (63_595_745, 15_691_825_152),
    "le_hrnet": (4_745_695, 1_601_618_880),
    "lightweight_hrnet_448": (5_941_779, 4_776_815_176),
    "lightweight_hrnet_480": (8_824_710, 8_192_159_100),
    "lightweight_hrnet_512": (13_190_483, 13_861_650_432),
    "lite_csw_hrnet": (892_481, 191_145_536),
    "lite_hrnet_18": (1_130_769, 198_626_688),
    "lite_hrnet_30": (1_763_717, 309_451_488),
    "mobilenetv2_pose": (9_569_552, 2_085_675_008),
    "mobilenetv3_pose": (8_669_486, 1_931_879_008),
    "mobileposenet": (1_505_279, 557_328_992),
    "mobileposenet_v1": (2_490_799, 620_525_152),
    "mobileposenet_v2": (2_080_879, 699_844_192),
    "naive_lite_hrnet_18": (760_365, 185_517_888),
    "shufflenetv2_pose": (7_550_708, 1_815_320_064),
    "simplebaseline_resnet152": (68_635_473, 12_699_303_936),
    "simplebaseline_resnet50": (33_999_697, 5_426_380_800),
    "small_hrnet_w16": (1_284_961, 570_703_872),
    "wider_naive_lite_hrnet_18": (1_318_625, 302_331_648),
    "x_hrnet_30": (2_117_657, 300_362_368),
}
# heavy networks: fewer sizes, so that the suite stays short
LARGE = (
    {f"efficient_hrnet_h{i}" for i in range(5)}
    | {f"lightweight_hrnet_{i}" for i in (448, 480, 512)}
    | {"higher_hrnet_w32", "hrnet_w32", "hrnet_w32_ae", "hrnet_w48", "le_hrnet"}
    | {"dite_hrnet_30", "lite_hrnet_30", "x_hrnet_30"}
    | {"simplebaseline_resnet152", "simplebaseline_resnet50"}
)
# networks that repeat the same modules: fewer of them where compiling takes long
SHORTER = {
    name: {"modules": (1, 1, 1)}
    for name in ("dite_hrnet_30", "hr_litenet", "hrnet_w32", "hrnet_w48", "le_hrnet", "lite_csw_hrnet", "lite_hrnet_18")
    + ("lite_hrnet_30", "naive_lite_hrnet_18", "wider_naive_lite_hrnet_18", "x_hrnet_30")
}
# a sigmoid gate on large activations is steep and multiplies rounding: (float32, bfloat16) tolerance of such networks
TOLERANCE = {"hr_litenet": (1e-3, 0.3)}
MODELS = fastpose.list_models()
# every network; those that take long can be left out with -m "not slow"
QUICK = {"hr_litenet", "lite_csw_hrnet", "lite_hrnet_18", "mobileposenet", "small_hrnet_w16"}
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]


def test_every_model_is_counted():
    assert set(COUNTS) == set(MODELS)


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the model returns, as a list: heatmaps, or for bottom-up networks several maps."""
    y = model(x)
    return list(y) if isinstance(y, (tuple, list)) else [y]


def build(name: str, **changes) -> nn.Module:
    """A model in eval mode whose batch norms have seen something: folding must matter."""
    torch.manual_seed(0)
    model = fastpose.create_model(name, **changes)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            m.running_mean.normal_(std=0.3)
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


def relative(got, expected) -> float:
    """Largest difference over the largest value, the worst of all outputs."""
    got, expected = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (got, expected))
    return max(
        float((g.double() - e.double()).abs().max() / e.double().abs().max())
        for g, e in zip(got, expected, strict=True)
    )


def reference_copy(model: nn.Module, name: str, **changes) -> nn.Module:
    other = fastpose.create_model(name, **changes)
    other.load_state_dict(model.state_dict())
    return fastpose.set_fused(other.eval(), False)


@pytest.mark.parametrize("name", MODELS)
def test_counts(name):
    entry = model_entry(name)
    model = fastpose.create_model(name)
    assert (count_parameters(model), count_macs(model, entry.input_size)) == COUNTS[name]
    assert model.training and all(m.fused == fastpose.use_fused() for m in model.modules() if hasattr(m, "fused"))


def test_variants():
    mpii = fastpose.create_model("mobileposenet", num_keypoints=16)
    assert sum(p.numel() for p in mpii.parameters()) == 1_505_118
    expand = fastpose.create_model("mobileposenet", se_position="expand")
    assert round(sum(p.numel() for p in expand.parameters()) / 1e6, 3) == 2.726


def sizes(name: str) -> list[tuple[int, int]]:
    """The paper's input size, one wide and one small."""
    model, paper = fastpose.create_model(name), model_entry(name).input_size
    m = model.input_multiple
    others = [(m, 2 * m), (3 * m, m)]
    return others if name in LARGE else [paper, *others]


@pytest.mark.parametrize("name", EACH)
def test_forward_fused_equals_reference(name):
    model = build(name, num_keypoints=5)
    reference = reference_copy(model, name, num_keypoints=5)
    tolerance = TOLERANCE.get(name, (1e-5, 0.1))[0]
    for size in sizes(name):
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            expected = outputs(reference, x)
            assert all(y.isfinite().all() and len(y) == 3 for y in expected)
            if not isinstance(model(x), (tuple, list)):
                assert expected[0].shape == (3, 5, size[0] // 4, size[1] // 4)
            assert relative(outputs(model, x), expected) < tolerance
            last = x.contiguous(memory_format=torch.channels_last)
            assert (
                relative(outputs(copy.deepcopy(model).to(memory_format=torch.channels_last), last), expected)
                < tolerance
            )
            assert relative(outputs(model, x[:1]), [y[:1] for y in expected]) < tolerance
            if name != "dite_hrnet_30":  # torch's unfold gives another shape without images
                assert [y.shape for y in outputs(model, x[:0])] == [(0, *y.shape[1:]) for y in expected]
    with torch.no_grad():
        exact = outputs(copy.deepcopy(reference).double(), x.double())
    assert relative(expected, exact) < 1e-4


@pytest.mark.parametrize("name", EACH)
def test_backward(name):
    m = fastpose.create_model(name).input_multiple
    x = torch.randn(2, 3, 2 * m, 2 * m, dtype=torch.float64)
    gradients = []
    for on in (fastpose.use_fused(), False):
        torch.manual_seed(1)
        model = fastpose.set_fused(fastpose.create_model(name, num_keypoints=3), on).double().train()
        sum(y.square().mean() for y in outputs(model, x)).backward()
        # a parameter without gradient would stop distributed training
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        gradients.append([p.grad for p in model.parameters()])
    largest = max(float(g.abs().max()) for g in gradients[1])
    for fused, reference in zip(*gradients, strict=True):
        assert float((fused - reference).abs().max()) < 1e-9 * largest


def test_folded_weights_are_never_stale():
    a, b = build("mobileposenet"), build("mobileposenet")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a(x)
        for p in b.parameters():
            p.mul_(1.1)
        a.load_state_dict(b.state_dict())
        assert relative(a(x), b(x)) < 1e-6
        a.train()(torch.randn(4, 3, 64, 64))
        assert relative(a.eval()(x), reference_copy(a, "mobileposenet")(x)) < 1e-5


@pytest.mark.parametrize("name", EACH)
def test_script_and_export(name, tmp_path):
    model = build(name, num_keypoints=4, **SHORTER.get(name, {}))
    m = model.input_multiple
    x = torch.randn(2, 3, m, 2 * m)
    with torch.no_grad():
        expected = outputs(model, x)
        scripted = torch.jit.script(model)
        torch.jit.save(scripted, tmp_path / "model.pt")
        assert relative(outputs(torch.jit.load(tmp_path / "model.pt"), x), expected) < 1e-5
        assert relative(outputs(torch.jit.freeze(scripted), x), expected) < 1e-5
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
        twice = [torch.cat([y, y]) for y in expected]
        assert relative(outputs(exported.module(), torch.cat([x, x])), twice) < 1e-5
    if fastpose.use_fused():
        for layer, op in ((DWUpsampleBNAct, "dw_upsample"), (GhostModule, "ghost_cheap")):
            if any(isinstance(m, layer) for m in model.modules()):
                assert f"fastpose::{op}" in str(scripted.inlined_graph)
                assert f"fastpose.{op}" in str(exported.graph)


def test_scripted_reference_loads_without_fastpose(tmp_path):
    model = fastpose.set_fused(build("mobileposenet"), False)
    x = torch.randn(1, 3, 64, 64)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    code = (
        "import sys, torch; d = torch.load('data.pt', weights_only=True); m = torch.jit.load('model.pt');"
        "assert torch.allclose(m(d['x']), d['y'], atol=1e-5); assert 'fastpose' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@needs_kernels
def test_scripted_fused_model_loads_with_the_library_alone(tmp_path):
    from fastpose.ops import _backend

    model, x = build("mobileposenet"), torch.randn(1, 3, 64, 64)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    code = (
        f"import sys, torch; torch.ops.load_library({str(_backend.LIBRARY)!r});"
        "d = torch.load('data.pt', weights_only=True); m = torch.jit.load('model.pt').eval()\n"
        "with torch.inference_mode(): assert torch.allclose(m(d['x']), d['y'], atol=1e-5)\n"
        "assert 'fastpose' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("name", EACH)
def test_autocast_bfloat16(name):
    model = build(name)
    x = torch.randn(2, 3, 2 * model.input_multiple, 2 * model.input_multiple)
    with torch.no_grad():
        expected = outputs(model, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = outputs(model, x)
    # bfloat16 has 8 bits of mantissa (0.4 %); the error grows with depth. Stated: within 10 % of the largest value
    assert relative(got, expected) < TOLERANCE.get(name, (1e-5, 0.1))[1]


@pytest.mark.parametrize("name", MODELS)
def test_wrong_input_says_what_is_needed(name):
    model = fastpose.create_model(name)
    m = model.input_multiple
    for shape in ((1, 3, m + 1, m), (1, 3, m, m + m // 2), (1, 4, m, m), (3, m, m), (1, 3, 0, m)):
        with pytest.raises(ValueError, match=f"multiples of {m}, got"):
            model(torch.zeros(shape))


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown model 'mobileposnet'; did you mean mobileposenet"):
        fastpose.create_model("mobileposnet")
    with pytest.raises(ValueError, match="mobileposenet cannot be made with .*widht"):
        fastpose.create_model("mobileposenet", widht=3)
    with pytest.raises(ValueError, match="no weights are shipped for model 'mobileposenet_v1'"):
        fastpose.create_model("mobileposenet_v1", weights="default")
    with pytest.raises(FileNotFoundError, match="no such file"):
        fastpose.create_model("mobileposenet", weights="nowhere.safetensors")
    with pytest.raises(ValueError, match="num_keypoints must be at least 1, got 0"):
        fastpose.create_model("mobileposenet", num_keypoints=0)
