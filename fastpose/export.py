"""Writing networks for deployment, with a check that the file computes the same."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpose.checkpoints import WeightsInfo, save_weights
from fastpose.files import write_atomically
from fastpose.ops import set_fused
from fastpose.plan import NotOptimizable, optimize


def export_weights(model: nn.Module, path: str | Path, info: WeightsInfo, bits: int = 16) -> None:
    """Write the network's weights rounded to float16, with `info`, as a fastpose file of half the size.

    With 8 `bits` dense convolutions are rounded to 8 bits, scaled per output channel, and the file is a quarter of the
    size. They are numbers like others once read.

    Raises:
        ValueError: a weight is too large for float16 (nothing is written then).
    """
    state = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value.half()).all():
            raise ValueError(f"{key} has numbers that float16 cannot hold, up to {float(value.abs().max()):.3g}")
    save_weights(path, state, info, torch.int8 if bits == 8 else torch.float16)


def export_torchscript(model: nn.Module, path: str | Path, input_size: tuple[int, int], fused: bool = False) -> float:
    """Script, freeze and save `model`; load the file again and compare.

    Args:
        input_size: (height, width) of the check's input; the file takes any size and batch the model takes.
        fused: use fastpose's kernels: the network as `optimize` makes it where possible, its fused layers otherwise.
            Such a file needs ``import fastpose`` (or the operator library alone, `fastpose info` prints its path) in
            the process that loads it; one without runs on plain torch.

    Returns:
        The largest difference between the file's and the model's outputs, relative to the largest output.

    Raises:
        RuntimeError: `fused` without the kernels, or a difference above 1e-4 (nothing is written then).
    """
    before = [(m, m.fused) for m in model.modules() if hasattr(m, "fused")]
    set_fused(model, fused)
    try:
        model = model.eval()
        x = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = _outputs(model(x))
            network: nn.Module = model
            if fused:
                with contextlib.suppress(NotOptimizable):
                    network = optimize(model, input_size)
            scripted = torch.jit.freeze(torch.jit.script(network))

        def write(temporary: Path) -> None:
            torch.jit.save(scripted, str(temporary))
            with torch.no_grad():
                got = _outputs(torch.jit.load(str(temporary))(x))
            worst = max(float((g - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True))
            if not worst <= 1e-4:
                raise RuntimeError(f"{path}: the exported file's outputs differ by {worst:.2e} of their maximum")
            differences.append(worst)

        differences: list[float] = []
        write_atomically(path, write)
        return differences[0]
    finally:
        for module, fused_before in before:
            module.fused = fused_before


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result
