"""Weights files: our own, safetensors with everything an estimator must know beside the numbers, and others'."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastpose.codecs import AssociativeEmbeddingCodec, Codec, MSRAHeatmapCodec
from fastpose.config import from_dict
from fastpose.files import write_atomically
from fastpose.skeletons import SKELETONS, Skeleton, definition_of, get_skeleton, skeleton_from_dict

SCALE = ":scale"  # end of the names of numbers that int8 weights are multiplied by

USUAL_PADDING = 1.25  # of crops, for weights of others
DEFAULT_MODEL = "mobileposenet"
# model name -> file in fastpose/weights
DEFAULT_WEIGHTS = {
    "mobileposenet": "mobileposenet_lspet.safetensors",
    "hr_litenet": "hr_litenet_lspet.safetensors",
    "lightweight_hrnet_448": "lightweight_hrnet_lspet.safetensors",
    "lite_csw_hrnet": "lite_csw_hrnet_lspet.safetensors",
}


@dataclass(frozen=True)
class WeightsInfo:
    """What travels with the weights.

    Attributes:
        model: registry name; num_keypoints: K; skeleton: its name.
        input_size: (height, width) of the crops the network was trained on and works best at.
        padding: crop side in units of the box's longer side (see `geometry.crop_matrix`); no meaning for bottom-up
            networks, for which the lesser number of `input_size` is the shorter side of the resized image.
        codec: how its outputs become keypoints.
        flip_test: whether averaging with the mirrored crop is recommended.
        options: fields of the network's config that differ from its default.
        skeleton_definition: for a skeleton that is not built in: what `skeletons.skeleton_to_dict` says about it.
        antialias: whether crops that shrink the image are smoothed first (see `geometry.warp_crop`).
    """

    model: str
    num_keypoints: int
    skeleton: str
    input_size: tuple[int, int]
    padding: float
    codec: Codec
    flip_test: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    antialias: bool = True
    skeleton_definition: dict[str, Any] = field(default_factory=dict)

    def get_skeleton(self) -> Skeleton:
        """The keypoints; raises ValueError if `skeleton` is neither built in nor defined here."""
        if self.skeleton_definition.get("name") == self.skeleton:
            return skeleton_from_dict(self.skeleton_definition)
        return get_skeleton(self.skeleton)


def resolve_weights(weights: str | Path, model: str) -> Path:
    """Path of the weights file meant by ``"default"`` or a path; the default of ``"auto"`` is mobileposenet's.

    Raises:
        ValueError: ``"default"`` for a model without shipped weights.
        FileNotFoundError: no such file.
    """
    if str(weights) == "default":
        model = DEFAULT_MODEL if model == "auto" else model
        if model not in DEFAULT_WEIGHTS:
            known = ", ".join(DEFAULT_WEIGHTS)
            raise ValueError(f"no weights are shipped for model {model!r} (only for: {known}); train it or give a path")
        return Path(str(resources.files("fastpose.weights").joinpath(DEFAULT_WEIGHTS[model])))
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(weights)!r}: no such file (expected 'default' or a path)")
    return path


@dataclass(frozen=True)
class Checkpoint:
    """A weights file, read once for all that is asked of it.

    Attributes:
        path: of the file.
        state: its tensors by name, without prefixes of wrappers.
        layout: its format, see `load_checkpoint`.
        metadata: JSON text of its `WeightsInfo`; None for checkpoints of others.
    """

    path: Path
    state: dict[str, Tensor]
    layout: str
    metadata: str | None = None

    def info(self) -> WeightsInfo | None:
        """What travels with the weights of a fastpose file, None for checkpoints of others.

        Raises:
            ValueError: the metadata are damaged.
        """
        return None if self.metadata is None else _parse_info(self.metadata, self.path)


def read_info(path: str | Path) -> WeightsInfo:
    """Metadata of a fastpose weights file; raises ValueError if it is not one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if "fastpose" not in metadata:
        raise ValueError(f"{path} has no fastpose metadata; expected a file that fastpose wrote")
    return _parse_info(metadata["fastpose"], path)


def _parse_info(metadata: str, path: str | Path) -> WeightsInfo:
    try:
        return from_dict(WeightsInfo, json.loads(metadata), "")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged fastpose metadata: {error}") from None


def is_fastpose(path: str | Path) -> bool:
    """Whether `path` is a weights file with readable fastpose metadata."""
    try:
        read_info(path)
    except ValueError:
        return False
    return True


# what published weights with so many keypoints were trained on; fewer than certain for other numbers
USUAL_SKELETONS = {17: "coco17", 16: "mpii16"}


def check_number(skeleton: Skeleton, num_keypoints: int) -> None:
    """Raise ValueError if weights for so many keypoints cannot be for those of `skeleton`."""
    if skeleton.num_keypoints != num_keypoints:
        raise ValueError(
            f"skeleton {skeleton.name!r} has {skeleton.num_keypoints} keypoints, the weights have {num_keypoints}"
        )


def codec_of(checkpoint: Checkpoint, name: str) -> Codec:
    """That of a fastpose file, the customary one for weights of others for the network called `name`."""
    from fastpose.models._registry import is_bottom_up

    info = checkpoint.info()
    if info is not None:
        return info.codec
    if is_bottom_up(name):
        return AssociativeEmbeddingCodec()
    return MSRAHeatmapCodec(edges="hrnet" if checkpoint.layout == "original" else "mmpose")


def describe_weights(checkpoint: Checkpoint, name: str = "auto", skeleton: str | Skeleton | None = None) -> WeightsInfo:
    """The metadata of a fastpose file; for checkpoints of others what is customary among them.

    That is the paper's input size, `padding` 1.25, `MSRAHeatmapCodec` (`AssociativeEmbeddingCodec` for bottom-up
    networks), the flip test, crops without antialiasing, and the keypoints of COCO for 17 and of MPII for 16 of them.
    Weights trained with DARK, UDP or at another input size look the same in the file: correct the result for them.

    Args:
        name: the network, or ``"auto"``.
        skeleton: the keypoints, or their name, for a checkpoint of others.

    Raises:
        ValueError: damaged metadata, no or more than one network fits, or the keypoints cannot be told by their
            number and `skeleton` is not given, or has another number.
    """
    from fastpose.models._registry import model_entry

    info = checkpoint.info()
    if info is not None:
        return info
    name, k, options = find_architecture(checkpoint, name)
    if skeleton is None:
        if k not in USUAL_SKELETONS:
            known = [s.name for s in SKELETONS.values() if s.num_keypoints == k]
            these = f" (there is {' and '.join(known)})" if known else " (none of the built-in ones)"
            raise ValueError(
                f"{checkpoint.layout} weights {checkpoint.path} have {k} keypoints, but do not say which: "
                f"choose with skeleton=...{these}"
            )
        skeleton = USUAL_SKELETONS[k]
    keypoints = get_skeleton(skeleton) if isinstance(skeleton, str) else skeleton
    check_number(keypoints, k)
    return WeightsInfo(
        model=name,
        num_keypoints=k,
        skeleton=keypoints.name,
        input_size=model_entry(name).input_size,
        padding=USUAL_PADDING,
        codec=codec_of(checkpoint, name),
        options=options,
        antialias=False,
        skeleton_definition=definition_of(keypoints),
    )


def save_weights(
    path: str | Path, state: dict[str, Tensor], info: WeightsInfo, dtype: torch.dtype = torch.float32
) -> None:
    """Write `state` (floating-point tensors as `dtype`) and `info` to `path`, atomically.

    With int8 each row of a dense convolution's weight is written as integers and the number to multiply them by, the
    rest as float16.
    """
    tensors = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        if dtype == torch.int8 and value.dim() == 4 and value.shape[1] > 1 and value[0].numel() >= 16:
            scale = value.float().abs().amax((1, 2, 3), keepdim=True) / 127
            tensors[key] = (value.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
            tensors[key + SCALE] = scale
        elif value.is_floating_point():
            tensors[key] = value.to(torch.float16 if dtype == torch.int8 else dtype)
        else:
            tensors[key] = value
    metadata = {"fastpose": json.dumps(dataclasses.asdict(info))}
    write_atomically(path, lambda p: p.write_bytes(save(tensors, metadata)))


def load_checkpoint(model: nn.Module, path: str | Path) -> str:
    """Copy the weights in `path` into `model`, converting to its dtype; all of them or none.

    Accepted are fastpose files (safetensors) and what others published for the same networks (safetensors, or a
    PyTorch file, which is read with ``weights_only=True``): mmpose 1.x (keys ``backbone.``, ``head.``), mmpose 0.x
    (``keypoint_head.``) and the original HRNet, SimpleBaseline and Lite-HRNet repositories (plain keys). Lite-HRNet,
    X-HRNet and Dite-HRNet are switched to the published code's arithmetic (`legacy_fuse`, `legacy_pool`) by files that
    are not fastpose's, since those were trained with it.

    Returns:
        The format that was recognised: ``"fastpose"``, ``"mmpose 1.x"``, ``"mmpose 0.x"`` or ``"original"``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, or keys are missing, unexpected or misshaped: the first differing ones are
            listed, with the network that fits best, and nothing is loaded.
    """
    checkpoint = read_checkpoint(path)
    fill(model, checkpoint)
    as_published = getattr(model, "as_published", None)
    if checkpoint.layout != "fastpose" and callable(as_published):
        as_published()
    return checkpoint.layout


def load_pretrained(model: nn.Module, name: str, num_keypoints: int, path: str | Path) -> list[str]:
    """As `load_checkpoint`, but the checkpoint may be of other keypoints: what depends on their number is left out.

    Args:
        model: the network `name` with `num_keypoints` keypoints and otherwise its default config.

    Returns:
        Names of the tensors that were left as they are, none if the number of keypoints is the same.
    """
    checkpoint = read_checkpoint(path)
    own = model.state_dict()
    renamed = _rename(checkpoint.state, own)
    one, two = _shapes(name, num_keypoints), _shapes(name, num_keypoints + 1)
    left = [k for k in own if one[k].shape != two[k].shape and k in renamed and renamed[k].shape != own[k].shape]
    fill(model, checkpoint, left)
    return left


def fill(model: nn.Module, checkpoint: Checkpoint, leave: Collection[str] = ()) -> None:
    """`load_checkpoint` for a file that is read already; the tensors of `model` called `leave` stay as they are."""
    own = model.state_dict()
    loaded = {k: v for k, v in _rename(checkpoint.state, own).items() if k not in leave}
    problems = _differences(own, {**loaded, **{k: own[k] for k in leave}})
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        fits = matching_models(checkpoint.state)
        hint = f"; it is a {fits[0][0]!r} with num_keypoints={fits[0][1]}" if fits else _closest(checkpoint.state)
        raise ValueError(
            f"{checkpoint.layout} weights {checkpoint.path} do not fit this {type(model).__name__}: "
            f"{'; '.join(problems[:5])}{more}{hint}"
        )
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in loaded.items()}, strict=False)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a weights file of any format that `load_checkpoint` accepts.

    Raises:
        FileNotFoundError: no such file. ValueError: not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    metadata = None
    if len(start) == 9 and start[8:] == b"{":  # 8 bytes of header length, then JSON
        state, metadata = _read_safetensors(path)
    else:
        state = _read_pytorch(path)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    layout = "original"
    if metadata is not None:
        layout = "fastpose"
    elif any(k.startswith("keypoint_head.") for k in state):
        layout = "mmpose 0.x"
    elif any(k.startswith("backbone.") for k in state):
        layout = "mmpose 1.x"
    return Checkpoint(path, state, layout, metadata)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors, and the metadata if fastpose wrote the file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = (file.metadata() or {}).get("fastpose")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    for key in [k for k in tensors if k.endswith(SCALE) and metadata is not None]:
        scale, name = tensors.pop(key), key.removesuffix(SCALE)
        if name not in tensors or tensors[name].shape[:1] != scale.shape[:1]:
            raise ValueError(f"{path}: damaged: {key!r} belongs to no tensor of {scale.shape[0]} rows")
        tensors[name] = tensors[name].float() * scale
    return tensors, metadata


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a program, before the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage happens to cause
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{path} holds a Python object ({foreign[1]}) beside its tensors, and reading that could run code. "
                "If you trust its source, load it with PyTorch and save its 'state_dict' alone"
            ) from None
        if _is_program(path):
            raise ValueError(
                f"{path} is a TorchScript program, for torch.jit.load; expected weights, as `fastpose export --format "
                "safetensors` and `fastpose train` write them"
            ) from None
        raise ValueError(f"{path} is neither a safetensors file nor a PyTorch checkpoint, or damaged") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or those under 'state_dict'")
    return dict(content)


def _is_program(path: Path) -> bool:
    """Whether `torch.jit.save` wrote the file."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _harmless() -> list[Any]:
    """Numpy numbers and arrays, which training logs leave in checkpoints; under their names in numpy 1 and 2."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    named: list[Any] = [np.dtype, np.ndarray]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    return named + [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)]


# the same layer under another name: original repositories -> OpenMMLab
_ALIASES = (("final_layer.0.", "final_layer."), ("final_layers.0.", "final_layer."))


def _plain(key: str) -> str:
    """The name of a tensor without the part of the network it belongs to; unique in all networks here."""
    for prefix in ("backbone.", "keypoint_head.", "head."):
        key = key.removeprefix(prefix)
    return key


def _rename(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names of `own`; what has no counterpart keeps its name."""
    names = {_plain(k): k for k in own}
    assert len(names) == len(own)
    renamed = {}
    for key, value in state.items():
        plain = _plain(key)
        for old, new in _ALIASES:
            if plain not in names and plain.startswith(old):
                plain = new + plain[len(old) :]
        renamed[key if key in own else names.get(plain, key)] = value
    return renamed


def _differences(own: dict[str, Tensor], loaded: dict[str, Tensor]) -> list[str]:
    """Why `loaded` is not a state dict of the shape of `own`. Only the step counters of batch norm may be missing."""
    problems = [f"missing {k}" for k in own if k not in loaded and not k.endswith("num_batches_tracked")]
    problems += [f"unexpected {k}" for k in loaded if k not in own]
    problems += [
        f"{k}: expected {list(own[k].shape)}, got {list(loaded[k].shape)}"
        for k in own
        if k in loaded and own[k].shape != loaded[k].shape
    ]
    return problems


@functools.cache
def _shapes(name: str, num_keypoints: int) -> dict[str, Tensor]:
    """State dict of a network without its numbers. Not to be changed: it is kept."""
    from fastpose.models._registry import model_entry

    with torch.device("meta"):
        return model_entry(name).build(num_keypoints=num_keypoints).state_dict()


def infer_num_keypoints(state: dict[str, Tensor], name: str) -> int | None:
    """Number of keypoints K of the network `name` for which `state` has the right shapes; None if there is none."""
    from fastpose.models._registry import model_entry

    k = model_entry(name).num_keypoints
    one = _shapes(name, k)
    renamed = _rename(state, one)
    if any(key not in one for key in renamed):
        return None
    two = _shapes(name, k + 1)
    for key in one:
        if key in renamed and renamed[key].dim() == one[key].dim():
            for a, b, got in zip(one[key].shape, two[key].shape, renamed[key].shape, strict=True):
                if a != b:  # this dimension grows by b - a with every keypoint
                    found = k + (got - a) // (b - a)
                    return found if found >= 1 and not _differences(_shapes(name, found), renamed) else None
    return None


def find_architecture(checkpoint: Checkpoint, name: str = "auto") -> tuple[str, int, dict[str, Any]]:
    """Network, number of keypoints and config options for a checkpoint.

    Args:
        name: the network if it is known, or ``"auto"``. If the checkpoint does not fit it, the paper's number of
            keypoints is returned and it is left to `fill` to say what differs.

    Raises:
        ValueError: damaged metadata; ``"auto"`` and no network, or more than one, has these names and shapes.
    """
    from fastpose.models._registry import model_entry

    info, state = checkpoint.info(), checkpoint.state
    if info is not None:
        return (info.model if name == "auto" else name), info.num_keypoints, info.options
    if name != "auto":
        k = infer_num_keypoints(state, name)
        return name, model_entry(name).num_keypoints if k is None else k, model_entry(name).of_others
    found = matching_models(state)
    if len(found) == 1:
        return *found[0], model_entry(found[0][0]).of_others
    names = ", ".join(n for n, _ in found)
    why = f"it fits more than one network: {names}" if found else f"no network has these names{_closest(state)}"
    raise ValueError(f"cannot tell the architecture of {checkpoint.layout} weights {checkpoint.path}: {why}")


def _closest(state: dict[str, Tensor]) -> str:
    """The network that shares most tensors (name and shape) with `state`, as a hint."""
    from fastpose.models._registry import list_models, model_entry

    best, score = "", 0.0
    for name in list_models():
        own = _shapes(name, model_entry(name).num_keypoints)
        renamed = _rename(state, own)
        same = sum(k in own and own[k].shape == v.shape for k, v in renamed.items())
        share = same / max(len(own), len(renamed))
        if share > score:
            best, score = name, share
    return f"; nearest: {best!r}, which shares {score:.0%} of the tensors" if best else ""


def matching_models(state: dict[str, Tensor]) -> list[tuple[str, int]]:
    """Networks, with their number of keypoints, whose state dict has exactly the names and shapes of `state`."""
    from fastpose.models._registry import list_models

    found = ((name, infer_num_keypoints(state, name)) for name in list_models())
    return [(name, k) for name, k in found if k is not None]
