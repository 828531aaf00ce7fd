from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpose.ops import ghost_cheap, ghost_cheap_reference
from tests.conftest import TOL, assert_near, needs_kernels, opcheck, shifted

ACTIVATIONS = ("none", "relu", "hardswish", "silu")
# one pixel, odd sizes, widths around the tiles of 4 and 8, channels around the vectors, the networks' own, empty
SHAPES = [(1, 1, 1, 1), (2, 8, 17, 31), (3, 17, 5, 9), (2, 16, 8, 6), (1, 33, 1, 13), (0, 8, 4, 4), (1, 64, 16, 12)]


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Slow and independent: float64, one shifted product per tap."""
    x, weight = x.double().cpu(), weight.double().cpu()
    b, c, h, w = x.shape
    k = weight.shape[2]
    m = weight.shape[0] // c
    padded = torch.zeros(b, c, h + k - 1, w + k - 1, dtype=torch.float64)
    padded[:, :, k // 2 : k // 2 + h, k // 2 : k // 2 + w] = x
    z = torch.zeros(b, m * c, h, w, dtype=torch.float64)
    for o in range(m * c):
        for i in range(k):
            for j in range(k):
                z[:, o] += padded[:, o // m, i : i + h, j : j + w] * weight[o, 0, i, j]
        if bias is not None:
            z[:, o] += bias[o].double().cpu()
    if activation == "relu":
        z = torch.where(z < 0, 0.0, z)
    elif activation == "hardswish":
        z = z * torch.where(z < -3, 0.0, torch.where(z > 3, 6.0, z + 3)) / 6
    elif activation == "silu":
        z = z / (1 + torch.exp(-z))
    return torch.cat([x, z], dim=1)


def sample(shape, k=3, m=1, dtype=torch.float32, layout="contiguous", bias=True, device="cpu"):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        big = torch.randn(shape[0], shape[1] * 2, shape[2] + 3, shape[3] + 2, dtype=torch.float64).to(dtype).to(device)
        x = big[:, ::2, 1:-2, 2:]
    weight = torch.randn(m * shape[1], 1, k, k, dtype=torch.float64).to(dtype).to(device)
    b = torch.randn(m * shape[1], dtype=torch.float64).to(dtype).to(device) if bias else None
    return x, weight, b


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", list(TOL), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype, layout, device):
    for k, m, activation, bias in (
        (3, 1, "relu", True),
        (5, 2, "hardswish", True),
        (7, 1, "silu", False),
        (1, 3, "none", True),
    ):
        x, weight, b = sample(shape, k, m, dtype, layout, bias, device=device)
        y = ghost_cheap(x, weight, b, activation)
        assert y.dtype == dtype
        assert torch.equal(y[:, : shape[1]], x)
        assert_near(y, oracle(x, weight, b, activation), TOL[dtype])
        if layout == "channels_last" and min(shape) > 1:
            assert y.is_contiguous(memory_format=torch.channels_last)
        if layout == "contiguous":
            assert y.is_contiguous()


def test_reference_matches_oracle():
    for activation in ACTIVATIONS:
        x, weight, bias = sample((2, 6, 5, 7), 5, 2, torch.float64)
        assert_near(ghost_cheap_reference(x, weight, bias, activation), oracle(x, weight, bias, activation), 1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", list(TOL), ids=str)
def test_any_alignment(dtype, layout, device):
    """Channels and widths around the widths of vectors, and tensors that begin in the middle of one."""
    for channels, m in ((8, 1), (12, 2), (18, 1)):
        for width in (2, 4, 6, 8):
            for offset in (0, 1, 2, 4):
                tensors = sample((2, channels, 3, width), 3, m, dtype, layout, device=device)
                x, weight, bias = (shifted(t, offset) for t in tensors)
                y = ghost_cheap(x, weight, bias)
                assert torch.equal(y[:, :channels], x)
                assert_near(y, oracle(x, weight, bias, "relu"), TOL[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repetitions_are_equal_to_the_bit(layout, device):
    inputs = [t.requires_grad_() for t in sample((3, 40, 9, 6), 3, 2, layout=layout, device=device)]
    results = []
    for _ in range(2):
        y = ghost_cheap(*inputs, "silu")
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_travel(activation, device):
    x, weight, bias = sample((1, 20, 9, 11), 3, 1, torch.float32, "channels_last", device=device)
    x[0, 3, 4, 5], x[0, 7, 0, 0], x[0, 9, 8, 10] = float("nan"), float("inf"), float("-inf")
    got = ghost_cheap(x, weight, bias, activation).cpu()
    # on the CPU: other libraries may multiply infinity by the zeros of padding
    expected = ghost_cheap_reference(x.cpu(), weight.cpu(), bias.cpu(), activation)
    assert got[0, 23, 3:6, 4:7].isnan().all() and not got[0, 24].isnan().any()
    assert_near(got, expected, TOL[torch.float32])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, layout, device):
    for k, m in ((3, 1), (5, 2)):
        x, weight, bias = sample((2, 5, 4, 3), k, m, torch.float64, layout, device=device)
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(
            lambda x, w, b: ghost_cheap(x, w, b, activation),
            inputs,
            check_forward_ad=True,
        )


@pytest.mark.parametrize("dtype", list(TOL), ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradients_equal_the_references(dtype, layout, device):
    for shape, k, m in (
        ((2, 17, 9, 13), 3, 1),
        ((1, 32, 1, 1), 3, 1),
        ((3, 5, 6, 8), 7, 2),
        ((2, 6, 5, 4), 5, 3),
        ((0, 4, 3, 3), 3, 1),
    ):
        tensors = sample(shape, k, m, dtype, layout, device=device)
        grad = torch.randn(shape[0], shape[1] * (1 + m), *shape[2:], dtype=torch.float64)
        results = []
        for fn, kind in ((ghost_cheap, dtype), (ghost_cheap_reference, torch.float64)):
            inputs = [t.detach().to(kind).requires_grad_() for t in tensors]
            results.append(torch.autograd.grad(fn(*inputs, "silu"), inputs, grad.to(device).to(dtype).to(kind)))
        for got, expected in zip(*results, strict=True):
            assert got.dtype == dtype
            assert_near(got, expected, TOL[dtype] * 10)


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, device):
    for grad in (False, True):
        x, weight, bias = sample((2, 17, 5, 6), 3, 2, torch.float32, layout, device=device)
        inputs = [t.requires_grad_(grad) for t in (x, weight, bias)]
        opcheck(torch.ops.fastpose.ghost_cheap.default, (*inputs, "hardswish"))
        opcheck(torch.ops.fastpose.ghost_cheap.default, (inputs[0], inputs[1], None, "none"))


@needs_kernels
def test_second_derivative_is_refused(device):
    x, weight, bias = sample((1, 4, 3, 3), dtype=torch.float64, device=device)
    x.requires_grad_()
    (g,) = torch.autograd.grad(ghost_cheap(x, weight, bias, "silu").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        g.sum().backward()


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, weight, bias = sample((1, 6, 1, 1))
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return ghost_cheap(x, self.weight, self.bias, "relu")


@needs_kernels
def test_script_export_and_compile_agree(tmp_path):
    module, x = Module(), torch.randn(2, 6, 5, 4)
    expected = module(x)
    scripted = torch.jit.script(module)
    assert "fastpose::ghost_cheap" in str(scripted.inlined_graph)
    torch.jit.save(scripted, tmp_path / "m.pt")
    assert torch.equal(torch.jit.load(tmp_path / "m.pt")(x), expected)
    scripted(x).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.abs().sum() > 0
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(exported.module()(torch.cat([x, x])), torch.cat([expected, expected]))


@needs_kernels
def test_autocast(device):
    x, weight, bias = sample((1, 16, 5, 6), device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=dtype):
            y = ghost_cheap(x, weight, bias, "relu")
        assert y.dtype == dtype
        assert_near(y, oracle(x, weight, bias, "relu"), 0.1)


def test_bad_arguments_name_the_problem():
    x, weight, bias = sample((1, 4, 5, 5))
    cases = [
        ((x[0], weight, bias), r"x must be \[B, C, H, W\], got \[4, 5, 5\]"),
        ((x, weight[:3], None), r"\[M \* C, 1, k, k\] with C = x.size\(1\) = 4, got \[3, 1, 3, 3\]"),
        ((x, torch.randn(4, 1, 2, 2), None), "kernel size must be 1, 3, 5 or 7, got 2"),
        ((x, weight, bias[:2]), r"bias must be \[4\] like weight, got \[2\]"),
        ((x, weight, bias, "gelu"), "activation must be 'none', 'relu', 'hardswish' or 'silu', got 'gelu'"),
    ]
    cases += [
        ((x, weight.double()), "weight must have the dtype of x, float32, got float64"),
        ((x.half(), weight.half(), bias), "bias must have the dtype of x, float16, got float32"),
        ((x.long(), weight.long()), "x must be float32, float64, float16 or bfloat16, got int64"),
    ]
    for arguments, message in cases:
        for fn in (ghost_cheap, ghost_cheap_reference):
            with pytest.raises(ValueError, match=message):
                fn(*arguments)
    for fn in (ghost_cheap, ghost_cheap_reference):
        assert fn(x[:, :, :0], weight, bias).shape == (1, 8, 0, 5)


@needs_kernels
def test_devices_without_a_kernel_take_the_reference():
    x, weight, bias = (t.to("meta") for t in sample((2, 4, 5, 6)))
    assert ghost_cheap(x, weight, bias).shape == (2, 8, 5, 6)
    x, weight, bias = sample((2, 4, 5, 6), dtype=torch.float64)
    got = torch.ops.fastpose.ghost_cheap.default.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), x, weight, bias, "relu"
    )
    assert_near(got, oracle(x, weight, bias, "relu"), 1e-12)
    assert F.relu(got).shape == got.shape
