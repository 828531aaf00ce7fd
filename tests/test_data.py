"""Readers of data sets: layouts, values, and that nothing broken stops them or goes unreported."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastpose.average_precision import average_precision
from fastpose.boxes import read_boxes
from fastpose.data import Report, from_results, load_coco_format, load_dataset, read_annotated, to_results
from fastpose.data.validate import validate_data
from fastpose.images import ImageError
from fastpose.scoring import score_poses
from fastpose.skeletons import (
    COCO17,
    CROWDPOSE14,
    MPII16,
    SKELETONS,
    Skeleton,
    read_skeleton,
    skeleton_from_dict,
    skeleton_to_dict,
    unpaired_sides,
)
from tests import datasets


def kinds(report: Report) -> dict[str, int]:
    return {kind: finding.count for kind, finding in report.findings.items()}


def test_coco(tmp_path):
    content = datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val")
    assert len(data) == 10 and data.metric == "AP" and data.skeleton is COCO17 and not data.report.findings
    assert data.annotated.ids == (10, 20, 30, 40, 50, 60) and data.image_index.tolist() == [
        0,
        0,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
    ]
    assert data.images[2] == tmp_path / "val2017" / "002.png" and data.read(2).shape == (90, 120, 3)
    for i, annotation in enumerate(content["annotations"]):
        points = np.array(annotation["keypoints"]).reshape(17, 3)
        assert np.allclose(data.keypoints[i], points[:, :2]) and (data.labelled[i] == (points[:, 2] > 0)).all()
        x, y, w, h = annotation["bbox"]
        assert np.allclose(data.boxes[i], [x, y, x + w, y + h])
    people = data.annotated.people
    assert people.areas.tolist() == [a["area"] for a in content["annotations"]]
    assert len(load_dataset("coco", tmp_path, "val", limit=3)) == 4
    # other places
    again = load_dataset(
        "coco", tmp_path / "nowhere", "x", annotations=tmp_path / "annotations" / "person_keypoints_val2017.json",
        images=tmp_path / "val2017",
    )  # fmt: skip
    assert again.images == data.images


def test_parts(tmp_path):
    datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val")
    part = data.without_images([data.images[0]])
    assert len(part) == 8 and part.annotated.ids == (20, 30, 40, 50, 60) and part.image_index.tolist()[:3] == [1, 1, 2]
    assert part.annotated.people.image_ids.tolist() == [20, 30, 40, 50, 60] and len(part.annotated.people) == 8
    assert data.first_images(2).annotated.ids == (10, 20) and data.first_images(0) is data
    assert len(data.of_images([])) == 0
    taken = data.take(np.array([3, 1]))
    assert (taken.keypoints == data.keypoints[[3, 1]]).all() and taken.image_index.tolist() == [2, 0]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        data.first_images(-1)


def test_everything_broken_is_counted_and_the_rest_is_read(tmp_path):
    content = datasets.write_standard_coco(tmp_path)
    images, annotations = content["images"], content["annotations"]
    images += [{"id": 10, "file_name": "again.png"}, {"id": 70}, "no object", {"id": 80, "file_name": "gone.png"}]
    images[5] |= {"height": "tall"}
    (tmp_path / "val2017" / "003.png").unlink()
    good = copy.deepcopy(annotations[1])

    def add(**changes):
        annotations.append({**good, "id": len(annotations) + 1, **changes})

    add(id=1)
    add(image_id=12345)
    add(image_id=[3])
    add(keypoints=[1, 2, 2])
    add(keypoints=[float("nan")] * 51)
    add(keypoints=None)
    add(iscrowd=1, num_keypoints=0, keypoints=[0] * 51)
    add(num_keypoints=0, keypoints=[0] * 51)
    add(bbox=[5, 5, 0, 20])
    add(bbox=[500, 500, 10, 20])
    add(bbox="left")
    add(area=None)
    add(area=-3)
    add(num_keypoints=3)
    add(category_id=2)
    outside = list(good["keypoints"])
    outside[:3] = [-4, 10, 2]
    add(keypoints=outside)
    strange = list(good["keypoints"])
    strange[2] = 7
    add(keypoints=strange)
    annotations.append(5)
    path = tmp_path / "annotations" / "person_keypoints_val2017.json"
    path.write_text(json.dumps(content))
    data = load_dataset("coco", tmp_path, "val")
    found = kinds(data.report)
    assert found == {
        "image id used twice (the first counts)": 1,
        "image entry without id or file_name": 2,
        "image without height and width": 2,
        "image file missing": 2,
        "annotation id used twice (the first counts)": 1,
        "annotation of an unknown image": 2,
        "keypoints are not 17 x (x, y, v) finite numbers": 3,
        "crowd region": 1,
        "person without labelled keypoints": 1,
        "bbox without area (keypoints give the box)": 1,
        "box outside the image (not estimated)": 1,
        "bbox is not [x, y, width, height] in finite numbers (keypoints give the box)": 1,
        "no area (0.53 of the box is taken)": 2,
        "num_keypoints differs from the labelled keypoints": 1,
        "annotation of another category": 1,
        "labelled keypoint outside the image": 1,
        "keypoint flag other than 0, 1 or 2 (above 0 is read as labelled)": 1,
        "annotation is not an object": 1,
    }
    assert len(data) == 8 + 7 and 40 not in data.annotated.ids and data.report.wrong == 22
    assert "image file missing: 2 (" in data.report.to_text() and "note: crowd region: 1" in data.report.to_text()
    assert "crowd region" not in data.report.to_text(wrong_only=True)
    json.dumps(data.report.to_dict())
    assert np.isfinite(data.boxes).all() and (data.boxes[:, 2:] > data.boxes[:, :2]).all()
    # the crowd, the person without keypoints and who is outside are still part of the truth
    assert len(data.annotated.people) == 8 + 7 + 3 and data.annotated.people.ignored.sum() == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected COCO's format, a JSON object with the list 'images'"),
        ('{"images": [], "annotations": 3}', "with the list 'annotations'"),
        ('{"images": [], "annotations": []}', "has no usable image entry; the list is empty"),
        (
            '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}',
            "none of the 1 images of .*'a.png'; looked",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_dataset("coco", tmp_path, "val", annotations=tmp_path / "a.json")


def test_wrong_arguments(tmp_path):
    for arguments, options, message in (
        (("coca", tmp_path, "val"), {}, "dataset must be one of coco, .*, got 'coca'"),
        (("mpii", tmp_path, "val"), {"detections": []}, "detections are for data in COCO's format"),
        (("coco", tmp_path, "val"), {"skeleton": "coco17"}, "can be given for dataset 'custom' only"),
        (("coco", tmp_path, "val"), {"metric": "mAP"}, "metric must be one of"),
        (("coco", tmp_path, "val"), {"metric": "PCK@0.2", "detections": []}, "can be scored by AP only, got 'PCK@0.2'"),
        (("lsp", tmp_path, "val"), {"images": tmp_path}, "has fixed places"),
        (("mpii", tmp_path, "test"), {}, "MPII split must be one of train, valid, trainval, got 'test'"),
        (("lsp", tmp_path, "x"), {}, "LSP split must be 'train' or 'test'"),
        (("custom", tmp_path, "train"), {}, "has neither train.json nor annotations.json"),
        (("mpii", tmp_path, "train"), {}, "MPII annotations do not exist: looked for"),
        (("crowdpose", tmp_path, "val"), {}, "crowdpose_val.json does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_dataset(*arguments, **options)


def test_detections(tmp_path):
    content = datasets.write_standard_coco(tmp_path)
    found = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.5} for a in content["annotations"]
    ]
    first = found[0]
    found += [{**first, "score": 0.01}, {**first, "category_id": 3}, {**first, "image_id": 7}, {**first, "bbox": [1]}]
    found += [{**first, "bbox": [3, 3, 0, 5]}, {**first, "bbox": [300, 3, 9, 5]}, {**first, "score": float("nan")}]
    found += [3, {**first, "image_id": {}}]
    (tmp_path / "det.json").write_text(json.dumps(found))
    data = load_dataset("coco", tmp_path, "val", detections=tmp_path / "det.json", least_score=0.1)
    truth = load_dataset("coco", tmp_path, "val")
    assert (
        np.allclose(data.boxes, truth.boxes, atol=1e-4) and (data.box_scores == 0.5).all() and not data.labelled.any()
    )
    assert kinds(data.report) == {
        "detection scores below 0.1": 1,
        "detection of another category": 1,
        "detection on an image that is not evaluated": 1,
        "detection without image_id, bbox [x, y, width, height] or score": 4,
        "detection without area in the image": 2,
    }
    with pytest.raises(ValueError, match="expected a list of"):
        load_dataset("coco", tmp_path, "val", detections=tmp_path / "annotations" / "person_keypoints_val2017.json")
    data = load_dataset("coco", tmp_path, "val", detections=[{**first, "category_id": {}}])
    malformed = "detection without image_id, bbox [x, y, width, height] or score"
    assert kinds(data.report) == {malformed: 1, "no detection is left": 1} and data.report.wrong


def test_results_for_a_test_set_without_annotations(tmp_path):
    content = datasets.write_standard_coco(tmp_path)
    found = [{"image_id": a["image_id"], "bbox": a["bbox"], "score": 0.5} for a in content["annotations"]]
    file = tmp_path / "image_info.json"
    file.write_text(json.dumps({key: content[key] for key in ("images", "categories")}))
    data = load_dataset("coco", tmp_path, "val", annotations=file, detections=found)
    assert len(data) == 10 and len(data.annotated) == 6 and len(data.annotated.people) == 0
    with pytest.raises(ValueError, match="with the list 'annotations'"):
        load_dataset("coco", tmp_path, "val", annotations=file)


def test_who_has_no_size(tmp_path):
    """One labelled keypoint tells no size; an area of 0, which no pose would match, and an empty box tell nothing."""
    content = datasets.write_standard_coco(tmp_path)
    one, flat, empty, *_ = content["annotations"]
    one["keypoints"][3:] = [0] * 48
    one["num_keypoints"] = 1
    del one["bbox"]
    flat["area"] = 0
    empty |= {"bbox": [0, 0, 0, 0], "area": 0}
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    data = load_dataset("coco", tmp_path, "val")
    assert kinds(data.report) == {
        "no bbox (keypoints give the box)": 1,
        "one labelled position and no box tell no size (not estimated)": 1,
        "bbox without area (keypoints give the box)": 1,
        "no area (0.53 of the box is taken)": 2,
    }
    assert len(data) == 9 and (data.boxes[:, 2:] - data.boxes[:, :2] > 20).all()
    areas, boxes = data.annotated.people.areas, data.annotated.people.boxes
    assert np.allclose(areas[1:3], 0.53 * boxes[1:3, 2] * boxes[1:3, 3])


def test_the_category_is_that_of_the_annotations(tmp_path):
    content = datasets.coco_content(("a", "b"))
    content["categories"][0]["id"] = 7
    for annotation in content["annotations"]:
        annotation["category_id"] = 7
    datasets.write_coco(tmp_path, content, "annotations.json", "images")
    found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1} for a in content["annotations"]]
    data = load_dataset("custom", tmp_path, "all", detections=[*found, {**found[0], "category_id": 1}])
    assert len(data) == len(found) and kinds(data.report) == {"detection of another category": 1}
    entries = to_results(data.annotated, data.image_index[:1], np.zeros((1, 2, 2)), np.zeros((1, 2)), np.ones(1))
    assert entries[0]["category_id"] == 7
    half = data.first_images(3)
    entries = to_results(half.annotated, half.image_index[:1], np.zeros((1, 2, 2)), np.zeros((1, 2)), np.ones(1))
    assert entries[0]["category_id"] == 7


def test_results_survive_the_round_trip(tmp_path):
    datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val")
    scores = np.linspace(0.1, 1, len(data))
    entries = to_results(data.annotated, data.image_index, data.keypoints, np.ones((len(data), 17)), scores)
    assert entries[0]["image_id"] == 10 and len(entries[0]["keypoints"]) == 51 and entries[0]["category_id"] == 1
    results = from_results(json.loads(json.dumps(entries)), data.annotated)
    assert (results.image == data.image_index).all() and np.allclose(results.keypoints, data.keypoints, atol=6e-4)
    assert average_precision(data.annotated.people, results, COCO17.sigmas).ap == 1.0
    report = Report()
    entries += [{"image_id": 1}, 5, {**entries[0], "image_id": 99}, {**entries[0], "score": None}]
    entries += [{**entries[0], "image_id": [10]}, {**entries[0], "category_id": [1]}]
    assert len(from_results(entries, data.annotated, report)) == len(data)
    assert sorted(kinds(report).values()) == [1, 5] and report.wrong == 5
    others = [{**entry, "category_id": 9} for entry in entries[: len(data)]]
    without = [{k: v for k, v in entry.items() if k != "category_id"} for entry in entries[: len(data)]]
    report = Report()
    assert len(from_results(others, data.annotated, report)) == 0 and len(from_results(without, data.annotated)) == 10
    assert kinds(report) == {"result of another category than 1": 10, "no result is left": 1}
    boxed = [{**entry, "bbox": [0, 0, 10, 20]} for entry in entries[:3]]
    assert from_results(boxed, data.annotated).areas.tolist() == [200, 200, 200]


def test_crowdpose(tmp_path):
    content = datasets.write_crowdpose(tmp_path)
    data = load_dataset("crowdpose", tmp_path, "val")
    assert data.skeleton is CROWDPOSE14 and len(data) == 16 and not data.report.findings
    people = data.annotated.people
    assert people.crowd_index.tolist() == [i / 10 for i in range(9)]
    _, _, w, h = content["annotations"][0]["bbox"]
    assert people.areas[0] == h * w * 0.53


def test_mpii_in_hrnets_format(tmp_path):
    pytest.importorskip("scipy")
    joints, labelled, heads = datasets.write_mpii(tmp_path)
    data = load_dataset("mpii", tmp_path, "val")
    assert data.metric == "PCKh@0.5" and data.skeleton is MPII16 and not data.report.findings
    assert np.allclose(data.keypoints, joints - 1) and (data.labelled == labelled).all()
    assert np.allclose(data.head_sizes, 0.6 * np.hypot(*(heads[:, 2:] - heads[:, :2]).T))
    # centre (60, 45 + 15 * 0.4) counted from 1, side 200 * 0.4
    assert np.allclose(data.boxes, [[19 + i, 10, 99 + i, 90] for i in range(6)])
    entries = json.loads((tmp_path / "annot" / "valid.json").read_text())
    entries += [{"image": "00000.png"}, {**entries[0], "scale": -1}, {**entries[0], "joints": [[1, 2]]}, 3]
    entries.append({**entries[1], "image": "gone.png"})
    (tmp_path / "annot" / "train.json").write_text(json.dumps(entries))
    data = load_dataset("mpii", tmp_path, "train")
    assert len(data) == 6 and np.isnan(data.head_sizes).all()
    assert sorted(kinds(data.report).values()) == [1, 1, 3]
    (tmp_path / "annot" / "valid.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="with N = 11 people as in the json file"):
        load_dataset("mpii", tmp_path, "val")
    (tmp_path / "annot" / "gt_valid.mat").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a MATLAB file"):
        load_dataset("mpii", tmp_path, "val")


def test_mpii_with_odd_ground_truth(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    _, labelled, _ = datasets.write_mpii(tmp_path)
    path = tmp_path / "annot" / "gt_valid.mat"
    content = {k: v for k, v in scipy_io.loadmat(path).items() if not k.startswith("_")}
    person, joint = np.argwhere(labelled)[0]
    content["pos_gt_src"] = content["pos_gt_src"].astype(float)
    content["pos_gt_src"][joint, 0, person] = np.nan
    content["headboxes_src"] = content["headboxes_src"].astype(float)
    content["headboxes_src"][:, :, 2] = 7
    content["headboxes_src"][0, 0, 3] = np.nan
    scipy_io.savemat(path, content)
    data = load_dataset("mpii", tmp_path, "val")
    assert kinds(data.report) == {
        "labelled keypoint that is not a finite number (not labelled)": 1,
        "head box without size (the person is not scored)": 2,
    }
    assert not data.labelled[person, joint] and data.labelled.sum() == labelled.sum() - 1
    score = score_poses(data, data.keypoints, np.ones((6, 16), np.float32))
    assert score.value == 100 and score.people == 4


def test_mpii_official(tmp_path):
    pytest.importorskip("scipy")
    joints, labelled, heads = datasets.write_mpii_official(tmp_path)
    data = load_dataset("mpii", tmp_path, "trainval")
    assert len(data) == 9 and (data.labelled == labelled).all()
    assert np.allclose(data.keypoints[labelled], joints[labelled] - 1)
    assert np.allclose(data.head_sizes, 0.6 * np.hypot(*(heads[:, 2:] - heads[:, :2]).T))
    assert kinds(data.report) == {"person without keypoints, position or scale": 1}
    train, valid = load_dataset("mpii", tmp_path, "train"), load_dataset("mpii", tmp_path, "val")
    assert [p.name for p in valid.images] == ["00000.png", "00008.png"] and len(train) == 7


def test_mpii_official_with_odd_numbers(tmp_path):
    """A person whose numbers cannot be read costs nobody else; another structure is named."""
    pytest.importorskip("scipy")
    odd = {
        1: {"objpos": {"x": np.zeros(0), "y": 45.0}},
        2: {"objpos": 7.0},
        3: {"scale": np.array([0.4, 0.5])},
        4: {"objpos": {"x": np.nan, "y": 45.0}},
        5: {"annopoints": {"point": {"x": np.array([1.0, 2.0]), "y": 1.0, "id": 3}}},
        6: {"annopoints": {"point": {"x": 1.0, "y": 1.0, "id": "zero"}}},
        7: {"annopoints": {"point": {"x": np.inf, "y": 1.0, "id": 3}}},
    }
    datasets.write_mpii_official(tmp_path, odd=odd)
    data = load_dataset("mpii", tmp_path, "trainval")
    assert [p.name for p in data.images] == ["00000.png", "00008.png"]
    assert data.report.findings["person whose numbers cannot be read"].count == 7 == data.report.wrong
    from scipy.io import savemat

    path = tmp_path / "mpii_human_pose_v1_u12_1.mat"
    for release in ({"version": "12"}, 7.0, np.zeros((0, 0)), {"annolist": [1.0, 2.0], "img_train": [1.0]}):
        savemat(path, {"RELEASE": release})
        with pytest.raises(ValueError, match="u12_1.mat: expected a struct RELEASE with as many img_train as annolist"):
            load_dataset("mpii", tmp_path, "trainval")


def test_lsp(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    joints = np.random.default_rng(0).uniform(5, 80, (3, 14, 2000))
    joints[2] = 1  # all occluded, and labelled all the same
    scipy_io.savemat(tmp_path / "joints.mat", {"joints": joints})
    for i in (1, 2, 1001, 2000):
        datasets.picture(tmp_path / "images" / f"im{i:04d}.jpg", np.zeros((0, 14, 2)))
    (tmp_path / "images" / "im0003.jpg").write_bytes(b"nothing")
    train, test = load_dataset("lsp", tmp_path, "train"), load_dataset("lsp", tmp_path, "val")
    assert [p.name for p in train.images] == ["im0001.jpg", "im0002.jpg"] and len(test) == 2 and train.labelled.all()
    assert np.allclose(test.keypoints[1], joints[:2, :, 1999].T)
    assert kinds(train.report) == {"image file missing": 997, "image cannot be read": 1}
    few = load_dataset("lsp", tmp_path, "train", limit=2)
    assert [p.name for p in few.images] == ["im0001.jpg", "im0002.jpg"] and not few.report.findings
    joints[0, 3, 0], joints[1, 4, 1] = np.nan, 1e300
    scipy_io.savemat(tmp_path / "joints.mat", {"joints": joints})
    odd = load_dataset("lsp", tmp_path, "train", limit=2)
    assert kinds(odd.report) == {"labelled keypoint that is not a finite number (not labelled)": 2}
    assert odd.labelled.sum(1).tolist() == [13, 13] and np.isfinite(odd.boxes).all()
    joints[:2] = 3
    scipy_io.savemat(tmp_path / "joints.mat", {"joints": joints})
    with pytest.raises(ValueError, match="(?s)nobody to estimate on 1000 images, .*one labelled position and no box"):
        load_dataset("lsp", tmp_path, "train")


def test_lspet_with_odd_joints(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    joints = np.random.default_rng(0).uniform(5, 80, (14, 3, 10000))
    joints[:, 2] = 1
    joints[0, 2, :] = 2
    joints[1, 0, :] = np.inf
    joints[2, 2, :] = np.nan
    scipy_io.savemat(tmp_path / "joints.mat", {"joints": joints})
    first, second = load_lspet_names("val")[:2]
    datasets.picture(tmp_path / "images" / first, np.zeros((0, 14, 2)))
    (tmp_path / "images" / second).mkdir()  # a folder
    data = load_dataset("lspet", tmp_path, "val")
    assert len(data) == 1 and data.labelled[0].tolist() == [True, False, False, *[True] * 11]
    assert kinds(data.report) == {
        "keypoint flag other than 0 or 1 (above 0 is read as labelled)": 500,
        "labelled keypoint that is not a finite number (not labelled)": 500,
        "image cannot be read": 1,
        "image file missing": 498,
    }
    joints[:, 2] = 0
    scipy_io.savemat(tmp_path / "joints.mat", {"joints": joints})
    with pytest.raises(ValueError, match="(?s)nobody to estimate on 500 images, .*without labelled keypoints: 1"):
        load_dataset("lspet", tmp_path, "val")


def load_lspet_names(split):
    lists = json.loads(resources.files("fastpose.data").joinpath("lspet_split.json").read_text())
    return [f"im{i:05d}.jpg" for i in lists[split]]


def test_links_that_cannot_be_are_counted(tmp_path):
    content = datasets.coco_content(("a", "b", "c"), 6)
    content["categories"][0]["skeleton"] = [[0, 1], [2, 3], [1, 99], "x", [1, 1], [[1], 2]]
    datasets.write_coco(tmp_path, content, "annotations.json", "images")
    data = load_dataset("custom", tmp_path, "all")
    assert data.skeleton.links == ((1, 2),)
    assert kinds(data.report) == {"link in 'skeleton' that is not two keypoints from 1 to 3": 5} and data.report.wrong


def test_json_too_deep_to_read(tmp_path):
    datasets.write_coco(tmp_path, datasets.coco_content(("a", "b")), "annotations.json", "images")
    deep = tmp_path / "annotations.json"
    deep.write_text("[" * 100_000 + "]" * 100_000)
    for read in (lambda: load_dataset("custom", tmp_path, "all"), lambda: read_boxes(deep)):
        with pytest.raises(ValueError, match="annotations.json.*not valid JSON"):
            read()


def test_files_from_other_systems(tmp_path):
    """A byte order mark, as Windows writes it; names that no file can have."""
    content = datasets.coco_content(("a", "b"), 6)
    datasets.write_coco(tmp_path, content, "annotations.json", "images")
    content["images"][3]["file_name"] = "x" * 300 + ".png"
    (tmp_path / "annotations.json").write_text(json.dumps(content), encoding="utf-8-sig")
    (tmp_path / "skeleton.toml").write_text('names = ["a", "b"]', encoding="utf-8-sig")
    data = load_dataset("custom", tmp_path, "all")
    assert data.skeleton.names == ("a", "b") and len(data.image_files()) == 5
    assert kinds(data.report) == {"image file missing": 1}


def test_several_categories_are_told(tmp_path):
    content = datasets.coco_content(("a", "b"))
    content["categories"].append({"id": 2, "name": "dog", "keypoints": ["a", "b"]})
    datasets.write_coco(tmp_path, content, "annotations.json", "images")
    data = load_dataset("custom", tmp_path, "all")
    assert kinds(data.report) == {"category with the same keypoints as another (they are scored as one)": 2}
    assert data.report.wrong == 0


def test_custom_with_nothing_but_the_least(tmp_path):
    """Ids that are texts, no boxes, areas or sizes, keypoint names from the categories, one annotation file."""
    names = ("nose", "left_ear", "right_ear", "tail")
    content = datasets.coco_content(names, images=10, people=1)
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
        del image["height"], image["width"]
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
        for key in ("bbox", "area", "num_keypoints", "iscrowd", "id", "category_id"):
            del annotation[key]
    datasets.write_coco(tmp_path, content, "annotations.json", "images")
    train, val = load_dataset("custom", tmp_path, "train"), load_dataset("custom", tmp_path, "val")
    assert (
        train.skeleton.names == names and train.skeleton.flip_pairs == ((1, 2),) and train.skeleton.links == ((0, 1),)
    )
    assert set(train.skeleton.sigmas) == {0.07}
    assert [p.name for p in val.images] == ["000.png", "005.png"] and len(train) == 7 and len(train.annotated) == 8
    assert val.annotated.ids == ("image 10", "image 60")
    assert train.report.wrong == 0
    assert len(load_dataset("custom", tmp_path, "all")) == 9
    points, box = val.keypoints[0][val.labelled[0]], val.boxes[0]
    assert (points > box[:2]).all() and (points < box[2:]).all()
    # a skeleton file at the root goes first, and must have as many keypoints
    (tmp_path / "skeleton.toml").write_text('names = ["a", "b", "c", "d"]\nsigmas = [0.1, 0.1, 0.1, 0.2]')
    assert load_dataset("custom", tmp_path, "val").skeleton.sigmas[3] == 0.2
    with pytest.raises(ValueError, match=r"skeleton 'coco17' has 17 keypoints, the annotations' categories \[4\]"):
        load_dataset("custom", tmp_path, "val", skeleton="coco17")
    # two files
    (tmp_path / "val.json").write_text((tmp_path / "annotations.json").read_text())
    assert len(load_dataset("custom", tmp_path, "val")) == 9


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left_ear", "right_ear"), ("LeftEar", "RightEar"), ("leftEar", "rightEar"), ("earL", "earR"),
        ("LEar", "REar"), ("lEar", "rEar"), ("lefteye", "righteye"), ("eye left", "eye right"), ("left1", "right1"),
        ("L1", "R1"), ("LEFT_EAR", "RIGHT_EAR"), ("ear.l", "ear.r"), ("EyeLInner", "EyeRInner"),
        ("earleft", "earright"),
    ],
)  # fmt: skip
def test_names_of_both_sides_are_paired(left, right):
    for names in (["nose", left, right, "tail"], [right, "bright", left, "bulb"]):
        skeleton = skeleton_from_dict({"names": names})
        pairs = {frozenset(names[i] for i in pair) for pair in skeleton.flip_pairs}
        assert pairs == {frozenset((left, right))} and not unpaired_sides(skeleton)
    assert skeleton_from_dict({"names": [left, "tail", "TL", "TR"]}).flip_pairs == ()
    lonely = skeleton_from_dict({"names": ["left_ear", "RightFoot", "bright", "lip", "rightmost"]})
    assert lonely.flip_pairs == () and unpaired_sides(lonely) == ["left_ear", "RightFoot"]
    # of several that a name may be paired with, one
    names = ["left_L4", "left_R4", "right_R4"]
    assert skeleton_from_dict({"names": names}).flip_pairs == ((1, 2),)
    # a letter beside the word is something else
    assert skeleton_from_dict({"names": ["left_L4", "right_L4", "left_l1", "right_l1"]}).flip_pairs == ((0, 1), (2, 3))


def test_skeleton_files(tmp_path):
    path = tmp_path / "mouse.toml"
    path.write_text(
        'names = ["snout", "ear_L", "ear_R", "tail"]\nlinks = [["snout", 3], [0, 1]]\nsigmas = [0.1, 0.2, 0.2, 0.3]\n'
        'upper_body = ["snout", "ear_L", "ear_R"]\n'
    )
    mouse = read_skeleton(path)
    assert mouse == Skeleton(
        "mouse", ("snout", "ear_L", "ear_R", "tail"), ((0, 3), (0, 1)), ((1, 2),), (0.1, 0.2, 0.2, 0.3), (0, 1, 2)
    )
    for skeleton in (mouse, *SKELETONS.values()):
        (tmp_path / "again.json").write_text(json.dumps(skeleton_to_dict(skeleton)))
        assert read_skeleton(tmp_path / "again.json") == skeleton
        without_pairs = {"names": skeleton.names, "sigmas": skeleton.sigmas}
        pairs = {frozenset(pair) for pair in skeleton_from_dict(without_pairs).flip_pairs}
        assert pairs == {frozenset(pair) for pair in skeleton.flip_pairs}
    for text, message in (
        ("names = [", "is not valid TOML"),
        ("sigmas = [1]", "expected a table with 'names'"),
        ('names = ["a", "a"]', "names must be unique"),
        ('names = ["a", 1]', "names must be texts"),
        ('names = ["a", "b"]\nlinks = [["a", "c"]]', "links: 'c' is neither a keypoint's name nor an index below 2"),
        ('names = ["a", "b"]\nlinks = [["a"]]', r"links must hold pairs of keypoints, got \['a'\]"),
        ('names = ["a", "b"]\nlinks = [[0, 0]]', "two different indices"),
        ('names = ["a", "b"]\nflip_pairs = 3', "flip_pairs must be a list, got 3"),
        ('names = ["a", "b"]\nsigmas = [0.1]', "expected 2 sigmas"),
        ('names = ["a", "b"]\nsigmas = [0.1, "x"]', "sigmas must be numbers"),
        ('names = ["a", "b"]\nsigmas = [0.1, -1]', "sigmas must be positive"),
        ('names = ["a", "b"]\nsigma = [0.1, 1]', "unknown field 'sigma'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_skeleton(path)
        assert "mouse.toml" in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.toml does not exist"):
        read_skeleton(tmp_path / "none.toml")


def test_validate_data(tmp_path):
    content = datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val")
    assert validate_data(data).wrong == 0 and kinds(data.report) == {"image without people to estimate": 1}
    (tmp_path / "val2017" / "002.png").write_bytes(b"broken")
    cv2.imwrite(str(tmp_path / "val2017" / "003.png"), np.zeros((50, 50, 3), np.uint8))
    content["annotations"].append({**content["annotations"][0], "id": 99})
    for annotation in content["annotations"]:
        annotation["keypoints"][3:6] = [0, 0, 0]
        annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    report = validate_data(load_dataset("coco", tmp_path, "val"))
    assert report.findings["image cannot be read"].count == 2
    assert "003.png: the image is 50 x 50 (height x width), its annotation says 90 x 120" in report.to_text()
    assert report.findings["person annotated twice"].examples == ["000.png, people 0 and 2"]
    assert report.findings["keypoint that nobody has"].examples == ["left_eye"]
    quick = validate_data(load_dataset("coco", tmp_path, "val"), read_images=False)
    assert "image cannot be read" not in quick.findings


def corners(annotation):
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x, y, x + w, y + h]


def fractions(annotation):
    annotation["keypoints"] = [v / 120 if i % 3 < 2 else v for i, v in enumerate(annotation["keypoints"])]


def elsewhere(annotation):
    annotation["bbox"] = [1, 1, 9, 9]


def too_large(annotation):
    annotation["bbox"][2:] = [200, 300]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (corners, "boxes look like [x1, y1, x2, y2], expected [x, y, width, height]"),
        (fractions, "all labelled keypoints at one place (fractions of the image instead of pixels?)"),
        (elsewhere, "most labelled keypoints lie outside the person's box"),
        (too_large, "box reaches beyond the image (clipped)"),
    ],
)
def test_validate_data_finds_what_does_not_fit_together(tmp_path, change, message):
    content = datasets.write_standard_coco(tmp_path)
    for annotation in content["annotations"]:
        change(annotation)
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    report = validate_data(load_dataset("coco", tmp_path, "val"), read_images=False)
    assert report.findings[message].count == (1 if change is corners else 10) and report.wrong


def test_an_image_with_two_ids(tmp_path):
    content = datasets.write_standard_coco(tmp_path)
    content["images"].append({**content["images"][0], "id": 999})
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    assert kinds(load_dataset("coco", tmp_path, "val").report) == {"image file with two ids (both count)": 1}


def test_exif_orientation_follows_the_annotation(tmp_path):
    """A photo stored lying down: upright for annotations of 30 x 20, as stored for annotations of 20 x 30."""
    pillow = pytest.importorskip("PIL.Image")
    stored = np.zeros((20, 30, 3), np.uint8)
    stored[:, :10] = 255
    exif = pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = Path(tmp_path) / "a.jpg"
    pillow.fromarray(stored).save(path, exif=exif, quality=95)
    assert read_annotated(path, (30, 20)).shape == (30, 20, 3) and read_annotated(path, None).shape == (30, 20, 3)
    image = read_annotated(path, (20, 30))
    assert image.shape == (20, 30, 3) and image[:, :8].min() > 200 and image[:, 12:].max() < 50
    with pytest.raises(ImageError, match="the image is 30 x 20"):
        read_annotated(path, (20, 31))


def test_categories_with_as_many_keypoints_and_other_names(tmp_path):
    content = datasets.coco_content(("a", "b", "c"))
    content["categories"].append({"id": 2, "name": "cow", "keypoints": ["tail", "hoof", "horn"]})
    content["annotations"][0]["category_id"] = 2
    skeleton = Skeleton("mouse", ("a", "b", "c"), links=(), flip_pairs=(), sigmas=(0.1, 0.1, 0.1))
    data = load_coco_format(content, [tmp_path], skeleton, keep_missing=True)
    assert kinds(data.report)["annotation of another category"] == 1


@pytest.mark.parametrize(("given", "crowds"), [(0, 0), (1, 1), (True, 1), (None, 0), ("0", 0), ("false", 0), (7, 0)])
def test_the_crowd_flag(tmp_path, given, crowds):
    content = datasets.coco_content(COCO17.names)
    content["annotations"][0]["iscrowd"] = given
    data = load_coco_format(content, [tmp_path], COCO17, keep_missing=True)
    assert kinds(data.report).get("crowd region", 0) == crowds and data.annotated.people.crowd.sum() == crowds
    assert ("iscrowd other than 0 or 1 (read as one person)" in kinds(data.report)) == (given in ("0", "false", 7))


def test_the_error_names_the_splits_that_are_there(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither all.json nor .*; it has train.json and val.json, which are"):
        load_dataset("custom", tmp_path, "all")


def test_annotations_as_a_dict_need_no_images(tmp_path):
    content = datasets.coco_content(COCO17.names)
    data = load_coco_format(content, [tmp_path], COCO17, keep_missing=True)
    assert len(data) == 10 and kinds(data.report) == {"image file missing": 6}


def test_boxes_end_with_the_image(tmp_path):
    content = datasets.write_standard_coco(tmp_path)
    content["annotations"][0]["bbox"] = [-10, -5, 300, 400]
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    assert load_dataset("coco", tmp_path, "val").boxes[0].tolist() == [0, 0, 119, 89]
