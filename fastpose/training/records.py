"""What a run writes beside its weights: settings, findings in the data, log, and the state to go on from."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import fastpose
from fastpose.checkpoints import resolve_weights
from fastpose.config import from_dict, read_run
from fastpose.data import PoseData
from fastpose.distributed import rank
from fastpose.files import write_atomically, write_json
from fastpose.training.settings import TrainConfig

# settings that change the speed, and the outcome by rounding at most; and what matters at the beginning only
FREE = ("data", "output", "memory", "workers", "threads", "device", "compile", "tensorboard", "init")


class Log:
    """Lines of a CSV file, whose header are the keys of the first one, and TensorBoard's if that is wanted.

    A run that goes on at `step` removes the lines of later steps, which it is about to repeat; one that begins, at step
    0, removes all.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / "log.csv"
        self.board: Any = None
        self.rows: list[list[Any]] = []
        if step and self.path.is_file():
            text = self.path.read_text(errors="replace").replace("\0", "")  # which a power cut may leave
            header, *rows = list(csv.reader(text.splitlines())) or [[]]
            if header[:2] != ["time", "step"]:
                rows = []
            whole = [row for row in rows if len(row) == len(header) and row[1].isdecimal() and int(row[1]) <= step]
            self.rows = [header, *whole] if whole else []
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard=true needs TensorBoard: pip install tensorboard") from error
            self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, *, step: int, **row: object) -> None:
        if not self.rows:
            self.rows.append(["time", "step", *row])
        self.rows.append([time.strftime("%Y-%m-%dT%H:%M:%S"), step, *row.values()])
        text = io.StringIO()
        csv.writer(text).writerows(self.rows)
        write_atomically(self.path, lambda p: p.write_text(text.getvalue(), newline=""))
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)
            self.board.flush()


def write_config(config: TrainConfig, device: torch.device, processes: int, path: Path) -> None:
    """Everything needed to repeat the run: ``--config`` takes the file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    content = {
        "config": dataclasses.asdict(config),
        "command": sys.argv,
        "device": {"type": device.type, "name": name, "processes": processes, "threads": torch.get_num_threads()},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("FASTPOSE_", "OMP_"))},
        "versions": {
            "fastpose": fastpose.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
        # names stand for the weights of a version
        "sha256": {key: _sha256(file) for key, file in _weights_files(config).items()},
    }
    write_json(path, content)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _weights_files(config: TrainConfig) -> dict[str, Path]:
    files = {"init": resolve_weights(config.init, config.model)} if config.init else {}
    return {**files, "teacher": resolve_weights(*config.teacher_weights)} if config.teacher else files


def check_config(config: TrainConfig, path: Path, processes: int) -> None:
    """Raise ValueError if `config` would not go on with the run that wrote `path`; tell if `processes` differ."""
    if not path.is_file():
        if rank() == 0 and path.with_name("last.pt").exists():
            print(f"fastpose: {path} is missing: nobody can tell whether the settings are the same", file=sys.stderr)
        return
    content = read_run(path)
    before, now = (
        json.loads(json.dumps(dataclasses.asdict(c))) for c in (from_dict(TrainConfig, content["config"], ""), config)
    )
    free = set(FREE)
    known = content.get("sha256", {}).get("teacher")
    if now["teacher"] and before["teacher"] and known:  # wherever the file is now
        if _sha256(resolve_weights(*config.teacher_weights)) != known:
            raise ValueError(
                f"{path.parent} cannot be resumed with another teacher: {now['teacher']} has other contents"
            )
        free.add("teacher")
    changed = [k for k in now if k in before and k not in free and now[k] != before[k]]
    if changed:
        what = "; ".join(f"{k} was {before[k]!r} and is {now[k]!r}" for k in changed[:3])
        raise ValueError(f"{path.parent} cannot be resumed with other settings: {what}")
    began = content.get("device", {}).get("processes", processes)
    if began != processes and rank() == 0:
        print(
            f"fastpose: the run began with {began} processes and goes on with {processes}: batch norm sees other parts "
            "of the batches, and the outcome is not that of a run left alone",
            file=sys.stderr,
        )


def report_data(path: Path, told: Collection[str] = (), **parts: PoseData) -> None:
    """Write what was found in the data and say what is wrong with it, but for the parts in `told`."""
    content = {}
    for name, data in parts.items():
        content[name] = {"images": len(data.image_files()), "people": len(data), "findings": data.report.to_dict()}
        if data.report.wrong and name not in told:
            print(f"fastpose: in the {name} data:\n{data.report.to_text(wrong_only=True)}", file=sys.stderr)
    write_json(path, content)


def fingerprint(data: PoseData) -> dict[str, Any]:
    """What a run must find again when it goes on: counts, and a digest of file names, keypoints and boxes."""
    digest = hashlib.sha256(json.dumps([data.skeleton.names, [path.name for path in data.images]]).encode())
    for array in (data.keypoints, data.labelled, data.boxes):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {"images": len(data.image_files()), "people": len(data), "sha256": digest.hexdigest()}


def check_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if the `fingerprint` of a part is another than it was."""
    for part, was in before.items():
        if was != now[part]:
            counts = " and ".join(f"{x['images']} images with {x['people']} people" for x in (was, now[part]))
            raise ValueError(
                f"the {part} data are not those that the run began with ({counts}); --resume goes on with the same "
                "data, another output folder with others"
            )


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators that networks with random parts draw from."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the numbers of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# what `train` cannot do without when it goes on
STATE = ("model", "optimizer", "average", "updates", "step", "best", "random")


def read_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; raises ValueError if the file is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        missing = [key for key in STATE if key not in state]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
    except Exception as error:  # whatever the damage happens to cause in the readers
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged, or not what a run saves to go on ({reason}); delete it and the run begins again, with "
            f"init={path.with_name('best.safetensors')} in another output folder from its best weights"
        ) from error
    return state


def save_state(path: Path, **state: Any) -> None:
    """Write what `torch.load(weights_only=True)` reads back, atomically; raises OSError if it cannot be written."""
    try:
        write_atomically(path, functools.partial(torch.save, state))
    except RuntimeError as error:
        if not any(word in str(error) for word in ("inline_container", "PytorchStreamWriter")):
            raise
        # of a full disk torch says so
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
