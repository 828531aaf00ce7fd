"""Training on a small synthetic data set in the LSPET layout: learning, resuming, failing loudly."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastpose
from fastpose import create_model
from fastpose.checkpoints import read_info, resolve_weights, save_weights
from fastpose.codecs import DarkHeatmapCodec, MSRAHeatmapCodec, SoftmaxHeatmapCodec, UDPHeatmapCodec
from fastpose.config import read_config
from fastpose.data import load_dataset, load_lspet
from fastpose.data.base import boxes_of_keypoints
from fastpose.data.crops import (
    Augmentation,
    CropDataset,
    CropStore,
    ResumableBatches,
    change_colours,
    half_body_box,
)
from fastpose.geometry import apply_affine, crop_matrix, invert_affine
from fastpose.metrics import pck, torso_lengths
from fastpose.skeletons import COCO17, LSP14
from fastpose.train import Average, Optimizer, Schedule, Stage, TrainConfig, _create_model, train
from fastpose.training.muon import Muon
from fastpose.training.records import Log, write_config
from fastpose.training.samples import check_validation, make_dataset, open_store
from fastpose.training.teacher import Teacher
from tests import datasets


@pytest.fixture(scope="module")
def lspet(tmp_path_factory):
    """Images with 14 coloured dots each; only the first ids of each split exist."""
    scipy_io = pytest.importorskip("scipy.io")
    root = tmp_path_factory.mktemp("lspet")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    joints = np.zeros((14, 3, 10000))
    colours = rng.integers(0, 256, (14, 3))
    for i in range(1, 10001):
        joints[:, :2, i - 1] = rng.uniform(20, 100, (14, 2))
        joints[:, 2, i - 1] = rng.random(14) < 0.9
    scipy_io.savemat(root / "joints.mat", {"joints": joints})
    blank, tiny = (cv2.imencode(".jpg", np.zeros((n, n, 3), np.uint8))[1].tobytes() for n in (120, 8))
    for i in range(1, 10001):
        path = root / "images" / f"im{i:05d}.jpg"
        if i > 120:
            path.write_bytes(blank if i <= 600 else tiny)
            continue
        image = np.zeros((120, 120, 3), np.uint8)
        for (x, y, _), colour in zip(joints[:, :, i - 1], colours, strict=True):
            cv2.circle(image, (round(x), round(y)), 5, colour.tolist(), -1)
        cv2.imwrite(str(path), image)
    return root


def config(lspet, output, **changes) -> TrainConfig:
    settings = {
        "data": str(lspet), "output": str(output), "limit": 16, "workers": 0, "validate_every": 1.0, "lr": 2e-3,
        "stages": (Stage((32, 32), 3.0, 4), Stage((48, 48), 1.0, 4)),
        "augment": Augmentation(mirror=0.5, rotation_sd=20),
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def test_lspet_reader(lspet):
    data, val = load_lspet(lspet, "train"), load_lspet(lspet, "val")
    assert len(data) == 8500 and len(val) == 500 and data.skeleton is LSP14
    assert not {p.name for p in data.images} & {p.name for p in val.images}
    box, points = data.boxes[0], data.keypoints[0][data.labelled[0]]
    assert (points >= box[:2] - 1e-3).all() and (points <= box[2:] + 1e-3).all()
    with pytest.raises(ValueError, match="must be 'train' or 'val', got 'test'"):
        load_lspet(lspet, "test")
    with pytest.raises(FileNotFoundError, match="joints.mat"):
        load_lspet(lspet / "images", "val")


def test_boxes_grow_and_clip():
    points = np.array([[[10.0, 20], [30, 80], [500, 500]]], np.float32)
    labelled = np.array([[True, True, False]])
    assert boxes_of_keypoints(points, labelled, 0.15).tolist() == [[1, 11, 39, 89]]
    assert boxes_of_keypoints(points, labelled, 0.5, np.array([[35.0, 85]])).tolist() == [[0, 0, 35, 85]]
    assert boxes_of_keypoints(points, ~labelled & False, 0.15).tolist() == [[0, 0, 0, 0]]


def test_samples_follow_the_keypoints_and_the_seed(lspet):
    data = load_lspet(lspet, "train").take(np.arange(8))
    store = CropStore(data, 1.1, side=64)
    strong = Augmentation(any_rotation=0.5, rotation_sd=30, log_scale=0.2, shift=0.05, mirror=0.5)
    dataset = CropDataset(store, (96, 96), strong, seed=3)
    for index in (0, 3, 11, 25):
        crop, points, valid = dataset[index]
        assert crop.shape == (3, 96, 96) and crop.dtype == torch.uint8 and valid.dtype == torch.bool
        again = CropDataset(store, (96, 96), strong, seed=3)[index]
        assert torch.equal(crop, again[0]) and torch.equal(points, again[1])
        for x, y in points[valid].round().long().tolist():  # a dot lies where the label says
            assert crop[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max() > 40
    assert not torch.equal(dataset[0][0], dataset[8][0])  # the same person in the next epoch


def test_stored_people_are_large_enough_for_every_change(lspet, tmp_path):
    """A crop that shows less than the box must not be enlarged from what was reduced for the whole box."""
    data = load_lspet(lspet, "train").take(np.arange(2))
    changes = Augmentation(scale=(0.5, 1.0), log_scale=0.1, half_body=0.3)
    store = open_store(config(lspet, tmp_path / "run", augment=changes, padding=1.0), data)
    assert math.isclose(changes.zoom, 1.7 * 2 * math.exp(0.1)) and store.side == round(48 * changes.zoom)
    assert Augmentation().zoom == 1.0


def test_batches_cover_every_person_and_resume():
    batches = list(ResumableBatches(10, 3, steps=7, seed=1))
    assert all(len(set(b)) == 3 for b in batches) and batches == list(ResumableBatches(10, 3, 7, 1))
    assert list(ResumableBatches(10, 3, 7, 1, first_step=4)) == batches[4:]
    epoch = [i for b in batches[:3] for i in b]
    assert len(set(epoch)) == 9 and all(i < 10 for i in epoch)
    halves = [list(ResumableBatches(10, 4, 3, 1, rank=r, world=2)) for r in (0, 1)]
    whole = list(ResumableBatches(10, 4, 3, 1))
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(b) for b in whole]
    with pytest.raises(ValueError, match="batch_size 11 is larger than the data set"):
        ResumableBatches(10, 11, 1, 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_dense_convolutions_as_matrices(layout):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 9, 1))
    model = model.to(memory_format=layout)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, TrainConfig(data="", output="", optimizer="muon", clip=0), torch.device("cpu"))
    assert [m.shape for m in optimizer.matrices] == [(12, 8, 3, 3), (9, 12, 1, 1)]
    optimizer.backward(model(torch.randn(2, 3, 12, 12)).square().mean())
    assert optimizer.step(1.0)
    for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        assert not torch.equal(p, old)
        if i in (2, 6):  # what Muon does to the matrix itself
            order = (0, 2, 3, 1) if layout == torch.channels_last else (0, 1, 2, 3)
            matrix = nn.Parameter(old.permute(order).flatten(1))
            matrix.grad = p.grad.permute(order).flatten(1)
            Muon([matrix], lr=0.02, weight_decay=0.02).step()
            assert torch.allclose(p.detach().permute(order).flatten(1), matrix, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_pytorch(nesterov, monkeypatch):
    """Over several steps, and state dicts can be exchanged. PyTorch's own rounds to bfloat16, which is kept from it."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8), (1, 5), (24, 8)]
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    still = ours[3].detach().clone()
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    mine, reference = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if i == 3 else torch.randn_like(p) * (0 if i == 5 else 10.0**step)  # one absent, one zero
            q.grad = None if p.grad is None else p.grad.clone()
        mine.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.allclose(p, q, atol=1e-5)
        saved = mine.state_dict(), reference.state_dict()
        mine.load_state_dict(saved[1])
        reference.load_state_dict(saved[0])
    assert torch.equal(ours[3], still)
    assert torch.allclose(ours[5], theirs[5]) and torch.isfinite(ours[5]).all()


def test_muon_refuses_what_it_does_not_do():
    matrix = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="takes no closure"):
        Muon([matrix]).step(lambda: 0.0)
    with pytest.raises(ValueError, match="adjust_lr_fn must be None or 'original', got 'match_rms_adamw'"):
        Muon([matrix], adjust_lr_fn="match_rms_adamw").step()


@pytest.mark.parametrize(
    ("optimizer", "codec"),
    [("adamw", SoftmaxHeatmapCodec()), ("muon", SoftmaxHeatmapCodec()), ("adamw", UDPHeatmapCodec(hardest=8))],
    ids=["adamw", "muon", "udp"],
)
def test_it_learns_and_writes_usable_weights(lspet, tmp_path, optimizer, codec, monkeypatch):
    best = train(config(lspet, tmp_path / "run", optimizer=optimizer, codec=codec), quiet=True)
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 and lines[0].split(",")[0] == "time"
    losses = [float(line.split(",")[5]) for line in lines[1:]]
    assert losses[2] < losses[0]
    assert 0 <= best <= 100
    info = read_info(tmp_path / "run" / "final.safetensors")
    assert info.input_size == (48, 48) and info.padding == 1.1 and info.codec == codec
    poses = fastpose.PoseEstimator(weights=tmp_path / "run" / "best.safetensors", detector="none")(
        np.zeros((60, 60, 3), np.uint8)
    )
    assert len(poses) == 1
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["config"]["optimizer"] == optimizer and recorded["versions"]["torch"] == torch.__version__
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(config(lspet, tmp_path / "run"), quiet=True)


def command(settings: TrainConfig, path: Path, *options: str) -> list[str]:
    """Write the settings to `path` and return the command that trains with them."""
    path.write_text(json.dumps({"config": asdict(settings)}))
    return [sys.executable, "-m", "fastpose", "train", "--quiet", f"--config={path}", *options]


def same_run(a: Path, b: Path) -> None:
    one, two = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    assert flat(one).keys() == flat(two).keys()
    for key, value in flat(one).items():
        assert torch.equal(value, flat(two)[key]) if torch.is_tensor(value) else value == flat(two)[key], key
    for name in ("best.safetensors", "final.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    lines = [list(csv.DictReader((folder / "log.csv").read_text().splitlines())) for folder in (a, b)]
    timeless = [[{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in f] for f in lines]
    assert timeless[0] == timeless[1]


def flat(state, prefix="") -> dict:
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        return {prefix: state}
    return {k: v for name, part in items for k, v in flat(part, f"{prefix}/{name}").items()}


def test_a_killed_run_resumes_exactly(lspet, tmp_path):
    """kill -9 wherever the run happens to be, more than once; what is left over goes on as if nothing had been."""
    whole, part = (config(lspet, tmp_path / n, optimizer="muon", workers=1, threads=1) for n in ("whole", "part"))
    train(whole, quiet=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(fastpose.__file__).parents[1])}
    log, rng = tmp_path / "part" / "log.csv", np.random.default_rng()
    for attempt in range(3):
        resume = ["--resume"] if (tmp_path / "part" / "last.pt").is_file() else []
        process = subprocess.Popen(command(part, tmp_path / "b.json", *resume), env=environment, start_new_session=True)
        while attempt < 2 and process.poll() is None:
            rows = len(log.read_text().splitlines()) - 1 if log.is_file() else 0
            if rows > attempt:  # so many of the four validations are over
                time.sleep(rng.uniform(0, 0.2))
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        if process.wait(timeout=300) == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert attempt > 0, "the run was over before it could be killed"
    same_run(tmp_path / "whole", tmp_path / "part")


def test_networks_with_random_parts_resume_exactly(lspet, tmp_path, monkeypatch, capsys):
    """EfficientHRNet leaves out blocks at random: a resumed run must not repeat the choices of the first steps."""
    import fastpose.train as module

    settings = {"model": "efficient_hrnet_h4", "mosaic": 2, "stages": (Stage((64, 64), 2.0, 4),), "limit": 8}
    train(config(lspet, tmp_path / "whole", **settings), quiet=True)
    original = module.save_state

    def save_state(path, **state):
        original(path, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", save_state)
    with pytest.raises(KeyboardInterrupt):
        train(config(lspet, tmp_path / "part", **settings), quiet=True)
    monkeypatch.setattr(module, "save_state", original)
    file = tmp_path / "part" / "config.json"
    content = json.loads(file.read_text())
    content["device"]["processes"] = 2
    file.write_text(json.dumps(content))
    torch.manual_seed(123)
    train(config(lspet, tmp_path / "part", **settings), resume=True, quiet=True)
    assert "the run began with 2 processes and goes on with 1" in capsys.readouterr().err
    same_run(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize("at", [8, 16])
def test_what_is_left_after_a_kill_between_two_files(at, lspet, tmp_path, monkeypatch):
    """The log and the best weights are already of the next step when last.pt is not."""
    import fastpose.train as module

    train(config(lspet, tmp_path / "whole"), quiet=True)

    def save_state(path, **state):
        if state["step"] == at:
            raise KeyboardInterrupt
        original(path, **state)

    original = module.save_state
    monkeypatch.setattr(module, "save_state", save_state)
    with pytest.raises(KeyboardInterrupt):
        train(config(lspet, tmp_path / "part"), quiet=True)
    monkeypatch.setattr(module, "save_state", original)
    assert len((tmp_path / "part" / "log.csv").read_text().splitlines()) == 1 + at // 4
    assert (tmp_path / "part" / "final.safetensors").is_file() == (at == 16)
    with pytest.raises(ValueError, match="cannot be resumed with other settings: lr was 0.002 and is 0.1"):
        train(config(lspet, tmp_path / "part", lr=0.1), resume=True, quiet=True)
    train(config(lspet, tmp_path / "part", device="cpu"), resume=True, quiet=True)
    same_run(tmp_path / "whole", tmp_path / "part")


def test_a_run_is_repeated_from_what_it_wrote(lspet, tmp_path):
    train(config(lspet, tmp_path / "one", codec=UDPHeatmapCodec(hardest=3)), quiet=True)
    again = read_config(TrainConfig, tmp_path / "one" / "config.json", [f"output={tmp_path / 'two'}"])
    train(again, quiet=True)
    same_run(tmp_path / "one", tmp_path / "two")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="has no 'config'; expected the config.json of a run"):
        read_config(TrainConfig, tmp_path / "x.json", [])


def short(lspet, output, **changes) -> TrainConfig:
    return config(lspet, output, stages=(Stage((32, 32), 2.0, 4),), limit=8, **changes)


def final(folder: Path) -> dict:
    return load_file(folder / "final.safetensors")


def test_workers_change_nothing(lspet, tmp_path):
    augment = Augmentation(any_rotation=0.2, rotation_sd=20, half_body=0.3, brightness=20, grey=0.2, erase=0.5)
    for workers in (0, 2):
        train(short(lspet, tmp_path / str(workers), workers=workers, augment=augment), quiet=True)
    same_run(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_comes_close(lspet, tmp_path, precision):
    """A few steps of SGD: Adam's first steps have the sign of a gradient, however small it is."""
    sgd = {"optimizer": "sgd", "lr": 1e-3, "ema": 0.0}
    train(short(lspet, tmp_path / "full", **sgd), quiet=True)
    train(short(lspet, tmp_path / "reduced", precision=precision, **sgd), quiet=True)
    full, reduced = final(tmp_path / "full"), final(tmp_path / "reduced")
    torch.manual_seed(0)
    start = create_model("mobileposenet", num_keypoints=14).state_dict()
    moved = sum(float((full[k] - v).square().sum()) for k, v in start.items() if v.is_floating_point())
    apart = sum(float((full[k] - reduced[k]).square().sum()) for k, v in start.items() if v.is_floating_point())
    assert 0 < apart < 0.05 * moved
    state = torch.load(tmp_path / "reduced" / "last.pt", weights_only=True)
    assert bool(state["optimizer"]["scaler"]) == (precision == "float16")


def test_float16_skips_a_step_whose_gradient_overflows():
    model = torch.nn.Linear(4, 1)
    optimizer = Optimizer(model, TrainConfig("", "", precision="float16"), torch.device("cpu"))
    before, scale = model.weight.clone(), optimizer.scaler.get_scale()
    optimizer.backward(model(torch.ones(1, 4)).sum() * 1e37)
    assert not optimizer.step(1.0) and optimizer.may_skip and torch.equal(model.weight, before)
    assert optimizer.scaler.get_scale() < scale
    optimizer.backward(model(torch.ones(1, 4)).sum())
    assert optimizer.step(1.0) and not torch.equal(model.weight, before)


def test_an_infinite_gradient_stops_the_run(lspet, tmp_path, monkeypatch):
    import fastpose.train as module

    monkeypatch.setattr(module, "_loss", lambda c, outputs, t: torch.sqrt(outputs * 0).sum())  # 0, with slope infinity
    with pytest.raises(FloatingPointError, match="a gradient is not finite at step 0; the batch is in"):
        train(short(lspet, tmp_path / "run"), quiet=True)
    assert set(torch.load(tmp_path / "run" / "nan_batch.pt", weights_only=True)) == {"step", "images", "targets"}


def test_a_teacher_is_imitated(lspet, tmp_path):
    train(config(lspet, tmp_path / "teacher"), quiet=True)
    teacher = tmp_path / "teacher" / "final.safetensors"
    given, sgd = {"teacher": str(teacher)}, {"optimizer": "sgd", "lr": 1e-3}
    for name, changes in {"none": {}, "1": {**given, "teacher_weight": 1.0}}.items():
        train(config(lspet, tmp_path / name, seed=1, ema=0.0, **changes), quiet=True)
    for name, changes in {"plain": {}, "0": {**given, "teacher_weight": 0.0}}.items():
        train(short(lspet, tmp_path / name, ema=0.0, **sgd, **changes), quiet=True)
    plain, ignored = final(tmp_path / "plain"), final(tmp_path / "0")
    assert all(torch.allclose(plain[k], ignored[k], atol=1e-5) for k in plain)

    codec, images = SoftmaxHeatmapCodec(), torch.randn(4, 3, 48, 48)  # the teacher's size: nothing is enlarged
    logits = {}
    for path in (teacher, *(tmp_path / n / "final.safetensors" for n in ("none", "1"))):
        with torch.no_grad():
            network = create_model("mobileposenet", weights=path)
            logits[path.parent.name] = network(images)
            if path == teacher:
                once = codec.heatmaps(network(images))
                mirrored = codec.heatmaps(network(images.flip(3))).flip(3)[:, LSP14.flip_indices]
    apart = {k: float(codec.imitation_loss(v, (once + mirrored) / 2)) for k, v in logits.items()}
    assert apart["teacher"] < apart["1"] < apart["none"]
    targets = [48 * torch.rand(4, 14, 2), torch.ones(4, 14, dtype=torch.bool)]
    labels = float(codec.loss(logits["none"], *targets))
    without = tmp_path / "without.safetensors"
    info = read_info(teacher)
    save_weights(without, load_file(teacher), replace(info, flip_test=False))
    for path, imitated in ((teacher, apart["none"]), (without, float(codec.imitation_loss(logits["none"], once)))):
        settings = short(lspet, tmp_path / "x", teacher=str(path), teacher_weight=0.7)
        loss = Teacher(settings, LSP14, torch.device("cpu")).loss(images, logits["none"], targets)
        assert float(loss) == pytest.approx(0.3 * labels + 0.7 * imitated, rel=1e-4)


def test_unfit_teachers_are_named(lspet, tmp_path):
    train(short(lspet, tmp_path / "run"), quiet=True)
    weights, other = str(tmp_path / "run" / "final.safetensors"), tmp_path / "published.pth"
    torch.save(create_model("mobileposenet").state_dict(), other)
    for changes, message in (
        (
            {"teacher": weights, "codec": UDPHeatmapCodec()},
            "makes heatmaps of codec 'softmax', expected 'udp'",
        ),
        ({"teacher": str(other)}, "expected a weights file of fastpose"),
        ({"teacher": "lite_csw"}, "weights 'lite_csw': no such file"),
        ({"teacher": weights, "teacher_weight": 2.0}, "teacher_weight must be between 0 and 1, got 2.0"),
        ({"teacher": weights, "model": "lightweight_hrnet_448", "mosaic": 2}, "codec.position must be above 0, got 0"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(short(lspet, tmp_path / "new", **changes), quiet=True)
        assert not (tmp_path / "new" / "last.pt").exists()
    udp = str(tmp_path / "udp" / "final.safetensors")
    train(short(lspet, tmp_path / "udp", codec=UDPHeatmapCodec()), quiet=True)
    for size, teacher, codec, message in (
        ((64, 64), udp, UDPHeatmapCodec(), r"with codec 'udp' stages must have that size, got \(64, 64\)"),
        ((64, 32), weights, None, r"stages must have the same ratio of the sides, got \(64, 32\)"),
    ):
        changed = config(lspet, tmp_path / "new", stages=(Stage(size, 1.0, 4),), teacher=teacher, codec=codec)
        with pytest.raises(ValueError, match=message):
            Teacher(changed, LSP14, torch.device("cpu"))
    Teacher(short(lspet, tmp_path / "new", teacher=udp, codec=UDPHeatmapCodec()), LSP14, torch.device("cpu"))
    with pytest.raises(ValueError, match="knows 'lsp14', the data have 'coco17' with 17 keypoints instead of 14"):
        Teacher(short(lspet, tmp_path / "new", teacher=weights), COCO17, torch.device("cpu"))


def test_optimizers_are_those_of_torch():
    for name, reference in (
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.01)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)),
    ):
        one, two = (torch.nn.Linear(3, 2, bias=False) for _ in range(2))
        two.load_state_dict(one.state_dict())
        settings = TrainConfig("", "", optimizer=name, lr=0.1, momentum=0.8, weight_decay=0.01, clip=0.0)
        mine, other = Optimizer(one, settings, torch.device("cpu")), reference(two.parameters())
        for _ in range(3):
            x = torch.randn(5, 3)
            mine.backward(one(x).square().mean())
            assert mine.step(1.0)
            other.zero_grad()
            two(x).square().mean().backward()
            other.step()
        assert torch.equal(one.weight, two.weight), name


def test_clipping_bounds_the_step():
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    settings = TrainConfig("", "", optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.5)
    optimizer = Optimizer(model, settings, torch.device("cpu"))
    optimizer.backward(1e6 * model(torch.ones(1, 3)).sum())
    optimizer.step(1.0)
    assert 0.1 < float((model.weight - before).detach().norm()) <= 0.5


def test_compiled_training_is_the_same(lspet, tmp_path, monkeypatch):
    sgd = {"optimizer": "sgd", "lr": 1e-3}
    train(short(lspet, tmp_path / "plain", **sgd), quiet=True)
    calls = []

    def compile_quickly(self):  # without the compiler, which takes minutes
        calls.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    train(short(lspet, tmp_path / "compiled", compile=True, **sgd), quiet=True)
    assert len(calls) == 1
    one, two = final(tmp_path / "plain"), final(tmp_path / "compiled")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)


def test_tensorboard(lspet, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "run" / "tensorboard" and purge_step == 1

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    train(short(lspet, tmp_path / "run", tensorboard=True), quiet=True)
    assert {name for name, _ in written} == {"epoch", "lr_factor", "loss", "images_per_s", "val_pck"}
    assert {step for _, step in written} == {2, 4}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"needs TensorBoard: pip install tensorboard"):
        train(short(lspet, tmp_path / "other", tensorboard=True), quiet=True)


def test_nan_loss_stops_the_run_and_saves_the_batch(lspet, tmp_path, monkeypatch):
    import fastpose.train as module

    monkeypatch.setattr(module, "normalize", lambda crops: crops.float() * float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0; the batch is in"):
        train(config(lspet, tmp_path / "run"), quiet=True)
    assert (tmp_path / "run" / "nan_batch.pt").is_file()


def test_people_beside_their_image(tmp_path):
    """Annotated on larger images than those at hand, whose size is not said."""
    content = datasets.coco_content(("a", "b"), images=4)
    for entry in content["images"]:
        del entry["height"], entry["width"]
    for annotation in content["annotations"][:3]:
        annotation["bbox"] = [1000, 2000 + annotation["id"], 30, 40]
    datasets.write_coco(tmp_path, content, "annotations.json", "images")
    for side in (16, 160):
        data = load_dataset("custom", tmp_path, "all")
        store = CropStore(data, 1.25, side)
        found = data.report.findings["box outside the image (not estimated)"]
        assert found.count == 3
        assert (
            "000.png: nothing of the box [1000.0, 2001.0, 1030.0, 2041.0] is in the 120x90 image" in found.examples[0]
        )
        samples = [CropDataset(store, (side, side))[i] for i in range(len(data))]
        for sample in samples[:3]:
            assert any(all(map(torch.equal, sample, other)) for other in samples[3:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"metric": "AP"}, "AP needs annotations in COCO's format"), ({"metric": "PCKh@0.5"}, "PCKh needs head boxes")],
)
def test_what_cannot_be_measured_is_said_before_training(lspet, tmp_path, changes, message, monkeypatch):
    import fastpose.train as module

    monkeypatch.setattr(module, "open_store", lambda *_: pytest.fail("began"))
    with pytest.raises(ValueError, match=message):
        train(config(lspet, tmp_path / "run", **changes), quiet=True)


def test_images_to_validate_on_are_looked_at_before_training(tmp_path):
    datasets.write_coco(tmp_path, datasets.coco_content(("a", "b")), "annotations.json", "images")
    data = load_dataset("custom", tmp_path, "all")
    check_validation(data)
    for path in data.image_files()[1:]:
        path.write_bytes(b"broken")
    check_validation(data)
    data.image_files()[0].write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the 10 people to validate on has an image that can be read: .*005"):
        check_validation(data)


def test_nothing_to_resume(lspet, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume: .*run does not exist"):
        train(config(lspet, tmp_path / "run"), resume=True)


def test_damaged_files_of_a_run_are_named(lspet, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_when_saved(patched, 2)
        train(short(lspet, run), quiet=True)
    settings = short(lspet, run)
    last, written = run / "last.pt", (run / "last.pt").read_bytes()
    flipped = bytearray(written)
    flipped[len(written) // 2] ^= 1
    state = torch.load(last, weights_only=True)
    partial = {k: v for k, v in state.items() if k != "optimizer"}
    for content, reason in (
        (b"", "not a zip file"),
        (written[:5000], "not a zip file"),
        (written[: len(written) * 9 // 10], "not a zip file"),
        (bytes(flipped), "checksum of .* is wrong"),
        (pickle.dumps({"model": 1}), "not a zip file"),
        (saved([1]), "it holds a list"),
        (saved({"a": 1}), "it has no model, optimizer, average"),
        (saved(partial), "it has no optimizer"),
        (None, "Is a directory"),
    ):
        last.unlink()
        last.mkdir() if content is None else last.write_bytes(content)
        with pytest.raises(ValueError, match=f"last.pt is damaged, or not what a run saves .*{reason}.*; delete it"):
            train(settings, resume=True, quiet=True)
    last.rmdir()
    last.write_bytes(written)
    path = run / "config.json"
    text = path.read_text()
    for content, reason in (("{", "is not valid JSON"), ("[]", "has no 'config'"), ("{}", "has no 'config'")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"config.json {reason}"):
            train(settings, resume=True, quiet=True)
    path.unlink()
    capsys.readouterr()
    train(settings, resume=True, quiet=True)
    assert "config.json is missing: nobody can tell whether the settings are the same" in capsys.readouterr().err
    path.write_text(text)
    with pytest.raises(FileExistsError, match="config.json is a file, expected a folder"):
        train(short(lspet, path), quiet=True)


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def stop_when_saved(monkeypatch, step: int) -> list[int]:
    """Kill the run once it has saved `step`, or before it saves anything if that is 0; returns what it has saved."""
    saved, original = [], fastpose.train.save_state

    def save_state(path, **state):
        if step:
            original(path, **state)
            saved.append(state["step"])
        if state["step"] == step or not step:
            raise KeyboardInterrupt

    monkeypatch.setattr("fastpose.train.save_state", save_state)
    return saved


def test_a_run_killed_before_it_saved_anything_begins_again(lspet, tmp_path, monkeypatch, capsys):
    """A queue that starts killed runs again with --resume need not know how far they came."""
    train(short(lspet, tmp_path / "whole"), quiet=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_when_saved(patched, 0)
        train(short(lspet, tmp_path / "part"), quiet=True)
    (tmp_path / "part" / ".last.123.pt").write_bytes(b"half of it")
    with (tmp_path / "part" / "log.csv").open("a") as file:
        file.write("2026-11")
    with pytest.raises(ValueError, match="cannot be resumed with other settings"):
        train(short(lspet, tmp_path / "part", lr=0.5), resume=True, quiet=True)
    train(short(lspet, tmp_path / "part"), resume=True, quiet=True)
    assert "was killed before it saved anything; it begins again" in capsys.readouterr().err
    same_run(tmp_path / "whole", tmp_path / "part")
    assert not list((tmp_path / "part").glob(".*"))


def test_a_line_that_was_not_written_to_its_end(lspet, tmp_path, monkeypatch):
    train(config(lspet, tmp_path / "whole"), quiet=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_when_saved(patched, 8)
        train(config(lspet, tmp_path / "part"), quiet=True)
    log = tmp_path / "part" / "log.csv"
    log.write_text(log.read_text() + "2026-11")
    for content in ("", "\n\n2026,1\n", "time\n2026\n", "\0\0\0"):
        (tmp_path / "log.csv").write_text(content)
        assert Log(tmp_path, step=8).rows == []
    train(config(lspet, tmp_path / "part"), resume=True, quiet=True)
    same_run(tmp_path / "whole", tmp_path / "part")


def test_the_state_is_saved_between_validations_too(lspet, tmp_path, monkeypatch):
    """Hours may lie between two of them."""
    settings = {"validate_every": 100.0, "optimizer": "muon"}
    train(config(lspet, tmp_path / "whole", **settings), quiet=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        saved = stop_when_saved(patched, 7)
        patched.setattr("fastpose.train.SAVE_AFTER", 0.0)
        train(config(lspet, tmp_path / "part", **settings), quiet=True)
    assert saved == list(range(1, 8))
    train(config(lspet, tmp_path / "part", **settings), resume=True, quiet=True)
    whole, part = final(tmp_path / "whole"), final(tmp_path / "part")
    assert all(torch.equal(whole[k], part[k]) for k in whole)


def test_weights_to_begin_with_are_not_needed_to_go_on(lspet, tmp_path):
    train(short(lspet, tmp_path / "first"), quiet=True)
    begin, teacher = tmp_path / "begin.safetensors", tmp_path / "teacher.safetensors"
    for path in (begin, teacher):
        path.write_bytes((tmp_path / "first" / "final.safetensors").read_bytes())
    train(short(lspet, tmp_path / "run", init=str(begin), teacher=str(teacher)), quiet=True)
    begin.unlink()
    moved = teacher.rename(tmp_path / "moved.safetensors")
    train(short(lspet, tmp_path / "run", init=str(begin), teacher=str(moved)), resume=True, quiet=True)
    train(short(lspet, tmp_path / "run", teacher=str(moved)), resume=True, quiet=True)
    moved.write_bytes((tmp_path / "run" / "final.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be resumed with another teacher: .*moved.safetensors has other"):
        train(short(lspet, tmp_path / "run", teacher=str(moved)), resume=True, quiet=True)


def test_the_default_teacher_is_recorded(tmp_path):
    c = TrainConfig(data="d", output="o", model="lite_hrnet_18", teacher="default")
    write_config(c, torch.device("cpu"), 1, tmp_path / "config.json")
    file = resolve_weights("default", "mobileposenet")
    assert json.loads((tmp_path / "config.json").read_text())["sha256"] == {
        "teacher": hashlib.sha256(file.read_bytes()).hexdigest()
    }


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"some")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last\.pt could not be written: \[enforce fail"):
        fastpose.train.save_state(tmp_path / "last.pt", step=1)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory")))
    with pytest.raises(RuntimeError, match="^CUDA error"):  # which is not the disk's
        fastpose.train.save_state(tmp_path / "last.pt", step=1)


def test_weights_that_nobody_can_measure_are_the_latest(lspet, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("fastpose.train.validate", lambda weights, data, **_: (math.nan, data))
        assert math.isnan(train(short(lspet, tmp_path / "run"), quiet=True))
    best, last = load_file(tmp_path / "run" / "best.safetensors"), final(tmp_path / "run")
    assert all(torch.equal(best[k], last[k]) for k in last)
    data = load_lspet(lspet, "val")
    data.labelled[:, [LSP14.names.index("left_hip"), LSP14.names.index("right_hip")]] = False
    with pytest.raises(ValueError, match="none of the 500 people to validate on has both labelled"):
        check_validation(data)


def test_the_surroundings_are_enough_for_the_largest_changes():
    """Corners of crops, the largest, turned anyhow and shifted, lie in what is kept."""
    for size in ((64, 64), (96, 64), (64, 128)):
        augment = Augmentation(log_scale=0.4, scale=(0.5, 1.6), shift=0.2, any_rotation=1.0)
        reach = augment.reach(size)
        box = np.array([100.0, 100, 180, 150])
        rng, farthest = np.random.default_rng(0), 0.0
        for _ in range(300):
            change = augment.draw(rng)
            inverse = invert_affine(change.matrix(box, size, 1.25, "fastpose"))
            h, w = size
            corners = apply_affine(inverse, np.array([[0, 0], [w - 1, 0], [0, h - 1], [w - 1, h - 1]], np.float64))
            farthest = max(farthest, np.abs(corners - [140, 125]).max() / (80 * 1.25 / 2))
        assert 0.5 * reach < farthest <= reach
    assert Augmentation().reach((64, 64)) < 2.2 < Augmentation(scale=(1.0, 2.0)).reach((64, 64))


def test_schedule():
    c = TrainConfig(data="", output="", stages=(Stage((32, 32), 2.0, 10),), warmup=0.1, decay_start=0.5)
    schedule = Schedule(c, 1000)
    factors = [schedule.factor(s) for s in range(schedule.total)]
    assert schedule.total == 200 and factors[0] < 0.1 and factors[50] == 1.0 and factors[-1] < 0.01
    assert all(a >= b for a, b in zip(factors[30:], factors[31:], strict=False))


def test_schedule_by_steps():
    stages = (Stage((32, 32), 2.0, 10), Stage((64, 64), 3.0, 20))
    c = TrainConfig("", "", stages=stages, warmup=4, milestones=(1.0, 2.5, 4.0), gamma=0.1)
    schedule = Schedule(c, 100)  # 10 and 5 steps an epoch
    assert schedule.total == 20 + 15 and schedule.epoch(20) == 2.0 and schedule.epoch(25) == 3.0
    factors = [schedule.factor(s) for s in range(schedule.total)]
    assert np.allclose(factors[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    # epoch 1 begins with step 10; 2.5 with step 22.5; 4 with step 30
    assert np.allclose(factors[4:], [1.0] * 6 + [0.1] * 13 + [0.01] * 7 + [0.001] * 5)
    with pytest.raises(ValueError, match="the data set has 15 samples, fewer than one batch of 20"):
        Schedule(c, 15)


def test_config_errors(tmp_path):
    base = ["data=d", "output=o"]
    c = read_config(TrainConfig, None, [*base, "lr=1e-2", "augment.mirror=1", "stages=[{size=[64,48],epochs=2}]"])
    assert c.lr == 0.01 and c.augment.mirror == 1.0 and c.stages == (Stage((64, 48), 2.0, 32),)
    for override, message in (
        ("leraning=1", "unknown setting 'leraning'"),
        ("lr=fast", "setting 'lr' must be float, got 'fast'"),
        ("augment.miror=1", "unknown setting 'augment.miror'; did you mean 'mirror'"),
        ("stages=[{size=[64],epochs=2}]", "setting 'stages\\[0\\].size' must be"),
        ("lr", "must have the form key=value"),
        ("optimizer=lamb", "optimizer must be one of adamw, muon, adam, sgd, got 'lamb'"),
        ("precision=int8", "precision must be one of float32, bfloat16, float16, got 'int8'"),
        ("codec.type=associative", "mobileposenet is a top-down network, for which codec 'associative' is not made"),
        ("model=mobilposenet", "unknown model 'mobilposenet'; did you mean mobileposenet"),
        ("milestones=[20, 10]", r"milestones must be epochs in ascending order, got \[20.0, 10.0\]"),
        ("ema=1.0", "ema must be at least 0 and less than 1, got 1.0"),
        ("lr=-1.0", "lr must not be negative, got -1.0"),
        ("augment.mirror=2.0", "augment.mirror is a probability, between 0 and 1, got 2.0"),
        ("augment.log_scale=nan", "augment.log_scale must not be negative, got nan"),
        ("padding=-1.0", "padding must be positive, got -1.0"),
        ("codec.sigma=0.0", "codec.sigma must be above 0, got 0.0"),
        ("decay_start=nan", "decay_start must be between 0 and 1, got nan"),
        ("stages=[{size=[64,48],epochs=0}]", "stages need a positive size, number of epochs"),
        ("stages=[{size=[64,48],epochs=2]", "override 'stages=.*' is not valid TOML: "),
        ("validate_every=0", "validate_every must be positive and finite, got 0.0"),
        ("validate_every=inf", "validate_every must be positive and finite, got inf"),
        ("codec.stride=8", "codec.stride must be 4: mobileposenet's heatmaps are a quarter of the image, got 8"),
        ("threads=08", "setting 'threads' must be int, got '08'"),
        ("seed=-1", "seed must not be negative, got -1"),
        ("threads=-1", "threads must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_config(TrainConfig, None, [*base, override])
    c = read_config(TrainConfig, None, [*base, "output=2024-01-01", "lr=.001", "data=007", "teacher='a'", "init=[b].x"])
    assert (c.output, c.lr, c.data, c.teacher, c.init) == ("2024-01-01", 0.001, "007", "a", "[b].x")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ValueError, match="is not valid TOML"):
        read_config(TrainConfig, tmp_path / "bad.toml", base)


def test_all_stages_are_checked_before_the_first(lspet, tmp_path, monkeypatch):
    stages = (Stage((64, 64), 1, 2), Stage((50, 64), 1, 2))
    with pytest.raises(ValueError, match=r"stages: mobileposenet takes sides that are multiples of \d+, got \(50, 64"):
        train(config(lspet, tmp_path / "run", stages=stages), quiet=True)
    monkeypatch.setattr("fastpose.train.world_size", lambda: 2)
    stages = (Stage((64, 64), 1, 2), Stage((64, 64), 1, 3))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the number of processes, 2, got .*=3"):
        train(config(lspet, tmp_path / "run", stages=stages), quiet=True)


def test_settings_that_are_rarely_meant_are_pointed_out(lspet, tmp_path, capsys):
    train(short(lspet, tmp_path / "run", milestones=(3.0, 4.0), warmup=100.0), quiet=True)
    said = capsys.readouterr().err
    assert "all milestones, [3.0, 4.0], lie behind the run's 2 epochs" in said
    assert "warmup=100 are more steps than the run's 4" in said
    train(short(lspet, tmp_path / "other", milestones=(1.0,), warmup=0.5), quiet=True)
    assert capsys.readouterr().err == ""


def test_pck_by_hand():
    keypoints = np.zeros((2, 14, 2))
    keypoints[:, LSP14.names.index("right_hip")] = [30, 40]  # left shoulder to right hip: 50
    labelled = np.ones((2, 14), bool)
    labelled[:, LSP14.names.index("left_hip")] = False
    labelled[1, LSP14.names.index("left_shoulder")] = False
    lengths = torso_lengths(keypoints, labelled, LSP14)
    assert lengths[0] == 50 and np.isnan(lengths[1])
    predictions = keypoints.copy()
    predictions[0, 0] += [10, 0]  # exactly on the limit of 0.2 torso: correct
    predictions[0, 1] += [10.01, 0]
    total, per_keypoint = pck(predictions, keypoints, labelled, lengths)
    flags = 2 * labelled  # as in COCO files
    assert np.array_equal(torso_lengths(keypoints, flags, LSP14), lengths, equal_nan=True)
    assert pck(predictions, keypoints, flags, lengths)[0] == total
    assert np.isclose(total, 100 * 12 / 13)
    assert per_keypoint[0] == 100 and per_keypoint[1] == 0 and np.isnan(per_keypoint[3])


def test_rotation_and_scale_are_drawn_as_in_hrnet():
    changes = Augmentation(rotation=30.0, scale=(0.75, 1.25), law="hrnet")
    rng = np.random.default_rng(0)
    drawn = [changes.draw(rng) for _ in range(4000)]
    rotation, scale = np.array([c.rotation for c in drawn]), np.array([c.scale for c in drawn])
    assert abs((rotation == 0).mean() - 0.4) < 0.03 and np.abs(rotation).max() == 60
    # of a normal distribution 4.6 % lie beyond two standard deviations, 32 % beyond one
    assert abs((np.abs(rotation) == 60).mean() - 0.6 * 0.0455) < 0.01
    assert abs((np.abs(rotation) < 30).mean() - (0.4 + 0.6 * 0.683)) < 0.03
    assert scale.min() == 0.75 and scale.max() == 1.25 and abs((np.abs(scale - 1) == 0.25).mean() - 0.317) < 0.03
    with pytest.raises(ValueError, match=r"augment.law must be 'uniform' or 'hrnet', got 'normal'"):
        Augmentation(law="normal")


def test_networks_may_begin_as_in_hrnet(lspet, tmp_path):
    settings = {"initialization": "hrnet", "model": "hr_litenet"}
    changed = _create_model(config(lspet, tmp_path / "a", **settings), LSP14)
    for layer in changed.modules():
        if isinstance(layer, torch.nn.Conv2d):
            assert float(layer.weight.detach().abs().max()) < 0.006 and float(layer.weight.detach().std()) > 0
            assert layer.bias is None or not layer.bias.any()
    images = torch.randn(2, 3, 64, 64)
    usual = _create_model(config(lspet, tmp_path / "b", **{**settings, "initialization": "torch"}), LSP14)
    with torch.no_grad():
        assert float(changed(images).std()) < 1 < 10 < float(usual(images).std())
    with pytest.raises(ValueError, match="initialization must be one of torch, hrnet, got 'xavier'"):
        config(lspet, tmp_path / "c", initialization="xavier")


def test_keypoints_outside_the_crop_are_drawn_by_gaussian_codecs(lspet, tmp_path):
    """As in HRNet, whose targets show the part of a Gaussian that is on the map."""
    data = load_lspet(lspet, "train").take(np.arange(4))
    narrow = Augmentation(scale=(0.4, 0.4))  # of the box, so that many keypoints lie outside
    for codec, outside in ((MSRAHeatmapCodec(), True), (DarkHeatmapCodec(), True), (SoftmaxHeatmapCodec(), False)):
        c = config(lspet, tmp_path / "run", augment=narrow, codec=codec)
        dataset = make_dataset(c, open_store(c, data), c.stages[0], 0)
        trained = 0
        for i in range(len(data)):
            _, points, valid = dataset[i]
            size = c.stages[0].size
            inside = ((points > -0.5) & (points < torch.tensor([size[1] - 0.5, size[0] - 0.5]))).all(1)
            _, weight = codec.encode(points[None], valid[None], (size[0] // 4, size[1] // 4))
            assert (weight[0][inside & valid] == 1).all()
            assert outside or not weight[0][~inside].any()
            far = ((points < -40) | (points > max(size) + 40)).any(1)
            assert not weight[0][far].any()
            trained += int(weight[0][~inside].sum())
        assert (trained > 0) == outside


def test_half_body_box_is_that_of_hrnet():
    """HRNet crops 1.5 times the extent around the mean of the keypoints, and does not pad that again."""
    keypoints = np.stack([np.arange(14.0), 10 * np.arange(14.0)], 1)
    keypoints[6] = [6, 132]  # so that the mean of the upper half is not the middle of its extent
    labelled = np.ones(14, bool)
    whole = np.array([0.0, 0.0, 1.0, 1.0])
    lower = half_body_box(keypoints, labelled, LSP14, False, whole, 1.25)  # keypoints 0 to 5, (0, 0) to (5, 50)
    assert np.allclose(lower, [2.5 - 3, 25 - 30, 2.5 + 3, 25 + 30])
    upper = half_body_box(keypoints, labelled, LSP14, True, whole, 1.5)  # 6 to 13, (6, 70) to (13, 132)
    assert np.allclose(upper, [9.5 - 3.5, 104 - 31, 9.5 + 3.5, 104 + 31])
    matrix = crop_matrix(upper, (96, 96), 1.5)  # the height of the crop: 1.5 times 62 pixels
    assert np.isclose(matrix[1, 1], 96 / 93)
    labelled[:4] = False  # two of the lower half are too few: the other one is taken
    assert np.array_equal(half_body_box(keypoints, labelled, LSP14, False, whole, 1.5), upper)
    labelled[4:6] = False  # eight labels in all are too few
    assert half_body_box(keypoints, labelled, LSP14, True, whole, 1.5) is whole


def test_mirrored_labels_are_those_of_the_other_side(lspet):
    store = CropStore(load_lspet(lspet, "train").take(np.arange(4)), 1.1, side=96)
    plain, mirrored = (CropDataset(store, (96, 96), Augmentation(mirror=m)) for m in (0.0, 1.0))
    for i in range(4):
        (_, points, valid), (_, turned, turned_valid) = plain[i], mirrored[i]
        expected = (points * torch.tensor([-1, 1]) + torch.tensor([95, 0]))[LSP14.flip_indices]
        assert torch.equal(turned_valid, valid[LSP14.flip_indices]) and torch.allclose(turned, expected, atol=1e-3)


@pytest.mark.parametrize("codec", [SoftmaxHeatmapCodec(), MSRAHeatmapCodec(), UDPHeatmapCodec()], ids=lambda c: c.type)
def test_crops_lie_as_the_codec_has_them(lspet, tmp_path, codec):
    c = config(lspet, tmp_path, codec=codec, augment=Augmentation(), stages=(Stage((192, 192), 1, 4),))
    data = load_lspet(lspet, "train").take(np.arange(2))
    _, points, _ = make_dataset(c, open_store(c, data), c.stages[0], 0)[0]
    matrix = crop_matrix(data.boxes[0], (192, 192), c.padding, convention=codec.convention)
    assert np.allclose(points, apply_affine(matrix, data.keypoints[0]), atol=1e-3)


def test_a_reduced_image_keeps_its_keypoints(lspet):
    data = load_lspet(lspet, "train").take(np.arange(2))
    small, large = (CropDataset(CropStore(data, 1.1, side=side), (48, 48)) for side in (48, 1000))
    for i in range(2):
        assert torch.allclose(small[i][1], large[i][1], atol=0.02)


def test_the_schedule_reaches_the_weights():
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    settings = TrainConfig("", "", optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip=0.0)
    optimizer = Optimizer(model, settings, torch.device("cpu"))
    optimizer.backward(model(torch.ones(1, 3)).sum())
    optimizer.step(0.25)
    assert torch.allclose(before - model.weight, torch.full((2, 3), 0.025))


def test_the_shape_of_the_schedule():
    schedule = Schedule(TrainConfig("", "", stages=(Stage((64, 64), 10, 10),), warmup=0.1, decay_start=0.5), 100)
    got = [schedule.factor(step) for step in (0, 9, 10, 49, 75, 99)]
    assert got == pytest.approx([1 / 11, 10 / 11, 1, 1, 0.5, 0.5 * (1 + math.cos(math.pi * 0.98))])


def test_the_average_of_the_weights():
    model = nn.Linear(1, 1, bias=False)
    average, expected = Average(model, 0.25), model.weight.item()
    for n, value in enumerate((1.0, 2.0, 4.0), 1):
        nn.init.constant_(model.weight, value)
        average.update(model)
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert float(average.state["weight"]) == pytest.approx(expected)


def test_what_is_saved_is_the_average(lspet, tmp_path):
    train(short(lspet, tmp_path / "run", ema=0.9), quiet=True)
    state, last = torch.load(tmp_path / "run" / "last.pt", weights_only=True), final(tmp_path / "run")
    best, key = load_file(tmp_path / "run" / "best.safetensors"), "head.weight"
    assert torch.equal(last[key], state["average"][key])
    assert not torch.equal(last[key], state["model"][key]) and not torch.equal(best[key], state["model"][key])


def test_augmentations_are_applied_as_they_are_asked_for(lspet, tmp_path):
    crop = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    assert (change_colours(crop, Augmentation(grey=1.0), np.random.default_rng(0)) == 124).all()
    data = load_lspet(lspet, "train").take(np.arange(1))
    grey = CropDataset(CropStore(data, 1.1, 64), (64, 64), Augmentation(grey=1.0))[0][0]
    assert grey.any() and torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])

    keypoints, labelled = data.keypoints[0], data.labelled[0]
    boxes = [half_body_box(keypoints, labelled, LSP14, upper, data.boxes[0], 1.1) for upper in (True, False)]
    wanted = [apply_affine(crop_matrix(box, (96, 96), 1.1), keypoints) for box in boxes]
    dataset = CropDataset(CropStore(data, 1.1, 400), (96, 96), Augmentation(half_body=1.0))
    which = [[np.allclose(dataset[i][1], w, atol=1e-2) for w in wanted] for i in range(8)]
    assert all(any(w) for w in which) and {w.index(True) for w in which} == {0, 1}

    rng = np.random.default_rng(0)
    drawn = [Augmentation(rotation_sd=20.0, log_scale=0.3).draw(rng) for _ in range(2000)]
    assert np.std([c.rotation for c in drawn]) == pytest.approx(20, rel=0.1)
    scales = np.log([c.scale for c in drawn])
    assert -0.3 <= scales.min() < -0.29 and 0.29 < scales.max() <= 0.3
    assert np.std([Augmentation(any_rotation=1.0).draw(rng).rotation for _ in range(500)]) > 90


def test_surroundings_are_kept_for_larger_crops(tmp_path):
    content = datasets.coco_content(("a", "b"), images=1, people=1)
    content["annotations"][0]["bbox"] = [100, 100, 40, 50]
    content["images"][0] |= {"height": 300, "width": 300}
    datasets.write_coco(tmp_path, content, "annotations.json", "images")
    datasets.picture(tmp_path / "images" / "000.png", np.zeros((0, 2, 2)), size=(300, 300))
    store = CropStore(load_dataset("custom", tmp_path, "all"), 1.0, 200)
    assert min(store.get(0).image.shape[:2]) >= 2.2 * 50


def test_boxes_of_lspet_have_a_margin(lspet):
    data = load_lspet(lspet, "train").take(np.arange(3))
    for points, labelled, box in zip(data.keypoints, data.labelled, data.boxes, strict=True):
        low, high = points[labelled].min(0), points[labelled].max(0)
        margin = 0.15 * (high - low).max()
        inside = box[:2] > 0  # where the image does not cut it
        assert np.allclose(box[:2][inside], (low - margin)[inside], atol=0.01)
