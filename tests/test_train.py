"""Training on a small synthetic data set in the LSPET layout: learning, resuming, failing loudly."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

import fastpose
from fastpose.checkpoints import read_info
from fastpose.codecs import SoftmaxHeatmapCodec, UDPHeatmapCodec
from fastpose.config import read_config
from fastpose.data import load_lspet
from fastpose.data.base import boxes_of_keypoints
from fastpose.data.crops import Augmentation, CropDataset, CropStore, ResumableBatches, half_body_box
from fastpose.metrics import pck, torso_lengths
from fastpose.skeletons import LSP14
from fastpose.train import Schedule, Stage, TrainConfig, train


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


def test_batches_cover_every_person_and_resume():
    batches = list(ResumableBatches(10, 3, steps=7, seed=1))
    assert sorted(i % 10 for b in batches[:3] for i in b) != list(range(9)) or len(batches) == 7
    assert all(len(set(b)) == 3 for b in batches) and batches == list(ResumableBatches(10, 3, 7, 1))
    assert list(ResumableBatches(10, 3, 7, 1, first_step=4)) == batches[4:]
    epoch = [i for b in batches[:3] for i in b]
    assert len(set(epoch)) == 9 and all(i < 10 for i in epoch)
    halves = [list(ResumableBatches(10, 4, 3, 1, rank=r, world=2)) for r in (0, 1)]
    whole = list(ResumableBatches(10, 4, 3, 1))
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(b) for b in whole]
    with pytest.raises(ValueError, match="batch_size 11 is larger than the data set"):
        ResumableBatches(10, 11, 1, 0)


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_exactly(lspet, tmp_path, optimizer, monkeypatch):
    whole = config(lspet, tmp_path / "whole", optimizer=optimizer)
    train(whole, quiet=True)

    class Killed(Exception):
        pass

    import fastpose.train as module

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 10:  # in the middle of an epoch, after a checkpoint at step 8
            raise Killed
        return original(*arguments)

    calls: list[int] = []
    original = module.normalize
    monkeypatch.setattr(module, "normalize", killed)
    part = config(lspet, tmp_path / "part", optimizer=optimizer)
    with pytest.raises(Killed):
        train(part, quiet=True)
    monkeypatch.setattr(module, "normalize", original)
    train(part, resume=True, quiet=True)
    a, b = (torch.load(tmp_path / d / "last.pt", weights_only=True) for d in ("whole", "part"))
    assert a["step"] == b["step"]
    for key in a["average"]:
        assert torch.equal(a["average"][key], b["average"][key]), key


def test_nan_loss_stops_the_run_and_saves_the_batch(lspet, tmp_path, monkeypatch):
    import fastpose.train as module

    monkeypatch.setattr(module, "normalize", lambda crops: crops.float() * float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0; the batch is in"):
        train(config(lspet, tmp_path / "run"), quiet=True)
    assert (tmp_path / "run" / "nan_batch.pt").is_file()


def test_nothing_to_resume(lspet, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(config(lspet, tmp_path / "run"), resume=True)


def test_schedule():
    c = TrainConfig(data="", output="", stages=(Stage((32, 32), 2.0, 10),), warmup=0.1, decay_start=0.5)
    schedule = Schedule(c, 1000)
    factors = [schedule.factor(s) for s in range(schedule.total)]
    assert schedule.total == 200 and factors[0] < 0.1 and factors[50] == 1.0 and factors[-1] < 0.01
    assert all(a >= b for a, b in zip(factors[30:], factors[31:], strict=False))


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
        ("optimizer=sgd", "optimizer must be 'adamw' or 'muon', got 'sgd'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_config(TrainConfig, None, [*base, override])
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ValueError, match="is not valid TOML"):
        read_config(TrainConfig, tmp_path / "bad.toml", base)


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
    assert np.isclose(total, 100 * 12 / 13)
    assert per_keypoint[0] == 100 and per_keypoint[1] == 0 and np.isnan(per_keypoint[3])


def test_half_body_box_holds_one_half():
    keypoints = np.stack([np.arange(14.0), 10 * np.arange(14.0)], 1)
    labelled = np.ones(14, bool)
    whole = np.array([0.0, 0.0, 1.0, 1.0])
    lower = half_body_box(keypoints, labelled, LSP14, False, whole)  # keypoints 0 to 5: 50 high, so a margin of 12.5
    assert np.allclose(lower, [-12.5, -12.5, 17.5, 62.5])
    upper = half_body_box(keypoints, labelled, LSP14, True, whole)  # 6 to 13
    assert np.allclose(upper, [6 - 17.5, 60 - 17.5, 13 + 17.5, 130 + 17.5])
    labelled[:3] = False
    assert half_body_box(keypoints, labelled, LSP14, False, whole) is whole  # three are too few
