"""Weights files: safetensors with everything an estimator must know beside the numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastpose.codecs import SoftmaxHeatmapCodec
from fastpose.config import from_dict
from fastpose.files import write_atomically

# model name -> file in fastpose/weights
DEFAULT_WEIGHTS = {"mobileposenet": "mobileposenet_lspet.safetensors"}


@dataclass(frozen=True)
class WeightsInfo:
    """What travels with the weights.

    Attributes:
        model: registry name; num_keypoints: K; skeleton: name of a built-in skeleton.
        input_size: (height, width) of the crops the network was trained on and works best at.
        padding: crop side in units of the box's longer side (see `geometry.crop_matrix`).
        codec: how its outputs become keypoints.
        flip_test: whether averaging with the mirrored crop is recommended.
    """

    model: str
    num_keypoints: int
    skeleton: str
    input_size: tuple[int, int]
    padding: float
    codec: SoftmaxHeatmapCodec
    flip_test: bool = True


def resolve_weights(weights: str | Path, model: str) -> Path:
    """Path of the weights file meant by ``"default"`` or a path.

    Raises:
        ValueError: ``"default"`` for a model without shipped weights.
        FileNotFoundError: no such file.
    """
    if str(weights) == "default":
        if model not in DEFAULT_WEIGHTS:
            known = ", ".join(DEFAULT_WEIGHTS)
            raise ValueError(f"no weights are shipped for model {model!r} (only for: {known}); train it or give a path")
        return Path(str(resources.files("fastpose.weights").joinpath(DEFAULT_WEIGHTS[model])))
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(weights)!r}: no such file (expected 'default' or a .safetensors path)")
    return path


def read_info(path: str | Path) -> WeightsInfo:
    """Metadata of a fastpose weights file; raises ValueError if it is not one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if "fastpose" not in metadata:
        raise ValueError(f"{path} has no fastpose metadata; expected a file that fastpose wrote")
    try:
        return from_dict(WeightsInfo, json.loads(metadata["fastpose"]), "")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged fastpose metadata: {error}") from None


def save_weights(
    path: str | Path, state: dict[str, Tensor], info: WeightsInfo, dtype: torch.dtype = torch.float32
) -> None:
    """Write `state` (floating-point tensors as `dtype`) and `info` to `path`, atomically."""
    tensors = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        tensors[key] = value.to(dtype) if value.is_floating_point() else value
    metadata = {"fastpose": json.dumps(dataclasses.asdict(info))}
    write_atomically(path, lambda p: p.write_bytes(save(tensors, metadata)))


def load_state(model: nn.Module, path: str | Path, name: str) -> None:
    """Copy the weights in `path` into `model`, converting to its dtype.

    Raises:
        ValueError: keys are missing, unexpected or misshaped; the first differing ones are listed, nothing is loaded.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    own = model.state_dict()
    problems = [f"missing {k}" for k in own if k not in loaded]
    problems += [f"unexpected {k}" for k in loaded if k not in own]
    problems += [
        f"{k}: expected {list(own[k].shape)}, got {list(loaded[k].shape)}"
        for k in own
        if k in loaded and own[k].shape != loaded[k].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"weights {path} do not fit model {name!r}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in loaded.items()})
