"""A newcomer's ten images: keypoints of one's own, from the annotation file to poses in new images."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import fastpose
from fastpose.checkpoints import read_info
from fastpose.cli import main
from fastpose.data import load_dataset, to_results
from fastpose.data.crops import CropDataset, CropStore
from fastpose.scoring import score_results
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


def settings_of(mice, run, *more):
    return ["train", "--config", "own_images", "--quiet", f"data={mice}", f"output={run}", *more]


SHORT = "stages=[{size=[32,32],epochs=1,batch_size=2}]"


def test_splits_that_do_not_fit_are_refused_before_the_first_step(tmp_path, capsys):
    names = {"train": NAMES, "val": (NAMES[0], NAMES[2], NAMES[1], NAMES[3])}
    for split, keypoints in names.items():
        datasets.write_coco(tmp_path, datasets.coco_content(keypoints, 4, 1), f"{split}.json", "images")
    assert main(settings_of(tmp_path, tmp_path / "run", SHORT)) == 2
    said = capsys.readouterr().err
    assert "the splits have other keypoints: 'train' has 'custom', 'val' has 'custom', whose keypoint 1 is" in said
    assert not list((tmp_path / "run").iterdir())


def test_images_in_both_splits_are_told(mice, tmp_path, capsys):
    (mice / "train.json").write_bytes((mice / "annotations.json").read_bytes())
    assert main(settings_of(mice, tmp_path / "run", SHORT)) == 0
    assert "2 images are in 'train' and in 'val': the validation says little about others" in capsys.readouterr().err


def test_too_few_images(tmp_path, capsys):
    for images, message in (
        (1, "has too few images, 1, for the split 'train': of every five the first is in 'val'"),
        (5, "the data set has 3 samples, fewer than one batch of 4: give the stages a smaller batch_size"),
    ):
        folder = tmp_path / str(images)
        datasets.write_coco(folder, datasets.coco_content(NAMES, images, 1), "annotations.json", "images")
        stages = "stages=[{size=[32,32],epochs=1,batch_size=4}]"
        assert main(settings_of(folder, folder / "run", stages)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("options.foo=1", "mobileposenet cannot be made with {'foo': 1}: "),
        ("options.blocks=3", "mobileposenet cannot be made with {'blocks': 3}: "),
        ("stages=[{size=[64,64],epochs=inf,batch_size=4}]", "stages need a positive size, number of epochs"),
        ("stages=[{size=[64,64],epochs=nan,batch_size=4}]", "stages need a positive size, number of epochs"),
        ("codec=msra", "setting 'codec' is a group: choose codec.type from softmax, "),
    ],
)
def test_wrong_settings_are_named(mice, tmp_path, capsys, setting, message):
    assert main(settings_of(mice, tmp_path / "run", SHORT, setting)) == 2
    assert message in capsys.readouterr().err


def test_what_a_kill_leaves_is_cleared_away(mice, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".last.1.pt", ".candidate.2.safetensors", ".final.3.safetensors", ".log.4.csv", ".hidden"):
        (run / name).write_bytes(b"half")
    assert main(settings_of(mice, run, SHORT)) == 0
    assert [path.name for path in run.glob(".*")] == [".hidden"]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_met_late_are_recorded(mice, tmp_path, capfd, workers):
    (mice / "images" / "007.png").write_bytes(b"broken")
    more = ("memory=0", f"workers={workers}", "stages=[{size=[32,32],epochs=4,batch_size=2}]", "validate_every=2")
    assert main(settings_of(mice, tmp_path / "run", *more)) == 0
    assert capfd.readouterr().err.count("trained without") in ((1,) if workers == 0 else (1, 2))  # at the same time
    found = json.loads((tmp_path / "run" / "data.json").read_text())["train"]["findings"]
    assert found["image cannot be read"]["count"] == 1 and "007.png" in found["image cannot be read"]["examples"][0]


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
    samples = [CropDataset(store, (64, 64))[i] for i in range(len(data))]
    same = [i for i, sample in enumerate(samples) if all(map(torch.equal, sample, samples[broken]))]
    assert len(same) > 1 and samples[broken][2].any()  # another in place of each, not black
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


def run_of(mice, tmp_path, *more: str) -> list[str]:
    settings = [f"data={mice}", f"output={tmp_path / 'run'}", "stages=[{size=[32,32],epochs=4,batch_size=4}]"]
    return ["train", "--config", "own_images", "--quiet", "workers=0", "init=", *settings, *more]


def test_without_mirroring_the_flip_test_is_not_recommended(mice, tmp_path):
    """A network that never saw a mirrored image knows nothing about one."""
    for mirror in ("0", "0.5"):
        assert main([*run_of(mice, tmp_path / mirror), f"augment.mirror={mirror}"]) == 0
        assert read_info(tmp_path / mirror / "run" / "best.safetensors").flip_test is (mirror != "0")


def test_keypoints_without_a_right_and_left_are_pointed_out(tmp_path, capsys):
    names = ("corner_a", "corner_b", "left_corner", "corner_d")
    folder = datasets.write_coco(tmp_path / "d", datasets.coco_content(names, 10, 1), "annotations.json", "images")
    assert main(run_of(folder, tmp_path)) == 0
    assert "no keypoints are a pair of left and right: each keeps its name" in capsys.readouterr().err
    assert main(["validate-data", str(folder), "--dataset", "custom", "--split", "all", "--quiet"]) == 0
    assert "note: keypoint of one side without that of the other: 1 (left_corner)" in capsys.readouterr().out


def test_data_that_changed_are_not_gone_on_with(mice, tmp_path, capsys):
    assert main(run_of(mice, tmp_path)) == 0
    content = json.loads((mice / "annotations.json").read_text())
    content["annotations"][3]["keypoints"][0] += 1
    (mice / "annotations.json").write_text(json.dumps(content))
    assert main([*run_of(mice, tmp_path), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "data are not those that the run began with" in said and "another output folder with others" in said


def test_images_that_cannot_be_read_for_validation_are_told(mice, tmp_path, capsys):
    (mice / "images" / "005.png").write_bytes(b"broken")
    assert main(run_of(mice, tmp_path)) == 0
    assert capsys.readouterr().err.count("image cannot be read: 1") == 1
    report = json.loads((tmp_path / "run" / "data.json").read_text())["val"]
    assert report["images"] == 1 and "image cannot be read" in report["findings"]


def test_a_disturbed_disk_costs_one_validation_no_images(mice, tmp_path, monkeypatch):
    """What could not be read once is read again the next time."""
    seen, read = [], fastpose.data.base.read_image

    def stale(path, **options):
        seen.append(Path(path).name)
        if Path(path).name == "005.png" and seen.count("005.png") == 2:  # the first is the look before training
            raise fastpose.ImageError(f"{path}: stale file handle")
        return read(path, **options)

    monkeypatch.setattr("fastpose.data.base.read_image", stale)
    scored, evaluate = [], fastpose.train.evaluate
    monkeypatch.setattr(
        "fastpose.train.evaluate", lambda *a, **o: (r := evaluate(*a, **o), scored.append(len(r.data.image_files())))[0]
    )
    assert main([*run_of(mice, tmp_path), "validate_every=1"]) == 0
    assert len(scored) == 4 and set(scored[2:]) == {2}


def test_nothing_readable_to_train_on(mice, tmp_path, capsys):
    for i in range(10):
        if i % 5:
            (mice / "images" / f"{i:03d}.png").write_bytes(b"broken")
    assert main(run_of(mice, tmp_path)) == 2
    assert "nobody is left: none of 7 can be used: image cannot be read" in capsys.readouterr().err


def test_what_the_data_do_not_say_the_weights_do(mice, tmp_path):
    """Sigmas of a skeleton file that lay elsewhere in training."""
    (mice / "skeleton.toml").rename(tmp_path / "mouse.toml")
    assert main([*run_of(mice, tmp_path), f"skeleton={tmp_path / 'mouse.toml'}"]) == 0
    weights, numbers = tmp_path / "run" / "final.safetensors", tmp_path / "n.json"
    logged = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))[-1]["val_ap"]
    for more, sigma in (([], 0.3), (["--skeleton", str(tmp_path / "other.toml")], 0.2)):
        (tmp_path / "other.toml").write_text(f"names = {json.dumps(NAMES)}\nsigmas = [0.2, 0.2, 0.2, 0.2]")
        common = ["evaluate", str(mice), "--dataset", "custom", "--no-flip-test", "--quiet", f"--json={numbers}"]
        assert main([*common, "--weights", str(weights), *more]) == 0
        content = json.loads(numbers.read_text())
        assert content["sigmas"] == [sigma] * 4
        if not more:
            assert content["value"] == pytest.approx(float(logged), abs=0.006)


def test_names_in_another_order_are_refused(mice, capsys):
    (mice / "skeleton.toml").write_text(f"names = {json.dumps(NAMES[::-1])}")
    assert main(["validate-data", str(mice), "--dataset", "custom", "--split", "all"]) == 2
    assert "has 'tail' at position 0, the annotations' category 'person' at 3" in capsys.readouterr().err
    (mice / "skeleton.toml").write_text('names = ["a", "b", "c", "d"]')
    assert main(["validate-data", str(mice), "--dataset", "custom", "--split", "all"]) == 2
    assert "category with other keypoints than the skeleton's: 1 (person)" in capsys.readouterr().out


@pytest.mark.parametrize("categories", [None, [], [{"id": 7, "name": "mouse"}]])
def test_categories_that_tell_nothing_of_keypoints(mice, tmp_path, categories):
    content = json.loads((mice / "annotations.json").read_text())
    content |= {"categories": categories}
    if categories is None:
        del content["categories"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 7
    (mice / "annotations.json").write_text(json.dumps(content))
    data = load_dataset("custom", mice, "all")
    entries = to_results(
        data.annotated, data.image_index, data.keypoints, np.ones(data.labelled.shape), np.ones(9), data.categories
    )
    assert {e["category_id"] for e in entries} == {7}
    assert score_results(data.annotated, entries, data.skeleton).value == pytest.approx(100)
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"image_id": 10, "category_id": 7, "bbox": [1, 2, 30, 40], "score": 1}])
    )
    assert len(load_dataset("custom", mice, "all", detections=tmp_path / "boxes.json")) == 1
    for annotation, strange in zip(content["annotations"], ([7], {}, 7.5, None), strict=False):
        annotation["category_id"] = strange
    (mice / "annotations.json").write_text(json.dumps(content))
    data = load_dataset("custom", mice, "all")
    assert len(data) == 9 and set(data.categories) == {1, 7}


def test_two_kinds_of_animals_with_the_same_keypoints(tmp_path):
    content = datasets.coco_content(NAMES, 10, 1)
    content["categories"] = [
        {**content["categories"][0], "id": i, "name": name} for i, name in ((2, "cat"), (3, "dog"))
    ]
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = 2 + i % 2
    folder = datasets.write_coco(tmp_path / "d", content, "annotations.json", "images")
    results, numbers = tmp_path / "results.json", tmp_path / "n.json"
    results.write_text(json.dumps([{**a, "score": 1.0} for a in content["annotations"]]))
    common = ["evaluate", str(folder), "--dataset", "custom", "--split", "all", "--quiet", f"--json={numbers}"]
    assert main([*common, "--predictions", str(results)]) == 0
    assert json.loads(numbers.read_text())["value"] == pytest.approx(100)
    assert main([*run_of(folder, tmp_path)]) == 0
    boxes = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in content["annotations"]]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    for more in ([], ["--boxes", str(tmp_path / "boxes.json")]):
        weights = ["--weights", str(tmp_path / "run" / "final.safetensors"), "--nms", "none"]
        assert main([*common, *weights, "--results", str(results), *more]) == 0
        found = {(r["image_id"], r["category_id"]) for r in json.loads(results.read_text())}
        assert found == {(a["image_id"], a["category_id"]) for a in content["annotations"]}
