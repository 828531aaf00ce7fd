"""`fastpose evaluate`: every data set through the whole chain, with an estimator that knows the answers."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from fastpose.average_precision import average_precision_pycocotools
from fastpose.codecs import SoftmaxHeatmapCodec
from fastpose.data import PoseData, from_results, load_dataset, to_results
from fastpose.evaluate import evaluate, to_text
from fastpose.metrics import torso_lengths
from fastpose.models import create_model
from fastpose.pipeline import PoseEstimator
from fastpose.poses import Poses
from fastpose.scoring import score_poses
from fastpose.sheets import Case, contact_sheet
from fastpose.skeletons import COCO17, LSP14
from tests import datasets


class Oracle:
    """Answers with the annotation whose box it is given, moved by `error` pixels."""

    batch_size = 3

    def __init__(self, data: PoseData, error: float = 0.0) -> None:
        self.skeleton = data.skeleton
        self.info = SimpleNamespace(input_size=(64, 48), padding=1.25, codec=SoftmaxHeatmapCodec())
        self.error = error
        self.known = {tuple(np.round(box, 1)): points for box, points in zip(data.boxes, data.keypoints, strict=True)}
        self.calls = 0

    def prepare(self, crops):
        pass

    def estimate(self, images, boxes):
        self.calls += 1
        found = []
        for image, some in zip(images, boxes, strict=True):
            points = np.stack([self.known[tuple(np.round(box, 1))] for box in some]) + self.error
            ones = np.ones(len(some))
            shape = points.shape[:2]
            found.append(Poses(points, np.ones(shape), some, ones, image.shape[:2], self.skeleton))
        return found


def test_ground_truth_is_perfect(tmp_path):
    pytest.importorskip("scipy")
    datasets.write_standard_coco(tmp_path / "coco")
    datasets.write_crowdpose(tmp_path / "crowdpose")
    datasets.write_mpii(tmp_path / "mpii")
    for name in ("coco", "crowdpose", "mpii"):
        data = load_dataset(name, tmp_path / name, "val")
        result = evaluate(Oracle(data), data)
        main = {n: v for n, v in result.score.numbers.items() if not n.endswith(("(M)", "(L)"))}
        assert set(main.values()) == ({100.0} if name == "mpii" else {1.0}), main
        assert result.score.value == 100 and set(result.score.per_keypoint.values()) == {100.0}
        assert not result.report.wrong and result.to_dict()["images"] == len(data.image_files())
        json.dumps(result.to_dict(), allow_nan=False)
        assert "100.0" in to_text(result.score)


@pytest.mark.parametrize("nms", ["hard", "soft", "parallel", "none"])
def test_numbers_are_those_of_pycocotools_on_the_written_file(tmp_path, nms):
    pytest.importorskip("pycocotools")
    datasets.write_standard_coco(tmp_path, people=4)
    data = load_dataset("coco", tmp_path, "val")
    found = []
    for n, (i, box) in enumerate(zip(data.image_index, data.boxes, strict=True)):
        bbox = [float(v) for v in (*box[:2], *(box[2:] - box[:2]))]
        found += [{"image_id": data.annotated.ids[i], "category_id": 1, "bbox": bbox, "score": 0.5 + n / 99}] * (
            1 + n % 2
        )
    detected = load_dataset("coco", tmp_path, "val", detections=found)
    estimator = Oracle(data, error=2.0)
    result = evaluate(estimator, detected, nms=nms)
    assert estimator.calls > 1
    result.write_results(tmp_path / "out" / "results.json")
    entries = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(entries) == (len(found) if nms == "none" else len(data) if nms == "hard" else len(entries))
    assert set(entries[0]) == {"image_id", "category_id", "keypoints", "score"}
    theirs = average_precision_pycocotools(data.annotated.people, from_results(entries, data.annotated), COCO17.sigmas)
    for name, value in theirs.to_dict().items():
        assert abs(result.score.numbers[name] - value) <= 1e-9, name
    assert 0 < result.score.value < 100


def test_rescoring_and_nms_as_in_the_papers(tmp_path):
    datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val")
    keypoint_scores = np.full((len(data), 17), 0.1)
    keypoint_scores[:, :4] = 0.6
    keypoint_scores[3] = 0.0
    score = score_poses(data, data.keypoints, keypoint_scores)
    assert [entry["score"] for entry in score.results] == pytest.approx([0.6] * 3 + [0.0] + [0.6] * 6)
    with pytest.raises(ValueError, match=r"expected keypoints \[10, 17, 2\] and keypoint_scores"):
        score_poses(data, data.keypoints[:, :3], keypoint_scores)
    with pytest.raises(ValueError, match="evaluator must be one of fastpose, pycocotools"):
        score_poses(data, data.keypoints, keypoint_scores, evaluator="mine")


def test_parallel_nms_follows_its_paper(tmp_path):
    """The OKS takes keypoints above the threshold only and the area of the box, where that of hard NMS takes all."""
    datasets.write_standard_coco(tmp_path)
    twice = load_dataset("coco", tmp_path, "val").take(np.array([0, 0]))
    keypoints, seen = twice.keypoints.copy(), np.full((2, 17), 0.9)
    seen[1] = 0.8
    keypoints[1] += 2.0
    keypoints[1, 5:] += 500.0  # elsewhere, but nobody is sure of it
    seen[:, 5:] = 0.15
    settings = {"nms": "parallel", "crop_areas": np.full(2, 1e9)}
    score = score_poses(twice, keypoints, seen, keypoint_threshold=0.2, **settings)
    area = float((twice.boxes[0, 2:] - twice.boxes[0, :2]).prod())
    oks = np.exp(-8 / (2 * (2 * np.array(COCO17.sigmas[:5])) ** 2 * area)).mean()
    assert [entry["score"] for entry in score.results] == pytest.approx([0.9, 0.8 * (1 - oks)], rel=1e-5)
    score = score_poses(twice, keypoints, seen, keypoint_threshold=0.1, **settings)
    kept = seen[1].mean() * (1 - oks * 5 / 17)
    assert score.results[1]["score"] == pytest.approx(kept, rel=1e-5)


def test_missed_people_and_distances(tmp_path):
    """Nobody found on the first image: quality 0 and no match for its people; the others' similarity by hand."""
    datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val")
    rest = data.take(np.arange(2, len(data)))
    score = score_poses(rest, rest.keypoints + 3.0, np.ones((len(rest), 17)), nms="none")
    assert score.quality[:2].tolist() == [0, 0] and np.isnan(score.matched[:2]).all() and score.people == 10
    people = data.annotated.people
    similar = np.exp(-18 / (2 * (2 * np.array(COCO17.sigmas)) ** 2 * people.areas[:, None]))
    similar[:2] = 0
    for k, name in enumerate(COCO17.names):
        assert score.per_keypoint[name] == pytest.approx(100 * similar[people.visible[:, k], k].mean(), rel=1e-4)


def test_bad_images_are_left_out_and_counted(tmp_path):
    datasets.write_standard_coco(tmp_path)
    (tmp_path / "val2017" / "002.png").write_bytes(b"broken")
    data = load_dataset("coco", tmp_path, "val")
    data.boxes[7] = [500, 500, 600, 600]
    result = evaluate(Oracle(data), data)
    assert {k: f.count for k, f in result.report.findings.items()} == {
        "image cannot be read": 1,
        "box outside the image (not estimated)": 1,
    }
    assert len(result.data) == 7 and result.data.annotated.ids == (10, 20, 40, 50, 60)
    assert result.score.numbers["AR"] == pytest.approx(7 / 8)
    for path in (tmp_path / "val2017").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing is left to evaluate: image cannot be read: 1"):
        evaluate(Oracle(data), load_dataset("coco", tmp_path, "val", limit=1))
    with pytest.raises(ValueError, match="the weights know 'lsp14', the data set has 'coco17' with 17"):
        evaluate(PoseEstimator(detector="none"), data)


def test_worst_people_come_first(tmp_path):
    datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val")
    oracle = Oracle(data)
    for n, box in enumerate(list(oracle.known)):
        oracle.known[box] = oracle.known[box] + n
    result = evaluate(oracle, data, nms="none")
    worst = np.argsort(result.score.quality)
    assert worst[0] in (8, 9)  # the two largest errors are on the last image
    sheet = result.worst(count=5, columns=3)
    assert sheet.shape == (2 * 274, 3 * 192, 3) and sheet.dtype == np.uint8
    result.write_worst(tmp_path / "worst.png", 2)
    assert cv2.imread(str(tmp_path / "worst.png")).shape == (274, 384, 3)
    with pytest.raises(ValueError, match="at least one picture"):
        result.worst(0)
    case = Case(
        np.zeros((20, 20, 3), np.uint8),
        np.array([2, 2, 9, 9.0]),
        np.full((17, 2), np.nan),
        np.ones(17, bool),
        None,
        "x",
    )
    assert contact_sheet([case], COCO17).shape == (274, 192, 3)


def test_pck_needs_shoulders(tmp_path):
    datasets.write_coco(tmp_path, datasets.coco_content(("a", "b")), "annotations.json", "images")
    data = load_dataset("custom", tmp_path, "all", metric="PCK@0.2")
    with pytest.raises(ValueError, match="needs shoulders and hips; skeleton 'custom' has no left_hip"):
        evaluate(Oracle(data), data)
    (tmp_path / "mpii").mkdir()
    datasets.write_mpii(tmp_path / "mpii", split="train")
    data = load_dataset("mpii", tmp_path / "mpii", "train")
    with pytest.raises(ValueError, match="PCKh needs head boxes"):
        evaluate(Oracle(data), data)


def content_without_people(folder):
    path = folder / "data" / "annotations" / "person_keypoints_val2017.json"
    return {**json.loads(path.read_text()), "annotations": []}


def test_command_line(tmp_path, capsys):
    from fastpose.checkpoints import WeightsInfo, save_weights
    from fastpose.cli import main
    from fastpose.models import create_model

    content = datasets.write_standard_coco(tmp_path / "data")
    model = create_model("mobileposenet", num_keypoints=17)
    save_weights(
        tmp_path / "w.safetensors", model.state_dict(),
        WeightsInfo("mobileposenet", 17, "coco17", (64, 64), 1.25, SoftmaxHeatmapCodec()),
    )  # fmt: skip
    found = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.5} for a in content["annotations"]
    ]
    (tmp_path / "det.json").write_text(json.dumps(found))
    common = ["evaluate", str(tmp_path / "data"), "--dataset", "coco", "--quiet"]
    files = [
        f"--{kind}={tmp_path / name}" for kind, name in (("results", "r.json"), ("json", "n.json"), ("worst", "w.png"))
    ]
    weights = ["--weights", str(tmp_path / "w.safetensors")]
    assert main([*common, *weights, "--boxes", str(tmp_path / "det.json"), *files, "--nms", "parallel"]) == 0
    out = capsys.readouterr().out
    assert "AP (M)" in out and "left_ankle" in out
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["metric"] == "AP" and numbers["people"] == 10 and numbers["settings"]["nms"] == "parallel"
    assert cv2.imread(str(tmp_path / "w.png")) is not None
    # the same numbers from the file it wrote, without network or images
    (tmp_path / "data" / "val2017").rename(tmp_path / "elsewhere")
    assert main([*common, "--predictions", str(tmp_path / "r.json"), f"--json={tmp_path / 'm.json'}"]) == 0
    assert main(["evaluate", str(tmp_path), "--predictions", str(tmp_path / "r.json")]) == 2
    assert "--dataset must be one of coco, crowdpose, custom, got 'lspet'" in capsys.readouterr().err
    again = json.loads((tmp_path / "m.json").read_text())
    assert again["numbers"] == numbers["numbers"] and again["per_keypoint"] == numbers["per_keypoint"]
    assert main([*common, *weights]) == 2 and "none of the 6 images" in capsys.readouterr().err
    # what is left out is told
    (tmp_path / "elsewhere").rename(tmp_path / "data" / "val2017")
    half = [
        {"image_id": 7 if i % 2 else a["image_id"], "category_id": 1, "keypoints": a["keypoints"], "score": 1}
        for i, a in enumerate(content["annotations"])
    ]
    notes = []
    for kind, entries in (("predictions", half), ("boxes", [{**f, "image_id": 7} for f in found])):
        (tmp_path / "part.json").write_text(json.dumps(entries))
        notes.append((main([*common, *weights, f"--{kind}", str(tmp_path / "part.json")]), capsys.readouterr().err))
    assert notes[0][0] == 0 and "note: result for an image that is not evaluated: 5 (7, 7, 7, ...)" in notes[0][1]
    assert notes[1][0] == 2 and "no detection is left" in notes[1][1]
    (tmp_path / "nobody.json").write_text(json.dumps(content_without_people(tmp_path)))
    nobody = ["--annotations", str(tmp_path / "nobody.json"), "--predictions", str(tmp_path / "r.json")]
    assert main([*common, *nobody]) == 2 and "nobody could be measured" in capsys.readouterr().err
    (tmp_path / "data" / "val2017").rename(tmp_path / "elsewhere")
    (tmp_path / "w.png").unlink()
    black = [*common, "--predictions", str(tmp_path / "r.json"), "--worst", str(tmp_path / "w.png")]
    assert main(black) == 0 and cv2.imread(str(tmp_path / "w.png")) is not None
    (tmp_path / "elsewhere" / "003.png").unlink()
    assert main([*common, *weights, "--images", str(tmp_path / "elsewhere"), "--limit", "4"]) == 2
    assert "image file missing: 1" in capsys.readouterr().err


def test_weights_of_others(tmp_path, capsys):
    """A checkpoint with 14 keypoints does not say which they are; the data set does."""
    import torch

    from fastpose.cli import main
    from tests.test_models import build

    pytest.importorskip("scipy")
    datasets.write_crowdpose(tmp_path / "data")
    torch.save(build("hrnet_w32", num_keypoints=14).state_dict(), tmp_path / "w.pth")
    arguments = [
        "evaluate",
        str(tmp_path / "data"),
        "--dataset",
        "crowdpose",
        "--quiet",
        "--no-flip-test",
        "--limit",
        "3",
    ]
    arguments += ["--model", "hrnet_w32", "--weights", str(tmp_path / "w.pth"), "--input-size", "64", "64"]
    assert main([*arguments, "--codec", "dark", "--json", str(tmp_path / "n.json")]) == 0
    out = capsys.readouterr().out
    assert "AP (hard)" in out and "flip test: no\n" in out
    settings = json.loads((tmp_path / "n.json").read_text())["settings"]
    assert settings["flip_test"] is False and settings["codec"] == "dark" and settings["input_size"] == [64, 64]
    assert settings["precision"] == "float32"  # "auto" of a network that so few images do not optimise
    assert main([*arguments, "--codec", "best"]) == 2 and "best" in capsys.readouterr().err
    assert main([*arguments, "--no-flip-shift"]) == 2
    assert "--no-flip-shift needs --codec softmax, msra, dark or udp, got None" in capsys.readouterr().err
    arguments.remove("--no-flip-test")
    for shift in ([], ["--no-flip-shift"]):
        results = tmp_path / f"r{len(shift)}.json"
        assert main([*arguments, "--codec", "msra", *shift, "--results", str(results)]) == 0
        assert "flip test: yes\n" in capsys.readouterr().out
    one, two = (json.loads((tmp_path / f"r{i}.json").read_text()) for i in (0, 1))
    assert one != two


def test_bottom_up(tmp_path):
    """A network that finds the people itself: images without people are looked at too."""
    from fastpose.codecs import AssociativeEmbeddingCodec

    datasets.write_standard_coco(tmp_path)
    (tmp_path / "val2017" / "004.png").write_bytes(b"")
    data = load_dataset("coco", tmp_path, "val")

    class Finder(Oracle):
        model_name = "finder"

        def estimate(self, images, boxes):
            assert boxes == [None]
            number, self.calls = self.calls, self.calls + 1
            number += number > 3  # image 4 cannot be read
            own = np.flatnonzero(data.image_index == number)
            if len(own) == 0:  # a false alarm on the image without people
                points, scores = np.full((1, 17, 2), 9.0), np.array([0.01])
            else:
                points, scores = data.keypoints[own], np.full(len(own), 0.5)
            shape = points.shape[:2]
            return [Poses(points, np.ones(shape), np.zeros((len(points), 4)), scores, (90, 120), data.skeleton)]

    finder = Finder(data)
    finder.info.codec = AssociativeEmbeddingCodec()
    result = evaluate(finder, data)
    assert finder.calls == 5 and result.score.numbers["AP"] == 1.0 and len(result.score.results) == 9
    assert result.data.annotated.ids == (10, 20, 30, 40, 60)
    assert result.report.findings["image cannot be read"].count == 1
    result.worst(2)
    finder.calls = 0
    by_distance = evaluate(finder, load_dataset("coco", tmp_path, "val", metric="PCK@0.2"))
    assert by_distance.score.value == 100 and by_distance.score.metric == "PCK@0.2"
    single = replace(data, annotated=None, image_index=None, metric="PCK@0.2")
    with pytest.raises(ValueError, match="finder finds people itself, which is scored with annotations of everybody"):
        evaluate(finder, single)


@pytest.fixture
def coco_data(tmp_path):
    datasets.write_standard_coco(tmp_path)
    return load_dataset("coco", tmp_path, "val")


def test_scores_of_people_are_those_of_sure_keypoints_and_boxes(tmp_path, coco_data):
    seen = np.full((10, 17), 0.15)
    seen[:, :4] = 0.3
    assert score_poses(coco_data, coco_data.keypoints, seen).results[0]["score"] == pytest.approx(0.3)
    found = [{"image_id": 10, "bbox": [5, 5, 50, 50], "score": 0.4}]
    detected = load_dataset("coco", tmp_path, "val", detections=found)
    score = score_poses(detected, np.zeros((1, 17, 2)), np.full((1, 17), 0.5))
    assert score.results[0]["score"] == pytest.approx(0.2)


def test_hard_nms_counts_unsure_keypoints(coco_data):
    twice = coco_data.take(np.array([0, 0]))
    keypoints, seen = twice.keypoints.copy(), np.full((2, 17), 0.9)
    keypoints[1, 5:] += 500.0
    seen[1, 5:] = 0.1
    assert len(score_poses(twice, keypoints, seen).results) == 2


def test_settings_reach_the_scoring(coco_data, monkeypatch):
    given = {}
    monkeypatch.setattr("fastpose.evaluate.score_poses", lambda *a, **s: given.update(s) or score_poses(*a, **s))
    evaluate(Oracle(coco_data), coco_data)
    assert given["keypoint_threshold"] == 0.2 and given["nms_threshold"] is None
    evaluate(Oracle(coco_data), coco_data, nms_threshold=0.3, keypoint_threshold=0.05)
    assert given["keypoint_threshold"] == 0.05 and given["nms_threshold"] == 0.3
    width, height = (coco_data.boxes[:, 2:] - coco_data.boxes[:, :2]).T
    assert np.allclose(given["crop_areas"], (np.maximum(height, width * 64 / 48) * 1.25) ** 2 * 48 / 64, rtol=1e-5)


def test_settings_of_the_command_line_reach_the_evaluation(tmp_path, monkeypatch):
    from fastpose.cli import main

    datasets.write_standard_coco(tmp_path)
    given = {}

    def load(*args, **settings):
        given.update(settings)
        return SimpleNamespace(metric="AP", skeleton=COCO17)

    def run(*args, **settings):
        given.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr("fastpose.data.load_dataset", load)
    monkeypatch.setattr("fastpose.evaluate.evaluate", run)
    command = ["evaluate", str(tmp_path), "--dataset", "coco", "--boxes", "d.json", "--least-score", "0.6", "--nms"]
    assert main([*command, "soft", "--nms-threshold", "0.3", "--keypoint-threshold", "0.05"]) == 2
    assert (given["detections"], given["least_score"], given["nms"]) == ("d.json", 0.6, "soft")
    assert (given["nms_threshold"], given["keypoint_threshold"]) == (0.3, 0.05)


def test_pck_counts_to_a_fifth_of_the_torso(tmp_path):
    datasets.write_standard_coco(tmp_path)
    data = load_dataset("coco", tmp_path, "val", metric="PCK@0.2")
    lengths = np.nan_to_num(torso_lengths(data.keypoints, data.labelled, COCO17))
    for share, value in ((0.19, 100), (0.21, 0)):
        moved = data.keypoints + lengths[:, None, None] * np.array([share, 0])
        assert score_poses(data, moved, np.ones((10, 17))).value == value
    keypoints, at = np.zeros((1, 14, 2)), LSP14.names.index
    keypoints[0, at("right_hip")], keypoints[0, at("left_hip")] = [30, 40], [0, 100]
    assert torso_lengths(keypoints, np.ones((1, 14), bool), LSP14) == 75  # the mean of both diagonals


def test_pckh_counts_to_half_and_a_tenth_of_the_head(tmp_path):
    datasets.write_mpii(tmp_path)
    data = load_dataset("mpii", tmp_path, "val")
    for share, expected in ((0.09, [100, 100, 100]), (0.105, [100, 0, 100]), (0.49, [100, 0, 0]), (0.51, [0, 0, 0])):
        moved = data.keypoints + data.head_sizes[:, None, None] * np.array([share, 0])
        assert list(score_poses(data, moved, np.ones((6, 16))).numbers.values()) == expected


def test_the_worst_are_drawn(coco_data, monkeypatch):
    oracle, drawn = Oracle(coco_data), []
    for n, box in enumerate(list(oracle.known)):
        oracle.known[box] = oracle.known[box] + n
    result = evaluate(oracle, coco_data, nms="none")
    monkeypatch.setattr("fastpose.evaluate.contact_sheet", lambda cases, *rest: drawn.extend(cases))
    result.worst(3)
    assert [c.caption[:8] for c in drawn] == [f"OKS {q:.2f}" for q in np.sort(result.score.quality)[:3]]


def test_areas_of_results_are_those_of_their_keypoints(coco_data):
    ones = np.ones((10, 17)), np.ones(10)
    entries = to_results(coco_data.annotated, coco_data.image_index, coco_data.keypoints, *ones)
    areas = from_results(entries, coco_data.annotated).areas
    assert np.allclose(areas, np.ptp(coco_data.keypoints, axis=1).prod(1), rtol=1e-3)


def test_numbers_are_told_in_percent(coco_data):
    assert f"{'AP':<16}{100.0:6.1f}" in to_text(evaluate(Oracle(coco_data), coco_data).score)


def test_evaluating_does_not_change_the_data(tmp_path, coco_data):
    (tmp_path / "val2017" / "002.png").write_bytes(b"broken")
    counts = [evaluate(Oracle(coco_data), coco_data).report.findings["image cannot be read"].count for _ in range(2)]
    assert counts == [1, 1] and not coco_data.report.findings


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys, monkeypatch):
    from fastpose.cli import main

    datasets.write_standard_coco(tmp_path)
    (tmp_path / "file").write_text("")
    command = ["evaluate", str(tmp_path), "--dataset", "coco", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr("fastpose.evaluate.evaluate", None)
        for more, message in (
            (["--results", str(tmp_path)], "is a folder, expected the name of a file"),
            (["--json", str(tmp_path / "file" / "n.json")], "file"),
            (["--worst", str(tmp_path / "worst")], "OpenCV cannot write images with suffix ''"),
            (["--worst", str(tmp_path / "w.png"), "--worst-count", "0"], "--worst-count must be at least 1, got 0"),
        ):
            assert main([*command, *more]) == 2
            assert message in capsys.readouterr().err
    torch.save(create_model("mobileposenet").state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr("fastpose.evaluate.Evaluation.write_results", lambda *_: (_ for _ in ()).throw(OSError("full")))
    files = ["--results", str(tmp_path / "r.json"), "--json", str(tmp_path / "n.json")]
    assert main([*command, "--weights", str(tmp_path / "w.pth"), "--input-size", "64", "64", *files]) == 2
    assert "fastpose: error: full" in capsys.readouterr().err and (tmp_path / "n.json").is_file()


def test_results_of_another_metric_are_refused_before_the_work(tmp_path, capsys, monkeypatch):
    from fastpose.cli import main

    datasets.write_standard_coco(tmp_path)
    monkeypatch.setattr("fastpose.evaluate.evaluate", None)
    command = ["evaluate", str(tmp_path), "--dataset", "coco", "--metric", "PCK@0.2", "--results"]
    assert main([*command, str(tmp_path / "r.json")]) == 2
    assert "--results: only AP has results in COCO's format, the metric here is PCK@0.2" in capsys.readouterr().err


def test_results_of_nothing_here_are_told(tmp_path, capsys):
    from fastpose.cli import main

    content = datasets.write_standard_coco(tmp_path)
    entry = {"image_id": 10, "category_id": 1, "keypoints": content["annotations"][0]["keypoints"], "score": 1.0}
    file = tmp_path / "r.json"
    given = ["evaluate", str(tmp_path), "--dataset", "coco", "--predictions", str(file)]
    for entries in ([{**entry, "image_id": "10"}], [{**entry, "category_id": 0}]):
        file.write_text(json.dumps(entries))
        assert main(given) == 2
        assert f"no result is left: 1 (of {len(entries)})" in capsys.readouterr().err
    for entries in ([entry], []):  # nobody found is a result too
        file.write_text(json.dumps(entries))
        assert main(given) == 0 and not capsys.readouterr().err


def test_nobody_of_a_size_that_counts(coco_data):
    """pycocotools says -1; people of more than 1e10 square pixels are in none of its ranges."""
    people = replace(coco_data.annotated.people, areas=np.full(len(coco_data.annotated.people.areas), 2e10))
    data = replace(coco_data, annotated=replace(coco_data.annotated, people=people))
    assert np.isnan(evaluate(Oracle(data), data).score.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nms_threshold": 7.0}, "threshold of method 'hard' is an OKS, from 0 to 1, got 7.0"),
        ({"nms_threshold": float("nan")}, "is an OKS, from 0 to 1, got nan"),
        ({"nms": "soft", "nms_threshold": float("nan")}, "threshold must be a number, got nan"),
    ],
)
def test_thresholds_that_nothing_passes_are_refused_before_the_work(coco_data, settings, message):
    oracle = Oracle(coco_data)
    with pytest.raises(ValueError, match=message):
        evaluate(oracle, coco_data, **settings)
    assert oracle.calls == 0
    with pytest.raises(ValueError, match=message):
        PoseEstimator(**settings)
