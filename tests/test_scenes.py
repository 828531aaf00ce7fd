"""Whole images and mosaics for bottom-up networks, and their training from the images to poses."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import fastpose
from fastpose.checkpoints import read_info
from fastpose.cli import main
from fastpose.codecs import AssociativeEmbeddingCodec
from fastpose.codecs.associative import position_loss
from fastpose.data import PoseData, load_dataset
from fastpose.data.crops import Augmentation, Change, CropStore
from fastpose.data.scenes import (
    Mosaics,
    SceneDataset,
    SceneStore,
    collate_scenes,
    load_mosaics,
    write_mosaics,
)  # fmt: skip
from fastpose.evaluate import evaluate
from fastpose.geometry import whole_image_matrix
from fastpose.images import ImageError
from fastpose.poses import Poses
from fastpose.preprocess import normalize
from fastpose.skeletons import COCO17, LSP14
from fastpose.train import train
from fastpose.training.samples import load_split, make_dataset, open_store, scenes_to_validate
from fastpose.training.settings import Stage, TrainConfig
from fastpose.training.teacher import Teacher, _window
from tests import datasets
from tests.test_train import same_run

NAMES = ("snout", "left_ear", "right_ear", "tail")
STRONG = Augmentation(rotation=40, scale=(0.7, 1.3), shift=0.2, mirror=0.5, contrast=0.1)


@pytest.fixture
def coco(tmp_path) -> PoseData:
    datasets.write_standard_coco(tmp_path / "coco")
    return load_dataset("coco", tmp_path / "coco", "val")


def test_everybody_on_an_image(coco):
    store = SceneStore(coco, 1000)
    assert len(store) == 5 and coco.annotated.files[store.indices[1]].name == "002.png"  # nobody is on the second image
    scene = store.get(1)
    at = np.flatnonzero([p.name == "002.png" for p in coco.images])
    assert scene.image.shape == (90, 120, 3) and np.allclose(scene.keypoints, coco.keypoints[at])
    assert (scene.labelled == coco.labelled[at]).all() and len(scene.ignored) == 0
    small = SceneStore(coco, 30).get(1)
    assert small.image.shape == (45, 60, 3) and np.allclose(small.keypoints, (scene.keypoints + 0.5) / 2 - 0.5)
    with pytest.raises(ValueError, match="nobody in the data set has a labelled keypoint"):
        SceneStore(coco.of_images([]), 100)
    with pytest.raises(ValueError, match="everybody annotated on its images, in COCO's format"):
        SceneStore(replace(coco, annotated=None, image_index=None), 100)


def test_who_cannot_be_estimated_is_learned_all_the_same(tmp_path):
    """A box beside the image keeps a person out of top-down data; a bottom-up network needs no box."""
    content = datasets.write_standard_coco(tmp_path)
    content["annotations"][1]["bbox"] = [500, 500, 10, 20]
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    data = load_dataset("coco", tmp_path, "val")
    scene = SceneStore(data, 1000).get(0)
    assert len(data) == 9 and len(scene.keypoints) == 2 and scene.labelled.any(1).all() and len(scene.ignored) == 0


@pytest.mark.parametrize("source", ["images", "mosaics"])
def test_dots_lie_where_the_labels_say(coco, source):
    """One affine map for pixels and keypoints; keypoints exchanged by the mirror; the colours tell which is which."""
    colours = np.random.default_rng(0).integers(40, 256, (64, 3))[:17, ::-1]  # as drawn by tests.datasets
    scenes = SceneStore(coco, 128) if source == "images" else Mosaics(CropStore(coco, 1.3, 128), (128, 128), 4)
    geometry = replace(STRONG, contrast=0.0)
    dataset = SceneDataset(scenes, (128, 96), geometry, seed=3)
    near, far = 0, 0
    for index in range(40):
        image, points, valid, mask = dataset[index]
        assert image.shape == (3, 128, 96) and image.dtype == torch.uint8 and valid.dtype == torch.bool
        assert mask.shape == (128, 96) and mask.all() and points.shape == (len(valid), 17, 2)
        again = SceneDataset(scenes, (128, 96), geometry, seed=3)[index]
        assert all(torch.equal(a, b) for a, b in zip((image, points, valid, mask), again, strict=True))
        for n, k in valid.nonzero().tolist():
            x, y = points[n, k].round().long().clamp(max=95).tolist()
            # the drawn colour, of the mirrored keypoint where the image was mirrored: labels follow the body
            patch = image[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].flatten(1).float()
            flipped = COCO17.flip_indices[k]
            apart = [(patch - torch.tensor(colours[c].copy())[:, None]).abs().sum(0).min().item() for c in (k, flipped)]
            near, far = near + (min(apart) < 90), far + (min(apart) >= 90)
    assert near > 4 * far and near > 200  # others' dots may lie on top


def test_without_changes_a_sample_is_what_inference_sees(coco):
    store = SceneStore(coco, 96)
    image, points, valid, _ = SceneDataset(store, (96, 96))[0]
    matrix, size = whole_image_matrix((90, 120), 96)
    assert size == (96, 128)
    scene = store.get(0)
    expected = scene.keypoints @ matrix[:, :2].T + matrix[:, 2] - [16, 0]
    assert np.allclose(points, expected, atol=1e-4)
    seen = cv2.warpAffine(scene.image, matrix, size[::-1], flags=cv2.INTER_LINEAR)[:, 16:112]
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - seen).max() <= 2
    assert (valid <= torch.from_numpy(scene.labelled)).all()


def test_images_of_people_without_labelled_keypoints_are_learned_too(tmp_path):
    """As in HigherHRNet, which leaves out those without annotations only; a batch may hold nobody to find."""
    content = datasets.coco_content(COCO17.names, 4, 1)
    content["annotations"][1].update(keypoints=[0] * 51, num_keypoints=0)
    content["annotations"][2].update(keypoints=[0] * 51, num_keypoints=0, iscrowd=1)
    datasets.write_coco(tmp_path, content, "annotations/person_keypoints_val2017.json", "val2017")
    dataset = SceneDataset(SceneStore(load_dataset("coco", tmp_path, "val"), 64), (64, 64))
    assert len(dataset) == 3  # nobody is on the second
    images, points, valid, mask = collate_scenes([dataset[1], dataset[2]])
    assert images.shape == (2, 3, 64, 64)
    assert points.shape == (2, 0, 17, 2) and valid.shape == (2, 0, 17) and 0 < mask.float().mean() < 0.9
    codec = AssociativeEmbeddingCodec(position=1.0)
    maps = [torch.full((2, n, s, s), 0.5, requires_grad=True) for n, s in [(34, 16), (17, 32)]]
    heatmap, push, pull = codec.losses(maps, points, valid, mask)
    (heatmap + push + pull).backward()
    assert push == pull == 0 and 0 < heatmap < 0.5
    counted = F.adaptive_avg_pool2d(mask[:, None].float(), (32, 32)) > 0.5
    assert ((maps[1].grad != 0) == counted).all()  # background where nobody is hidden


def test_crowds_are_masked_but_not_labelled_people(tmp_path):
    content = datasets.coco_content(COCO17.names, 1, 1)
    person = content["annotations"][0]
    crowd = {**person, "id": 2, "iscrowd": 1, "keypoints": [0] * 51, "num_keypoints": 0, "bbox": [0, 0, 120, 90]}
    content["annotations"].append(crowd)
    datasets.write_coco(tmp_path, content, "annotations/person_keypoints_val2017.json", "val2017")
    data = load_dataset("coco", tmp_path, "val")
    dataset = SceneDataset(SceneStore(data, 192), (192, 192))
    _, points, valid, mask = dataset[0]
    x, y = points[valid].round().long().unbind(1)
    assert len(points) == 1 and mask[y, x].all() and 0.05 < mask.float().mean() < 0.9
    rows, columns = torch.meshgrid(torch.arange(192), torch.arange(192), indexing="ij")
    distance = ((columns[..., None] - x) ** 2 + (rows[..., None] - y) ** 2).amin(-1).sqrt()
    assert not mask[distance > 26].any() and mask[distance < 22].all()


def hidden_people(segmentations: list) -> dict:
    """COCO content, one image 120 wide and 90 high: a person; a crowd; two people without labelled keypoints."""
    content = datasets.coco_content(COCO17.names, 1, 1)
    person = content["annotations"][0]
    for i, (crowd, outline) in enumerate(zip((1, 0, 0), segmentations, strict=True)):
        box = {"bbox": [10 * i, 20, 40, 50], "keypoints": [0] * 51, "num_keypoints": 0}
        content["annotations"].append({**person, **box, "id": i + 2, "iscrowd": crowd, "segmentation": outline})
    return content


RUNS = {"size": [90, 120], "counts": [90 * 15 + 30, 25, 65, 25, 65, 25, 90 * 120 - 90 * 15 - 235]}
POLYGONS = [[50, 10, 70, 12, 64, 60], [55.5, 62, 70, 62, 70, 80.5, 55, 80]]
OTHER = [[90, 20, 118, 40, 119, 88, 92, 70]]


@pytest.mark.parametrize("side", [1000, 30])
def test_outlines_are_hidden_as_in_higherhrnet(tmp_path, side):
    """Its get_mask and affine transform: union of the decoded outlines, warped with the image, above one half."""
    mask_tools = pytest.importorskip("pycocotools.mask")
    content = hidden_people([RUNS, POLYGONS, OTHER])
    datasets.write_coco(tmp_path, content, "annotations/person_keypoints_val2017.json", "val2017")
    data = load_dataset("coco", tmp_path, "val")
    codes = [mask_tools.frPyObjects(RUNS, 90, 120), *mask_tools.frPyObjects([*POLYGONS, *OTHER], 90, 120)]
    union = mask_tools.decode(codes).any(2)
    assert union.sum() > 75 and union[35, 16] and not union[35, 25]

    dataset = SceneDataset(SceneStore(data, side), (96, 128), STRONG, seed=1)
    scene = dataset.scenes.scene(0, np.random.default_rng(0))
    assert scene.hidden.shape == scene.image.shape[:2] == ((90, 120) if side == 1000 else (45, 60))
    for index in range(5):
        rng = np.random.default_rng((1, index))
        matrix = dataset.augmentation.draw(rng).matrix(np.array([15, 0, 105, 90]), (96, 128), 1.0, "hrnet")
        expected = cv2.warpAffine(np.where(union, 0, 255).astype(np.uint8), matrix, (128, 96), borderValue=255) > 127
        mask = dataset[index][3].numpy()
        assert (mask != expected).mean() < (0.002 if side == 1000 else 0.02) and not mask.all()
    # nothing but the image is left out of a part of the data, and of images without anybody hidden
    assert data.annotated.take(np.array([False])).hidden == ()
    datasets.write_standard_coco(tmp_path / "b")
    assert load_dataset("coco", tmp_path / "b", "val").annotated.hidden == ()


@pytest.mark.parametrize(
    "wrong",
    [None, [], "x", [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, float("nan")]], {"size": [90, 120], "counts": [5, 6]},
     {"size": [120, 90], "counts": [90 * 120]}, {"size": [90, 120], "counts": [-5, 90 * 120 + 5]},
     {"size": [90, 120], "counts": "abc"}, [[1, 2, 3, 4, 5, 6], 7]],
)  # fmt: skip
def test_a_person_without_a_usable_outline_hides_the_box(tmp_path, wrong):
    datasets.write_coco(
        tmp_path, hidden_people([RUNS, wrong, OTHER]), "annotations/person_keypoints_val2017.json", "val2017"
    )
    data = load_dataset("coco", tmp_path, "val")
    scene = SceneStore(data, 1000).get(0)
    assert data.annotated.hidden == (None,) and scene.hidden is None
    assert scene.ignored.tolist() == [[0, 20, 40, 70], [10, 20, 50, 70], [20, 20, 60, 70]]


def test_outlines_far_outside_the_image_take_no_time(tmp_path):
    far = [[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9]]
    datasets.write_coco(
        tmp_path, hidden_people([RUNS, far, far]), "annotations/person_keypoints_val2017.json", "val2017"
    )
    assert SceneStore(load_dataset("coco", tmp_path, "val"), 1000).get(0).hidden.shape == (90, 120)


def test_a_mosaic_has_everybody_in_turn(coco):
    mosaics = Mosaics(CropStore(coco, 1.2, 64), (64, 80), 6)
    assert set(mosaics.grids) == {(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2)}
    counts = set()
    for index in range(2 * len(mosaics)):
        scene = mosaics.scene(index, np.random.default_rng(index))
        assert scene.image.shape == (64, 80, 3)
        counts.add(len(scene.keypoints))
        inside = (scene.keypoints > -0.5).all(2) & (scene.keypoints < [79.5, 63.5]).all(2)
        assert (scene.labelled <= inside).all() and scene.labelled.any(1).all()
    assert counts == {1, 2, 4, 6}
    with pytest.raises(ValueError, match="at least one person, got 0"):
        Mosaics(mosaics.store, (64, 64), 0)


def test_batches_of_unequal_numbers_of_people():
    def sample(n):
        return (
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.ones(n, 4, 2),
            torch.ones(n, 4).bool(),
            torch.ones(8, 8) > 0,
        )

    images, points, valid, mask = collate_scenes([sample(2), sample(0), sample(3)])
    assert images.shape == (3, 3, 8, 8) and points.shape == (3, 3, 4, 2) and mask.shape == (3, 8, 8)
    assert valid.sum((1, 2)).tolist() == [8, 0, 12]
    assert collate_scenes([sample(0)])[1].shape == (1, 0, 4, 2)


@pytest.mark.parametrize("memory", [0, math.inf])
def test_in_place_of_an_unreadable_image_is_another(tmp_path, memory, capsys):
    """Nothing black, which would count for batch normalisation; and not the same one for all that are in a row."""
    datasets.write_standard_coco(tmp_path, images=12)
    data = load_dataset("coco", tmp_path, "val")
    for path in sorted(set(data.images))[2:8]:
        path.write_bytes(b"broken")
    store = SceneStore(data, 64, memory)
    seen = [store.get(i).image.tobytes() for i in range(11)]
    whole = [seen[i] for i in (0, 1, 8, 9, 10)]
    assert len(set(whole)) == 5 and all(image in whole for image in seen) and len(set(seen[2:8])) > 2
    assert seen == [store.get(i).image.tobytes() for i in range(11)]
    assert data.report.findings["image cannot be read"].count == 6
    assert capsys.readouterr().err.count("trained without") == (6 if memory == 0 else 0)


def test_all_images_are_gone_while_training(coco):
    store = CropStore(coco, 1.2, 64, memory=0)
    for path in set(coco.images):
        path.unlink()
    with pytest.raises(ImageError, match=f"none of the {len(coco)} images and people .* can be read any more"):
        store.get(1)


def test_augmentation_ranges():
    rng = np.random.default_rng(0)
    changes = [Augmentation(rotation=30, scale=(0.75, 1.5), shift=0.2, mirror=0.5).draw(rng) for _ in range(500)]
    rotation = np.array([c.rotation for c in changes])
    scale = np.array([c.scale for c in changes])
    assert -30 <= rotation.min() < -28 and 28 < rotation.max() <= 30
    assert 0.75 <= scale.min() < 0.77 and 1.48 < scale.max() <= 1.5
    assert 0.4 < np.mean([c.mirror for c in changes]) < 0.6 and 0.18 < np.abs([c.shift for c in changes]).max() <= 0.2
    assert Augmentation().draw(rng) == Change()
    with pytest.raises(ValueError, match=r"augment.scale must be two positive factors.*got \[2.0, 1.0\]"):
        Augmentation(scale=(2.0, 1.0))
    with pytest.raises(ValueError, match="choose rotation_sd .* or rotation"):
        Augmentation(rotation=1.0, rotation_sd=1.0)


def write_mice(folder, images=3):
    """Images of two mice side by side."""
    content = datasets.coco_content(NAMES, images, 2)
    for a in content["annotations"]:
        left = 5 + 60 * (a["id"] % 2)
        points = np.array(a["keypoints"]).reshape(-1, 3)
        points[:, 0] = left + (points[:, 0] - 20) * 0.6
        points *= points[:, 2:] > 0
        a["keypoints"], a["bbox"] = points.reshape(-1).tolist(), [left - 8, a["bbox"][1], 50, a["bbox"][3]]
    datasets.write_coco(folder, content, "annotations.json", "images")
    (folder / "skeleton.toml").write_text(f"names = {json.dumps(NAMES)}\nsigmas = [0.2, 0.2, 0.2, 0.2]")
    return folder


@pytest.mark.slow
def test_a_bottom_up_network_learns_its_images(tmp_path):
    """From images to poses: the heatmaps come out as they should, and `PoseEstimator` finds the people."""
    data, run = write_mice(tmp_path / "mice"), tmp_path / "run"
    settings = ["model=lightweight_hrnet_448", "options.r=-8", "dataset=custom", f"data={data}", f"output={run}"]
    settings += ['splits=["all","all"]', "stages=[{size=[96,96],epochs=250,batch_size=2}]", "validate_every=50"]
    settings += ["optimizer=adam", "lr=6e-3", "decay_start=0.2", "ema=0.9", "workers=0", "augment.shift=0.02"]
    assert main(["train", "--quiet", *settings]) == 0
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    losses = [float(row["loss"]) for row in rows]
    # maps of zeros everywhere have a loss of 0.017
    assert losses[0] > 0.1 and losses[-1] < 0.009, losses
    assert max(float(row["val_ap"]) for row in rows) > 5
    info = read_info(run / "final.safetensors")
    assert info.codec == AssociativeEmbeddingCodec() and info.options == {"r": -8}
    model = fastpose.create_model("auto", weights=run / "final.safetensors")
    store = SceneStore(load_dataset("custom", data, "all"), 96)
    at, elsewhere = [], []
    for i in range(len(store)):
        image, points, valid, _ = SceneDataset(store, (96, 96))[i]
        with torch.inference_mode():
            maps = model(normalize(image[None]))[1][0]
        n, k = valid.nonzero().T
        x, y = (points[n, k] / 2).long().unbind(1)
        at.append(maps[k, y, x])
        elsewhere.append(maps.flatten())
    assert torch.cat(at).mean() > 0.25 and torch.cat(elsewhere).mean() < 0.05
    pose = fastpose.PoseEstimator("auto", run / "final.safetensors", flip_test=False)
    assert all(len(pose(path)) >= 1 for path in set(store.data.images))


def write_lsp(folder, count=14):
    """The first people of LSP's test part; the files of the others are missing."""
    savemat = pytest.importorskip("scipy.io").savemat
    rng = np.random.default_rng(0)
    joints = np.zeros((3, 14, 2000))
    joints[:2] = rng.uniform(10, 80, (2, 14, 2000))
    for first in (1, 1001):
        for i in range(first, first + count):
            datasets.picture(folder / "images" / f"im{i:04d}.jpg", joints[None, :2, :, i - 1].transpose(0, 2, 1))
    savemat(folder / "joints.mat", {"joints": joints})
    return folder


@pytest.mark.parametrize("metric", ["AP", "PCK@0.2"])
def test_training_on_mosaics_and_going_on(tmp_path, metric, monkeypatch):
    import fastpose.train as module

    data = write_lsp(tmp_path / "lsp")
    base = ["model=lightweight_hrnet_448", "options.r=-8", "dataset=lsp", f"data={data}", "mosaic=4", "workers=0"]
    base += [
        "stages=[{size=[64,64],epochs=1,batch_size=7}, {size=[96,64],epochs=1,batch_size=7}]",
        "validate_every=0.5",
    ]
    base += [f"metric={metric}", "augment.rotation=30.0", "augment.mirror=0.5"]
    assert main(["train", "--quiet", *base, f"output={tmp_path / 'whole'}"]) == 0
    rows = list(csv.DictReader((tmp_path / "whole" / "log.csv").read_text().splitlines()))
    assert len(rows) == 4 and ("val_ap" if metric == "AP" else "val_pck") in rows[0]
    mosaics = load_dataset("custom", tmp_path / "whole" / "mosaics", "all")
    assert len(mosaics.image_files()) == 14 // 4 and mosaics.skeleton.names == LSP14.names

    original = module.save_state
    monkeypatch.setattr(module, "save_state", lambda path, **s: original(path, **s) if s["step"] < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--quiet", *base, f"output={tmp_path / 'part'}"])
    monkeypatch.setattr(module, "save_state", original)
    assert main(["train", "--quiet", "--resume", *base, f"output={tmp_path / 'part'}"]) == 0
    same_run(tmp_path / "whole", tmp_path / "part")


def test_mosaics_of_another_run_are_not_taken(tmp_path):
    data = load_dataset("lsp", write_lsp(tmp_path / "lsp"), "val")
    config = TrainConfig(
        data="", output="", dataset="lsp", model="lightweight_hrnet_448", mosaic=4, stages=(Stage((64, 64), 1.0, 4),)
    )
    first = scenes_to_validate(config, data, tmp_path)
    (tmp_path / "mosaics" / "images" / "000000.png").write_bytes(b"mine")
    other = replace(config, stages=(Stage((96, 64), 1.0, 4),))
    assert scenes_to_validate(other, data, tmp_path, resume=True).annotated.sizes.tolist() == [[64, 64]] * 3
    again = scenes_to_validate(other, data, tmp_path)
    assert again.annotated.sizes.tolist() == [[96, 64]] * 3 and again.annotated.read(0).shape == (96, 64, 3)
    assert len(first.annotated) == 3


def test_stages_have_scenes_of_their_own(tmp_path):
    config = TrainConfig(
        data=str(write_lsp(tmp_path / "lsp")),
        output=str(tmp_path),
        model="hrnet_w32_ae",
        dataset="lsp",
        mosaic=4,
        stages=(Stage((64, 64), 1, 2, mosaic=1), Stage((96, 64), 1, 2)),
    )
    store = open_store(config, load_split(config, "train"))
    most = [max(len(make_dataset(config, store, s, 0)[i][1]) for i in range(20)) for s in config.stages]
    assert most == [1, 4]


def bottom_up_config(tmp_path, **changes):
    stage = Stage((64, 64), 1, 7)
    settings = {"model": "lightweight_hrnet_448", "options": {"r": -8}, "dataset": "lsp", "mosaic": 2, "workers": 0}
    settings.update(codec=AssociativeEmbeddingCodec(position=0.05), stages=(stage,), optimizer="sgd", ema=0.0)
    data = tmp_path / "lsp" if (tmp_path / "lsp").exists() else write_lsp(tmp_path / "lsp")
    return TrainConfig(data=str(data), output=str(tmp_path / "run"), **{**settings, **changes})


@pytest.mark.parametrize("size", [(160, 160), (160, 120)])
def test_a_teacher_sees_each_person_of_a_scene(tmp_path, size):
    teacher = Teacher(bottom_up_config(tmp_path, teacher="mobileposenet"), LSP14, torch.device("cpu"))
    seen = []

    def brightest(crops):  # every keypoint where the crop is brightest
        seen.append(crops)
        return 20 * F.avg_pool2d(crops[:, :1], 4).repeat(1, 14, 1, 1)

    teacher.model, teacher.size = brightest, size
    mirrors, teacher.flip_indices = teacher.flip_indices, None
    scenes = 60
    keypoints, valid = torch.full((scenes + 2, 2, 14, 2), 1e4), torch.zeros(scenes + 2, 2, 14, dtype=torch.bool)
    images, valid[:scenes, :, :9], valid[scenes, 0, :6] = torch.zeros(scenes + 2, 3, 96, 160).byte(), True, True
    keypoints[scenes, 0, :6] = 100 * torch.rand(6, 2)
    spots = torch.zeros(scenes, 2, 2)
    for i in range(scenes):
        for n, left in enumerate((0, 100)):
            size_and_place = torch.randint(40, 50, (2,)), torch.tensor([left, 10]) + torch.randint(0, 10, (2,))
            inside = torch.cat([torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.rand(7, 2)])
            keypoints[i, n, :9] = (inside * size_and_place[0] + size_and_place[1]).round()
            spots[i, n] = keypoints[i, n, 5]  # is bright
            x, y = spots[i, n].int().tolist()
            images[i, :, y - 1 : y + 2, x - 1 : x + 2] = 255
    maps = teacher.scene_heatmaps(normalize(images), keypoints, valid, (48, 80))
    assert maps.shape == (scenes + 2, 14, 48, 80) and not maps[scenes + 1].any()  # nobody
    codec = teacher.codec
    few, _ = codec.encode(keypoints[scenes:], valid[scenes:], (48, 80), 2)  # labels only
    assert torch.allclose(maps[scenes] * 2 * math.pi * codec.sigma**2, few[0], atol=1e-6) and few[0].any()
    crops = torch.cat(seen)
    assert crops.shape == (2 * scenes, 3, *size)
    assert torch.allclose(crops[0, :, 0, 0], normalize(images)[-1, :, 0, 0], atol=1e-5)  # black outside the image
    assert torch.allclose(maps[:scenes].sum((2, 3)), torch.tensor(2.0), atol=1e-4)
    # in the middle of the positions that belong to a cell
    cells = 2 * torch.stack(torch.meshgrid(torch.arange(80), torch.arange(48), indexing="xy"), 2) + 1
    part = maps[:scenes, None, 5] * ((cells - spots[:, :, None, None]).abs().amax(4) < 8)
    assert (part.sum((2, 3)) - 1).abs().max() < 0.02
    error = (part[..., None] * cells).sum((2, 3)) - spots
    assert error.abs().max() < 1.5 and error.mean((0, 1)).abs().max() < 0.2  # a cell of the teacher is 2 pixels or so
    assert not teacher.scene_heatmaps(normalize(images), keypoints[:, :0], valid[:, :0], (48, 80)).any()
    teacher.flip_indices = mirrors  # as the weights recommend; this network sees the same in a mirror
    assert torch.allclose(teacher.scene_heatmaps(normalize(images), keypoints, valid, (48, 80)), maps, atol=1e-5)
    teacher.flip_indices = None

    # a keypoint outside the image is none
    teacher.model = lambda crops: (
        20 * F.pad(torch.ones(len(crops), 14, 1, 1), (0, size[1] // 4 - 1, 0, size[0] // 4 - 1))
    )
    keypoints, valid = torch.rand(2, 1, 14, 2) * 40, torch.ones(2, 1, 14, dtype=torch.bool)
    keypoints[1] += 100
    maps = teacher.scene_heatmaps(torch.zeros(2, 3, 256, 256), keypoints, valid, (128, 128))
    assert not maps[0].any() and torch.allclose(maps[1].sum((1, 2)), torch.tensor(1.0), atol=1e-3)


def test_windows_average_what_they_shrink():
    maps = torch.rand(3, 2, 60, 90)
    zoom, offset = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.25, 0.5]]), torch.tensor([[0.0, 0.0], [0.5, -0.5], [0, 0]])
    small = _window(maps, zoom, offset, (20, 30))
    assert torch.allclose(small[0], F.avg_pool2d(maps[0], 3), atol=1e-5)
    same = _window(maps, zoom, offset, (60, 90))
    assert torch.allclose(same[0], maps[0], atol=1e-5)
    enlarged = F.interpolate(maps[1:2], scale_factor=2, mode="bilinear", align_corners=False)[0, :, :60, 90:]
    assert torch.allclose(same[1][:, 1:-1, 1:-1], enlarged[:, 1:-1, 1:-1], atol=1e-5)
    assert not _window(maps, zoom, offset + 5, (60, 90)).any()


def test_masked_cells_do_not_imitate():
    codec = AssociativeEmbeddingCodec(position=1.0)
    outputs, heatmaps = [torch.randn(1, 4, 8, 8), torch.randn(1, 2, 16, 16)], torch.rand(1, 2, 16, 16)
    mask = torch.ones(1, 32, 32, dtype=torch.bool)
    mask[:, :16] = False
    loss = codec.imitation_loss(outputs, heatmaps, mask)
    half = AssociativeEmbeddingCodec(position=1.0).imitation_loss(
        [o[:, :, o.shape[2] // 2 :] for o in outputs], heatmaps[:, :, 8:]
    )
    assert float(loss) == pytest.approx(float(half), rel=1e-5)
    assert float(codec.imitation_loss(outputs, heatmaps)) != pytest.approx(float(half), rel=1e-3)


def test_a_bottom_up_network_learns_from_a_teacher(tmp_path):
    weights = {}
    for name, changes in {
        "none": {},
        "0": {"teacher": "mobileposenet", "teacher_weight": 0.0},
        "1": {"teacher": "mobileposenet", "teacher_weight": 1.0},
    }.items():
        config = bottom_up_config(tmp_path / name, lr=0.1, stages=(Stage((64, 64), 4, 7),), **changes)
        train(config, quiet=True)
        weights[name] = load_file(tmp_path / name / "run" / "final.safetensors")
    assert all(torch.allclose(weights["none"][k], weights["0"][k], atol=1e-5) for k in weights["none"])

    store = open_store(config, load_split(config, "train"))
    batch = collate_scenes([make_dataset(config, store, config.stages[0], 0)[i] for i in range(14)])
    images, teacher = normalize(batch[0]), Teacher(config, LSP14, torch.device("cpu"))
    model = fastpose.create_model("lightweight_hrnet_448", num_keypoints=14, r=-8).eval()
    target, apart = teacher.scene_heatmaps(images, batch[1], batch[2], (32, 32)), {}
    for name in ("none", "1"):
        model.load_state_dict(weights[name])
        with torch.no_grad():
            outputs = model(images)
        apart[name] = position_loss(outputs[1], target) + position_loss(outputs[0][:, :14], F.avg_pool2d(target, 2))
    moved = [(weights["1"][k] - weights["none"][k]).abs().max() for k in weights["1"] if k.endswith("weight")]
    assert max(moved) > 1e-3  # the training loop has asked the teacher
    assert config.codec.imitation_loss(outputs, target) == pytest.approx(0.05 * float(apart["1"]), rel=1e-4)
    # heights and tags are learnt from the labels whatever the teacher's share
    teacher.weight = 0.6
    labels = [replace(config.codec, position=p).loss(outputs, *batch[1:]) for p in (0.0, 0.05)]
    expected = labels[0] + 0.4 * (labels[1] - labels[0]) + 0.6 * 0.05 * apart["1"]
    assert float(teacher.loss(images, outputs, batch[1:])) == pytest.approx(float(expected), rel=1e-4)


class Finder:
    """A bottom-up network that finds everybody in every image, the first person of each moved by `error` pixels."""

    batch_size, model_name = 1, "finder"

    def __init__(self, data: PoseData, error: float) -> None:
        self.skeleton, self.data, self.error = data.skeleton, data, error
        self.info = type("Info", (), {"codec": AssociativeEmbeddingCodec()})

    def prepare(self, crops):
        assert crops == 8 * len(self.data.annotated)

    def estimate(self, images, boxes):
        image = images[0]
        file = next(f for f in self.data.annotated.files if (cv2.imread(str(f))[..., ::-1] == image).all())
        rows = [i for i, path in enumerate(self.data.images) if path == file]
        points = self.data.keypoints[rows].copy()
        points[0] += self.error
        ones = np.ones(points.shape[:2])
        return [Poses(points, ones, self.data.boxes[rows], ones[:, 0], image.shape[:2], self.skeleton)]


def test_pck_of_found_people(tmp_path):
    store = CropStore(load_dataset("lsp", write_lsp(tmp_path / "lsp"), "test"), 1.2, 96)
    write_mosaics(Mosaics(store, (96, 96), 4), tmp_path / "mosaics", 6)
    data = replace(load_mosaics(tmp_path / "mosaics", LSP14), metric="PCK@0.2")
    assert 6 < len(data) <= 24
    right = evaluate(Finder(data, 0.0), data)
    assert right.score.metric == "PCK@0.2" and right.score.value == 100 and np.nanmin(right.score.quality) > 0.9999
    wrong = evaluate(Finder(data, 1000.0), data)
    assert 0 < wrong.score.value < 100 and np.nanmin(wrong.score.quality) < 0.1
    assert right.worst(3).ndim == 3
    again = tmp_path / "again"
    write_mosaics(Mosaics(store, (96, 96), 4), again, 6)
    for path in sorted((tmp_path / "mosaics").rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(tmp_path / "mosaics")).read_bytes()


def test_what_does_not_go_together(tmp_path, capsys):
    data = write_lsp(tmp_path / "lsp", 3)
    base = ["train", "dataset=lsp", f"data={data}", f"output={tmp_path / 'run'}"]
    for settings, message in (
        (["model=hrnet_w32_ae"], "train on mosaics of its people, e.g. mosaic=4"),
        (["mosaic=4"], "mosaic must be a number of people, for bottom-up networks only, got 4"),
        (
            ["model=hrnet_w32_ae", "stages=[{size=[64,64],epochs=1,mosaic=1}]"],
            "a stage's mosaic must be a number of people, in runs with mosaics only",
        ),
        (["model=hrnet_w32_ae", "metric=PCKh@0.5", "mosaic=2"], "by AP or PCK@0.2, not by PCKh@0.5"),
        (["model=hrnet_w32_ae", "codec.type=udp"], "bottom-up network, for which codec 'udp' is not made"),
    ):
        assert main([*base, "stages=[{size=[64,64],epochs=1,batch_size=2}]", *settings]) == 2
        assert message in capsys.readouterr().err


def test_mirrored_people_exchange_their_sides(coco):
    """HigherHRNet's convention mirrors about the middle of an image whose centre is at half its width."""
    store = SceneStore(coco, 128)
    (_, p, v, _), (_, q, w, _) = (SceneDataset(store, (128, 128), Augmentation(mirror=m))[0] for m in (0.0, 1.0))
    both = w & v[:, COCO17.flip_indices]
    expected = (p * torch.tensor([-1, 1]) + torch.tensor([128, 0]))[:, COCO17.flip_indices]
    assert both.sum() > 10 and torch.allclose(q[both], expected[both], atol=1e-3)
