from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpose.ops import _backend, dw_upsample, dw_upsample_reference
from tests.conftest import TOL, assert_near, needs_kernels, opcheck, shifted

ACTIVATIONS = ("none", "relu", "hardswish", "silu")
SHAPES = [(1, 1, 1, 1), (2, 8, 7, 11), (3, 17, 5, 4), (1, 33, 1, 9), (0, 8, 4, 4), (1, 48, 16, 12), (2, 16, 2, 3)]
# kernel, stride, padding, output padding; the first is the fast case
SETTINGS = [
    (4, 2, 1, 0),
    (3, 2, 1, 1),
    (5, 3, 2, 2),
    (2, 2, 0, 0),
    (7, 1, 3, 0),
    (4, 4, 0, 3),
    (1, 1, 0, 0),
    (5, 2, 2, 1),
]


def oracle(x, weight, bias, activation, stride, padding, output_padding):
    """Slow and independent: float64, every input pixel scattered to the outputs it reaches."""
    x, weight = x.double().cpu(), weight.double().cpu()
    b, c, h, w = x.shape
    k = weight.shape[2]
    full = torch.zeros(b, c, (h - 1) * stride + k + output_padding, (w - 1) * stride + k + output_padding).double()
    for i in range(h):
        for j in range(w):
            full[:, :, i * stride : i * stride + k, j * stride : j * stride + k] += (
                x[:, :, i, j, None, None] * weight[:, 0]
            )
    z = full[:, :, padding : full.shape[2] - padding, padding : full.shape[3] - padding]
    if bias is not None:
        z = z + bias.double().cpu()[:, None, None]
    if activation == "relu":
        z = torch.where(z < 0, 0.0, z)
    elif activation == "hardswish":
        z = z * torch.where(z < -3, 0.0, torch.where(z > 3, 6.0, z + 3)) / 6
    elif activation == "silu":
        z = z / (1 + torch.exp(-z))
    return z


def sample(shape, k=4, dtype=torch.float32, layout="contiguous", bias=True, device="cpu"):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.randn(shape[0], shape[1] * 2, shape[3] + 3, shape[2] + 2, dtype=torch.float64).to(dtype).to(device)
        x = x[:, 1::2, 3:, :-2].transpose(2, 3)
    weight = torch.randn(shape[1], 1, k, k, dtype=torch.float64).to(dtype).to(device)
    b = torch.randn(shape[1], dtype=torch.float64).to(dtype).to(device) if bias else None
    return x, weight, b


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", list(TOL), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype, layout, device):
    for i, (k, s, p, op) in enumerate(SETTINGS):
        if (shape[2] - 1) * s - 2 * p + k + op <= 0:
            continue
        activation = ACTIVATIONS[i % 4]
        x, weight, bias = sample(shape, k, dtype, layout, bias=i != 2, device=device)
        y = dw_upsample(x, weight, bias, activation, s, p, op)
        assert y.dtype == dtype
        assert_near(y, oracle(x, weight, bias, activation, s, p, op), TOL[dtype])
        if layout == "channels_last" and min(shape) > 1:
            assert y.is_contiguous(memory_format=torch.channels_last)
        if layout == "contiguous":
            assert y.is_contiguous()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", range(1, 14))
def test_fast_case_at_every_width_around_the_tiles(width, activation, device):
    x, weight, bias = sample((2, 16, 3, width), layout="channels_last", device=device)
    y = dw_upsample(x, weight, bias, activation)
    assert_near(y, oracle(x, weight, bias, activation, 2, 1, 0), TOL[torch.float32])


def test_large_output_that_bypasses_the_caches(device):
    x, weight, bias = sample((4, 320, 36, 40), layout="channels_last", device=device)  # 29 MB of output
    assert_near(dw_upsample(x, weight, bias), dw_upsample_reference(x, weight, bias), TOL[torch.float32])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", list(TOL), ids=str)
def test_any_alignment(dtype, layout, device):
    """Channels and widths around the widths of vectors, and tensors that begin in the middle of one."""
    for channels in (8, 12, 18):
        for width in (2, 4, 6, 8):
            for offset in (0, 1, 2, 4):
                x, weight, bias = (
                    shifted(t, offset) for t in sample((2, channels, 3, width), 4, dtype, layout, device=device)
                )
                assert_near(dw_upsample(x, weight, bias), oracle(x, weight, bias, "relu", 2, 1, 0), TOL[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repetitions_are_equal_to_the_bit(layout, device):
    inputs = [t.requires_grad_() for t in sample((3, 40, 9, 6), 4, layout=layout, device=device)]
    results = []
    for _ in range(2):
        y = dw_upsample(*inputs, "silu")
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_travel(activation, device):
    x, weight, bias = sample((1, 20, 9, 11), layout="channels_last", device=device)
    x[0, 3, 4, 5], x[0, 7, 0, 0] = float("nan"), float("inf")
    got = dw_upsample(x, weight, bias, activation)
    assert got[0, 3, 7:11, 9:13].isnan().all() and int(got[0, 3].isnan().sum()) == 16
    # on the CPU: other libraries may multiply infinity by the zeros of padding
    expected = dw_upsample_reference(x.cpu(), weight.cpu(), bias.cpu(), activation)
    assert_near(got.cpu(), expected, TOL[torch.float32])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, layout, device):
    for k, s, p, op in ((4, 2, 1, 0), (3, 2, 1, 1), (5, 3, 2, 2), (3, 1, 1, 0)):
        x, weight, bias = sample((2, 5, 4, 3), k, torch.float64, layout, device=device)
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(
            lambda x, w, b: dw_upsample(x, w, b, activation, s, p, op),  # noqa: B023
            inputs,
            check_forward_ad=True,
        )


@pytest.mark.parametrize("dtype", list(TOL), ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradients_equal_the_references(dtype, layout, device):
    for shape, k, s, p, op in (
        ((2, 17, 9, 13), 4, 2, 1, 0),
        ((1, 32, 1, 1), 4, 2, 1, 0),
        ((3, 5, 6, 8), 7, 3, 2, 1),
        ((0, 4, 3, 3), 4, 2, 1, 0),
    ):
        tensors = sample(shape, k, dtype, layout, device=device)
        results = []
        for fn, kind in ((dw_upsample, dtype), (dw_upsample_reference, torch.float64)):
            inputs = [t.detach().to(kind).requires_grad_() for t in tensors]
            y = fn(*inputs, "hardswish", s, p, op)
            grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view(y.shape).to(dtype).to(kind)
            results.append(torch.autograd.grad(y, inputs, grad))
        for got, expected in zip(*results, strict=True):
            assert got.dtype == dtype
            assert_near(got, expected, TOL[dtype] * 10)


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, device):
    for grad in (False, True):
        x, weight, bias = sample((2, 17, 5, 6), 4, torch.float32, layout, device=device)
        inputs = [t.requires_grad_(grad) for t in (x, weight, bias)]
        opcheck(torch.ops.fastpose.dw_upsample.default, (*inputs, "relu", 2, 1, 0))
        opcheck(torch.ops.fastpose.dw_upsample.default, (inputs[0], inputs[1], None, "none", 3, 1, 1))


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, weight, bias = sample((1, 6, 1, 1))
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return dw_upsample(x, self.weight, self.bias, "relu")


@needs_kernels
def test_script_export_and_compile_agree(tmp_path):
    module, x = Module(), torch.randn(2, 6, 5, 4)
    expected = module(x)
    scripted = torch.jit.script(module)
    assert "fastpose::dw_upsample" in str(scripted.inlined_graph)
    torch.jit.save(scripted, tmp_path / "m.pt")
    assert torch.equal(torch.jit.load(tmp_path / "m.pt")(x), expected)
    scripted(x).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.abs().sum() > 0
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    assert torch.equal(exported.module()(torch.cat([x, x])), torch.cat([expected, expected]))


@needs_kernels
def test_autocast(device):
    x, weight, bias = sample((1, 16, 5, 6), device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=dtype):
            y = dw_upsample(x, weight, bias, "relu")
        assert y.dtype == dtype
        assert_near(y, oracle(x, weight, bias, "relu", 2, 1, 0), 0.1)


def test_bad_arguments_name_the_problem():
    x, weight, bias = sample((1, 4, 5, 5))
    cases = [
        ((x[0], weight, bias), r"x must be \[B, C, H, W\], got \[4, 5, 5\]"),
        ((x, weight[:3], None), r"weight must be \[C, 1, k, k\] with C = x.size\(1\) = 4, got \[3, 1, 4, 4\]"),
        ((x, weight, bias[:2]), r"bias must be \[C\] with C = x.size\(1\) = 4, got \[2\]"),
        ((x, weight, bias, "gelu"), "activation must be 'none', 'relu', 'hardswish' or 'silu', got 'gelu'"),
        ((x, weight, bias, "relu", 0), "stride"),
        ((x, weight, bias, "relu", 2, 1, 2), "output_padding"),
        ((x, weight, bias, "relu", 2, -1), "padding"),
        # of which the output, (0 - 1) * 2 + 4 wide, would not be empty
        ((x[:, :, :, :0], weight, bias, "relu", 2, 0), r"x must have at least one pixel, got \[1, 4, 5, 0\]"),
        ((x[:, :, :0], weight, bias, "relu", 2, 0), r"x must have at least one pixel, got \[1, 4, 0, 5\]"),
    ]
    cases += [
        ((x[:, :, :1, :1], weight, None, "none", 1, 4), "the output would be empty, -4 x -4, for x"),
        ((x, weight.double()), "weight must have the dtype of x, float32, got float64"),
        ((x.half(), weight.half(), bias), "bias must have the dtype of x, float16, got float32"),
        ((x.long(), weight.long()), "x must be float32, float64, float16 or bfloat16, got int64"),
    ]
    for arguments, message in cases:
        for fn in (dw_upsample, dw_upsample_reference):
            with pytest.raises(ValueError, match=message):
                fn(*arguments)
    for fn in (dw_upsample, dw_upsample_reference):
        assert fn(x[:, :0], weight[:0]).shape == (1, 0, 10, 10)
    if _backend.LOADED:
        with pytest.raises(ValueError, match=r"must be less than 2\^30 large, got 288230376151711745"):
            dw_upsample(torch.zeros(1, 4, 65, 65), weight, None, "none", 2**58 + 1, 1)
