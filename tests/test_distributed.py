"""Two processes on the CPU against one: the same numbers and files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import fastpose
from fastpose.checkpoints import WeightsInfo, save_weights
from fastpose.codecs import AssociativeEmbeddingCodec
from fastpose.data import load_dataset
from fastpose.distributed import choose_device, shared_map
from fastpose.evaluate import _batches
from fastpose.training.sync_norm import synchronize_batch_norm
from tests import datasets
from tests.conftest import needs_kernels


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_processes(arguments: list[str], count: int, expect: int = 0) -> list[str]:
    """Run ``python -m fastpose`` as `count` processes of one group, as torchrun would; what each printed."""
    port = free_port()
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
    assert shared_map(float, lambda x: x * x, range(5)) == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert shared_map(str, str, []) == []


def test_the_map_reads_what_comes_next_meanwhile():
    begun = [threading.Event() for _ in range(3)]

    def read(i):
        begun[i].set()
        return i

    def use(i):
        return all(event.wait(30) for event in begun[: i + 2])

    assert shared_map(read, use, range(3)) == [True] * 3


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
    datasets.write_standard_coco(tmp_path, images=20)  # more than are estimated before the network is optimised
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


def _gradients_of_half_a_batch(rank: int, port: int, x: torch.Tensor, target: torch.Tensor, path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = synchronize_batch_norm(toy(), torch.device("cpu"))
    half = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares
    loss = (model(x[half]) - target[half]).square().sum()
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    if rank == 0:
        torch.save([[p.grad for p in model.parameters()], model.state_dict()], path)
    dist.destroy_process_group()


def toy() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = (torch.nn.Conv2d(3, 5, 3, 2), torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.Conv2d(5, 4, 3))
    return torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(4)).double()


def test_batch_norm_over_two_processes(tmp_path):
    x, target = torch.randn(4, 3, 13, 13, dtype=torch.float64), torch.randn(4, 4, 4, 4, dtype=torch.float64)
    torch.multiprocessing.spawn(_gradients_of_half_a_batch, (free_port(), x, target, tmp_path / "a.pt"), nprocs=2)
    model = toy()
    (model(x) - target).square().sum().backward()
    gradients, state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.allclose(state[k], v, atol=1e-12) for k, v in model.state_dict().items())
    assert all(torch.allclose(g, p.grad, atol=1e-9) for g, p in zip(gradients, model.parameters(), strict=True))


def test_two_processes_train_as_one(tmp_path):
    """With batch norm over all processes only the rounding differs."""
    data = tmp_path / "data"
    datasets.write_standard_coco(data)
    settings = [
        *("dataset=coco", f"data={data}", 'splits=["val","val"]', "optimizer=sgd", "lr=1e-2", "ema=0.0", "warmup=0.0"),
        *("codec.type=msra", "sync_batch_norm=true", "stages=[{size=[64,64],epochs=1,batch_size=8}]", "workers=0"),
        *("device=cpu", "augment.mirror=0.5"),
    ]
    for count in (1, 2):
        said = run_processes(["train", "--quiet", *settings, f"output={tmp_path / str(count)}"], count)
        assert "weights: " in said[0] and not any(said[1:])
    one, two = (load_file(tmp_path / n / "final.safetensors") for n in ("1", "2"))
    torch.manual_seed(0)
    start = dict(fastpose.create_model("mobileposenet", num_keypoints=17).named_parameters())
    moved = sum(float((one[k] - v.detach()).square().sum()) for k, v in start.items())
    apart = sum(float((one[k] - two[k]).square().sum()) for k in start)
    assert apart < 0.02 * moved  # 0.0008; 1.6 with the batch norm of each half of the batch
    logs = [(tmp_path / n / "log.csv").read_text().splitlines() for n in ("1", "2")]
    assert len(logs[0]) == len(logs[1]) == 2
    assert [line.split(",")[1:5] for line in logs[0]] == [line.split(",")[1:5] for line in logs[1]]
    recorded = json.loads((tmp_path / "2" / "config.json").read_text())
    assert recorded["device"]["processes"] == 2 and recorded["config"]["codec"]["type"] == "msra"
