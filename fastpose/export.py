"""Writing networks for deployment, with a check that the file computes the same."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

from fastpose.files import write_atomically
from fastpose.ops import set_fused, use_fused
from fastpose.plan import NotOptimizable, optimize


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
    was_fused = use_fused()
    set_fused(model, fused)
    try:
        model = model.eval()
        x = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(x)
            network: nn.Module = model
            if fused:
                with contextlib.suppress(NotOptimizable):
                    network = optimize(model, input_size)
            scripted = torch.jit.freeze(torch.jit.script(network))

        def write(temporary: Path) -> None:
            torch.jit.save(scripted, str(temporary))
            with torch.no_grad():
                got = torch.jit.load(str(temporary))(x)
            worst = float((got - expected).abs().max() / expected.abs().max())
            if not worst <= 1e-4:
                raise RuntimeError(f"{path}: the exported file's outputs differ by {worst:.2e} of their maximum")
            differences.append(worst)

        differences: list[float] = []
        write_atomically(path, write)
        return differences[0]
    finally:
        set_fused(model, was_fused)
