"""Writing networks for deployment, with a check that the file computes the same."""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastpose.checkpoints import WeightsInfo, save_weights
from fastpose.codecs import HeatmapCodec
from fastpose.files import write_atomically
from fastpose.ops import set_fused
from fastpose.pipeline import keypoints_of_crops
from fastpose.plan import PLAIN, NotOptimizable, optimize
from fastpose.preprocess import normalize


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


class ExportError(RuntimeError):
    """A network could not be written, or the file computes something else; the message says which and how far off."""


def _save(program: torch.jit.ScriptModule, path: Path) -> None:
    """By way of memory: `torch.jit.save` says of a folder that cannot be written only that it failed."""
    file = io.BytesIO()
    torch.jit.save(program, file)
    path.write_bytes(file.getvalue())


def export_torchscript(
    model: nn.Module,
    path: str | Path,
    input_size: tuple[int, int],
    fused: bool = False,
    codec: HeatmapCodec | None = None,
    precision: str = "float32",
) -> float:
    """Script, freeze and save `model`; load the file again and compare.

    Args:
        input_size: (height, width) of the check's input; the file takes any size and batch the model takes.
        fused: use fastpose's kernels: the network as `optimize` makes it where possible, its fused layers otherwise.
            Such a file needs ``import fastpose`` (or the operator library alone, `fastpose info` prints its path) in
            the process that loads it; one without runs on plain torch.
        codec: with it the file takes crops, uint8 RGB [B, 3, *input_size], and returns keypoints float32 [B, K, 2],
            (x, y) in crop pixels, and scores float32 [B, K], as `pipeline.estimate_crops` does without a flip test.
            Such a file runs on the CPU only.
        precision: of `optimize`, with `fused`. ``"auto"`` decides by this processor, not by the one that the file runs
            on; every precision runs on all.

    Returns:
        The largest difference between the file's and the model's heatmaps, relative to the largest number in them.

    Raises:
        ExportError: `fused` without the kernels, another precision without `fused` or for a network that cannot be
            optimised, a difference above 1e-4 (0.1 with ``"bfloat16"`` or ``"int8"``), keypoints that differ by more
            than 0.01 pixels (nothing is written then).
    """
    rounded = precision in ("bfloat16", "int8")
    if precision not in PLAIN and not fused:
        raise ExportError(f"precision {precision!r} is one of fastpose's kernels: it needs fused=True")
    with _layers(model, fused):
        x = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = _outputs(model(x))
            network: nn.Module = model
            if fused:
                try:
                    network = optimize(model, input_size, precision)
                except NotOptimizable as error:
                    if precision not in PLAIN:
                        raise ExportError(f"no precision {precision!r}: {error}") from None
            program = torch.jit.freeze(torch.jit.script(network))

        def write(temporary: Path) -> None:
            _save(program, temporary)
            with torch.no_grad():
                got = _outputs(torch.jit.load(str(temporary))(x))
            differences.append(_relative(got, expected, path, 0.1 if rounded else 1e-4))

        def write_with_decoder(temporary: Path) -> None:
            assert codec is not None
            write(temporary)
            whole = torch.jit.script(_KeypointsOfCrops(network, codec, expected[0], input_size).eval())
            _save(torch.jit.freeze(whole), temporary)
            file = torch.jit.load(str(temporary))
            for batch in (1, 3):  # it was traced with 2
                crops = _crops(batch, input_size)
                with torch.no_grad():
                    # of the same network, so that not even the maximum of a flat map may be elsewhere
                    _check_keypoints(file(crops), keypoints_of_crops(program, crops, codec), path, 0.0)

        differences: list[float] = []
        write_atomically(path, write if codec is None else write_with_decoder)
        return differences[0]


class _KeypointsOfCrops(nn.Module):
    """A network between what `estimate_crops` does before and after it, which is traced.

    Nothing there depends on the numbers, and on the size of the crops only, which is checked. The trace keeps the CPU.
    """

    height: Final[int]
    width: Final[int]

    def __init__(self, network: nn.Module, codec: HeatmapCodec, outputs: Tensor, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.height, self.width = input_size
        self.network = network
        crops = torch.zeros(2, 3, *input_size, dtype=torch.uint8)
        with warnings.catch_warnings(), torch.no_grad():
            # that a trace holds constants and that TorchScript has no future
            warnings.simplefilter("ignore")
            self.normalize = torch.jit.trace(normalize, crops, check_trace=False)
            self.decode = torch.jit.trace(lambda x: codec.decode(codec.heatmaps(x)), outputs, check_trace=False)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        if crops.dtype != torch.uint8:  # whose name TorchScript does not know
            raise ValueError("crops must be uint8, got another dtype")
        if list(crops.shape[1:]) != [3, self.height, self.width]:
            raise ValueError(f"crops must be [B, 3, {self.height}, {self.width}], got {list(crops.shape)}")
        keypoints, scores = self.decode(self.network(self.normalize(crops)))
        return keypoints, scores


def _crops(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


def _check_keypoints(got: Sequence[Tensor], expected: Sequence[Tensor], path: str | Path, share: float) -> float:
    """The largest difference between the scores of two results of `keypoints_of_crops`, relative to the largest score.

    Raises:
        ExportError: scores differ by more than 1e-3 of the largest, or positions by more than 0.01 pixels: more than a
            `share` of all, or of one keypoint those in more than half of the crops.
    """
    worst = _relative(got[1:], expected[1:], path, 1e-3)
    far = ~((got[0] - expected[0]).abs().amax(2) <= 0.01)
    if far.float().mean() > share or far.float().mean(0).max() > max(0.5, share):
        raise ExportError(
            f"{path}: {int(far.sum())} of {far.numel()} exported keypoints are more than 0.01 pixels from the network's"
        )
    return worst


def export_onnx(
    model: nn.Module, path: str | Path, input_size: tuple[int, int], codec: HeatmapCodec | None = None
) -> float:
    """Write `model` as an ONNX file for batches of any size, run it by ONNX Runtime and compare.

    Args:
        input_size: (height, width) of the images, float32 [B, 3, *input_size], to which the file is bound.
        codec: with it the file goes from crops to keypoints and scores, as that of `export_torchscript`.

    Returns:
        The largest difference between the file's and the model's outputs, relative to the largest output; with a
        `codec` that between the scores.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: the exporter or ONNX Runtime does not take the network; a difference above 1e-4; of scores above
            1e-3; positions that differ in more than a tenth of the cases (nothing is written then).
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which torch needs
    except ImportError as error:
        packages = "pip install onnx onnxscript onnxruntime"
        raise ImportError(f"export to ONNX needs the extra 'onnx', {packages}: {error}") from None

    with _layers(model, False), torch.no_grad():
        module = model if codec is None else _Decoded(model, codec).eval()
        name, outputs = ("images", None) if codec is None else ("crops", ["keypoints", "scores"])

        def images(batch: int) -> Tensor:
            crops = _crops(batch, input_size)
            return normalize(crops) if codec is None else crops

        def write(temporary: Path) -> None:
            program: Any = torch.onnx.export(
                module,
                (images(2),),
                dynamo=True,
                verbose=False,
                input_names=[name],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**16)},),
            )
            program.save(str(temporary), external_data=False)
            session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            for batch in (1, 3):
                x = images(batch)
                got = [torch.from_numpy(output) for output in session.run(None, {name: x.numpy()})]
                if codec is None:
                    differences.append(_relative(got, _outputs(module(x)), path, 1e-4))
                else:
                    # where the maximum of a flat map is, rounding decides
                    differences.append(_check_keypoints(got, module(x), path, 0.1))

        differences: list[float] = []
        try:
            with warnings.catch_warnings(), _quiet():
                warnings.simplefilter("ignore")
                write_atomically(path, write)
        except ExportError:
            raise
        except Exception as error:  # whatever the exporter and ONNX Runtime, which have many, raise
            raise ExportError(f"{path}: not exported: {type(error).__name__}: {error}") from error
        return max(differences)


class _Decoded(nn.Module):
    """What `estimate_crops` does, without a flip test."""

    def __init__(self, network: nn.Module, codec: HeatmapCodec) -> None:
        super().__init__()
        self.network, self.codec = network, codec

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        return keypoints_of_crops(self.network, crops, self.codec)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter logs about packages that it works without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _layers(model: nn.Module, fused: bool) -> Iterator[None]:
    """The model in eval mode, its layers for a while fused or not."""
    before = [(m, m.fused) for m in model.modules() if hasattr(m, "fused")]
    try:
        set_fused(model.eval(), fused)
    except RuntimeError as error:
        raise ExportError(str(error)) from None
    try:
        yield
    finally:
        for module, fused_before in before:
            module.fused = fused_before


def _relative(got: Sequence[Tensor], expected: Sequence[Tensor], path: str | Path, limit: float) -> float:
    """The largest difference, of each output in units of the largest number expected.

    Raises:
        ExportError: it is above `limit`, or not a number.
    """
    parts = [
        (g - e).abs().max() / e.abs().max().clamp(min=torch.finfo(e.dtype).tiny)
        for g, e in zip(got, expected, strict=True)
    ]
    worst = float(torch.stack(parts).max())
    if not worst <= limit:
        raise ExportError(
            f"{path}: the exported file's outputs differ by {worst:.2e} of their maximum, at most {limit:g} is allowed"
        )
    return worst


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result
