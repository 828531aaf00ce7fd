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
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import fastpose
from fastpose.checkpoints import DEFAULT_WEIGHTS, resolve_weights
from fastpose.config import from_dict
from fastpose.data import PoseData
from fastpose.distributed import rank
from fastpose.files import write_atomically, write_json
from fastpose.training.settings import TrainConfig

# settings that change the speed, and the outcome by rounding at most
FREE = ("data", "output", "memory", "workers", "threads", "device", "compile", "tensorboard")


class Log:
    """Appends lines to a CSV file, whose header are the keys of the first one, and to TensorBoard if that is wanted.

    A run that goes on at `step` removes the lines of later steps, which it is about to repeat.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / "log.csv"
        self.board: Any = None
        if self.path.is_file():
            rows = list(csv.reader(self.path.read_text().splitlines()))
            self._write("w", rows[:1] + [row for row in rows[1:] if int(row[1]) <= step])
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard=true needs TensorBoard: pip install tensorboard") from error
            self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, *, step: int, **row: object) -> None:
        header = [] if self.path.is_file() else [["time", "step", *row]]
        self._write("a", [*header, [time.strftime("%Y-%m-%dT%H:%M:%S"), step, *row.values()]])
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def _write(self, mode: str, rows: list[list[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        if mode == "a":
            with self.path.open("a", newline="") as file:
                file.write(text.getvalue())
        else:
            write_atomically(self.path, lambda p: p.write_text(text.getvalue(), newline=""))


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
        "sha256": {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in _weights_files(config).items()},
    }
    write_json(path, content)


def _weights_files(config: TrainConfig) -> dict[str, Path]:
    files = {"init": resolve_weights(config.init, config.model)} if config.init else {}
    if config.teacher in DEFAULT_WEIGHTS:
        files["teacher"] = resolve_weights("default", config.teacher)
    elif config.teacher:
        files["teacher"] = Path(config.teacher)
    return files


def check_config(config: TrainConfig, path: Path, processes: int) -> None:
    """Raise ValueError if `config` would not go on with the run that wrote `path`; tell if `processes` differ."""
    if not path.is_file():
        return
    content = json.loads(path.read_text())
    before, now = (
        json.loads(json.dumps(dataclasses.asdict(c))) for c in (from_dict(TrainConfig, content["config"], ""), config)
    )
    changed = [k for k in now if k in before and k not in FREE and now[k] != before[k]]
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


def report_data(path: Path, **parts: PoseData) -> None:
    """Write what was found in the data and say what is wrong with it."""
    content = {}
    for name, data in parts.items():
        content[name] = {"images": len(data.image_files()), "people": len(data), "findings": data.report.to_dict()}
        if data.report.wrong:
            print(f"fastpose: in the {name} data:\n{data.report.to_text(wrong_only=True)}", file=sys.stderr)
    write_json(path, content)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators that networks with random parts draw from."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the numbers of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_state(path: Path, **state: Any) -> None:
    """Write what `torch.load(weights_only=True)` reads back, atomically."""
    write_atomically(path, functools.partial(torch.save, state))
