"""The model registry: one dict from name to constructor."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from torch import nn

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: make the constructor `fn` available as ``create_model(fn.__name__)``."""
    name = fn.__name__
    if name in _MODELS:
        raise ValueError(f"model name {name!r} is registered twice")
    _MODELS[name] = fn
    return fn


def list_models() -> list[str]:
    """Names accepted by :func:`create_model`, sorted."""
    return sorted(_MODELS)


def create_model(
    name: str, num_keypoints: int | None = None, weights: str | Path | None = None, **changes: object
) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of :func:`list_models`.
        num_keypoints: number of heatmaps K; ``None`` takes it from `weights`, or 17 without weights.
        weights: ``None`` (random initialisation), ``"default"`` (the weights shipped with the package) or the path of a
            fastpose ``.safetensors`` file.
        **changes: fields of the model's config dataclass to override.

    Returns:
        The network in training mode without weights, in eval mode with them. Called on images [B, 3, H, W] (RGB,
        ImageNet mean and standard deviation) it returns heatmaps [B, K, H/4, W/4].

    Raises:
        ValueError: unknown name, config field or weights, or weights that do not fit the network.
        FileNotFoundError: a `weights` path that does not exist.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} (known: {', '.join(list_models())})")
    if weights is None:
        return _MODELS[name](num_keypoints=17 if num_keypoints is None else num_keypoints, **changes)

    from fastpose.checkpoints import load_state, read_info, resolve_weights

    path = resolve_weights(weights, name)
    if num_keypoints is None:
        num_keypoints = read_info(path).num_keypoints
    model = _MODELS[name](num_keypoints=num_keypoints, **changes)
    load_state(model, path, name)
    return model.eval()
