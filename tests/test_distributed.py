"""Two processes on the CPU against one: the same numbers and files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastpose
from fastpose.checkpoints import WeightsInfo, save_weights
from fastpose.codecs import AssociativeEmbeddingCodec
from fastpose.data import load_dataset
from fastpose.distributed import choose_device, shared_map
from fastpose.evaluate import _batches
from tests import datasets
from tests.conftest import needs_kernels


def run_processes(arguments: list[str], count: int, expect: int = 0) -> list[str]:
    """Run ``python -m fastpose`` as `count` processes of one group, as torchrun would; what each printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = str(Path(fastpose.__file__).parents[1])
    processes = []
    for rank in range(count):
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RANK": str(rank)}
        environment |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "fastpose", *arguments]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = [p.communicate(timeout=300) for p in processes]
    for process, (_, error) in zip(processes, results, strict=True):
        assert process.returncode == expect, error
    return [out for out, _ in results]


def test_the_map_of_one_process():
    assert shared_map(lambda x: x * x, range(5)) == [0, 1, 4, 9, 16]
    assert shared_map(str, []) == []


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device 'cuda:99': GPU 99 is needed, torch sees \d"):
        choose_device("cuda:99")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu'"):
        choose_device("gpu")


def test_batches_hold_everybody_once(tmp_path):
    datasets.write_standard_coco(tmp_path, images=8, people=3)
    data = load_dataset("coco", tmp_path, "val")
    for size in (1, 4, 1000):
        batches = _batches(data, size)
        assert [row for b in batches for rows in b for row in rows] == list(range(len(data)))
        assert all(sum(map(len, b)) >= size for b in batches[:-1])
        assert all(len({data.images[row] for row in rows}) == 1 for b in batches for rows in b)
    assert _batches(data.take(np.zeros(0, np.int64)), 4) == []


@needs_kernels
def test_all_crops_are_treated_alike():
    pose = fastpose.PoseEstimator(detector="none")
    pose.prepare(5)
    assert not isinstance(pose.model, fastpose.Optimized)
    pose.prepare(1000)
    assert isinstance(pose.model, fastpose.Optimized)


def test_two_processes_evaluate_as_one(tmp_path):
    datasets.write_standard_coco(tmp_path, images=9, people=3)
    (tmp_path / "val2017" / "003.png").write_bytes(b"broken")
    (tmp_path / "val2017" / "006.png").write_bytes(b"broken too")
    outputs = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        files = [f"--{name}={out / name}.json" for name in ("json", "results")]
        path = tmp_path / "random.safetensors"
        if count == 1:  # a random network: any numbers do, as long as they are the same
            torch.manual_seed(0)
            model = fastpose.create_model("mobilenetv2_pose", num_keypoints=17)
            info = WeightsInfo("mobilenetv2_pose", 17, "coco17", (64, 64), 1.25, fastpose.codecs.SoftmaxHeatmapCodec())
            save_weights(path, model.state_dict(), info)
        command = ["evaluate", str(tmp_path), "--dataset=coco", f"--weights={path}", "--model=auto", "--batch-size=4"]
        said = run_processes([*command, "--quiet", f"--worst={out}/worst.png", *files], count, expect=2)
        assert said[0] and not any(said[1:])
        outputs[count] = (said[0], {f.name: f.read_bytes() for f in sorted(out.iterdir())})
    assert outputs[1][0] == outputs[2][0]
    assert sorted(outputs[1][1]) == ["json.json", "results.json", "worst.png"]
    assert outputs[1][1] == outputs[2][1]
    skipped = json.loads(outputs[2][1]["json.json"])["skipped"]
    assert skipped["image cannot be read"]["count"] == 2


def test_two_processes_evaluate_a_bottom_up_network_as_one(tmp_path):
    datasets.write_standard_coco(tmp_path, images=5)
    torch.manual_seed(0)
    model = fastpose.create_model("lightweight_hrnet_448", num_keypoints=17, r=-8)
    info = WeightsInfo(
        "lightweight_hrnet_448", 17, "coco17", (64, 64), 1.0, AssociativeEmbeddingCodec(), options={"r": -8}
    )
    path = tmp_path / "random.safetensors"
    save_weights(path, model.state_dict(), info)
    written = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        command = ["evaluate", str(tmp_path), "--dataset=coco", f"--weights={path}", "--model=auto", "--quiet"]
        run_processes([*command, "--no-flip-test", f"--results={out}"], count)
        written.append(out.read_bytes())
    assert written[0] == written[1] and len(json.loads(written[0])) > 0
