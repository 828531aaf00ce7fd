"""What `optimize` does for CUDA as far as it can be tested without a device: folding, and when graphs are made."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import warnings
import weakref

import pytest
import torch
from torch import nn

import fastpose
from fastpose import graphs
from fastpose.graphs import Graphed, fold_batch_norms
from tests.test_models import build


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", ["mobileposenet", "lite_csw_hrnet", "hrnet_w32_ae"])
def test_folding_changes_nothing(name):
    model = build(name, num_keypoints=5)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norms(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and norms(model) > 20
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        got, expected = folded(x), exact(x.double())
    got, expected = ((o if isinstance(o, tuple) else (o,)) for o in (got, expected))
    for g, e in zip(got, expected, strict=True):
        assert (g - e).abs().max() <= 1e-5 * e.abs().max()
    assert norms(folded) <= (2 if name == "hrnet_w32_ae" or not fastpose.use_fused() else 0)


class Odd(nn.Module):
    """Batch norms that must stay: of a result that others read, of a convolution that runs twice, of no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        self.last = nn.Conv2d(3, 4, 1)
        self.last_norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.a(x)
        y = y + self.norms[0](y)
        y = self.norms[1](self.b(y)) + self.norms[2](self.b(y + 1))
        return self.last_norm(self.last(self.norms[3](y.relu())))


def test_what_cannot_be_folded_stays():
    torch.manual_seed(0)
    model = Odd().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    folded, x = fold_batch_norms(model, (8, 8)), torch.randn(2, 3, 5, 7)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert norms(model) == 6 and norms(folded) == 5 and folded.last.bias is not None


class Replay:
    """Stands for a captured graph."""

    made: list[tuple[int, ...]] = []
    waited = 0  # for what still reads the memory of a graph that goes

    def __init__(self, compute, x):
        if x.shape[0] == 7:
            raise RuntimeError("not permitted\nand so on")
        if x.shape[0] == 8:
            raise torch.OutOfMemoryError("out of memory")
        self.compute, self.free = compute, self
        self.made.append(tuple(x.shape))

    def run(self, x):
        return self.compute(x)

    def synchronize(self):
        Replay.waited += 1


def test_one_thread_captures_at_a_time(monkeypatch):
    """torch waits for the whole device before a capture, which no device allows while anything is captured on it."""
    inside, most = [], []

    def slow(call):
        inside.append(call)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(call)
        return None, call()

    monkeypatch.setattr(graphs, "_capture", slow)
    threads = [threading.Thread(target=graphs.capture, args=(lambda i=i: i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_graphs_are_made_for_shapes_that_return(monkeypatch):
    monkeypatch.setattr(graphs, "_Graph", Replay)
    monkeypatch.setattr(Graphed, "_may_capture", lambda self, x: not self._cannot)
    monkeypatch.setattr(Replay, "made", [])
    model = build("mobileposenet", num_keypoints=2)
    fast = Graphed(model)
    shapes = [(n, 3, 32, 32) for n in (1, 2, 1, 1, 3, 2)]
    with torch.no_grad():
        for shape in shapes:
            x = torch.randn(shape)
            assert torch.allclose(fast(x), model(x), atol=1e-4)
        assert Replay.made == [(1, 3, 32, 32), (2, 3, 32, 32)]
        fast(torch.randn(1, 3, 32, 32).double())
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        for _ in range(3):  # of another dtype, hence not what was captured
            assert torch.allclose(fast(x), model(x.float()), atol=1e-4)
        assert Replay.made[2:] == [(2, 3, 32, 32)] and len(fast._graphs) == 3

    with pytest.raises(RuntimeError, match="has no gradient"):
        fast(torch.zeros(1, 3, 32, 32, requires_grad=True))


def test_a_capture_that_fails_costs_the_others_nothing(monkeypatch):
    monkeypatch.setattr(graphs, "_Graph", Replay)
    monkeypatch.setattr(Graphed, "_may_capture", lambda self, x: not self._cannot)
    fast = Graphed(build("mobileposenet", num_keypoints=2))
    images = {n: torch.randn(n, 3, 32, 32) for n in (1, 7, 8)}

    def captured():
        return [shape[0] for _, _, shape in fast._graphs]

    def fails(n, why):
        expected = fast(images[n])
        with pytest.warns(UserWarning, match=rf"no CUDA graph for float32 \[{n}, 3, 32, 32\], .*: {why}$"):
            assert torch.equal(fast(images[n]), expected)
        kept = captured()
        with warnings.catch_warnings(action="error"):  # not tried again
            assert torch.equal(fast(images[n]), expected)
        return kept

    fast(images[1]), fast(images[1])
    assert fails(7, "not permitted") == [1]
    assert fails(8, "out of memory") == []  # the call itself may need what graphs held
    fast(images[1])
    assert captured() == [1]
    for _ in range(3):
        with pytest.raises(ValueError, match="must be"):  # the call is wrong, and nothing else
            fast(torch.zeros(1, 3, 32, 33))
    assert captured() == [1]
    fast.float()
    assert captured() == []
    assert fails(7, "not permitted") == []  # again, since the weights are elsewhere; and as the first it is the last
    fast(images[1]), fast(images[1])
    assert captured() == []
    fast.float()
    fast(images[1]), fast(images[1])
    assert captured() == [1]


def test_the_memory_of_a_graph_that_goes_is_free_for_the_next(monkeypatch):
    alive = []

    class Held(Replay):
        def __init__(self, compute, x):
            super().__init__(compute, x)
            alive.append(weakref.ref(self))
            most.append(sum(ref() is not None for ref in alive))
            self.free = Replay(compute, x)

    most: list[int] = []
    monkeypatch.setattr(graphs, "_Graph", Held)
    monkeypatch.setattr(Graphed, "_may_capture", lambda self, x: True)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    fast = Graphed(build("mobileposenet", num_keypoints=2))
    fast.network = torch.nn.Identity()
    for batch in (1, 2, 3):
        for _ in range(graphs.REPLACE_AFTER):
            fast(torch.zeros(batch, 3, 32, 32))
    assert most == [1, 2, 2]


def test_few_graphs_and_many_shapes(monkeypatch):
    monkeypatch.setattr(graphs, "_Graph", Replay)
    monkeypatch.setattr(Graphed, "_may_capture", lambda self, x: True)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(Replay, "made", [])
    fast = Graphed(build("mobileposenet", num_keypoints=2))
    fast.network = torch.nn.Identity()

    def call(batch):
        fast(torch.zeros(batch, 3, 32, 32))
        return [shape[0] for _, _, shape in fast._graphs]

    for _ in range(graphs.REPLACE_AFTER - 1):  # three in turns: no capture at every call
        for batch in (1, 2, 3):
            kept = call(batch)
    assert kept == [1, 2] and len(Replay.made) == 2
    waited = Replay.waited
    assert call(3) == [2, 3] and len(Replay.made) == 3 and Replay.waited == waited + 1
    assert call(1) == [2, 3]  # which begins anew


def test_graphs_are_forgotten_when_weights_move(monkeypatch):
    monkeypatch.setattr(graphs, "_Graph", Replay)
    monkeypatch.setattr(Graphed, "_may_capture", lambda self, x: True)
    model = build("mobileposenet", num_keypoints=2)
    fast, x = Graphed(model), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fast(x), fast(x)
        assert len(fast._graphs) == 1
        waited = Replay.waited
        fast.double()
        assert not fast._graphs and not fast._calls and Replay.waited == waited + 1
        assert torch.allclose(fast(x), model(x), atol=1e-4)


def test_copies_have_no_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "_Graph", Replay)
    monkeypatch.setattr(Graphed, "_may_capture", lambda self, x: True)
    fast, x = Graphed(build("mobileposenet", num_keypoints=2)), torch.randn(1, 3, 32, 32)
    expected = [fast(x) for _ in range(2)][0]
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert len(fast._graphs) == 1 and not twin._graphs
        assert torch.equal(twin(x), expected)


def test_precisions():
    model = build("mobileposenet", num_keypoints=2)
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, float16 on CUDA, got 'int8'"):
        Graphed(model, precision="int8")
    half, x = Graphed(model, precision="bfloat16"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got, expected = half(x), model(x)
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 0.05 * expected.abs().max()
