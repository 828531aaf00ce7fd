"""`optimize`: a model with its weights folded and packed once, run as one call on the CPU.

The model is captured with `torch.export`; batch norm, activations, residual additions and gates are folded into the
convolutions around them; what remains is a list of a few instructions, each on whole feature maps, that
``csrc/cpu/run_plan.cpp`` runs without going back to Python or to the allocator. `PATTERNS` says what is understood.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

import copy
import math
import operator
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fastpose.graphs import EXPORTING, Graphed
from fastpose.layers import check_images, fold_batch_norm
from fastpose.ops import _backend, run_plan, set_fused

aten = torch.ops.aten
Node = Any  # fx.Node, whose arguments have no useful static type

# as in csrc/cpu/run_plan.h
PAD, PANEL = 16, 32
VERSION, SPLIT_VERSION = 3, 4  # the latter has CONV_SPLIT and gates of CONV_BF16
CONV, DEPTHWISE, UPSAMPLE, MEAN, SCALE, ADD, ACTIVATE, MAX, SUM, STACK, INTERLEAVE, CHANNEL_STATS = range(12)
SCALE_PIXELS, COPY, AVERAGE_POOL, MULTIPLY, BILINEAR, BAND, OUTER = range(12, 19)
MEAN_OF_ROWS, MEAN_OF_COLUMNS, COORDINATE_MEAN, GROUP_SOFTMAX, GROUP_ATTENTION = range(19, 24)
DECONV, MAX_POOL, WINOGRAD, SHUFFLE, CONV_BF16, CONV_INT8, MEAN_MAX, CONV_SPLIT = range(24, 32)
WINOGRAD_LIMIT = 128 * 128  # pairs of channels
# how many times PyTorch's difference from exact numbers one may be that is still rounding
ROUNDING = {"float32": 10, "bfloat16x3": 1000}
PLAIN = ("auto", "float32")  # what there is without a program too
PRECISIONS = ("auto", "float32", "bfloat16x3", "bfloat16", "int8")
INT8_CHANNELS = 72  # of fewer, scaling the map costs as much as the products save
ACTIVATIONS = {
    aten.relu.default: 1,
    aten.relu_.default: 1,
    aten.hardswish.default: 2,
    aten.hardswish_.default: 2,
    aten.silu.default: 3,
    aten.silu_.default: 3,
    aten.hardsigmoid.default: 4,
    aten.sigmoid.default: 5,
    aten.relu6.default: 6,
    aten.hardtanh.default: 6,  # from 0 to 6, which is how ReLU6 is exported
    aten.hardtanh_.default: 6,
}
CLAMPS = (aten.hardtanh.default, aten.hardtanh_.default)
REDUCTIONS = {aten.mean.dim: MEAN, aten.amax.default: MAX, aten.sum.dim_IntList: SUM}
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
VIEWS = (aten.view.default, aten.reshape.default)
MULTIPLICATIONS = (aten.mul.Tensor, aten.mul_.Tensor)
ENLARGE = aten.upsample_nearest2d.vec
NOTHING = (aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)


def _shares_memory(node: Node) -> bool:
    """Whether the result is, or may be, the memory of the first argument."""
    target = node.target
    same = (aten.dropout.default, aten.contiguous.default, aten.reshape.default, operator.getitem)
    return node.op == "call_function" and (target in same or bool(getattr(target, "is_view", False)))


class NotOptimizable(ValueError):
    """The model has an operation that the instruction list does not know; the message names it."""


class Optimized(nn.Module):
    """An optimised network: float32 images [B, C, H, W] on the CPU in, what the original returns out.

    Inference only: there are no parameters and no gradients.
    """

    input_multiple: Final[int]
    name: Final[str]
    outputs: Final[list[int]]
    program: Tensor
    weights: Tensor

    def __init__(self, program: Tensor, weights: Tensor, name: str, input_multiple: int, outputs: list[int]) -> None:
        super().__init__()
        self.register_buffer("program", program)
        self.register_buffer("weights", weights)
        self.name = name
        self.input_multiple = input_multiple
        self.outputs = outputs
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, self.name)
        return run_plan(x, self.program, self.weights, self.outputs)[0]

    @torch.jit.unused
    def check_announced(self, i: int, images: Tensor, output: Tensor) -> None:
        """Take back the announced size of output `i`, for tracing, if that of `output` for `images` is another.

        So is that of a fraction like 21 / 64, which a kernel and stride of three make of an example: no size compared
        here need be a multiple of 64.
        """
        p, q = self.outputs[3 * i + 1 : 3 * i + 3]
        sides = [side * p for side in images.shape[2:]]
        exact = q > 0 and not any(side % q for side in sides)
        if min(p, q) > 1 or (exact and [side // q for side in sides] != list(output.shape[2:])):
            self.outputs[3 * i + 1 : 3 * i + 3] = [0, 0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Optimized":
        dtype = fn(torch.zeros(1, dtype=torch.float32)).dtype
        if dtype != torch.float32:
            raise TypeError(
                f"an optimised network computes in float32 and cannot be made {dtype}; optimize(model, "
                "precision=...) decides what it rounds"
            )
        return super()._apply(fn, recurse)


class OptimizedPair(Optimized):
    """The same for networks that return two maps."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        check_images(x, self.input_multiple, self.name)
        outputs = run_plan(x, self.program, self.weights, self.outputs)
        return outputs[0], outputs[1]


class OptimizedSingle(Optimized):
    """The same for networks that return a tuple of one map."""

    def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        check_images(x, self.input_multiple, self.name)
        return (run_plan(x, self.program, self.weights, self.outputs)[0],)


@dataclass
class _Step:
    op: int
    node: Node
    out: Node
    operand: Node
    other: Node | None = None
    gate: Node | None = None
    second: Node | None = None
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    act: int = 0
    factor: int = 1
    constant: float = 0.0
    weight: Tensor | None = None  # as the convolution has it, float64
    bias: Tensor | None = None


@dataclass
class _Program:
    # of every map: its channels; the map that holds them, itself or one of more channels; which channels they are there
    channels: list[int] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    length: int = 0

    def new_map(self, channels: int) -> int:
        self.channels.append(channels)
        self.base.append(len(self.base))
        self.first.append(0)
        return len(self.base) - 1

    def part(self, whole: int, first: int, channels: int) -> int:
        """Channels [first, first + channels) of the map `whole`."""
        part = self.new_map(channels)
        self.base[part], self.first[part] = self.base[whole], self.first[whole] + first
        return part

    def move(self, part: int, whole: int, first: int) -> None:
        """Let the map `part`, so far on its own, lie in `whole` from channel `first` on."""
        for m, base in enumerate(self.base):
            if base == part:
                self.base[m], self.first[m] = whole, self.first[m] + first

    def step(
        self,
        op: int,
        source: int,
        channels: int,
        other: int = -1,
        gate: int = -1,
        out: int | None = None,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        act: int = 0,
        numbers: tuple[int, int] = (-1, -1),
        factor: int = 1,
        constant: float = 0.0,
        second: int = -1,
    ) -> int:
        """Append an instruction; returns the map it writes, a new one of `channels` unless `out` is given."""
        to = self.new_map(channels) if out is None else out
        bits = struct.unpack("<i", struct.pack("<f", constant))[0]
        self.steps.append([op, source, other, gate, to, kernel, stride, padding, act, *numbers, factor, bits, second])
        return to

    def filters(self, op: int, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
        """Append the numbers of a convolution; returns the offsets of weights and bias."""
        numbers = torch.zeros(len(weight) + -len(weight) % PAD, dtype=torch.float64)
        if bias is not None:
            numbers[: len(bias)] = bias
        if op == CONV_INT8:
            scale = (weight.abs().amax((1, 2, 3), keepdim=True) / 127).clamp(min=1e-30)
            weight = (weight / scale).round()
            more = torch.zeros(2, len(numbers), dtype=torch.float64)
            more[:, : len(weight)] = torch.stack([scale.flatten(), weight.sum((1, 2, 3))])
            numbers = torch.cat([numbers, *more])
        return self.constant(_pack(op, weight)), self.constant(numbers)

    def constant(self, tensor: Tensor) -> int:
        """Append numbers, aligned to a vector; returns their offset."""
        flat = tensor.reshape(-1).float()
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % PAD)])
        self.weights.append(flat)
        self.length += len(flat)
        return self.length - len(flat)

    def all_weights(self) -> Tensor:
        """All numbers in one tensor. They are taken from the program piece by piece, so that they exist once."""
        whole, end = torch.empty(self.length), self.length
        while self.weights:
            flat = self.weights.pop()
            whole[end - len(flat) : end] = flat
            end -= len(flat)
        return whole


def optimize(model: nn.Module, size: tuple[int, int] | None = None, precision: str = "auto") -> Optimized | Graphed:
    """A copy of `model` for inference: on the CPU one fused call, on CUDA a graph per input shape (see `Graphed`).

    Args:
        model: one of this package's networks with float32 parameters, on the device it is to run on; on the CPU also
            any other module from images of three channels to one or two maps, made of the operations below. Its
            attribute `input_multiple`, if it has one, is what heights and widths must be multiples of.
        size: (height, width) of an example input; results are for any size the network takes. Default: 64x64 or twice
            `input_multiple`.
        precision: of the products of 1x1 convolutions, where most of a light network's arithmetic is; sums and
            everything else stay float32. ``"float32"``. ``"bfloat16x3"``: numbers of maps and weights are sums of two
            bfloat16, 16 bits together, and a product is three of theirs; results differ from exact ones by about 1e-5
            of the largest (infinite numbers give NaN), and Intel's processors with AMX do this faster than float32.
            ``"auto"`` is that on those, and ``"float32"`` on all others. ``"bfloat16"``: maps and weights are rounded
            to 8 bits as they are multiplied; up to five times the rate of float32 with AMX, twice on AMD processors
            with AVX512-BF16, elsewhere as fast as float32 or a little slower. ``"int8"``: of wide 1x1 convolutions
            instead bytes, weights scaled per output channel and maps per pixel as they are met; of the others as
            ``"bfloat16"``. Less exact; as fast as bfloat16 with AMX, faster on other processors that have AVX512-VNNI,
            slower than float32 on those without. On CUDA ``"float32"`` (or ``"auto"``), ``"bfloat16"`` or
            ``"float16"``: what everything is computed in.

    Returns:
        A module with the same interface. In float32 it differs from the model by rounding only. What `forward` decides
        by the size of its input, if it does, is decided as for the example.

    Raises:
        RuntimeError: the compiled operators are not available.
        ValueError: an unknown precision or size; parameters that are not float32.
        NotOptimizable: an operation is not understood, the message names it; the model cannot be run or exported; or
            its results in float32 for two examples of different sizes, which are computed once, are others.
    """
    if any(p.is_cuda for p in model.parameters()):
        return Graphed(model, size, "float32" if precision == "auto" else precision)
    if not _backend.LOADED:
        raise RuntimeError(f"optimize needs the compiled operators: {_backend.WHY_NOT}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "auto":
        precision = usual_precision()
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be a positive (height, width), got {tuple(size)}")
    others = {p.dtype for p in model.parameters()} - {torch.float32}
    if others:
        raise ValueError(f"optimize needs float32 parameters, got {', '.join(map(str, others))}")
    name, multiple = type(model).__name__, int(getattr(model, "input_multiple", 1))
    # at least two by two pixels in the smallest map: of one it could not be told whether it is a gate
    usual, least = (64, 1) if multiple == 1 else (2 * multiple, 2 * multiple)
    height, width = (max(side, least) for side in size or (usual, usual))
    example = _images(1, height, width)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        with _refusing(f"{name} cannot be copied and run on images {list(example.shape)}"):
            reference = set_fused(copy.deepcopy(model).eval(), False)
            kind = _kind(name, reference(example.clone()))  # it may write into its input
        with _refusing(f"{name} cannot be exported by PyTorch"), EXPORTING:
            exported = torch.export.export(reference, (example,))
        # Of other sizes too, where what was taken from the example, like the size of a pooling, is wrong.
        larger = [(multiple, 2 * multiple)] if multiple > 1 else [(32, 64), (33, 31)]
        several = [example, *(_images(2, height + h, width + w) for h, w in larger)]
        # In 16 or 8 bits there is no bound for what is rounding that holds for any network, so float32 stands for them.
        for rounded in (precision,) if precision in ROUNDING else ("float32", precision):
            with _refusing(f"{name}: a form of an operation that was not expected"):
                lowered = _Lowering(exported, name, multiple, rounded).lower()
            optimized = kind(*lowered)
            for images in several:
                _compare(optimized, reference, images, ROUNDING.get(rounded))
    return optimized


def usual_precision() -> str:
    """What ``precision="auto"`` is on this processor."""
    return "bfloat16x3" if _backend.cpu_level() == "amx" else "float32"


def _images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float32)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a network that cannot be optimised."""
    try:
        yield
    except NotOptimizable:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise NotOptimizable(f"{what}: {type(error).__name__}: {first}") from error


def _kind(name: str, returned: Any) -> type[Optimized]:
    """The class for what a network returns."""
    several = type(returned) is tuple and len(returned) in (1, 2)
    maps = returned if several else (returned,)
    if not all(isinstance(m, Tensor) and m.dim() == 4 for m in maps):
        items = ", ".join(type(r).__name__ for r in returned) if isinstance(returned, (tuple, list)) else ""
        what = f"{list(returned.shape)}" if isinstance(returned, Tensor) else f"{type(returned).__name__}({items})"
        raise NotOptimizable(f"{name} returns {what}; expected one map [B, C, H, W] or a plain tuple of 1 or 2")
    return Optimized if not several else OptimizedSingle if len(maps) == 1 else OptimizedPair


def _compare(optimized: Optimized, reference: nn.Module, images: Tensor, rounding: int | None) -> None:
    """Run both: what a pattern has overlooked is to be found here and not by wrong keypoints. `rounding`: see there;
    None: only sizes are compared."""
    try:
        expected = reference(images.clone())
    except Exception:
        return  # not a size that the network takes
    try:
        found = optimized(images)
    except (RuntimeError, ValueError) as error:
        raise NotOptimizable(f"{optimized.name}: {error}") from None
    exact: list[Tensor] = []
    for i, (ours, theirs) in enumerate(zip(_maps(found), _maps(expected), strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            results = (f"{t.dtype} {list(t.shape)}" for t in (ours, theirs))
            raise NotOptimizable("{}: the result would be {}, the network's is {}".format(optimized.name, *results))
        optimized.check_announced(i, images, ours)
        largest, off = (float(t.abs().max()) for t in (theirs, ours - theirs))
        if rounding is None or not math.isfinite(largest) or off <= 0.01 * largest:  # rounding is far below this
            continue
        # unless the network makes much of it: then both are compared with exact numbers
        exact = exact or _maps(copy.deepcopy(reference).double()(images.double()))
        ours_off, theirs_off = (float((t - exact[i]).abs().max()) for t in (ours, theirs))
        if not ours_off <= max(0.01 * largest, rounding * theirs_off):
            raise NotOptimizable(
                f"{optimized.name}: the result would differ from the network's by {off:.2g}, whose largest number is "
                f"{largest:.2g}. Either a layer computes something else than its settings say, or this is an error of "
                "fastpose.optimize: please report it with the network"
            )


def _maps(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


class _Lowering:
    """Turns an exported graph into instructions. Values are graph nodes; every instruction ends at one node."""

    def __init__(self, exported: torch.export.ExportedProgram, name: str, multiple: int, precision: str) -> None:
        self.graph = exported.graph
        self.name, self.multiple, self.precision = name, multiple, precision
        signature = exported.graph_signature
        state = {**exported.state_dict, **exported.constants}
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.tensors: dict[str, Tensor] = {k: state[v].detach() for k, v in named.items()}
        self.state = state
        inputs = [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.tensors]
        if len(inputs) != 1:
            raise NotOptimizable(f"{self.name} must take one tensor, it takes {len(inputs)}")
        self.image = inputs[0]
        # nodes by the module they come from, for those that have a rule as a whole
        self.modules: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            for path, kind in _modules_of(node):
                if kind in MODULES:
                    self.modules.setdefault(path, []).append(node)
        self.claimed: set[Node] = set()  # folded into an instruction
        self.ending: dict[Node, list[_Step]] = {}  # instructions by their last node
        self.same: dict[Node, Node] = {}  # nodes that pass a value on unchanged
        # left to those who use them: a map times a gate, a gate plus a number, an upsampled map, a map with zeros
        # around it, a mean or maximum over channels
        self.gated: dict[Node, _Step] = {}
        self.plus: dict[Node, tuple[Node, float]] = {}
        self.enlarged: dict[Node, tuple[Node, int]] = {}
        self.padded: dict[Node, tuple[Node, int]] = {}
        self.over_channels: dict[Node, Node] = {}
        self.program = _Program()
        self.maps: dict[Node, int] = {}

    def lower(self) -> tuple[Tensor, Tensor, str, int, list[int]]:
        """The arguments of `Optimized`."""
        program, maps = self.program, self.maps
        maps[self.image] = program.new_map(self.channels(self.image))
        self.check_writes()
        self.check_modes()
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self.claimed:
                self.match(node)
            for step in self.ending.pop(node, ()):
                self.emit(step)
        (output,) = [n for n in self.graph.nodes if n.op == "output"]
        results = [self.value(n) for n in output.args[0]]
        if self.image in results:
            raise NotOptimizable(f"{self.name} returns the image itself")
        new = any(op == CONV_SPLIT or (op == CONV_BF16 and gate >= 0) for op, _, _, gate, *_ in program.steps)
        header = [
            SPLIT_VERSION if new else VERSION,
            len(program.base),
            len(program.steps),
            maps[self.image],
            len(results),
        ]
        flat = header + [self.map_of(n) for n in results] + program.channels + program.base + program.first
        flat += [v for s in program.steps for v in s]
        sizes = [n for node in results for n in self.size(node)]
        return torch.tensor(flat), program.all_weights(), self.name, self.multiple, sizes

    def check_writes(self) -> None:
        """Refuse operations in place that other nodes see: all of them are computed as if they gave a new map.

        What reads the map afterwards by its own name reads the result, as `torch.export` writes it; but not what shares
        its memory under another.
        """
        for node in self.graph.nodes:
            if not getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                continue
            last, value = node, node.args[0]
            shared = False
            while isinstance(value, fx.Node) and _shares_memory(value):
                shared = shared or set(value.users) != {last}
                last, value = value, value.args[0]
            others = set(value.users) - {last}
            if shared or (others and last is not node) or any(_shares_memory(user) for user in others):
                raise NotOptimizable(
                    f"{self.name}: {node.target} in place on a map that is read under another name too"
                )

    def check_modes(self) -> None:
        """Refuse what eval mode does not switch off."""
        for node in self.graph.nodes:
            if node.target is aten.batch_norm.default and (node.args[5] or node.args[3] is None):
                raise NotOptimizable(f"{self.name}: {node.target} with the statistics of the batch")
            if node.target is aten.dropout.default and node.args[2]:
                raise NotOptimizable(f"{self.name}: {node.target} in training mode")

    def size(self, node: Node) -> list[int]:
        """Channels of an output, and its height and width as a fraction of the image's."""
        (height, width), (h, w) = self.image.meta["val"].shape[2:], node.meta["val"].shape[2:]
        ratio = Fraction(int(h), int(height))
        if ratio != Fraction(int(w), int(width)):
            raise NotOptimizable(f"{self.name}: an output of {h} x {w} for images of {height} x {width}")
        return [int(node.meta["val"].shape[1]), ratio.numerator, ratio.denominator]

    def end(self, step: _Step) -> None:
        """Emit `step` when its last node is reached: by then all its operands have been."""
        self.ending.setdefault(step.out, []).append(step)

    def channels(self, value: Node) -> int:
        shape = value.meta["val"].shape
        return int(shape[1] if len(shape) == 4 else shape[-1])  # [B, C] and [B, 1, C] are maps of one pixel

    def value(self, node: Any) -> Node:
        while node in self.same:
            node = self.same[node]
        if not isinstance(node, fx.Node) and node not in self.maps:
            raise NotOptimizable(f"{self.name}: an operand is {node!r}, expected a feature map")
        return node

    def map_of(self, node: Any) -> int:
        """Number of the map that holds a value; what was left to its users has none."""
        value = self.value(node)
        if value not in self.maps:
            users = ", ".join(str(u.target) for u in getattr(value, "users", ()))
            raise NotOptimizable(f"{self.name}: {value.target} is used by {users}, which is not supported")
        return self.maps[value]

    def match(self, node: Node) -> None:
        for path, kind in _modules_of(node):
            if kind in MODULES:
                MODULES[kind](self, path, self.modules[path])
                return
        rule = PATTERNS.get(node.target)
        if rule is None:
            shape = list(getattr(node.meta.get("val"), "shape", []))
            raise NotOptimizable(f"{self.name}: {node.target} giving {shape} is not in the table of patterns")
        rule(self, node)

    def follower(self, node: Node, targets: Any) -> Node | None:
        """The only user of `node`, if it is one of the operations `targets` and not folded elsewhere."""
        users = list(node.users)
        if len(users) == 1 and users[0].target in targets and users[0] not in self.claimed:
            return users[0]
        return None

    def finish(self, step: _Step, last: Node, residual: bool = True) -> None:
        """Fold what follows `last`, an addition and an activation, into `step` and note where it ends."""
        if residual:
            add = self.follower(last, ADDITIONS)
            plain = add is not None and len(add.args) == 2 and not add.kwargs
            if add is not None and plain and all(isinstance(a, fx.Node) for a in add.args):
                other = add.args[1] if add.args[0] is last else add.args[0]
                same = other.meta["val"].shape == add.meta["val"].shape
                if other is not last and same and other.target is not ENLARGE:
                    step.other, last = other, add
                    self.claimed.add(add)
        act = self.follower(last, ACTIVATIONS)
        if act is not None and self.fits(act):
            step.act, last = ACTIVATIONS[act.target], act
            self.claimed.add(act)
        step.out = last
        self.end(step)

    def convolution(self, node: Node) -> None:
        transposed = node.target is aten.conv_transpose2d.input
        names = ["input", "weight", "bias", "stride", "padding"]
        names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
        given: dict[str, Any] = {
            "bias": None,
            "stride": 1,
            "padding": 0,
            "output_padding": 0,
            "groups": 1,
            "dilation": 1,
        }
        given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight = self.tensors[given["weight"].name].double()
        bias = None if given["bias"] is None else self.tensors[given["bias"].name].double()
        stride, padding, dilation = (self.square(node, given[k]) for k in ("stride", "padding", "dilation"))
        groups = int(given["groups"])
        depthwise = groups > 1 and weight.shape[1] == 1 and weight.shape[0] == groups
        if given["input"] in self.padded and padding == 0 and not transposed:
            given["input"], padding = self.padded[given["input"]]
            # A larger kernel that begins with zeros makes the same of as many zeros on all sides. By two for depthwise
            # ones, of which only odd sizes are known: with the last of them an odd map would give one row too many.
            more = 2 if depthwise else 1
            if depthwise and not (stride == 2 and self.always_even(given["input"])):
                raise NotOptimizable(f"{self.name}: {node.format_node()} on a map padded unevenly is not supported")
            weight, padding = nn.functional.pad(weight, (more, 0, more, 0)), padding + more
        k = weight.shape[2]
        fits = weight.shape[3] == k and dilation == 1 and self.square(node, given["output_padding"]) == 0
        if transposed:
            op = UPSAMPLE if depthwise else DECONV
            fits = fits and (depthwise or groups == 1) and (k, stride, padding) == (4, 2, 1)
            weight = weight if depthwise else weight.transpose(0, 1)  # [out, in, k, k]
        elif depthwise:
            op = DEPTHWISE
            fits = fits and k in (3, 5, 7) and stride in (1, 2) and padding == k // 2
        else:
            op = WINOGRAD if _suits_winograd(weight, stride, padding) else CONV
            # the image is not padded
            if self.precision != "float32" and (k, stride, padding) == (1, 1, 0) and given["input"].op != "placeholder":
                wide = self.precision == "int8" and min(weight.shape[:2]) >= INT8_CHANNELS
                if self.precision != "bfloat16x3":
                    op = CONV_INT8 if wide else CONV_BF16
                elif _suits_split(*weight.shape[:2]):
                    op = CONV_SPLIT
            fits = fits and groups == 1 and padding < k <= 31 and stride <= 31
        if not fits:
            raise NotOptimizable(
                f"{self.name}: convolution with weight {list(weight.shape)}, stride {stride}, padding {padding}, "
                f"dilation {dilation}, groups {groups}{', transposed' if transposed else ''} is not supported"
            )
        last = node
        norm = self.follower(node, (aten.batch_norm.default,))
        if norm is not None:
            mean, var = (self.tensors[a.name].double() for a in norm.args[3:5])
            gamma, beta = (
                torch.full_like(mean, without) if a is None else self.tensors[a.name].double()
                for a, without in zip(norm.args[1:3], (1.0, 0.0), strict=True)
            )
            mean = mean if bias is None else mean - bias
            weight, bias = fold_batch_norm(weight, gamma, beta, mean, var, norm.args[7])
            self.claimed.add(norm)
            last = norm
        step = _Step(op, node, node, given["input"], kernel=k, stride=stride, padding=padding, weight=weight, bias=bias)
        self.take_gate(step)
        self.finish(step, last, residual=op in (CONV, CONV_SPLIT, CONV_BF16, CONV_INT8, WINOGRAD))

    def pad(self, node: Node) -> None:
        """Zeros around a map, one row and column more behind it: left to the convolutions that use it."""
        x, sides = node.args[:2]
        mode = node.args[2] if len(node.args) > 2 else "constant"
        value = node.args[3] if len(node.args) > 3 else 0
        first = sides[0]
        if mode != "constant" or value or list(sides) != [first, first + 1] * 2 or first < 0:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported")
        if not all(u.target is aten.conv2d.default for u in node.users):
            raise NotOptimizable(f"{self.name}: padding that is not followed by a convolution is not supported")
        self.padded[node] = (x, first)

    def always_even(self, node: Node) -> bool:
        """Whether height and width of a map are even for all images the network takes."""
        sizes = zip(node.meta["val"].shape[2:], self.image.meta["val"].shape[2:], strict=True)
        return all(int(n) * self.multiple % (2 * int(whole)) == 0 for n, whole in sizes)

    def square(self, node: Node, value: Any) -> int:
        values = {int(v) for v in value} if isinstance(value, (list, tuple)) else {int(value)}
        if len(values) != 1:
            raise NotOptimizable(f"{self.name}: {node.target} with different settings {value} in height and width")
        return values.pop()

    def reduction(self, node: Node) -> None:
        x, dims = node.args[0], [d % 4 for d in node.args[1]]
        shape = x.meta["val"].shape
        keep = (len(node.args) > 2 and node.args[2]) or sorted(dims) == [2, 3]
        everything = sorted(dims) == [2, 3] or (dims == [3] and shape[2] == 1) or (dims == [2] and shape[3] == 1)
        if not keep or not (everything or dims == [1]) or node.kwargs:
            raise NotOptimizable(f"{self.name}: {node.target} over {dims} of {list(shape)}, keepdim {keep}, is unknown")
        if dims == [1] and all(u.target is aten.cat.default for u in node.users):
            self.over_channels[node] = x  # taken by the concatenation of mean and maximum
        elif dims == [1] and node.target is aten.mean.dim:
            self.channel_stats(node, x)
        elif dims == [1]:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported")
        elif sorted(dims) == [2, 3] and self.mean_max(node, x):
            return
        else:
            self.finish(_Step(REDUCTIONS[node.target], node, node, x), node, residual=False)

    def channel_stats(self, node: Node, x: Node) -> None:
        """Mean, or mean and maximum, over the channels of `x`."""
        step = _Step(CHANNEL_STATS, node, node, x)
        self.take_gate(step)
        self.end(step)

    def take_gate(self, step: _Step) -> None:
        """Let `step` apply the gate of its operand itself, if that was left to it."""
        gated = self.gated.get(step.operand)
        if gated is not None:
            step.operand, step.constant = gated.operand, gated.constant
            # a step with a gate of its own has another place for it
            if step.gate is None:
                step.gate = gated.gate
            else:
                step.second = gated.gate

    def mean_max(self, node: Node, x: Node) -> bool:
        """Mean and maximum over all pixels of one map, in one pass."""
        pair = (aten.mean.dim, aten.amax.default)
        both = {
            user.target: user
            for user in x.users
            if user.target in pair and user not in self.claimed and sorted(d % 4 for d in user.args[1]) == [2, 3]
        }
        if len(both) != 2 or node not in both.values():
            return False
        program, channels = self.program, self.channels(x)
        whole = program.step(MEAN_MAX, self.map_of(x), 2 * channels)
        for i, target in enumerate(pair):
            self.maps[both[target]] = program.part(whole, i * channels, channels)
            self.claimed.add(both[target])
        return True

    def adaptive_pool(self, node: Node) -> None:
        if list(node.args[1]) != [1, 1]:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported; expected an output of one pixel")
        self.finish(_Step(MEAN, node, node, node.args[0]), node, residual=False)

    def multiply(self, node: Node) -> None:
        a, b = node.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            raise NotOptimizable(f"{self.name}: a product with the number {b} is not supported")
        for gate, x in ((a, b), (b, a)):
            full, small = x.meta["val"].shape, gate.meta["val"].shape
            if small[2:] == (1, 1) and small[1] == full[1]:
                step = _Step(SCALE, node, node, x, gate=gate)
                if gate in self.plus:
                    step.gate, step.constant = self.plus[gate]
                break
            if small[1] == 1 and full[2:] == (1, 1):
                step = _Step(OUTER, node, node, x, gate=gate)
                if gate in self.enlarged:
                    step.gate, step.factor = self.enlarged[gate]
                else:
                    step = self.both_gates(step)
                break
            if small[1] == 1 and small[2:] == full[2:] and gate not in self.enlarged:
                step = _Step(SCALE_PIXELS, node, node, x, gate=gate)
                self.take_gate(step)
                break
            if small == full and x not in self.enlarged:
                step = _Step(MULTIPLY, node, node, x, other=gate)
                if gate in self.enlarged:
                    step.other, step.factor = self.enlarged[gate]
                break
        else:
            shapes = [list(v.meta["val"].shape) for v in (a, b)]
            raise NotOptimizable(f"{self.name}: a product of {shapes[0]} and {shapes[1]} is not supported")
        if step.op == SCALE and (self.gates_convolution(step) or self.gates_attention(step)):
            return
        if step.op in (SCALE, SCALE_PIXELS) and self.joins_shuffle(step):
            return
        self.finish(step, step.node, residual=step.op != MULTIPLY)

    def both_gates(self, outer: _Step) -> _Step:
        """A map times the product of a gate per channel and one per pixel, `outer`, as one step, if that product has no
        other use; otherwise `outer`."""
        product = self.follower(outer.node, MULTIPLICATIONS)
        if product is None:
            return outer
        x = product.args[1] if product.args[0] is outer.node else product.args[0]
        if not isinstance(x, fx.Node) or x is outer.node or x in self.enlarged or x in self.gated:
            return outer
        if not x.meta["val"].shape == outer.node.meta["val"].shape == product.meta["val"].shape:
            return outer
        # what comes only now may still be left to its users
        if x not in self.maps and x.target in (ENLARGE, aten.slice.Tensor, operator.getitem):
            return outer
        self.claimed.add(product)
        return _Step(SCALE_PIXELS, product, product, x, gate=outer.gate, second=outer.operand)

    def gates_attention(self, step: _Step) -> bool:
        """Leave a map times a gate to its uses, if all are means and maxima over channels and products with a gate per
        pixel, which take it in."""
        b, channels, h, w = step.node.meta["val"].shape

        def takes_it(user: Node) -> bool:
            if user.target in (aten.mean.dim, aten.amax.default):
                return [d % 4 for d in user.args[1]] == [1] and all(u.target is aten.cat.default for u in user.users)
            if user.target not in MULTIPLICATIONS or not all(isinstance(a, fx.Node) for a in user.args):
                return False
            gate = user.args[1] if user.args[0] is step.node else user.args[0]
            return list(gate.meta["val"].shape) == [b, 1, h, w] and gate not in self.enlarged

        if channels == 1 or h * w == 1 or not all(takes_it(user) for user in step.node.users):
            return False
        self.gated[step.node] = step
        return True

    def gates_convolution(self, step: _Step) -> bool:
        """Leave a map times a gate to the convolution that is its only use, if depthwise or 1x1 and not of bytes."""
        conv = self.follower(step.node, (aten.conv2d.default,))
        if conv is None or conv.args[0] is not step.node:
            return False
        groups = conv.args[6] if len(conv.args) > 6 else 1
        pointwise = list(conv.args[1].meta["val"].shape[2:]) == [1, 1] and self.precision != "int8"
        # stride and padding, if they are given
        pointwise = pointwise and groups == 1 and list(map(list, conv.args[3:5])) in ([], [[1, 1]], [[1, 1], [0, 0]])
        if not pointwise and not 1 < groups == self.channels(step.node):
            return False
        self.gated[step.node] = step
        return True

    def joins_shuffle(self, step: _Step) -> bool:
        """Write a map times its gates straight into the shuffle of two halves that is its only use, as the second."""
        cat = self.follower(step.node, (aten.cat.default,))
        if cat is None or len(cat.args[0]) != 2 or cat.args[0][1] is not step.node:
            return False
        first = cat.args[0][0]
        if len(cat.args) < 2 or cat.args[1] % 4 != 1 or first.target is ENLARGE or first in self.enlarged:
            return False
        end = self.shuffle_after(cat) if first.meta["val"].shape == step.node.meta["val"].shape else None
        if end is None:
            return False
        self.claimed.add(cat)
        if step.op == SCALE_PIXELS:
            step.gate, step.second = step.second, step.gate
        step.op, step.operand, step.other, step.out = INTERLEAVE, first, step.operand, end
        self.end(step)
        return True

    def add(self, node: Node) -> None:
        a, b = node.args[:2]
        if len(node.args) != 2 or node.kwargs:  # alpha
            pass
        elif isinstance(a, fx.Node) and isinstance(b, (int, float)):
            # a number added to a gate: left to the products that use it
            if all(u.target in MULTIPLICATIONS for u in node.users) and node.meta["val"].shape[2:] == (1, 1):
                self.plus[node] = (a, float(b))
                return
        elif isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a.meta["val"].shape == b.meta["val"].shape:
                step = _Step(ADD, node, node, a, other=b)
                if b not in self.enlarged:
                    step.operand, step.other = b, a
                if step.other in self.enlarged:
                    step.other, step.factor = self.enlarged[step.other]
                if step.operand in self.enlarged:
                    raise NotOptimizable(f"{self.name}: a sum of two upsampled maps is not supported")
                self.finish(step, self.third_addend(step, node), residual=False)
                return
        raise NotOptimizable(f"{self.name}: the addition {node.format_node()} is not supported")

    def third_addend(self, step: _Step, node: Node) -> Node:
        """Let the addition `step` take in the one that is the only use of its result; returns its last node."""
        more = self.follower(node, ADDITIONS)
        if more is None or len(more.args) != 2 or more.kwargs or not all(isinstance(a, fx.Node) for a in more.args):
            return node
        third = more.args[1] if more.args[0] is node else more.args[0]
        if third is node or third.meta["val"].shape != node.meta["val"].shape:
            return node
        if third.target is ENLARGE:
            self.enlarge(third)  # which may come after `node`
        step.gate, step.kernel = self.enlarged.get(third, (third, 1))
        self.claimed.add(more)
        return more

    def enlarge(self, node: Node) -> None:
        """Nearest-neighbour upsampling: left to the sums, products and concatenations that use it."""
        x = node.args[0]
        (h, w), (height, width) = x.meta["val"].shape[2:], node.meta["val"].shape[2:]
        factor = height // h
        users = (*ADDITIONS, *MULTIPLICATIONS, aten.cat.default, aten.slice.Tensor)
        if (height, width) != (factor * h, factor * w) or not all(u.target in users for u in node.users):
            raise NotOptimizable(f"{self.name}: upsampling from {h} x {w} to {height} x {width} is not supported")
        self.enlarged[node] = (self.value(x), factor)

    def concat(self, node: Node) -> None:
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        shapes = [list(p.meta["val"].shape) for p in parts]
        if dim % 4 == 1 and all(p in self.over_channels for p in parts):
            kinds = [p.target for p in parts]
            if kinds == [aten.mean.dim, aten.amax.default] and len({self.over_channels[p] for p in parts}) == 1:
                self.channel_stats(node, self.over_channels[parts[0]])
                return
        elif dim % 4 == 1:
            even = len(parts) == 2 and shapes[0] == shapes[1] and not any(p in self.enlarged for p in parts)
            shuffled = self.shuffle_after(node) if even else None
            if shuffled is not None:
                self.end(_Step(INTERLEAVE, node, shuffled, parts[0], other=parts[1]))
            else:
                self.join(node, parts)
            return
        elif len(parts) == 2 and all(s[2:] == [1, 1] for s in shapes):
            self.end(_Step(STACK, node, node, parts[0], other=parts[1]))
            return
        raise NotOptimizable(f"{self.name}: concatenation of {shapes} along dimension {dim} is not supported")

    def join(self, node: Node, parts: list[Node]) -> None:
        """Concatenation: a part that has a map of its own moves into the result, others are copied."""
        program, at = self.program, 0
        whole = self.maps[node] = program.new_map(self.channels(node))
        for part in parts:
            small, factor = self.enlarged.get(part, (part, 1))
            held = self.map_of(small)
            if held == self.maps[self.image]:
                raise NotOptimizable(f"{self.name}: {node.target} of the image itself is not supported")
            if factor == 1 and program.base[held] == held:
                program.move(held, whole, at)
            else:
                to = program.part(whole, at, program.channels[held])
                program.step(COPY, held, program.channels[held], out=to, factor=factor)
            at += program.channels[held]

    def shuffle(self, node: Node) -> None:
        """A channel shuffle: view, transpose, reshape."""
        x = node.args[0]
        end = self.shuffle_after(x, node)
        if end is None:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not part of a channel shuffle")
        groups = int(node.meta["val"].shape[1])
        if groups == 2 and x not in self.enlarged:
            half, held = self.channels(x) // 2, self.map_of(x)
            parts = [self.program.part(held, first, half) for first in (0, half)]
            self.maps[end] = self.program.step(INTERLEAVE, parts[0], 2 * half, other=parts[1])
        else:
            self.end(_Step(SHUFFLE, node, end, x, kernel=groups))

    def shuffle_after(self, node: Node, view: Node | None = None) -> Node | None:
        """The end of a channel shuffle of `node`: view, transpose, reshape. Without `view` it must be the only use of
        `node` and have two groups."""
        b, c, h, w = node.meta["val"].shape
        first = self.follower(node, VIEWS) if view is None else view
        swap = self.follower(first, (aten.transpose.int,)) if first is not None else None
        back = self.follower(swap, VIEWS) if swap is not None else None
        if first is None or swap is None or back is None:
            return None
        groups = int(first.meta["val"].shape[1])
        if list(first.meta["val"].shape) != [b, groups, c // groups, h, w] or sorted(swap.args[1:]) != [1, 2]:
            return None
        if list(back.meta["val"].shape) != [b, c, h, w] or (view is None and groups != 2):
            return None
        self.claimed |= {first, swap, back}
        return back

    def split(self, node: Node) -> None:
        """`chunk` and `split_with_sizes` along the channels: every part is read where it lies."""
        dim = node.args[2] if len(node.args) > 2 else 0
        if dim % 4 != 1:
            raise NotOptimizable(f"{self.name}: {node.target} along dimension {dim} is not supported")
        sizes = [int(part.shape[1]) for part in node.meta["val"]]
        for user in node.users:
            self.claimed.add(user)
            self.range(node.args[0], sum(sizes[: user.args[1]]), user)

    def slice(self, node: Node) -> None:
        x, dim, first = (*node.args, 0, 0)[:3]
        if dim % 4 != 1 or len(node.args) > 4:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported")
        first = first or 0
        self.range(x, max(0, first + self.channels(x)) if first < 0 else first, node)

    def range(self, x: Node, first: int, part: Node) -> None:
        """`part` is channels of `x` from `first` on."""
        if x in self.enlarged:
            small, factor = self.enlarged[x]
            self.maps[(part, "small")] = self.program.part(self.map_of(small), first, self.channels(part))
            self.enlarged[part] = ((part, "small"), factor)
            return
        if self.map_of(x) == 0:
            raise NotOptimizable(f"{self.name}: channels of the image on their own are not supported")
        self.maps[part] = self.program.part(self.map_of(x), first, self.channels(part))

    def average_pool(self, node: Node) -> None:
        kernel = self.square(node, node.args[1])
        stride = self.square(node, node.args[2]) if len(node.args) > 2 and node.args[2] else kernel
        if stride != kernel or any(node.args[3:]) or node.kwargs:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported; expected stride = kernel only")
        self.end(_Step(AVERAGE_POOL, node, node, node.args[0], kernel=kernel))

    def max_pool(self, node: Node) -> None:
        kernel = self.square(node, node.args[1])
        stride = self.square(node, node.args[2]) if len(node.args) > 2 and node.args[2] else kernel
        padding = self.square(node, node.args[3]) if len(node.args) > 3 else 0
        if len(node.args) > 4 or node.kwargs:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported; expected no dilation")
        self.end(_Step(MAX_POOL, node, node, node.args[0], kernel=kernel, stride=stride, padding=padding))

    def bilinear(self, node: Node) -> None:
        x, _, corners, factors = node.args
        if not corners or list(factors or []) != [2.0, 2.0]:
            raise NotOptimizable(
                f"{self.name}: {node.format_node()} is not supported; expected factor 2, align_corners"
            )
        self.finish(_Step(BILINEAR, node, node, x), node, residual=False)

    def band(self, node: Node) -> None:
        """Convolution along the channels: [B, 1, C] with a kernel of odd size and zeros at both ends."""
        x, name, bias, stride, padding = (*node.args, *(None, [1], [0])[len(node.args) - 2 :])[:5]
        weight = self.tensors[name.name].double()
        k = weight.shape[2]
        fits = tuple(weight.shape[:2]) == (1, 1) and x.meta["val"].shape[1] == 1 and len(node.args) < 6
        if not fits or k % 2 == 0 or list(stride) != [1] or list(padding) != [k // 2]:
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported")
        number = None if bias is None else self.tensors[bias.name].double()
        self.finish(_Step(BAND, node, node, x, kernel=k, weight=weight, bias=number), node)

    def vector(self, node: Node) -> None:
        """`unsqueeze`, `transpose` and the like of a map of one pixel: the same numbers."""
        for shape in (node.args[0].meta["val"].shape, node.meta["val"].shape):
            if math.prod(shape[1:]) != max(shape[1:]):
                raise NotOptimizable(f"{self.name}: {node.format_node()} of {list(shape)} is not supported")
        self.same[node] = node.args[0]

    def mcam(self, path: str, nodes: list[Node]) -> None:
        """Multi-scale coordinate attention of LE-HRNet, see `fastpose.models.le_hrnet.MCAM`.

        What follows the filters of three sizes is linear up to the sigmoid: mix(filters(x)) . query is filters(x) .
        (mix^T query), so the mixing convolution is applied to one vector instead of all pixels.
        """
        self.claimed |= set(nodes)
        inputs = {a for n in nodes for a in n.all_input_nodes} - set(nodes)
        (x,) = (a for a in inputs if a.name not in self.tensors)
        mine = {k[len(path) + 1 :]: v.detach().double() for k, v in self.state.items() if k.startswith(path + ".")}
        channels = self.channels(x)
        mix, coordinate = mine["mix.weight"], mine["coordinate.weight"]
        size = mix.shape[1]
        groups = channels // size
        if groups != 4 or channels % PAD != 0:
            raise NotOptimizable(
                f"{self.name}: multi-scale attention in {groups} groups of {size} channels is not supported; "
                "expected 4 groups of a multiple of 4"
            )
        program, held = self.program, self.map_of(x)
        g_h, g_w = (
            self.grouped(program.step(op, held, channels), coordinate, mine["coordinate.bias"], groups, act=5)
            for op in (MEAN_OF_ROWS, MEAN_OF_COLUMNS)
        )
        mean = program.step(COORDINATE_MEAN, held, channels, other=g_h, gate=g_w)
        query = program.step(GROUP_SOFTMAX, mean, channels, kernel=groups)
        gate = program.new_map(channels + groups)
        turned = mix.view(groups, size, size).transpose(1, 2).reshape(channels, size, 1, 1)
        self.grouped(query, turned, None, groups, out=program.part(gate, 0, channels))
        rows = torch.block_diag(*mine["mix.bias"].view(groups, 1, size))
        self.grouped(query, rows[:, :, None, None], None, 1, out=program.part(gate, channels, groups))
        # one filter of 7x7 per channel, the smaller ones with zeros around them; 4 channels of each group in turn
        filters = torch.zeros(groups, size, 7, 7, dtype=torch.float64)
        reach = torch.zeros(size, dtype=torch.int64)
        at = 0
        for j in range(3):
            part = mine[f"scales.{j}.weight"].view(groups, -1, 2 * j + 3, 2 * j + 3)
            filters[:, at : at + part.shape[1], 2 - j : 5 + j, 2 - j : 5 + j] = part
            reach[at : at + part.shape[1]] = j + 1
            at += part.shape[1]
        filters = filters.view(groups, -1, 4, 7, 7).transpose(0, 1)
        reaches = reach.view(-1, 4).amax(1)
        self.maps[(x, path)] = gate
        step = _Step(GROUP_ATTENTION, nodes[-1], nodes[-1], x, gate=(x, path))
        step.weight, step.bias = filters.reshape(channels, 1, 7, 7), reaches
        self.finish(step, nodes[-1])

    def grouped(
        self, x: int, weight: Tensor, bias: Tensor | None, groups: int, act: int = 0, out: int | None = None
    ) -> int:
        """Emit a 1x1 convolution in groups on map `x`: each group for itself, or all at once if they are small."""
        program, size = self.program, weight.shape[1]
        to = program.new_map(len(weight)) if out is None else out
        if size < PANEL:
            weight = torch.block_diag(*weight.view(groups, -1, size))[:, :, None, None]
            groups = 1
        width = len(weight) // groups
        for g in range(groups):
            rows = slice(g * width, (g + 1) * width)
            source = x if groups == 1 else program.part(x, g * size, size)
            target = to if groups == 1 else program.part(to, g * width, width)
            numbers = program.filters(CONV, weight[rows], None if bias is None else bias[rows])
            program.step(CONV, source, width, out=target, act=act, numbers=numbers)
        return to

    def activation(self, node: Node) -> None:
        """An activation that nothing before it could take in."""
        if not self.fits(node):
            raise NotOptimizable(f"{self.name}: {node.format_node()} is not supported; expected bounds 0 and 6")
        self.end(_Step(ACTIVATE, node, node, node.args[0], act=ACTIVATIONS[node.target]))

    def fits(self, activation: Node) -> bool:
        return activation.target not in CLAMPS or list(activation.args[1:]) == [0.0, 6.0]

    def unchanged(self, node: Node) -> None:
        self.same[node] = node.args[0]

    def emit(self, step: _Step) -> None:
        program = self.program

        def operand(node: Node | None) -> int:
            return -1 if node is None else self.map_of(node)

        image = self.maps[self.image]  # its pixels are not padded to whole vectors, which convolutions alone allow for
        plain = step.op in (CONV, DECONV) and step.gate is None
        first = -1 if plain else operand(step.operand)
        if image in (first, *map(operand, (step.other, step.gate, step.second))):
            raise NotOptimizable(
                f"{self.name}: {step.node.target} of the image itself is not supported; expected a dense convolution"
            )
        self.maps[step.out] = program.step(
            step.op,
            operand(step.operand),
            self.channels(step.out),
            other=operand(step.other),
            gate=operand(step.gate),
            kernel=step.kernel,
            stride=step.stride,
            padding=step.padding,
            act=step.act,
            numbers=(-1, -1) if step.weight is None else program.filters(step.op, step.weight, step.bias),
            factor=step.factor,
            constant=step.constant,
            second=operand(step.second),
        )


def _suits_winograd(weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the transforms pay: there are enough channels to outweigh them, and not too many weights to read."""
    out, into, height, width = weight.shape
    return (height, width, stride, padding) == (3, 3, 1, 1) and min(out, into) >= 16 and out * into <= WINOGRAD_LIMIT


def _suits_split(out: int, into: int) -> bool:
    """Whether three products of bfloat16 pay for taking numbers apart, on a core that others keep busy too: products in
    the tile registers are what suffers most by that."""
    return into >= 96 or (into >= 64 and out * into >= 128 * 128)


def _pack(op: int, weight: Tensor) -> Tensor:
    """Weights in the order the kernels read them, output channels padded with zeros to whole vectors."""
    out = weight.shape[0]
    padded = torch.zeros(out + -out % PAD, *weight.shape[1:], dtype=weight.dtype)
    padded[:out] = weight
    if op == BAND:
        return weight.flatten()
    if op == DECONV:  # of output (2 y + a, 2 x + b): rows 3 - a and 1 - a, and columns alike
        phases = [weight.flip(2, 3)[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)]
        return torch.cat([_pack(CONV, phase) for phase in phases])
    if op == WINOGRAD:
        basis = torch.tensor(
            [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
        )
        basis /= 24
        squares = torch.einsum("ay,oiyx,bx->aboi", basis, weight, basis).flatten(0, 1)
        return torch.cat([_pack(CONV, square[:, :, None, None]) for square in squares])
    if op == CONV_SPLIT:  # the nearest bfloat16, and that nearest to what is left
        large = padded.to(torch.bfloat16).to(padded.dtype)
        rows = torch.cat([_grouped(large, torch.bfloat16, 2), _grouped(padded - large, torch.bfloat16, 2)])
    elif op in (CONV_BF16, CONV_INT8):
        rows = _grouped(padded, *((torch.bfloat16, 2) if op == CONV_BF16 else (torch.int8, 4)))
    elif op == CONV:
        rows = padded.permute(2, 3, 1, 0).flatten(0, 2)  # [k * k * in, out]
    else:
        return padded.flatten(1).t()  # [k * k, channels]
    return torch.cat([panel.reshape(-1) for panel in rows.split(PANEL, dim=1)])


def _grouped(weight: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Weights of a 1x1 convolution as [in / count, out], `count` input channels in the bits of a float."""
    padded = nn.functional.pad(weight.flatten(1), (0, -weight.shape[1] % count)).to(dtype)
    return padded.unflatten(1, (-1, count)).contiguous().view(torch.float32).squeeze(2).t()


def _modules_of(node: Node) -> list[tuple[str, str]]:
    """Path and class of the modules an exported node comes from, the outermost first."""
    return list((node.meta.get("nn_module_stack") or {}).values())


# modules that are replaced as a whole, whatever they consist of
MODULES: dict[str, Callable[[_Lowering, str, list[Node]], None]] = {"fastpose.models.le_hrnet.MCAM": _Lowering.mcam}

PATTERNS: dict[Any, Callable[[_Lowering, Node], None]] = {
    aten.conv2d.default: _Lowering.convolution,
    aten.conv_transpose2d.input: _Lowering.convolution,
    aten.pad.default: _Lowering.pad,
    **{target: _Lowering.reduction for target in REDUCTIONS},
    ENLARGE: _Lowering.enlarge,
    aten.cat.default: _Lowering.concat,
    aten.conv1d.default: _Lowering.band,
    aten.unsqueeze.default: _Lowering.vector,
    aten.transpose.int: _Lowering.vector,
    aten.chunk.default: _Lowering.split,
    aten.split_with_sizes.default: _Lowering.split,
    aten.slice.Tensor: _Lowering.slice,
    aten.adaptive_avg_pool2d.default: _Lowering.adaptive_pool,
    aten.avg_pool2d.default: _Lowering.average_pool,
    aten.max_pool2d.default: _Lowering.max_pool,
    **{target: _Lowering.shuffle for target in VIEWS},
    aten.upsample_bilinear2d.vec: _Lowering.bilinear,
    **{target: _Lowering.multiply for target in MULTIPLICATIONS},
    **{target: _Lowering.add for target in ADDITIONS},
    **{target: _Lowering.activation for target in ACTIVATIONS},
    **{target: _Lowering.unchanged for target in NOTHING},
}
