"""A newcomer's ten images: keypoints of one's own, from the annotation file to poses in new images."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest

import fastpose
from fastpose.checkpoints import read_info
from fastpose.cli import main
from fastpose.data import load_dataset
from fastpose.data.crops import CropDataset, CropStore
from tests import datasets

NAMES = ("snout", "left_ear", "right_ear", "tail")


@pytest.fixture
def mice(tmp_path):
    folder = datasets.write_coco(tmp_path / "mice", datasets.coco_content(NAMES, 10, 1), "annotations.json", "images")
    (folder / "skeleton.toml").write_text(f"names = {json.dumps(NAMES)}\nsigmas = [0.3, 0.3, 0.3, 0.3]")
    return folder


def test_ten_images_of_ones_own(mice, tmp_path, capsys):
    assert main(["validate-data", str(mice), "--dataset", "custom", "--split", "all"]) == 0
    run = tmp_path / "run"
    settings = [f"data={mice}", f"output={run}", "stages=[{size=[64,64],epochs=30,batch_size=4}]", "validate_every=10"]
    assert main(["train", "--config", "own_images", "--quiet", *settings]) == 0
    said = capsys.readouterr()
    assert "best validation AP: " in said.out and "starting anew: head.weight, head.bias" in said.err
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    assert len(rows) == 3 and float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"]) and "val_ap" in rows[0]
    assert json.loads((run / "data.json").read_text())["train"]["people"] == 7
    info = read_info(run / "best.safetensors")
    assert info.get_skeleton().names == NAMES and info.get_skeleton().flip_pairs == ((1, 2),)
    assert not (run / "candidate.safetensors").exists()

    weights = ["--weights", str(run / "best.safetensors")]
    out = tmp_path / "numbers.json"
    common = ["evaluate", str(mice), "--dataset", "custom", "--no-flip-test", "--quiet", f"--json={out}", *weights]
    assert main(common) == 0  # the number from training is the command's
    best = max(float(row["val_ap"]) for row in rows)
    assert json.loads(out.read_text())["value"] == pytest.approx(best, abs=0.005)
    assert main([*common, "--split", "train"]) == 0
    assert json.loads(out.read_text())["value"] > 30  # it knows the images it has seen
    poses = fastpose.PoseEstimator(weights=run / "best.safetensors", detector="none")(mice / "images" / "000.png")
    assert poses.keypoints.shape == (1, 4, 2) and poses.skeleton.names == NAMES


@pytest.mark.parametrize("dataset", ["coco", "crowdpose", "mpii"])
def test_other_data_sets_train(tmp_path, dataset):
    pytest.importorskip("scipy")
    folder, run = tmp_path / "data", tmp_path / "run"
    if dataset == "coco":
        datasets.write_standard_coco(folder)
    elif dataset == "crowdpose":
        datasets.write_crowdpose(folder)
    else:
        datasets.write_mpii(folder)
    settings = [
        f"dataset={dataset}",
        f"data={folder}",
        f"output={run}",
        'splits=["val", "val"]',
        "limit=3",
        "workers=0",
    ]
    settings.append("stages=[{size=[32,32],epochs=1,batch_size=2}]")
    assert main(["train", "--quiet", *settings]) == 0
    info = read_info(run / "final.safetensors")
    assert info.skeleton == {"coco": "coco17", "crowdpose": "crowdpose14", "mpii": "mpii16"}[dataset]
    assert info.skeleton_definition == {}
    recorded = json.loads((run / "data.json").read_text())
    assert recorded["train"]["images"] == 3
    column = {"mpii": "val_pckh"}.get(dataset, "val_ap")
    (row,) = csv.DictReader((run / "log.csv").read_text().splitlines())
    assert 0 <= float(row[column]) <= 100


def test_training_goes_on_without_images_that_break(mice, tmp_path, capsys):
    (mice / "images" / "002.png").write_bytes(b"broken")
    (mice / "images" / "003.png").unlink()
    (mice / "images" / "005.png").write_bytes(b"")  # in the validation part
    settings = [
        f"data={mice}",
        f"output={tmp_path / 'run'}",
        "stages=[{size=[32,32],epochs=1,batch_size=2}]",
        "memory=0",
    ]
    assert main(["train", "--config", "own_images", "--quiet", *settings]) == 0
    said = capsys.readouterr().err
    assert "image file missing: 1" in said and "trained without" in said and "002.png" in said
    for part in ("images", "annotations.json"):
        assert (mice / part).exists()


def test_people_beyond_the_memory_are_read_again(mice):
    data = load_dataset("custom", mice, "train")
    whole, part, none = (CropStore(data, 1.25, 64, memory) for memory in (float("inf"), 50_000, 0))
    held = [sum(p is not None for p in store.kept) for store in (whole, part, none)]
    assert held[0] == len(data) > held[1] > held[2] == 0
    for i in range(len(data)):
        samples = [CropDataset(store, (64, 64))[i] for store in (whole, part, none)]
        assert all((a == b).all() for other in samples[1:] for a, b in zip(samples[0], other, strict=True))
    (mice / "images" / "002.png").write_bytes(b"broken")
    store = CropStore(data, 1.25, 64)
    broken = next(i for i, path in enumerate(data.images) if path.name == "002.png")
    crop, _, valid = CropDataset(store, (64, 64))[broken]
    assert not valid.any() and int(crop.max()) == 0
    assert data.report.findings["image cannot be read"].count == 1


def test_wrong_settings(mice, tmp_path):
    base = ["train", "--config", "own_images", f"data={mice}", f"output={tmp_path / 'run'}"]
    for setting, message in (
        ("dataset=mice", "dataset must be one of coco, crowdpose, custom, lsp, lspet, mpii, got 'mice'"),
        ("metric=mAP", "metric must be one of PCK@0.2, PCKh@0.5, AP, got 'mAP'"),
        ("metric=PCK@0.2", "needs shoulders and hips"),
        ("skeleton=coco17", "skeleton 'coco17' has 17 keypoints"),
        ('splits=["train"]', "setting 'splits' must be"),
        ("stages=[{size=[32,32],epochs=1,batch_size=9}]", "the data set has 7 samples, fewer than one batch of 9"),
        ("init=nowhere.safetensors", "weights 'nowhere.safetensors': no such file"),
    ):
        done = _stderr([*base, "stages=[{size=[32,32],epochs=1,batch_size=4}]", setting])
        assert message in done, (setting, done)
        if (tmp_path / "run").exists():
            for path in (tmp_path / "run").iterdir():
                path.unlink()
    image = cv2.imread(str(mice / "images" / "000.png"))
    assert isinstance(image, np.ndarray)


def _stderr(arguments):
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        assert main(arguments) == 2
    return text.getvalue()
