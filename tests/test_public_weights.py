"""`PoseEstimator` on checkpoints of other packages against their evaluation code's steps, one person at a time."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

import fastpose
from fastpose import PoseEstimator
from fastpose.codecs import DarkHeatmapCodec, MSRAHeatmapCodec, SoftmaxHeatmapCodec, UDPHeatmapCodec
from fastpose.skeletons import COCO17, MPII16, Skeleton
from tests.test_checkpoints import as_published
from tests.test_heatmap_codecs import decode_slowly
from tests.test_models import build

SIZE = (64, 96)


@pytest.fixture(scope="module")
def hrnet() -> torch.nn.Module:
    return build("hrnet_w32", num_keypoints=17)


@pytest.fixture(scope="module")
def checkpoints(hrnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for layout in ("mmpose 1.x", "original"):
        torch.save(as_published(hrnet.state_dict(), layout), folder / f"{layout}.pth")
    return folder


def estimate_slowly(model, image, box, codec):
    """One person as HRNet's and mmpose's test scripts have it: keypoints [17, 2] and scores [17]."""
    (h, w), (x1, y1, x2, y2) = SIZE, box
    size = np.array([max(x2 - x1, (y2 - y1) * w / h), max((x2 - x1) * h / w, y2 - y1)]) * 1.25
    centre = np.array([(x1 + x2) / 2, (y1 + y2) / 2])
    wh = np.array([w, h])
    if isinstance(codec, UDPHeatmapCodec):
        zoom = (wh - 1) / size
        offset = (wh - 1) / 2 - zoom * centre
    else:
        zoom = wh / size
        offset = wh / 2 - zoom * centre
    matrix = np.array([[zoom[0], 0, offset[0]], [0, zoom[1], offset[1]]])
    crop = cv2.warpAffine(image, matrix, (w, h), flags=cv2.INTER_LINEAR)
    x = (crop / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = torch.from_numpy(x.transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        maps, mirrored = model(x)[0].numpy(), model(x.flip(3))[0].numpy()[:, :, ::-1]
    mirrored = mirrored[COCO17.flip_indices].copy()
    if not isinstance(codec, UDPHeatmapCodec):
        mirrored[:, :, 1:] = mirrored[:, :, :-1].copy()
    maps = (maps + mirrored) / 2
    points = np.stack([decode_slowly(codec, m) for m in maps])
    return (points - offset) / zoom, maps.max((1, 2)).clip(min=0)


@pytest.mark.parametrize(
    ("layout", "codec", "given"),
    [
        ("original", MSRAHeatmapCodec(), None),
        ("mmpose 1.x", MSRAHeatmapCodec(edges="mmpose"), None),
        ("original", DarkHeatmapCodec(), "dark"),
        ("mmpose 1.x", UDPHeatmapCodec(), "udp"),
    ],
)
def test_keypoints_are_those_of_the_original_code(hrnet, checkpoints, photo, layout, codec, given):
    path = checkpoints / f"{layout}.pth"
    pose = PoseEstimator("hrnet_w32", path, detector="none", input_size=SIZE, codec=given, batch_size=2)
    assert pose.info.codec == codec and pose.skeleton is COCO17 and pose.flip_test and pose.info.padding == 1.25
    boxes = np.array([[20.0, 10, 200, 220], [100.5, 30, 310, 239], [0, 0, 320, 240], [5, 5, 40, 20]])
    poses = pose(photo, boxes)
    for i, box in enumerate(boxes):
        points, scores = estimate_slowly(hrnet, photo, box, codec)
        # random weights give rugged maps, on which the Newton step of DARK and UDP may be badly conditioned
        assert np.allclose(poses.keypoints[i], points, atol=1e-3 if isinstance(codec, MSRAHeatmapCodec) else 2e-2)
        assert np.allclose(poses.keypoint_scores[i], scores, atol=1e-5)


def test_what_is_customary_and_what_can_be_corrected(hrnet, checkpoints, photo, tmp_path):
    path = checkpoints / "mmpose 1.x.pth"
    pose = PoseEstimator("auto", path)
    assert pose.model_name == "hrnet_w32" and pose.info.input_size == (256, 192) and not pose.info.antialias
    own = Skeleton("own", tuple(f"k{i}" for i in range(17)), (), (), (0.1,) * 17)
    changed = PoseEstimator(
        "hrnet_w32", path, skeleton=own, padding=1.0, codec=SoftmaxHeatmapCodec(), input_size=(64, 64), flip_test=False
    )
    assert changed.skeleton is own and changed.info.padding == 1.0 and changed.info.codec == SoftmaxHeatmapCodec()
    assert len(changed(photo, [[5, 5, 90, 90]])) == 1
    for settings, message in (
        ({"skeleton": "mpii16"}, "skeleton 'mpii16' has 16 keypoints, the weights have 17"),
        ({"skeleton": "cat"}, "unknown skeleton 'cat'"),
        ({"codec": "simcc"}, "unknown codec 'simcc'; known: softmax, msra, dark, udp"),
        ({"input_size": (250, 192)}, r"positive multiples of 32, got \(250, 192\)"),
        ({"input_size": (256,)}, "input_size must be"),
        ({"padding": 0.0}, "padding must be positive and finite, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PoseEstimator("hrnet_w32", path, **settings)
    with pytest.raises(ValueError, match="do not fit this MobilePoseNet.* it is a 'hrnet_w32' with num_keypoints=17"):
        PoseEstimator("mobileposenet", path)
    assert PoseEstimator(weights=path).model_name == "hrnet_w32"


@pytest.mark.parametrize(
    ("k", "skeleton", "message"),
    [(16, "mpii16", ""), (14, None, "have 14 keypoints, .* choose with skeleton=.*lsp14"), (3, None, "none of the")],
)
def test_the_number_of_keypoints_may_tell_which(k, skeleton, message, tmp_path):
    state = fastpose.create_model("mobileposenet", num_keypoints=k).state_dict()
    torch.save(state, tmp_path / "a.pth")
    if skeleton is None:
        with pytest.raises(ValueError, match=message):
            PoseEstimator("mobileposenet", tmp_path / "a.pth")
    else:
        assert PoseEstimator("mobileposenet", tmp_path / "a.pth").skeleton is MPII16
    if k == 14:
        pose = PoseEstimator("mobileposenet", tmp_path / "a.pth", skeleton="lsp14")
        assert pose.skeleton.name == "lsp14"
