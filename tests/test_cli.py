"""The command line in fresh processes: what a user types and what comes back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastpose import images, predict
from fastpose.checkpoints import read_info
from fastpose.cli import main
from fastpose.codecs import DarkHeatmapCodec, get_codec
from fastpose.data import base
from fastpose.export import ExportError, export_onnx, export_torchscript
from fastpose.files import write_json
from fastpose.geometry import apply_affine, crop_matrix, invert_affine, warp_crop
from fastpose.models import create_model
from fastpose.pipeline import PoseEstimator, estimate_crops
from fastpose.plan import NotOptimizable
from fastpose.zoo import models_table
from tests import datasets
from tests.conftest import needs_kernels

try:
    import onnxruntime
    import onnxscript  # noqa: F401
except ImportError:
    onnxruntime = None
needs_onnx = pytest.mark.skipif(onnxruntime is None, reason="the extra 'onnx' is not installed")


def fastpose(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "fastpose", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def folder(tmp_path, photo):
    (tmp_path / "in").mkdir()
    for i in range(3):
        cv2.imwrite(str(tmp_path / "in" / f"{i}.jpg"), np.roll(photo, 40 * i, axis=1))
    return tmp_path


def test_one_photo_gives_a_picture_and_json(folder):
    done = fastpose("predict", "in/0.jpg", "--detector", "none", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "in/0.jpg: 1 person" in done.stdout and "1 poses in 1 images -> poses/poses.json" in done.stdout
    result = json.loads((folder / "poses" / "poses.json").read_text())
    assert result["images"] == [{"id": 1, "file_name": "in/0.jpg", "width": 320, "height": 240}]
    (annotation,) = result["annotations"]
    assert annotation["image_id"] == 1 and len(annotation["keypoints"]) == 42
    assert result["categories"][0]["keypoints"][12:] == ["neck", "head_top"]
    assert cv2.imread(str(folder / "poses" / "0_pose.png")).shape == (240, 320, 3)


def test_bad_files_are_reported_and_the_rest_is_done(folder):
    (folder / "in" / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    done = fastpose(
        "predict", "in", "missing.png", "--detector", "none", "--save-images", "--json", "r.json", cwd=folder
    )
    assert done.returncode == 2
    assert "fastpose: error: in/broken.jpg: truncated JPEG" in done.stderr
    assert "fastpose: error: missing.png: no such file or folder" in done.stderr
    assert "2 of 5 inputs failed" in done.stderr and "Traceback" not in done.stderr
    result = json.loads((folder / "r.json").read_text())
    assert len(result["images"]) == 3 and len(result["errors"]) == 2
    assert len(list((folder / "poses").glob("*_pose.png"))) == 3


def test_nothing_that_is_read_is_drawn_over(folder):
    """Drawings lie beside the images, and some images have the name that a drawing would get."""
    for name in ("0_pose.png", "sub/0.png", "sub/000001_0.png"):
        (folder / "in" / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "in" / name), np.full((64, 48, 3), len(name), np.uint8))
    before = {p: p.read_bytes() for p in (folder / "in").rglob("*.*")}
    sources = ["in/0.jpg", "in/0_pose.png", "in/sub/0.png", "in/sub/000001_0.png", "in/1.jpg"]
    done = fastpose("predict", *sources, "--output", "in", "--save-images", "--detector", "none", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert all(p.read_bytes() == content for p, content in before.items())
    assert sorted(p.name for p in (folder / "in").glob("*_pose.png")) == [
        "000001_0_pose.png", "000003_0_pose.png", "000004_000001_0_pose.png", "0_pose.png", "0_pose_pose.png",
        "1_pose.png",
    ]  # fmt: skip


def test_names_that_the_system_refuses(folder):
    done = fastpose("predict", "x" * 300 + ".jpg", "in/0.jpg", "--detector", "none", cwd=folder)
    assert done.returncode == 2 and "in/0.jpg: 1 person" in done.stdout and "File name too long" in done.stderr
    assert fastpose("predict", "in/0.jpg", "--padding", "inf", cwd=folder).stderr.endswith("finite, got inf\n")
    done = fastpose("export", "in", cwd=folder)
    assert done.returncode == 2 and done.stderr == "fastpose: error: in is a folder, expected the name of a file\n"


def test_an_image_that_vanishes_before_it_is_drawn(folder, monkeypatch, capsys):
    read, times = images.read_image, Counter()

    def read_once(path, **options):
        times[path] += 1
        if path.name == "1.jpg" and times[path] > 1:
            path.unlink()
        return read(path, **options)

    monkeypatch.setattr(base, "read_image", read_once)
    arguments = ["predict", str(folder / "in"), "--detector", "none", "--save-images", "--output", str(folder / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "error: not drawn: " in said and "1.jpg: no such file" in said and "1 of 3 inputs failed" in said
    assert len(json.loads((folder / "out" / "poses.json").read_text())["images"]) == 3
    assert sorted(p.name for p in (folder / "out").glob("*.png")) == ["0_pose.png", "2_pose.png"]


def test_boxes_file(folder):
    nan = float("nan")
    boxes = {"0.jpg": [[10, 10, 100, 200], [50, 20, 300, 230]], "1.jpg": [[10, 10, nan, 50]], "2.jpg": []}
    (folder / "boxes.json").write_text(json.dumps(boxes))
    done = fastpose("predict", "in", "--boxes", "boxes.json", cwd=folder)
    assert done.returncode == 2
    assert "in/1.jpg: boxes: box 0 (10, 10, nan, 50) is not finite" in done.stderr
    result = json.loads((folder / "poses" / "poses.json").read_text())
    assert [i["file_name"] for i in result["images"]] == ["in/0.jpg", "in/2.jpg"]
    assert [a["image_id"] for a in result["annotations"]] == [1, 1]
    assert result["annotations"][0]["bbox"] == [10, 10, 90, 190]
    coco = {
        "images": [{"id": 5, "file_name": "0.jpg"}],
        "annotations": [{"image_id": 5, "bbox": [10, 10, 90, 190]}],
    }
    (folder / "boxes.json").write_text(json.dumps(coco))
    done = fastpose("predict", "in/0.jpg", "--boxes", "boxes.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "poses" / "poses.json").read_text())
    assert np.allclose(again["annotations"][0]["keypoints"], result["annotations"][0]["keypoints"], atol=0.01)
    done = fastpose("predict", "in/1.jpg", "--boxes", "boxes.json", cwd=folder)
    assert done.returncode == 2 and "in/1.jpg: not in boxes.json" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "holds a int; expected"),
        ('{"a.jpg": 5}', "the entry 'a.jpg' is 5, not a list of boxes"),
        ('[{"bbox": [1, 2, 3, 4]}]', "missing key 'file_name'"),
        ('[{"file_name": "a", "bbox": [1, 2]}]', r"bbox must be [x, y, width, height], got [1, 2]"),
    ],
)
def test_wrong_boxes_files(folder, content, message):
    from fastpose.boxes import read_boxes

    (folder / "boxes.json").write_text(content)
    with pytest.raises(ValueError) as error:
        read_boxes(folder / "boxes.json")
    assert message in str(error.value) and "boxes.json" in str(error.value)


def test_boxes_of_people_with_their_scores(folder, photo, capsys, monkeypatch):
    """Of a COCO file: no crowds, no cars; scores of boxes count; names by as much of the path as it takes."""
    monkeypatch.chdir(folder)
    for name in ("x", "y"):
        (folder / name).mkdir()
        cv2.imwrite(str(folder / name / "1.png"), photo)
    # in this noise the weights are sure enough of a keypoint of either
    box = {"image_id": 7, "bbox": [33, 103, 182, 86]}
    content = {
        "images": [{"id": 7, "file_name": "x/1.png"}, {"id": 8, "file_name": "1.png"}],
        "annotations": [{**box, "category_id": 1}, {**box, "category_id": 3},
                        {**box, "category_id": 1, "iscrowd": 1},
                            {**box, "category_id": 1, "score": 0.5, "bbox": [6, 118, 113, 44]}],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
    }  # fmt: skip
    (folder / "b.json").write_text(json.dumps(content))
    assert main(["predict", "x", "--boxes", "b.json", "--quiet"]) == 0
    got = json.loads((folder / "poses" / "poses.json").read_text())["annotations"]
    assert [a["bbox"] for a in got] == [[33, 103, 182, 86], [6, 118, 113, 44]]
    poses = PoseEstimator(detector="none")("x/1.png", [[33, 103, 215, 189], [6, 118, 119, 162]])
    assert np.allclose([a["score"] for a in got], poses.scores * [1, 0.5], atol=2e-5) and poses.scores[1] > 0.05
    assert [(a["iscrowd"], a["area"], a["num_keypoints"]) for a in got] == [(0, 15652, 14), (0, 4972, 14)]

    assert main(["predict", "x", "y", "--boxes", "b.json", "--quiet"]) == 0  # y/1.png: the other entry, without boxes
    del content["images"][0], content["annotations"][:]
    (folder / "b.json").write_text(json.dumps(content))
    assert main(["predict", "x", "y", "--boxes", "b.json", "--quiet"]) == 2
    assert "x/1.png: '1.png' may be y/1.png as well; give more of the path" in capsys.readouterr().err
    (folder / "b.json").write_text('[{"file_name": "1.png", "bbox": [1, 2, 3, 4], "score": NaN}]')
    assert main(["predict", "x", "--boxes", "b.json"]) == 2
    assert "score must be finite" in capsys.readouterr().err


def test_boxes_of_the_stored_pixels(folder, photo, capsys, monkeypatch):
    """A photo that EXIF turns: the COCO file's size tells which pixels its boxes are for, or that they are others'."""
    pillow = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(folder)
    exif = pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pillow.fromarray(photo).save("turned.png", exif=exif)
    height, width = photo.shape[:2]
    entry = {"id": 7, "file_name": "turned.png", "height": height, "width": width}
    content = {"images": [entry], "annotations": [{"image_id": 7, "bbox": [10, 20, 150, 200]}]}
    (folder / "b.json").write_text(json.dumps(content))
    assert main(["predict", "turned.png", "--boxes", "b.json", "--quiet"]) == 0
    got = json.loads((folder / "poses" / "poses.json").read_text())
    assert (got["images"][0]["height"], got["images"][0]["width"]) == (height, width)
    expected = PoseEstimator(detector="none")(photo, [[10, 20, 160, 220]]).to_coco(1)[0]
    assert np.allclose(got["annotations"][0]["keypoints"], expected["keypoints"], atol=1e-2)
    assert cv2.imread("poses/turned_pose.png").shape == photo.shape
    entry["height"], entry["width"] = width, height
    (folder / "b.json").write_text(json.dumps(content))
    assert main(["predict", "turned.png", "--boxes", "b.json", "--quiet"]) == 0
    assert cv2.imread("poses/turned_pose.png").shape == (width, height, 3)
    entry["width"] += 1
    (folder / "b.json").write_text(json.dumps(content))
    assert main(["predict", "turned.png", "--boxes", "b.json", "--quiet"]) == 2
    said = f"the image is {width} x {height} (height x width), its annotation says {width} x {height + 1}"
    assert said in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(folder, photo, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def estimate(estimator, files, *args):
        yield predict.Found(files[0], poses=estimator(photo))
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpose.predict.estimate_files", estimate)
    assert main(["predict", "in", "--quiet"]) == 130
    content = json.loads((folder / "poses" / "poses.json").read_text())
    assert content["info"]["incomplete"] and len(content["images"]) == len(content["annotations"]) == 1


def test_a_long_run_saves_what_it_has_from_time_to_time(folder, photo, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("fastpose.cli.SAVE_AFTER", 0.0)
    seen = []

    def estimate(estimator, files, *args):
        for file in files:
            yield predict.Found(file, poses=estimator(photo))
            if Path("poses/poses.json").is_file():
                content = json.loads(Path("poses/poses.json").read_text())
                seen.append((content["info"].get("incomplete", False), len(content["images"])))

    files = sorted(Path("in").iterdir())[:3]
    monkeypatch.setattr("fastpose.predict.estimate_files", estimate)
    assert main(["predict", *map(str, files), "--quiet"]) == 0
    assert seen == [(True, 0), (True, 1), (True, 2)]  # each before its own image is added
    content = json.loads(Path("poses/poses.json").read_text())
    assert "incomplete" not in content["info"] and len(content["images"]) == 3
    os.mkfifo("pipe")
    reader = subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE)
    assert main(["predict", *map(str, files), "--quiet", "--json", "pipe"]) == 0
    assert len(json.loads(reader.communicate(timeout=20)[0])["images"]) == 3  # once, at the end


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("there/old.json")
    write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "there" / "old.json").read_text()) == [1]
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    write_json(tmp_path / "pipe", [2])
    assert json.loads(reader.communicate(timeout=20)[0]) == [2] and (tmp_path / "pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "pipe", "there"]


def test_wrong_arguments(folder):
    cases = {
        ("predict", "in", "--model", "mobileposnet"): "unknown model 'mobileposnet'; did you mean mobileposenet",
        ("predict", "in", "--weights", "none.safetensors"): "no such file (expected 'default' or a path)",
        ("predict", "in", "--boxes", "none.json"): "boxes none.json: no such file",
        ("predict", "nothing"): "nothing: no such file or folder",
        ("train", "lr=1"): "missing setting 'data'",
        ("train", "data=none", "output=run", "learning_rate=1"): "unknown setting 'learning_rate'",
    }
    for arguments, message in cases.items():
        done = fastpose(*arguments, cwd=folder)
        assert done.returncode == 2, (arguments, done.stdout)
        assert message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_settings_of_a_training_may_stand_anywhere(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("fastpose.train.train", lambda config, *_: seen.append(config) or 0.0)
    assert main(["train", "data=d", "--config", "own_images", "output=x", "--quiet", "lr=.5"]) == 0
    assert (seen[0].data, seen[0].output, seen[0].lr) == ("d", "x", 0.5)
    for arguments in (["train", "data=d", "--quick", "output=x"], ["predict", "a.jpg", "--wights=w"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "unrecognized arguments: --" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_refused_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr("fastpose.predict.estimate_files", None)
    assert main(["predict", str(folder / "in"), "--output", str(folder / "out"), "--json", str(folder)]) == 2
    assert "is a folder, expected the name of a file" in capsys.readouterr().err


def test_results_into_a_pipe(folder):
    """/dev/stdout names a pipe here, of which there is no path."""
    done = fastpose("predict", "in", "--detector", "none", "--quiet", "--json", "/dev/stdout", cwd=folder)
    assert json.loads(done.stdout)["annotations"], done.stderr


def test_export_and_info(folder):
    done = fastpose("export", "model.pt", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "model.pt: loads with torch alone" in done.stdout
    code = "import torch; print(tuple(torch.jit.load('model.pt')(torch.zeros(1, 3, 64, 64)).shape))"
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "(1, 14, 16, 16)"
    done = fastpose("info", "--json", cwd=folder)
    report = json.loads(done.stdout)
    assert set(report["ops on cpu"]) == {"ghost_cheap", "dw_upsample", "oks_nms", "run_plan"}
    text = fastpose("info", cwd=folder).stdout
    assert "fused kernels" in text and "of one: fastpose info --model NAME" in text
    assert report["native module"] == "loaded" or report["native module"].startswith("not available: ")


def test_info_tells_of_what_does_not_load(capsys, monkeypatch):
    """OpenCV needs libraries that slim containers lack; without them `info` is what one asks."""
    message = "libGL.so.1: cannot open shared object file: No such file or directory"

    class NoOpenCV:
        def find_spec(self, name, path=None, target=None):
            if name == "cv2":
                raise ImportError(message)

    monkeypatch.setattr(sys, "meta_path", [NoOpenCV(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.setattr("fastpose.ops._backend.LOADED", False)
    monkeypatch.setattr("fastpose.ops._backend.WHY_NOT", "a test")
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["opencv"] == f"cannot be loaded: {message}" and "hog detector" not in report
    for device in ("cpu", "cuda"):
        assert report[f"ops on {device}"]["run_plan"] == "not there"
        assert report[f"ops on {device}"]["oks_nms"] == "reference"
    assert main(["predict", "photo.jpg"]) == 2
    assert "on Debian and Ubuntu, apt-get install libgl1 libglib2.0-0" in capsys.readouterr().err


@needs_kernels
def test_info_of_one_network(capsys, monkeypatch):
    assert main(["info", "--model", "mobileposenet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["optimised"] is True and report["instructions"] > 50 and report["input size"] == [256, 192]

    def refuse(model, size):
        raise NotOptimizable("aten.sin is not in the table of patterns")

    monkeypatch.setattr("fastpose.info.optimize", refuse)
    assert main(["info", "--model", "mobileposenet"]) == 0
    text = capsys.readouterr().out
    assert "256x192" in text and "aten.sin is not in the table" in text and "layer by layer" in text
    assert main(["info", "--model", "mobileposnet"]) == 2
    assert "did you mean mobileposenet" in capsys.readouterr().err


def test_export_of_weights(tmp_path, capsys):
    network, source, target = create_model("lite_hrnet_18", num_keypoints=17), tmp_path / "w.pth", tmp_path / "w16.st"
    torch.save(network.state_dict(), source)
    arguments = ["export", "--format", "safetensors", "--model", "auto", "--weights", str(source), str(target)]
    assert main(arguments) == 0
    info = read_info(target)
    assert (info.model, info.num_keypoints, info.skeleton) == ("lite_hrnet_18", 17, "coco17")
    assert target.stat().st_size < 0.6 * source.stat().st_size
    state, again = network.state_dict(), create_model("auto", weights=target).state_dict()
    assert all(torch.equal(again[k], v.half().float() if v.is_floating_point() else v) for k, v in state.items())
    assert main([*arguments, "--fused"]) == 2
    key = next(k for k in state if k.endswith("running_var"))
    torch.save(state | {key: state[key] + 1e6}, source)
    target.unlink()
    assert main(arguments) == 2 and not target.exists()
    assert f"{key} has numbers that float16 cannot hold, up to 1e+06" in capsys.readouterr().err


def test_export_of_weights_with_what_they_do_not_tell(tmp_path, capsys):
    """Given once, it need not be given wherever the file is used."""
    weights, target = tmp_path / "w.pth", tmp_path / "w.safetensors"
    torch.save(create_model("lite_hrnet_18", num_keypoints=17).state_dict(), weights)
    arguments = ["export", "--format", "safetensors", "--weights", str(weights), str(target)]
    given = ["--codec", "dark", "--no-flip-shift", "--input-size", "384", "288", "--padding", "1.5"]
    for option, message in (
        (["--codec", "associative"], "lite_hrnet_18 is a top-down network"),
        (["--input-size", "100", "96"], "positive multiples of 32, got (100, 96)"),
        (["--padding", "-1"], "padding must be positive and finite, got -1"),
        (["--codec", "msr"], "'msr'"),
    ):
        assert main([*arguments, *option]) == 2 and not target.exists()
        assert message in capsys.readouterr().err
    assert main([*arguments, *given]) == 0
    pose = PoseEstimator(weights=target)
    other = PoseEstimator(weights=weights, codec=DarkHeatmapCodec(flip_shift=0), input_size=(384, 288), padding=1.5)
    assert (pose.info.codec, pose.info.input_size, pose.info.padding) == (other.info.codec, (384, 288), 1.5)
    assert pose.info == other.info


def test_export_of_weights_with_keypoints_of_ones_own(tmp_path, capsys):
    weights, target = tmp_path / "w.pth", tmp_path / "w.safetensors"
    torch.save(create_model("lite_hrnet_18", num_keypoints=4).state_dict(), weights)
    (tmp_path / "mouse.toml").write_text('names = ["snout", "left_ear", "right_ear", "tail"]')
    arguments = ["export", "--format", "safetensors", "--weights", str(weights), str(target)]
    assert main(arguments) == 2 and "have 4 keypoints, but do not say which" in capsys.readouterr().err
    assert main([*arguments, "--skeleton", "lsp14"]) == 2
    assert "skeleton 'lsp14' has 14 keypoints, the weights have 4" in capsys.readouterr().err
    assert main([*arguments, "--skeleton", str(tmp_path / "mouse.toml")]) == 0
    skeleton = PoseEstimator(weights=target).skeleton
    assert skeleton.names == ("snout", "left_ear", "right_ear", "tail") and skeleton.flip_pairs == ((1, 2),)
    assert main(["export", "--format", "safetensors", "--skeleton", "lsp14", str(tmp_path / "no.safetensors")]) == 2
    assert "--skeleton: " in capsys.readouterr().err and not (tmp_path / "no.safetensors").exists()
    assert main(["export", "--skeleton", "lsp14", str(tmp_path / "no.pt")]) == 2
    assert "--skeleton is about weights" in capsys.readouterr().err


def test_export_of_what_is_found_of_the_flip_test(tmp_path, capsys):
    """It can be recommended or not for all weights, those that have come to a recommendation already included."""
    before = PoseEstimator("lite_csw_hrnet").info
    for flip_test, option in ((False, "--no-flip-test"), (True, "--flip-test")):
        target = tmp_path / f"{flip_test}.safetensors"
        arguments = ["export", "--format", "safetensors", "--model", "lite_csw_hrnet", str(target)]
        assert main([*arguments, option]) == 0
        assert PoseEstimator(weights=target).info == dataclasses.replace(before, flip_test=flip_test)
        assert PoseEstimator(weights=target).flip_test is flip_test
        assert PoseEstimator(weights=target, flip_test=not flip_test).flip_test is not flip_test
    assert main(["export", "--no-flip-test", str(tmp_path / "no.pt")]) == 2
    assert "--flip-test is about weights" in capsys.readouterr().err and not (tmp_path / "no.pt").exists()


def test_export_of_weights_in_8_bits(tmp_path, capsys):
    network, source, target = create_model("mobileposenet"), tmp_path / "w.pth", tmp_path / "w8.safetensors"
    with torch.no_grad():
        network.head.weight[3] = 0  # nothing to scale
    torch.save(network.state_dict(), source)
    arguments = ["export", "--model", "mobileposenet", "--weights", str(source), "--bits", "8", str(target)]
    assert main(arguments) == 2 and "--bits is about weights: --format safetensors" in capsys.readouterr().err
    assert main([*arguments, "--format", "safetensors"]) == 0
    assert target.stat().st_size < 0.31 * source.stat().st_size
    state, again = network.state_dict(), create_model("auto", weights=target).state_dict()
    for key, value in state.items():
        if value.dim() == 4 and value.shape[1] > 1:
            step = value.abs().amax((1, 2, 3), keepdim=True) / 127
            assert ((again[key] - value).abs() <= 0.501 * step).all() and not torch.equal(again[key], value)
        elif value.is_floating_point():
            assert torch.equal(again[key], value.half().float())
    tensors = load_file(target)
    tensors["none.weight:scale"] = tensors.pop("head.weight:scale")
    save_file(tensors, target, safe_open(target, "pt").metadata())
    with pytest.raises(ValueError, match="damaged: 'none.weight:scale' belongs to no tensor of 17 rows"):
        create_model("auto", weights=target)


def test_predict_with_a_checkpoint_of_others(tmp_path, photo):
    """What the file does not tell can be said, as to the estimator."""
    weights, results = tmp_path / "w.pth", tmp_path / "poses.json"
    torch.save(create_model("mobileposenet", num_keypoints=14).state_dict(), weights)
    cv2.imwrite(str(tmp_path / "a.png"), photo)
    arguments = ["predict", str(tmp_path / "a.png"), "--weights", str(weights), "--detector", "none", "--quiet"]
    arguments += ["--output", str(tmp_path / "drawn"), "--json", str(results), "--skeleton", "lsp14"]
    found = []
    for size in (64, 96):
        assert main([*arguments, "--codec", "udp", "--input-size", str(size), "64", "--padding", "1.5"]) == 0
        found.append(np.array(json.loads(results.read_text())["annotations"][0]["keypoints"]).reshape(14, 3))
        settings = {"input_size": (size, 64), "padding": 1.5, "codec": "udp", "skeleton": "lsp14"}
        expected = PoseEstimator("mobileposenet", weights, detector="none", **settings)(tmp_path / "a.png")
        assert np.abs(found[-1][:, :2] - expected.keypoints[0]).max() < 0.01
    assert np.abs(found[0] - found[1]).max() > 1
    assert main([*arguments, "--padding", "-1"]) == 2


def test_export_of_a_checkpoint_of_others(tmp_path):
    torch.save(create_model("mobileposenet", num_keypoints=13).state_dict(), tmp_path / "w.pth")
    assert main(["export", "--model", "auto", "--weights", str(tmp_path / "w.pth"), str(tmp_path / "model.pt")]) == 0
    with torch.no_grad():
        assert torch.jit.load(tmp_path / "model.pt")(torch.zeros(1, 3, 64, 64)).shape == (1, 13, 16, 16)


@needs_kernels
def test_export_with_rounded_products(folder, capsys):
    for precision in ("bfloat16", "int8"):
        file = folder / f"{precision}.pt"
        assert main(["export", "--fused", "--precision", precision, "--input-size", "64", "64", str(file)]) == 0
        assert 1e-4 < float(capsys.readouterr().out.partition("largest difference ")[2].split()[0]) < 0.1
        assert torch.jit.load(file)(torch.zeros(1, 3, 64, 96)).shape == (1, 14, 16, 24)
    file = folder / "split.pt"
    assert main(["export", "--fused", "--precision", "bfloat16x3", "--input-size", "64", "64", str(file)]) == 0
    assert 1e-7 < float(capsys.readouterr().out.partition("largest difference ")[2].split()[0]) < 1e-4
    assert main(["export", "--precision", "int8", str(folder / "no.pt")]) == 2
    assert "--precision is about --fused" in capsys.readouterr().err
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.GELU())
    with pytest.raises(ExportError, match="no precision 'int8': Sequential: aten.gelu"):
        export_torchscript(model, folder / "no.pt", (64, 64), fused=True, precision="int8")
    with pytest.raises(ExportError, match="precision 'int8' is one of fastpose's kernels"):
        export_torchscript(model, folder / "no.pt", (64, 64), precision="int8")
    assert not (folder / "no.pt").exists()


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_kernels), False])
def test_export_of_keypoints(folder, capsys, fused):
    file = folder / "keypoints.pt"
    assert main(["export", "--keypoints", str(file), *(["--fused"] if fused else [])]) == 0
    said = capsys.readouterr().out
    assert "uint8 RGB crops [B, 3, 160, 160] -> keypoints [B, K, 2] in crop pixels" in said
    assert 'crop_matrix(box, (160, 160), 1.1, convention="fastpose")' in said
    pose = PoseEstimator(flip_test=False, detector="none", optimize=fused)
    photo = cv2.imread(str(folder / "in" / "0.jpg"))[..., ::-1]
    box = (20, 10, 250, 220)
    matrix = crop_matrix(np.array(box), (160, 160), pose.info.padding)
    crop = torch.from_numpy(warp_crop(photo, matrix, (160, 160))).permute(2, 0, 1)[None]
    torch.save(crop, folder / "crop.pt")
    code = (
        "import torch; torch.save(torch.jit.load('keypoints.pt')(torch.load('crop.pt').repeat(5, 1, 1, 1)), 'out.pt')"
    )
    code = ("import fastpose; " if fused else "") + code + "; import sys; print('fastpose' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(fused)  # without kernels torch alone will do
    points, scores = torch.load(folder / "out.pt")
    expected = pose(photo, boxes=[box])
    assert points.shape == (5, 14, 2) and torch.equal(points[0], points[4])
    assert np.abs(apply_affine(invert_affine(matrix), points[0].double().numpy()) - expected.keypoints[0]).max() < 0.01
    assert np.abs(scores[3].numpy() - expected.keypoint_scores[0]).max() < 1e-3
    program = torch.jit.load(file)
    for wrong, message in (
        (crop.float(), "crops must be uint8, got another dtype"),
        (crop[:, :, :96], r"crops must be \[B, 3, 160, 160\], got \[1, 3, 96, 160\]"),
    ):
        with pytest.raises(Exception, match=message):
            program(wrong)
    assert program(crop[:0])[0].shape == (0, 14, 2)


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@needs_onnx
def test_export_to_onnx(tmp_path, capsys):
    file, model = tmp_path / "a.onnx", create_model("mobileposenet", weights="default")
    assert main(["export", "--format", "onnx", str(file)]) == 0
    assert "any batch of 160x160, compared by ONNX Runtime; largest difference" in capsys.readouterr().out
    x = torch.randn(5, 3, 160, 160)
    with torch.no_grad():
        expected = model.eval()(x)
    (got,) = run_onnx(file, x)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]  # weights included
    assert main(["export", "--format", "onnx", "--fused", str(file)]) == 2
    assert "--fused is about TorchScript" in capsys.readouterr().err


@needs_onnx
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    class Wrong(onnxruntime.InferenceSession):
        kind = ""

        def run(self, names, inputs):
            outputs = super().run(names, inputs)
            if self.kind == "scores":
                outputs[1] = outputs[1] + 0.1
            elif self.kind == "heatmaps":
                outputs[0] = outputs[0] + 3
            else:
                outputs[0][:, 5] = np.nan if self.kind == "nan" else 7
            return outputs

    model = create_model("mobileposenet", weights="default")
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Wrong)
        for kind, codec, message in (
            ("heatmaps", None, "outputs differ by .* at most 0.0001 is allowed"),
            ("scores", get_codec("msra"), "outputs differ by .* at most 0.001 is allowed"),
            ("one keypoint", get_codec("msra"), "1 of 14 exported keypoints are more than 0.01 pixels"),
            ("nan", get_codec("msra"), "1 of 14 exported keypoints are more than 0.01 pixels"),
        ):
            Wrong.kind = kind
            with pytest.raises(ExportError, match=message):
                export_onnx(model, tmp_path / "a.onnx", (64, 64), codec)
    model.head.bias.data[2] = torch.nan
    with pytest.raises(ExportError, match="outputs differ by nan"):
        export_onnx(model, tmp_path / "a.onnx", (64, 64))
    model.forward = lambda x: torch.special.bessel_j0(x)
    with pytest.raises(ExportError, match="a.onnx: not exported: "):
        export_onnx(model, tmp_path / "a.onnx", (64, 64))
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs the extra 'onnx', pip install onnx onnxscript onnxruntime"):
        export_onnx(model, tmp_path / "a.onnx", (64, 64))


@needs_onnx
@pytest.mark.slow
def test_a_bottom_up_network_in_onnx(tmp_path):
    model = create_model("lightweight_hrnet_448", r=-8)
    export_onnx(model, tmp_path / "a.onnx", (64, 96))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for got, expected in zip(run_onnx(tmp_path / "a.onnx", x), model.eval()(x), strict=True):
            assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("format", ["torchscript", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("codec", ["softmax", "msra", "dark", "udp"])
def test_every_decoder_is_exported(tmp_path, codec, format):
    model, decoder = create_model("mobileposenet", weights="default"), get_codec(codec)
    write = export_torchscript if format == "torchscript" else export_onnx
    read = run_onnx if format == "onnx" else lambda path, x: torch.jit.load(path)(x)
    for i in (0, 1):  # decoding has no constants of the numbers or the batch it was traced with
        model.head.weight.data *= 1 - 2 * i
        write(model, tmp_path / f"{i}.pt", (64, 96), codec=decoder)
    crops = torch.randint(0, 256, (7, 3, 64, 96), dtype=torch.uint8)
    points, scores = read(tmp_path / "1.pt", crops)
    expected, expected_scores = estimate_crops(model, crops, decoder, None)
    # on noise a rounding in the heatmap can move UDP's Newton step by tenths of a pixel: there not all of them
    off = (points - expected).abs().quantile(0.95 if codec == "udp" else 1.0)
    assert off < 0.01 and (scores - expected_scores).abs().max() < 1e-3
    assert (points - read(tmp_path / "0.pt", crops)[0]).abs().max() > 1

    if format == "torchscript":
        model.head.bias.data[2] = torch.nan
        with pytest.raises(ExportError, match="differ by nan of their maximum"):
            write(model, tmp_path / "nan.pt", (64, 96), codec=decoder)
        assert not (tmp_path / "nan.pt").exists()


def test_export_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for options, message in (
        (["--input-size", "-32", "-32", str(tmp_path / "e.pt")], "takes positive multiples of 16, got -32 -32"),
        ([str(tmp_path / "file" / "e.pt")], "file"),
        (["--keypoints", "--codec", "associative", str(tmp_path / "e.pt")], "mobileposenet is a top-down network, for"),
    ):
        assert main(["export", *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastpose: error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "e.pt").exists()


def test_the_output_is_made_before_the_work(tmp_path, photo, capsys, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.png"), photo)
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr("fastpose.predict.estimate_files", None)
    assert main(["predict", str(tmp_path / "a.png"), "--output", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"


def test_file_names_that_are_not_utf8(tmp_path, photo):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    data = cv2.imencode(".png", photo)[1].tobytes()
    with open(name, "wb") as file:
        file.write(data)
    command = [sys.executable, "-m", "fastpose", "predict", str(tmp_path), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*command, "--detector", "none"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "caf?.png: 1 person" in done.stdout + done.stderr, done.stderr
    assert len(json.loads((tmp_path / "out" / "poses.json").read_text())["annotations"]) == 1


def test_keypoints_of_what_cannot_be_exported(tmp_path, capsys):
    name, weights = "lightweight_hrnet_448", tmp_path / "w.pth"
    torch.save(create_model(name).state_dict(), weights)
    assert main(["export", "--keypoints", "--model", name, "--weights", str(weights), str(tmp_path / "k.pt")]) == 2
    assert f"{name} is bottom-up; grouping keypoints into people cannot be exported" in capsys.readouterr().err
    of_others = ["export", "--format", "safetensors", "--model", name, "--weights", str(weights)]
    assert main([*of_others, "--padding", "1.1", str(tmp_path / "k.pt")]) == 2
    assert f"padding: {name} sees whole images, not crops; got 1.1" in capsys.readouterr().err
    assert main(["export", "--keypoints", "--format", "safetensors", str(tmp_path / "k.pt")]) == 2
    assert "--keypoints is about programs, not weights" in capsys.readouterr().err
    for option in (["--codec", "udp"], ["--input-size", "64", "64"], ["--padding", "1.1"]):
        assert main(["export", "--format", "safetensors", *option, str(tmp_path / "k.pt")]) == 2
        assert f"{option[0]}: " in (said := capsys.readouterr().err) and "mobileposenet_lspet" in said
        assert "has its own, which can be changed where it is used only" in said
    assert main(["export", "--padding", "1.1", str(tmp_path / "k.pt")]) == 2
    assert "--padding is about weights" in capsys.readouterr().err
    assert main(["export", "--codec", "udp", str(tmp_path / "k.pt")]) == 2
    assert "--codec is about --keypoints" in capsys.readouterr().err
    assert not (tmp_path / "k.pt").exists()


def test_keypoints_of_weights_of_others(tmp_path, capsys, monkeypatch):
    weights, target = tmp_path / "w.pth", tmp_path / "k.pt"
    torch.save(create_model("mobileposenet", num_keypoints=5).state_dict(), weights)
    arguments = ["export", "--keypoints", "--weights", str(weights), "--input-size", "64", "96", str(target)]
    assert main(arguments) == 0 and 'convention="hrnet"' in capsys.readouterr().out  # whatever they are called
    assert main([*arguments, "--codec", "udp"]) == 0
    assert 'crop_matrix(box, (64, 96), 1.25, convention="udp")' in capsys.readouterr().out
    points, _ = torch.jit.load(target)(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert points.shape == (2, 5, 2)
    target.unlink()
    monkeypatch.setattr("fastpose.export.keypoints_of_crops", lambda *a: (torch.zeros(1, 5, 2) + 9, torch.zeros(1, 5)))
    assert main([*arguments, "--codec", "udp"]) == 1
    assert "fastpose: error: " in capsys.readouterr().err and not target.exists()


def test_models_table(tmp_path):
    done = fastpose("models", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    (row,) = [r for r in rows if r["name"] == "mobileposenet"]
    assert row["macs"] == 557_328_992 and row["published"][0]["gflops"] == 0.557
    (line,) = [text for text in models_table(rows).splitlines() if text.startswith("mobileposenet *")]
    assert "1,505,279" in line and "0.557" in line and "AP 66.2 COCO val" in line


def test_validate_data(tmp_path):
    datasets.write_standard_coco(tmp_path / "data")
    done = fastpose("validate-data", "data", "--dataset", "coco", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "coco val: 6 images, 10 people, 0 things wrong" in done.stdout
    (tmp_path / "data" / "val2017" / "002.png").unlink()
    (tmp_path / "data" / "val2017" / "003.png").write_bytes(b"")
    done = fastpose("validate-data", "data", "--dataset", "coco", cwd=tmp_path)
    assert (
        done.returncode == 2 and "image file missing: 1" in done.stdout and "003.png: the file is empty" in done.stdout
    )
    done = fastpose("validate-data", "data", "--dataset", "coco", "--json", "--limit", 3, cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 2 and report["images"] == 3 and report["wrong"] == 2
    assert report["findings"]["image cannot be read"]["count"] == 1
    done = fastpose("validate-data", "data", "--dataset", "coco", "--no-images", "--split", "train", cwd=tmp_path)
    assert done.returncode == 2 and "person_keypoints_train2017.json does not exist" in done.stderr


def test_one_box_alone_is_a_box(tmp_path, photo):
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.png"), photo)
    height, width = photo.shape[:2]
    box, boxes = [0, 0, width, height], tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"a.png": box, "b.png": [box, box]}))
    found = [str(tmp_path / f"{name}.png") for name in "ab"]
    assert main(["predict", *found, "--boxes", str(boxes), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    content = json.loads((tmp_path / "out" / "poses.json").read_text())
    assert [a["image_id"] for a in content["annotations"]] == [1, 2, 2]


def test_programs_and_pipes_are_named_as_what_they_are(tmp_path, photo, capsys):
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "m.pt"))
    cv2.imwrite(str(tmp_path / "a.png"), photo)
    os.mkfifo(tmp_path / "pipe.png")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pth")
    run = ["predict", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    for arguments, message in (
        (
            [*run, "--weights", str(tmp_path / "m.pt")],
            "m.pt is a TorchScript program, for torch.jit.load; expected weights",
        ),
        ([*run, "--weights", str(tmp_path / "numbered.pth")], "numbered.pth holds no state dict"),
        (["predict", str(tmp_path / "pipe.png")], "pipe.png is neither a file nor a folder"),
        ([*run, "--device", "mps"], "device must be 'cpu', 'cuda' or 'cuda:N', got 'mps'"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and "Warning" not in said
