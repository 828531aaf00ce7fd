"""`optimize` on a GPU: batch norm folded into the convolutions, and every input shape replayed as one CUDA graph.

Light networks have hundreds of small kernels, each of which takes the CPU longer to launch than the GPU to run. A graph
is launched as a whole.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fastpose.layers import DWUpsampleBNAct, GhostModule, channels_last, fold_batch_norm
from fastpose.ops import dw_upsample, ghost_cheap

T = TypeVar("T")

aten = torch.ops.aten
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_GRAPHS = 16  # each holds the memory of a whole forward pass at its shape
CAPTURE_AFTER = 2  # calls with a shape, so that one that never returns is not captured
REPLACE_AFTER = 16  # calls when there is no room, so that captures stay rare where more shapes than that take turns


class FoldedGhost(nn.Module):
    """`GhostModule` with the numbers of its batch norm computed once."""

    def __init__(self, ghost: GhostModule) -> None:
        super().__init__()
        self.primary, self.act = ghost.primary, ghost.act
        weight, bias = _folded(ghost.cheap.conv, ghost.cheap.bn)
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)

    def forward(self, x: Tensor) -> Tensor:
        return ghost_cheap(self.primary(x), self.weight, self.bias, self.act)


class FoldedUpsample(nn.Module):
    """`DWUpsampleBNAct` likewise."""

    def __init__(self, layer: DWUpsampleBNAct) -> None:
        super().__init__()
        self.act, self.stride, self.padding = layer.act, layer.stride, layer.padding
        weight, bias = _folded(layer.conv, layer.bn)
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)

    def forward(self, x: Tensor) -> Tensor:
        return dw_upsample(x, self.weight, self.bias, self.act, self.stride, self.padding)


def fold_batch_norms(model: nn.Module, size: tuple[int, int] | None = None) -> nn.Module:
    """A copy of `model` in eval mode whose batch norms are part of the convolutions before them.

    Same interface, any size; the parameters keep their dtype. Where something else reads the result of a convolution
    too, or a layer is used in several places, batch norm stays.

    A transposed convolution keeps its batch norm unless it is a fused layer: torch runs it several times slower with a
    bias.

    Args:
        size: (height, width) of an example input.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, GhostModule) and layer.fused:
            model.set_submodule(name, FoldedGhost(layer))
        elif isinstance(layer, DWUpsampleBNAct) and layer.fused:
            model.set_submodule(name, FoldedUpsample(layer))
    multiple = int(getattr(model, "input_multiple", 32))
    parameter = next(model.parameters())
    example = torch.zeros(1, 3, *(size or (2 * multiple, 2 * multiple)), dtype=parameter.dtype, device=parameter.device)
    with EXPORTING, torch.no_grad():
        exported = torch.export.export(model, (example,))
    owner = {k: v.rpartition(".")[0] for k, v in exported.graph_signature.inputs_to_parameters.items()}
    calls = Counter(owner.get(n.args[1].name) for n in exported.graph.nodes if _has_weight(n))
    for norm in exported.graph.nodes:
        if norm.target is not aten.batch_norm.default:
            continue
        conv = norm.args[0]
        if conv.target is not aten.conv2d.default or len(conv.users) != 1:
            continue
        conv_name, norm_name = owner.get(conv.args[1].name), owner.get(norm.args[1].name)
        if calls[conv_name] != 1 or calls[norm_name] != 1:
            continue  # shared by several places
        layer, batch_norm = model.get_submodule(str(conv_name)), model.get_submodule(str(norm_name))
        weight, bias = _folded(layer, batch_norm)
        layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        model.set_submodule(str(norm_name), nn.Identity())
    return model


def _has_weight(node: fx.Node) -> bool:
    targets = (aten.conv2d.default, aten.batch_norm.default)
    return node.target in targets and isinstance(node.args[1], fx.Node)


def _folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias, computed in float64."""
    numbers = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    weight, gamma, beta, mean, var = (t.detach().double() for t in numbers)
    if conv.bias is not None:
        mean = mean - conv.bias.detach().double()
    weight, bias = fold_batch_norm(weight, gamma, beta, mean, var, norm.eps)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


# torch.export keeps what it is at in global variables: one at a time, whichever thread asks
EXPORTING = threading.RLock()
CAPTURING = threading.RLock()  # see `capture`
# For captures, one per device, of high priority: the other streams torch hands out in turn, so that one more would be
# another thread's by and by, whose work would be captured too.
STREAMS: dict[int, torch.cuda.Stream] = {}
FAILED: list[torch.cuda.CUDAGraph] = []  # torch 2.11 keeps a pointer to a graph whose capture failed

_Key = tuple[torch.device, torch.dtype, tuple[int, ...]]


class Graphed(nn.Module):
    """A network for inference on a CUDA device: images [B, C, H, W] in, what the original returns out, in float32.

    From the second call with a shape and dtype on, that is replayed as a CUDA graph; there are up to `MOST_GRAPHS`, of
    which the one that was not used for longest makes room. A shape for which capturing fails is run call by call, and a
    warning says so; if it is the first, no other is tried. Moving the module or changing its dtype forgets the graphs
    and the failures; what replaces the tensors of `network` otherwise is not seen. Not scriptable: script `network`.

    Attributes:
        network: what is captured, batch norm folded, in the dtype of `precision`; layout: of its maps and weights.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int] | None = None,
        precision: str = "float32",
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        if precision not in DTYPES:
            raise ValueError(f"precision must be one of {', '.join(DTYPES)} on CUDA, got {precision!r}")
        self.dtype = DTYPES[precision]
        self.layout = layout
        self.network = fold_batch_norms(model, size).to(self.dtype)
        if layout == torch.channels_last:
            channels_last(self.network)
        self.input_multiple = int(getattr(model, "input_multiple", 1))
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._calls: Counter[_Key] = Counter()
        self._failed: set[_Key] = set()
        self._cannot = False  # be captured at all
        self._lock = threading.Lock()
        self.eval()

    def forward(self, x: Tensor) -> Any:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("an optimised network has no gradient; use the network that was optimised")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if not self._may_capture(x):
                return self._compute(x)
            with self._lock:
                graph = self._graph(x)
                return self._compute(x) if graph is None else graph.run(x)

    def _apply(self, *args: Any, **kwargs: Any) -> Graphed:
        with self._lock:  # graphs read the weights where they were
            self._forget()
            self._calls.clear()
            self._failed.clear()
            self._cannot = False
            super()._apply(*args, **kwargs)
            self.dtype = next((p.dtype for p in self.network.parameters()), self.dtype)
        return self

    def _forget(self) -> None:
        for graph in self._graphs.values():
            graph.free.synchronize()
        self._graphs.clear()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: graphs and locks stay here."""
        state = {**self.__dict__, "_graphs": OrderedDict(), "_calls": Counter(), "_failed": set()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def _may_capture(self, x: Tensor) -> bool:
        return x.is_cuda and x.numel() > 0 and not self._cannot and not torch.cuda.is_current_stream_capturing()

    def _compute(self, x: Tensor) -> Any:
        outputs = self.network(x.to(self.dtype, memory_format=self.layout))
        return tuple(o.float() for o in outputs) if isinstance(outputs, tuple) else outputs.float()

    def _graph(self, x: Tensor) -> _Graph | None:
        """The graph for inputs like `x`; None if there is none (yet)."""
        key = (x.device, x.dtype, tuple(x.shape))
        self._calls[key] += 1
        enough = CAPTURE_AFTER if len(self._graphs) < MOST_GRAPHS else REPLACE_AFTER
        if key not in self._graphs and key not in self._failed and self._calls[key] >= enough:
            self._compute(x)  # raises what is wrong with the call, whether captured or not
            self._make_room()
            try:
                self._graphs[key] = _Graph(self._compute, x)
            except RuntimeError as error:
                self._failed.add(key)
                if isinstance(error, torch.OutOfMemoryError):
                    self._forget()  # for the call itself
                else:
                    self._cannot = not self._graphs
                first = str(error).partition("\n")[0]
                what = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
                warnings.warn(f"fastpose: no CUDA graph for {what}, running call by call: {first}", stacklevel=4)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return self._graphs.get(key)

    def _make_room(self) -> None:
        """For one graph more. Here and not where that is made: none may be left in a variable, with its memory."""
        while len(self._graphs) >= MOST_GRAPHS:
            oldest, graph = self._graphs.popitem(last=False)
            graph.free.synchronize()  # another stream may still be reading its memory
            self._calls[oldest] = 0


class _Graph:
    """One shape: a captured forward pass on an input of its own."""

    def __init__(self, compute: Any, x: Tensor) -> None:
        with torch.inference_mode(False):  # a caller outside inference mode could not write to such a tensor
            self.x = x.detach().clone()
        with torch.cuda.device(x.device):
            self.graph, self.outputs = capture(lambda: compute(self.x))
            self.free = torch.cuda.Event()
            self.free.record()

    def run(self, x: Tensor) -> Any:
        with torch.cuda.device(x.device):
            self.free.wait()  # another stream may still be reading the last result
            self.x.copy_(x)
            self.graph.replay()
            several = isinstance(self.outputs, tuple)
            result = tuple(o.clone() for o in self.outputs) if several else self.outputs.clone()
            self.free.record()
        return result


def capture(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `call` on the current device, and its results, which every replay overwrites.

    A call that cannot be captured raises what it raises, on the stream it was called on. One thread captures at a time:
    torch waits for the whole device first, which no device allows while anything is captured on it.
    """
    with CAPTURING:
        return _capture(call)


def _capture(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    here, device = torch.cuda.current_stream(), torch.cuda.current_device()
    if device not in STREAMS:
        STREAMS[device] = torch.cuda.Stream(priority=-1)
    aside = STREAMS[device]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # libraries choose their kernels and set themselves up
        for _ in range(3):
            call()
    here.wait_stream(aside)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # On a stream of this device: torch's own for captures belongs to the first device that captured. Leaving `here`
        # puts the thread back on it, which a capture that fails does not. Other threads go on allocating.
        with (
            torch.cuda.stream(here),
            torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"),
        ):
            results = call()
    except BaseException:
        FAILED.append(graph)
        del STREAMS[device]  # whatever state it is left in
        _end_capture(pool)
        raise
    return graph, results


def _end_capture(pool: Any) -> None:
    """After a capture that failed, torch 2.11 leaves the allocator and the random generator in it: end both."""
    with suppress(Exception):  # private functions, which object where torch has done so itself
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    with suppress(RuntimeError), torch.cuda.stream(torch.cuda.current_stream()):
        one = torch.ones(1, device="cuda")
        other = torch.cuda.Stream(priority=-1)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=other, capture_error_mode="thread_local"):
            one.add_(1)  # the end of a capture that succeeds resets the generator
