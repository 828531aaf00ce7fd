from __future__ import annotations

import copy
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch

import fastpose
from fastpose import BoxError, ImageError, PoseEstimator, Poses, create_model
from fastpose.checkpoints import DEFAULT_WEIGHTS, read_info, resolve_weights, save_weights
from fastpose.detect import HOG_MISSING, hog_available, make_detector
from fastpose.geometry import crop_matrix, warp_crop
from fastpose.images import find_images, read_image, to_rgb
from fastpose.ops import oks_nms, use_fused
from fastpose.pipeline import OPTIMIZE_AFTER
from fastpose.skeletons import COCO17, LSP14, MPII16, Skeleton, get_skeleton
from tests.conftest import needs_kernels


@pytest.fixture(scope="module")
def estimator() -> PoseEstimator:
    return PoseEstimator(detector="none")


def test_one_image_and_a_list(estimator, photo):
    boxes = np.array([[20, 10, 200, 220], [100.5, 30, 310, 239]])
    poses = estimator(photo, boxes)
    assert isinstance(poses, Poses) and len(poses) == 2
    assert poses.keypoints.shape == (2, 14, 2) and poses.keypoints.dtype == np.float32
    assert poses.keypoint_scores.shape == (2, 14) and poses.image_size == (240, 320)
    assert np.array_equal(poses.boxes, boxes.astype(np.float32)) and poses.skeleton is LSP14
    many = estimator([photo, photo[:100], photo], [boxes, None, boxes[:1]])
    assert [len(p) for p in many] == [2, 1, 1]
    assert np.allclose(many[0].keypoints, poses.keypoints, atol=1e-2)
    assert np.allclose(many[2].keypoints, poses.keypoints[:1], atol=1e-2)
    assert estimator([]) == []


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match=r"device 'cuda:99': torch 2\S+ sees \d+ GPUs"):
        PoseEstimator(device="cuda:99")
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"):
        PoseEstimator(device="gpu")


def test_autocast_and_default_dtype_of_the_caller_do_not_matter(photo):
    boxes = np.array([[20, 10, 200, 220], [25, 12, 198, 222]])
    for optimize in (None, False):
        estimator = PoseEstimator(detector=lambda image: boxes, optimize=optimize)
        expected = estimator(photo)
        with torch.autocast("cpu", torch.bfloat16):
            got = estimator(photo)
        assert np.array_equal(got.keypoints, expected.keypoints) and got.keypoint_scores.dtype == np.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert np.allclose(estimator(photo).keypoints, expected.keypoints, atol=1e-2)
        finally:
            torch.set_default_dtype(torch.float32)


def test_detectors_that_give_tensors_or_tuples(photo):
    boxes = ((20, 10, 200, 220), (5, 5, 150, 230), (60, 20, 310, 239))
    scores = torch.tensor([0.5, 0.9, 0.1], requires_grad=True)
    for result, found in (((torch.tensor(boxes), scores), boxes), (boxes, boxes), (boxes[:1], boxes[:1])):
        poses = PoseEstimator(detector=lambda image, result=result: result, nms="none")(photo)
        assert sorted(map(tuple, poses.boxes.tolist())) == sorted(found)


def test_a_slip_of_the_detector_does_not_cost_the_others(photo):
    good = [20, 10, 200, 220]
    boxes = np.array([[5, 5, 5, 90], good, [np.nan, 0, 9, 9], [900, 900, 950, 990]])
    scores = [0.9, 0.8, 0.7, 0.6]
    for result in ((boxes, scores), boxes):
        poses = PoseEstimator(detector=lambda image, result=result: result)(photo)
        assert poses.boxes.tolist() == [good]
    with pytest.raises(BoxError, match=r"the detector's scores must be finite, got"):
        PoseEstimator(detector=lambda image: (boxes, [0.9, np.nan, 1, 1]))(photo)
    with pytest.raises(BoxError, match=r"the detector's boxes must be \[P, 4\] .*, got \[4, 3\]"):
        PoseEstimator(detector=lambda image: boxes[:, :3])(photo)


def test_saving_the_drawing_on_what_was_given(estimator, photo, tmp_path):
    poses = estimator(photo, [[20, 10, 200, 220]])
    cv2.imwrite(str(tmp_path / "photo.png"), photo[:, :, ::-1])
    for i, image in enumerate(
        (photo, str(tmp_path / "photo.png"), PIL.Image.fromarray(photo), torch.from_numpy(photo))
    ):
        poses.save(tmp_path / f"{i}.png", image)
        assert (read_image(tmp_path / f"{i}.png") == read_image(tmp_path / "0.png")).all()
    with pytest.raises(ValueError, match=r"these poses are of an image of .*, got \(100, "):
        poses.save(tmp_path / "small.png", photo[:100])


def test_deep_pil_images(photo):
    grey = photo[:, :, 0].astype(np.uint16) * 256
    assert (to_rgb(PIL.Image.fromarray(grey), "bgr") == photo[:, :, :1]).all()
    with pytest.raises(ImageError, match="image has no pixels"):
        to_rgb(PIL.Image.new("RGB", (0, 4)), "rgb")


def test_cropping_on_the_device(estimator, photo):
    there = PoseEstimator(detector="none", crop_on_device=True)
    boxes = np.array([[20, 10, 200, 220], [100.5, 30, 310, 239], [5, 5, 30, 40]])
    expected = estimator([photo, photo[:100]], [boxes, None])
    planes = torch.from_numpy(photo).permute(2, 0, 1)
    for image in (photo, torch.from_numpy(photo), planes):
        poses = there([image, photo[:100]], [boxes, None])
        assert [len(p) for p in poses] == [3, 1] and poses[0].image_size == photo.shape[:2]
        for got, wanted in zip(poses, expected, strict=True):
            assert np.median(np.abs(got.keypoints - wanted.keypoints)) < 1
            assert np.allclose(got.keypoint_scores, wanted.keypoint_scores, atol=0.05)
    flipped = PoseEstimator(detector="none", crop_on_device=True, channel_order="bgr")(planes.flip(0), boxes)
    assert np.allclose(flipped.keypoints, poses[0].keypoints, atol=1e-3)
    assert len(there(photo, np.zeros((0, 4)))) == 0
    with pytest.raises(BoxError, match="box 0"):
        there(planes, [[0, 0, np.nan, 4]])
    with pytest.raises(ImageError, match="uint8"):
        there(planes.float(), boxes)


def test_given_boxes_are_all_kept_in_order(estimator, photo):
    box = [20, 10, 200, 220]
    poses = estimator(photo, [box, box, box])
    assert len(poses) == 3 and np.allclose(poses.scores, poses.scores[0])


def test_duplicates_of_a_detector_are_suppressed_per_image(photo):
    def twice(image):
        return np.array([[20, 10, 200, 220], [20, 10, 200, 220], [150, 40, 300, 220]]), np.array([0.5, 0.9, 0.4])

    settings = {"detector": twice, "keypoint_threshold": 0.0}  # nobody is in the picture: scores are low
    for p in PoseEstimator(**settings)([photo, photo]):
        assert len(p) == 2 and p.scores[0] >= p.scores[1]
    assert len(PoseEstimator(**settings, nms="none")(photo)) == 3
    assert len(PoseEstimator(**settings, nms="parallel", nms_threshold=1e-6)(photo)) == 2


def test_images_of_a_batch_are_suppressed_in_one_call(photo, monkeypatch):
    calls = []

    def counted(*args, image_index, **settings):
        calls.append(image_index.tolist())
        return oks_nms(*args, image_index=image_index, **settings)

    monkeypatch.setattr("fastpose.pipeline.oks_nms", counted)
    sizes = iter([2, 0, 1])

    def detect(image):
        return np.array([[20, 10, 200, 220]] * next(sizes)).reshape(-1, 4)

    pose = PoseEstimator(detector=detect, keypoint_threshold=0.0)
    assert [len(poses) for poses in pose([photo, photo, photo])] == [1, 0, 1]
    assert calls == [[0, 0, 2]]


def test_nobody_is_a_normal_answer(photo, tmp_path):
    poses = PoseEstimator(detector=lambda image: [])(photo)
    assert len(poses) == 0 and poses.keypoints.shape == (0, 14, 2) and poses.boxes.shape == (0, 4)
    assert poses.to_coco() == [] and json.loads(poses.to_json())["people"] == []
    assert np.array_equal(poses.draw(photo), photo)
    poses.save(tmp_path / "nobody.json")
    assert len(Poses.empty((5, 6), COCO17)) == 0


def test_inputs_of_every_kind_agree(estimator, photo, tmp_path):
    cv2.imwrite(str(tmp_path / "photo.png"), photo[:, :, ::-1])
    expected = estimator(photo).keypoints
    rgba = np.dstack([photo, np.full(photo.shape[:2], 7, np.uint8)])
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), rgba, photo.astype(np.uint16) * 256 + 9,
                  torch.from_numpy(photo), torch.from_numpy(photo).permute(2, 0, 1)):  # fmt: skip
        assert np.array_equal(estimator(image).keypoints, expected)
    bgr = PoseEstimator(detector="none", channel_order="bgr")
    assert np.array_equal(bgr(photo[:, :, ::-1]).keypoints, expected)
    assert np.array_equal(bgr(tmp_path / "photo.png").keypoints, expected)  # files know their order
    grey = photo[:, :, 0]
    assert np.array_equal(estimator(grey).keypoints, estimator(np.dstack([grey] * 3)).keypoints)
    assert np.array_equal(estimator(grey[:, :, None]).keypoints, estimator(grey).keypoints)
    assert len(estimator(np.zeros((1, 1, 3), np.uint8))) == 1


def test_batch_size_and_flip_test_are_only_about_speed_and_noise(photo):
    boxes = [[10 * i, 5 * i, 150 + 10 * i, 200] for i in range(7)]
    results = [PoseEstimator(detector="none", batch_size=b)(photo, boxes).keypoints for b in (1, 3, 32)]
    assert np.allclose(results[0], results[2], atol=1e-2) and np.allclose(results[1], results[2], atol=1e-2)
    plain, flipped = (PoseEstimator(detector="none", flip_test=f) for f in (False, True))
    # with the flip test an image and its mirror image give mirrored poses, up to the rounding of the crop's warp. On a
    # real person: on noise, two equally high maxima of a heatmap could change places.
    person = skimage.data.astronaut()
    height, width = person.shape[:2]
    box = [0, 0, width - 1, height - 1]  # symmetric: integer coordinates are pixel centres
    a, b = flipped(person, box).keypoints[0], flipped(person[:, ::-1], box).keypoints[0]
    sure = np.argsort(flipped(person, box).keypoint_scores[0])[-4:]
    order = LSP14.flip_indices
    b = np.column_stack([width - 1 - b[order, 0], b[order, 1]])
    assert np.abs(a - b)[sure].max() < 0.01 * width
    assert plain(photo).keypoints.shape == (1, 14, 2)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[10, 10, float("nan"), 20]], "box 0 .* is not finite"),
        ([[0, 0, 5, 5], [50, 10, 20, 90]], "box 1 .* is inverted or empty"),
        ([[400, 10, 500, 90]], "lies outside the image of 320 x 240 pixels"),
        ([[1, 2, 3]], r"must be \[P, 4\] \(x1, y1, x2, y2\), got \[1, 3\]"),
        ("a string", "must be numbers"),
    ],
)
def test_bad_boxes(estimator, photo, boxes, message):
    with pytest.raises(BoxError, match=message):
        estimator(photo, boxes)


def test_bad_images_and_settings(estimator, photo):
    for image, message in (
        (np.zeros((4, 4, 2), np.uint8), r"got \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 3)), "must be uint8 .* got float64"),
        (None, "got NoneType"),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), "must be uint8 .* got torch.bfloat16"),
    ):
        with pytest.raises(ImageError, match=message):
            estimator(image)
    with pytest.raises(BoxError, match="one entry per image, 2, got 1"):
        estimator([photo, photo], [None])
    with pytest.raises(BoxError, match="must be a list of one entry per image, got 3"):
        estimator([photo], 3)
    with pytest.raises(ValueError, match="stream takes several images, in a list for example, got a Image"):
        estimator.stream(PIL.Image.fromarray(photo))
    for settings, message in (
        ({"detector": "yolo"}, "detector must be"),
        ({"nms": "fast"}, "nms must be"),
        ({"channel_order": "gbr"}, "channel_order must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"model": "mobile"}, "unknown model 'mobile'"),
        ({"padding": float("inf")}, "padding must be positive and finite, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            PoseEstimator(**settings)


def test_results_as_coco_json_and_pictures(estimator, photo, tmp_path):
    poses = estimator(photo, [[20, 10, 200, 220]])
    (coco,) = poses.to_coco(image_id=7)
    assert coco["image_id"] == 7 and coco["category_id"] == 1 and len(coco["keypoints"]) == 42
    assert coco["bbox"] == [20, 10, 180, 210]
    person = json.loads(poses.to_json())["people"][0]
    assert np.allclose(person["keypoints"], poses.keypoints[0], atol=1e-3)
    drawn = poses.draw(photo, threshold=0.0)
    assert drawn.shape == photo.shape and not np.array_equal(drawn, photo)
    poses.save(tmp_path / "out.png", photo)
    assert np.array_equal(read_image(tmp_path / "out.png"), poses.draw(photo))
    with pytest.raises(ValueError, match="drawing needs the image"):
        poses.save(tmp_path / "out.png")
    with pytest.raises(ValueError, match="cannot write images with suffix '.xyz'"):
        poses.save(tmp_path / "out.xyz", photo)
    assert poses[0].keypoints.shape == (1, 14, 2) and len(poses[:0]) == 0
    with pytest.raises(IndexError):
        poses[1]


def test_drawing_survives_absurd_positions(photo):
    points = np.zeros((1, 14, 2))
    points[0, 0], points[0, 1] = np.nan, 1e30
    points[0, 2] = -1e30
    poses = Poses(points, np.ones((1, 14)), np.array([[0, 0, 9, 9]]), np.ones(1), (240, 320), LSP14)
    assert poses.draw(photo).shape == photo.shape
    huge = np.array([[-3e38, -3e38, 3e38, 3e38]], np.float32)
    assert replace(poses, boxes=huge, track_ids=np.array([1])).draw(photo).shape == photo.shape


@pytest.mark.skipif(not hog_available(), reason="this OpenCV has no HOG detector")
def test_copies_and_other_processes(photo):
    first = PoseEstimator()
    expected = first(photo)
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert np.array_equal(other(photo).keypoints, expected.keypoints)


def test_names_as_long_as_the_system_has_them(estimator, photo, tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    estimator(photo).save(path, photo)
    assert path.is_file()


def test_detectors(photo, monkeypatch):
    whole, notice = make_detector("none")
    assert whole(photo)[0].tolist() == [[0, 0, 320, 240]] and notice == ""
    if hog_available():
        boxes, scores = make_detector("hog")[0](photo)
        assert boxes.shape == (len(scores), 4)
        assert make_detector("auto")[1] == ""
    else:
        with pytest.raises(ImportError, match="opencv-contrib-python"):
            make_detector("hog")
        detect, notice = make_detector("auto")
        assert HOG_MISSING in notice and detect(photo)[0].tolist() == [[0, 0, 320, 240]]


def test_what_hog_finds_becomes_boxes_of_people(monkeypatch):
    """Its window has margins, its weights are distances, and large images are reduced for it."""

    class Hog:
        seen: ClassVar[list[tuple[int, int]]] = []

        def detectMultiScale(self, image, **settings):
            self.seen.append(image.shape[:2])
            return np.array([[100, 40, 100, 200], [-50, 300, 100, 200]]), np.array([[1.0], [-0.5]])

    monkeypatch.setattr("fastpose.detect._hog", Hog)
    detect = make_detector("hog")[0]
    boxes, scores = detect(np.zeros((400, 300, 3), np.uint8))
    assert np.allclose(boxes, [[115, 56, 185, 224], [0, 316, 35, 400]]) and boxes.dtype == np.float32
    assert scores.tolist() == [0.5, 0.0]
    boxes, _ = detect(np.zeros((1600, 900, 3), np.uint8))  # twice as large as it may be
    assert np.allclose(boxes, [[230, 112, 370, 448], [0, 632, 70, 968]])
    assert Hog.seen == [(400, 300), (800, 450)]
    for shape in ((127, 300, 3), (400, 63, 3), (9000, 100, 3)):  # less than a window, the last once it is reduced
        boxes, scores = detect(np.zeros(shape, np.uint8))
        assert boxes.shape == (0, 4) and scores.shape == (0,)
    assert len(Hog.seen) == 2


def test_the_network_is_that_of_the_weights(tmp_path):
    assert PoseEstimator().model_name == PoseEstimator("auto").model_name == "mobileposenet"
    path = tmp_path / "w.pth"
    torch.save(create_model("lite_hrnet_18").state_dict(), path)
    assert PoseEstimator(weights=path).model_name == "lite_hrnet_18"
    assert PoseEstimator(weights=resolve_weights("default", "hr_litenet")).model_name == "hr_litenet"
    with pytest.raises(ValueError, match="it is a 'lite_hrnet_18' with num_keypoints=17"):
        PoseEstimator("mobileposenet", path)
    assert create_model("auto", weights="default").head.weight.shape[0] == 14


def test_auto_takes_the_whole_image_or_the_detected_people_whichever_fits(photo, monkeypatch):
    pose = PoseEstimator(detector="none", nms="none")
    pose.try_whole_image = True
    pose.detector = lambda image: (np.array([[5.0, 5, 60, 90], [100, 20, 200, 230]]), np.array([0.3, 0.4]))
    fits = {3: [0.1, 0.2, 0.3], 1: [0.5]}

    def forward(crops):
        return [(np.zeros((14, 2), np.float32), np.full(14, fit, np.float32)) for fit in fits[len(crops)]]

    monkeypatch.setattr(pose, "_forward", forward)
    assert pose(photo).boxes.tolist() == [[0, 0, 320, 240]]
    fits[3] = [0.1, 0.4, 0.3]
    assert pose(photo).boxes.tolist() == [[100, 20, 200, 230], [5, 5, 60, 90]]
    pose.detector = lambda image: []
    assert pose(photo).boxes.tolist() == [[0, 0, 320, 240]]
    assert pose(photo, [[1, 2, 30, 40]]).boxes.tolist() == [[1, 2, 30, 40]]


def test_skeletons():
    for skeleton in (COCO17, LSP14, MPII16):
        order = skeleton.flip_indices
        assert [order[i] for i in order] == list(range(skeleton.num_keypoints))
        for i, name in enumerate(skeleton.names):
            swapped = name.replace("left", "?").replace("right", "left").replace("?", "right")
            assert skeleton.names[order[i]] == swapped
        assert get_skeleton(skeleton.name) is skeleton
    with pytest.raises(ValueError, match="unknown skeleton 'cat'"):
        get_skeleton("cat")
    with pytest.raises(ValueError, match="expected 2 sigmas"):
        Skeleton("x", ("a", "b"), (), (), (0.1,))
    with pytest.raises(ValueError, match="flip_pairs must hold two different indices below 2"):
        Skeleton("x", ("a", "b"), (), ((0, 2),), (0.1, 0.1))


RELEASED = {"le_hrnet": "le_hrnet_lspet.safetensors"}
BEST_ALONE = ("mobileposenet",)  # to it the flip test gives next to nothing


@pytest.mark.parametrize("model", [*DEFAULT_WEIGHTS, *RELEASED])
def test_shipped_weights(model):
    name = "default" if model in DEFAULT_WEIGHTS else Path(__file__).parent.parent / "release" / RELEASED[model]
    assert resolve_weights(name, model).with_suffix(".md").is_file()
    assert sum(resolve_weights("default", name).stat().st_size for name in DEFAULT_WEIGHTS) < 15_500_000
    pose = PoseEstimator(model, name, detector="none")
    assert pose.info.model == model and pose.skeleton is LSP14
    assert pose.flip_test == (model not in BEST_ALONE)
    poses = pose(skimage.data.astronaut())
    # of a portrait the head at least is sure, and above the neck
    neck, head = (LSP14.names.index(name) for name in ("neck", "head_top"))
    assert 0.2 < float(poses.scores[0]) <= 1 and poses.keypoints[0, head, 1] < poses.keypoints[0, neck, 1]


def test_weights_files(tmp_path):
    path = resolve_weights("default", "mobileposenet")
    info = read_info(path)
    assert info.model == "mobileposenet" and info.num_keypoints == 14 and path.stat().st_size < 3_500_000
    model = fastpose.create_model("mobileposenet", weights="default")
    assert not model.training and model.head.weight.dtype == torch.float32
    state = {k: v for k, v in model.state_dict().items() if k != "head.bias"}
    state["extra"] = torch.zeros(1)
    save_weights(tmp_path / "odd.safetensors", state, info)
    with pytest.raises(ValueError, match="do not fit this MobilePoseNet: missing head.bias; unexpected extra"):
        fastpose.create_model("mobileposenet", weights=tmp_path / "odd.safetensors")
    other = fastpose.create_model("mobileposenet", num_keypoints=17)
    before = other.head.weight.clone()
    with pytest.raises(ValueError, match=r"head.weight: expected \[17, 160, 1, 1\], got \[14, 160, 1, 1\]"):
        fastpose.load_checkpoint(other, path)
    assert torch.equal(other.head.weight, before)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="text.safetensors is neither a safetensors file nor"):
        PoseEstimator(weights=tmp_path / "text.safetensors")


def test_image_files_that_cannot_be_used(tmp_path, photo):
    good = tmp_path / "good.jpg"
    cv2.imwrite(str(good), photo)
    data = good.read_bytes()
    for name, content, message in (
        ("empty.jpg", b"", "the file is empty"),
        ("text.jpg", b"not an image at all", "not an image that OpenCV can decode"),
        ("cut.jpg", data[: len(data) // 2], "truncated JPEG"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: {message}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    assert find_images(str(tmp_path / "g*.jpg")) == [good]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match="the folder has no image files"):
        find_images(str(tmp_path / "folder"))
    with pytest.raises(ImageError, match="no file matches"):
        find_images(str(tmp_path / "x*.jpg"))


def test_a_pil_image_that_turns_out_to_be_cut(tmp_path, photo, estimator):
    pil = pytest.importorskip("PIL.Image")
    cv2.imwrite(str(tmp_path / "good.png"), photo)
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:3000])
    bad, good = estimator.stream([pil.open(tmp_path / "cut.png"), photo])
    assert isinstance(bad, ImageError) and "cut.png' cannot be decoded: " in str(bad) and len(good)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_grey_alpha_and_16_bit_files(tmp_path, photo, suffix):
    for image in (photo[:, :, 0], np.dstack([photo, photo[:, :, 0]]), photo.astype(np.uint16) * 257):
        cv2.imwrite(str(tmp_path / f"image{suffix}"), image)
        read = read_image(tmp_path / f"image{suffix}")
        assert read.shape == photo.shape and read.dtype == np.uint8


@needs_kernels
def test_networks_that_cannot_be_optimised_run_as_they_are_and_say_why(photo, monkeypatch):
    def refuse(model, size, precision):
        raise fastpose.NotOptimizable("aten.sin is not in the table of patterns")

    monkeypatch.setattr("fastpose.pipeline.fastpose_optimize", refuse)
    pose = PoseEstimator(detector="none", flip_test=False)
    assert pose.not_optimized == ""
    expected = pose(photo).keypoints
    pose.prepare(10_000)
    assert pose.not_optimized == "aten.sin is not in the table of patterns"
    assert np.array_equal(pose(photo).keypoints, expected)
    assert "optimize=False" in PoseEstimator(detector="none", optimize=False).not_optimized


@needs_kernels
def test_networks_put_in_place_by_the_caller_run_whatever_they_are(photo):
    box = [[20.0, 10.0, 210.0, 300.0]]
    for change in (torch.jit.script, Deciding, lambda model: model.double().float()):
        pose = PoseEstimator(detector="none", flip_test=False)
        expected = pose(photo, boxes=box).keypoints
        pose.model = change(pose.model)
        pose.prepare(10_000)
        assert (pose.not_optimized == "") == isinstance(pose.model, fastpose.Optimized)
        assert np.abs(pose(photo, boxes=box).keypoints - expected).max() < 0.1


class Deciding(torch.nn.Module):
    """Looks at its numbers, which cannot be exported."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if bool(x.isfinite().all()) else x


@needs_kernels
def test_optimised_after_some_crops_with_the_same_result(photo):
    box = [20, 10, 200, 220]
    plain, lazy, eager = (PoseEstimator(detector="none", optimize=o) for o in (False, None, True))
    expected = plain(photo, box).keypoints
    assert isinstance(eager.model, fastpose.Optimized) and not isinstance(plain.model, fastpose.Optimized)
    assert np.allclose(eager(photo, box).keypoints, expected, atol=1e-2)
    many = lazy(photo, [box] * (OPTIMIZE_AFTER + 1)).keypoints
    assert isinstance(lazy.model, fastpose.Optimized) and not isinstance(plain.model, fastpose.Optimized)
    assert lazy.not_optimized == eager.not_optimized == ""
    assert np.allclose(many, expected, atol=1e-2)


def test_reduced_precision_moves_keypoints_a_little(photo):
    with pytest.raises(ValueError, match="needs fastpose.optimize: optimize=False switches it off"):
        PoseEstimator(detector="none", optimize=False, precision="bfloat16")
    if not use_fused():
        with pytest.raises(ValueError, match="precision 'bfloat16' needs fastpose.optimize: "):
            PoseEstimator(detector="none", precision="bfloat16")
        return
    names = "auto, float32, bfloat16x3, bfloat16, int8"
    with pytest.raises(ValueError, match=f"precision must be one of {names}, got 'half'"):
        PoseEstimator(detector="none", precision="half")
    exact = PoseEstimator(detector="none", optimize=True)(photo).keypoints
    split = PoseEstimator(detector="none", precision="bfloat16x3")
    assert isinstance(split.model, fastpose.Optimized) and np.allclose(split(photo).keypoints, exact, atol=1e-2)
    for precision in ("bfloat16", "int8"):
        moved = np.abs(PoseEstimator(detector="none", precision=precision)(photo).keypoints - exact)
        assert moved.max() > 0 and np.median(moved) < 0.5  # an uncertain keypoint may jump


@needs_kernels
def test_estimators_of_two_threads_optimise_at_once():
    """torch.export itself is not made for that."""
    estimators = [PoseEstimator("mobileposenet", detector="none") for _ in range(2)]
    threads = [threading.Thread(target=e.prepare, args=(1000,)) for e in estimators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.not_optimized for e in estimators] == ["", ""]
    assert [type(e.model).__name__ for e in estimators] == ["Optimized", "Optimized"]


def test_without_a_detector_every_image_is_estimated_once(photo, monkeypatch):
    monkeypatch.setattr("fastpose.detect.hog_available", lambda: False)
    monkeypatch.setattr("fastpose.detect._hog", lambda: (_ for _ in ()).throw(ImportError(HOG_MISSING)))
    pose, crops = PoseEstimator(), []
    forward = pose._forward
    monkeypatch.setattr(pose, "_forward", lambda batch: (crops.append(len(batch)), forward(batch))[1])
    assert HOG_MISSING in pose.notice and len(pose(photo)) == 1 and crops == [1]


@pytest.mark.parametrize("antialias", [True, False])
def test_crops_of_images_too_large_for_opencv(antialias):
    """OpenCV 4 warps images of less than 2^15 - 1 pixels per side; the crop is that of the part under it."""
    image = np.random.default_rng(0).integers(0, 256, (150, 33000, 3), np.uint8)
    for x, scale in ((0, 1.0), (32800, 1.0), (16000, 0.9), (20000, 3.0)):
        box = np.array([x + 3, 20, x + 3 + 60 * scale, 20 + 80 * scale])
        matrix = crop_matrix(box, (64, 48), 1.25)
        first = max(x - 300, 0)
        part = np.ascontiguousarray(image[:, first : first + 1000])
        shifted = matrix @ np.array([[1, 0, first], [0, 1, 0], [0, 0, 1.0]])
        expected = warp_crop(part, shifted, (64, 48), antialias).astype(int)
        assert np.abs(warp_crop(image, matrix, (64, 48), antialias) - expected).max() <= 1
    whole = crop_matrix(np.array([0, 0, 33000, 150]), (64, 48), 1.25)
    assert warp_crop(image, whole, (64, 48), antialias).shape == (64, 48, 3)  # a sixth of a pixel high
    far = np.full((1, 14, 2), 32900.0)
    far[..., 1] = 75
    poses = Poses(far, np.ones((1, 14)), np.array([[32800, 10, 32990, 140]]), np.ones(1), (150, 33000), LSP14)
    assert (poses.draw(image)[:, 32890:32910] != image[:, 32890:32910]).any()


def test_numbers_of_a_detector_in_bfloat16(photo):
    boxes = torch.tensor([[8.0, 16, 160, 224]], dtype=torch.bfloat16)
    pose = PoseEstimator(detector=lambda image: (boxes, torch.ones(1, dtype=torch.bfloat16)))
    expected = PoseEstimator(detector="none")(photo, [[8, 16, 160, 224]])
    for poses in (pose(photo), pose(photo, boxes), *pose.stream([photo])):
        assert np.array_equal(poses.keypoints, expected.keypoints)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pil_images_whose_range_nobody_knows(mode):
    with pytest.raises(ImageError, match=f"PIL image of mode '{mode}' has no known range"):
        to_rgb(PIL.Image.new(mode, (8, 8)), "rgb")


def test_matrices_are_arrays():
    assert to_rgb(np.ones((4, 5), np.uint8).view(np.matrix), "rgb").shape == (4, 5, 3)


def test_a_size_is_two_numbers():
    with pytest.raises(ValueError, match=r"input_size must be \(height, width\), .* multiples of 16, got \(256,\)"):
        PoseEstimator(input_size=256)


def test_poses_can_be_looked_for(estimator, photo):
    first, second = estimator([photo, photo])
    assert first in [second, first] and first != second and len({first, second, first}) == 2


def test_bottom_up_networks_take_no_detector():
    for wrong in ({"detector": "hog"}, {"detector": lambda image: []}):
        with pytest.raises(ValueError, match="finds people itself: it takes no detector"):
            PoseEstimator("lightweight_hrnet_448", **wrong)
    with pytest.raises(ValueError, match="padding: lightweight_hrnet_448 sees whole images, not crops; got 2.0"):
        PoseEstimator("lightweight_hrnet_448", padding=2.0)


def test_nms_is_given_what_was_asked_for(photo, monkeypatch):
    calls = []
    monkeypatch.setattr("fastpose.pipeline.oks_nms", lambda *a, **s: calls.append((a, s)) or oks_nms(*a, **s))
    found = np.array([[20, 10, 200, 220], [150, 40, 300, 220]]), np.array([0.5, 0.25])
    PoseEstimator(detector=lambda image: found, nms_threshold=0.3, keypoint_threshold=0.05)(photo)
    (_, _, _, areas, sigmas), settings = calls[0]
    assert areas.tolist() == [180 * 210, 150 * 180] and torch.allclose(sigmas, torch.tensor(LSP14.sigmas))
    assert settings["threshold"] == 0.3 and settings["keypoint_threshold"] == 0.05


def test_scores_contain_those_of_the_detector(photo):
    one, half = (
        PoseEstimator(detector=lambda image, s=s: ([[20, 10, 200, 220]], [s]), keypoint_threshold=0.0)(photo)
        for s in (1.0, 0.5)
    )
    assert one.scores[0] > 0 and half.scores == pytest.approx(one.scores / 2)


def test_order_of_channels(photo):
    """PIL images are RGB whatever the arrays are; alpha comes last in both orders."""
    bgr = PoseEstimator(detector="none", channel_order="bgr")
    expected = PoseEstimator(detector="none")(photo).keypoints
    assert np.array_equal(bgr(PIL.Image.fromarray(photo)).keypoints, expected)
    alpha = np.full(photo.shape[:2], 7, np.uint8)
    assert np.array_equal(bgr(np.dstack([photo[:, :, ::-1], alpha])).keypoints, expected)


def test_colours_tell_left_from_right(photo):
    points, scores = np.full((1, 14, 2), 50.0), np.zeros((1, 14))
    scores[0, LSP14.names.index("left_wrist")] = 0.5
    poses = Poses(points, scores, np.array([[0, 0, 99, 99]]), np.ones(1), photo.shape[:2], LSP14)
    blank = np.zeros_like(photo)
    assert not poses.draw(blank, 0.6).any() and tuple(poses.draw(blank, 0.4)[50, 50]) == (30, 120, 255)
