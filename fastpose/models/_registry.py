"""The model registry: one dict from name to constructor, and what was published about each network."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpose.checkpoints import Checkpoint, fill, find_architecture, read_checkpoint, resolve_weights
from fastpose.codecs import AssociativeEmbeddingCodec, Codec

Constructor = Callable[..., nn.Module]


@dataclass(frozen=True)
class Published:
    """Figures as printed for a network, for comparison with our own counts.

    Attributes:
        source: the paper or repository that prints them.
        input_size: (height, width).
        parameters: in millions.
        gflops: multiply-accumulates as printed; `unit` says in what: ``"1e9"``, ``"2^30"`` or ``"?"`` where unknown.
        accuracy: metric, data set and value, e.g. ``"AP 74.4 COCO val"``.
    """

    source: str
    input_size: tuple[int, int]
    parameters: float | None = None
    gflops: float | None = None
    unit: str = "?"
    accuracy: str = ""


@dataclass(frozen=True)
class ModelEntry:
    """A registered network.

    Attributes:
        name: what :func:`create_model` accepts; build: the constructor.
        input_size: (height, width) the paper works at; num_keypoints: its number of keypoints.
        published: figures as printed, the network's own paper first.
        of_others: fields of the config with which weights of others were trained, where that is not the default.
    """

    name: str
    build: Constructor
    input_size: tuple[int, int]
    num_keypoints: int
    published: tuple[Published, ...]
    of_others: dict[str, Any]


_MODELS: dict[str, ModelEntry] = {}


def register_model(
    input_size: tuple[int, int] = (256, 192),
    num_keypoints: int = 17,
    published: tuple[Published, ...] = (),
    of_others: dict[str, Any] | None = None,
) -> Callable[[Constructor], Constructor]:
    """Decorator: make the constructor `fn` available as ``create_model(fn.__name__)``; arguments as in ModelEntry."""

    def register(fn: Constructor) -> Constructor:
        name = fn.__name__
        if name in _MODELS:
            raise ValueError(f"model name {name!r} is registered twice")
        _MODELS[name] = ModelEntry(name, fn, input_size, num_keypoints, published, of_others or {})
        return fn

    return register


def list_models() -> list[str]:
    """Names accepted by :func:`create_model`, sorted."""
    return sorted(_MODELS)


def model_entry(name: str) -> ModelEntry:
    """What is known about the network called `name`; raises ValueError with the nearest names if there is none."""
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} (known: {', '.join(list_models())})")
    return _MODELS[name]


@functools.cache
def is_bottom_up(name: str) -> bool:
    """Whether the network called `name` finds all people of an image itself: it returns a tuple of maps with tags."""
    entry = model_entry(name)
    with torch.device("meta"), torch.no_grad():  # shapes without numbers
        model = entry.build(num_keypoints=entry.num_keypoints).eval()
        return isinstance(model(torch.empty(1, 3, *entry.input_size)), tuple)


def create_model(
    name: str, num_keypoints: int | None = None, weights: str | Path | None = None, **changes: object
) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of :func:`list_models`, or ``"auto"``: what the names and shapes in `weights` say.
        num_keypoints: number of keypoints K; ``None`` takes it from `weights`, or the paper's without weights.
        weights: ``None`` (random initialisation), ``"default"`` (the weights shipped with the package) or the path of a
            checkpoint of any format that :func:`fastpose.load_checkpoint` accepts.
        **changes: fields of the model's config dataclass to override.

    Returns:
        The network in training mode without weights, in eval mode with them. Called on images [B, 3, H, W] (RGB,
        ImageNet mean and standard deviation) it returns heatmaps [B, K, H/4, W/4]; the bottom-up networks return what
        their docstrings say.

    Raises:
        ValueError: unknown name, config field or weights, or weights that do not fit the network.
        FileNotFoundError: a `weights` path that does not exist.
    """
    if weights is not None:
        return create_from(read_weights(weights, name), name, num_keypoints, **changes)
    if name == "auto":
        raise ValueError("create_model('auto') takes the architecture from a checkpoint; give weights=path")
    return _build(model_entry(name), num_keypoints, changes)


def _build(entry: ModelEntry, num_keypoints: int | None, changes: dict[str, Any]) -> nn.Module:
    k = entry.num_keypoints if num_keypoints is None else num_keypoints
    try:
        return entry.build(num_keypoints=k, **changes)
    except TypeError as error:
        raise ValueError(f"{entry.name} cannot be made with {changes}: {error}") from None


def check_codec(name: str, codec: Codec) -> None:
    """Raise ValueError if the outputs of the network `name` are not what `codec` takes."""
    bottom_up = is_bottom_up(name)
    if bottom_up != isinstance(codec, AssociativeEmbeddingCodec):
        kind = "bottom-up" if bottom_up else "top-down"
        raise ValueError(f"{name} is a {kind} network, for which codec {codec.type!r} is not made")


def read_weights(weights: str | Path, name: str) -> Checkpoint:
    """The file that `weights` means for the network `name`; both and the errors as for :func:`create_model`."""
    if name != "auto":
        model_entry(name)
    return read_checkpoint(resolve_weights(weights, name))


def create_from(
    checkpoint: Checkpoint, name: str = "auto", num_keypoints: int | None = None, **changes: object
) -> nn.Module:
    """:func:`create_model` for weights that are read already; the network is in eval mode."""
    name, found, options = find_architecture(checkpoint, name)
    k = found if num_keypoints is None else num_keypoints
    model = _build(model_entry(name), k, {**options, **changes})
    fill(model, checkpoint)
    return model.eval()
