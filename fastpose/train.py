"""Training: one loop, readable from top to bottom.

A run is described by a `TrainConfig` (a recipe file plus overrides) and lives in one folder:

* ``config.json``: every setting, package and library versions, command line;
* ``data.json``: how many images and people there are, and what was left out and why;
* ``log.csv``: one line per validation (step, epoch, size, learning rate, loss, images/s, PCK, PCKh or AP in percent);
* ``last.pt``: everything needed to go on after a kill (parameters, optimizer, average, step, best result);
* ``best.safetensors``, ``final.safetensors``: averaged weights, ready for `create_model(weights=...)`.

The randomness of a sample depends on the seed and the sample's number only, so a resumed run draws the same batches.

Started by ``torchrun --nproc-per-node N -m fastpose train ...`` the run is data-parallel: every process takes its
share of each batch. On a CPU, N processes of one thread are a third faster than one process of N threads.
"""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastpose.checkpoints import WeightsInfo, load_pretrained, resolve_weights, save_weights
from fastpose.codecs import SoftmaxHeatmapCodec, TopDownCodec
from fastpose.data import DATASETS, METRICS, PoseData, load_dataset
from fastpose.data.crops import Augmentation, CropDataset, CropStore, ResumableBatches
from fastpose.files import write_atomically
from fastpose.layers import channels_last
from fastpose.models import create_model
from fastpose.preprocess import normalize
from fastpose.skeletons import SKELETONS, skeleton_to_dict


@dataclass(frozen=True)
class Stage:
    """A part of the schedule at one input size: `size` (height, width), `epochs`, `batch_size`."""

    size: tuple[int, int]
    epochs: float
    batch_size: int = 32


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run.

    Attributes:
        data: folder of the unpacked data set; dataset: its kind, see `fastpose.data.load_dataset`; splits: names of the
            parts to train and validate on; skeleton: for dataset "custom", a file or the name of a built-in one.
        metric: decides which weights are the best: "PCK@0.2", "PCKh@0.5" or "AP"; empty: as usual for the data set.
        stages: run one after the other under one learning rate schedule.
        optimizer: ``"adamw"``, or ``"muon"``: Muon for the weights of dense 1x1 convolutions, AdamW for the rest.
        lr: peak learning rate of AdamW; muon_lr: of Muon. Linear warm-up over `warmup` of all steps, constant until
            `decay_start` of them, then half a cosine to 0.
        weight_decay: on tensors with more than one dimension. clip: bound on the gradient's norm.
        ema: decay of the weights' moving average, which is what is validated and saved.
        padding: crop side in units of the box's longer side. codec: target, loss and decoder; ``codec.type`` is
            ``"softmax"``, ``"msra"``, ``"dark"`` or ``"udp"``, see `fastpose.codecs`.
        validate_every: epochs between validations; limit: use only the first images of each split (0: all).
        memory: decoded people are kept in memory up to so many gigabytes per process, the others are read every time.
        init: weights to start from instead of random numbers, "default" or a file; if they are for other keypoints,
            everything but the last layer is taken.
    """

    data: str
    output: str
    model: str = "mobileposenet"
    dataset: str = "lspet"
    stages: tuple[Stage, ...] = (Stage((256, 192), 210.0),)
    optimizer: str = "adamw"
    lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.02
    warmup: float = 0.03
    decay_start: float = 0.0
    clip: float = 10.0
    ema: float = 0.998
    padding: float = 1.10
    codec: TopDownCodec = field(default_factory=SoftmaxHeatmapCodec)
    augment: Augmentation = field(default_factory=Augmentation)
    validate_every: float = 2.0
    workers: int = 1
    threads: int = 0
    seed: int = 0
    limit: int = 0
    init: str = ""
    splits: tuple[str, str] = ("train", "val")
    skeleton: str = ""
    metric: str = ""
    memory: float = 8.0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}")
        if self.metric not in ("", *METRICS):
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}")
        if not self.stages:
            raise ValueError("stages must not be empty")


class Schedule:
    """Which stage and learning rate factor belong to a step. Step counts are fixed by the data set's length."""

    def __init__(self, config: TrainConfig, people: int) -> None:
        self.config = config
        self.per_epoch = [people // s.batch_size for s in config.stages]
        if min(self.per_epoch) == 0:
            raise ValueError(f"the data set has {people} people, fewer than one batch of {config.stages[0].batch_size}")
        self.steps = [max(1, round(s.epochs * n)) for s, n in zip(config.stages, self.per_epoch, strict=True)]
        self.total = sum(self.steps)

    def factor(self, step: int) -> float:
        c = self.config
        warm, start = c.warmup * self.total, c.decay_start * self.total
        if step < warm:
            return (step + 1) / (warm + 1)
        if step < start:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - start) / max(self.total - start, 1)))


class Optimizer:
    """AdamW, or Muon for dense 1x1 convolutions with AdamW for the rest, behind one interface."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        matrices: list[nn.Parameter] = []
        decay, rest = [], []
        for p in model.parameters():
            dense = p.dim() == 4 and p.shape[2:] == (1, 1) and min(p.shape[:2]) >= 8
            if config.optimizer == "muon" and dense:
                matrices.append(p)
            elif p.dim() > 1:
                decay.append(p)
            else:
                rest.append(p)
        groups = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))]
        self.rates = [config.lr]
        self.matrices = matrices
        if matrices:
            # Muon takes matrices only: 2-D parameters that share storage with the [O, I, 1, 1] weights
            self.views = [nn.Parameter(p.detach().view(p.shape[0], p.shape[1])) for p in matrices]
            self.parts.append(torch.optim.Muon(self.views, lr=config.muon_lr, weight_decay=config.weight_decay))
            self.rates.append(config.muon_lr)

    def step(self, factor: float) -> None:
        if self.matrices:
            for p, view in zip(self.matrices, self.views, strict=True):
                view.grad = None if p.grad is None else p.grad.view(view.shape)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for part, s in zip(self.parts, state, strict=True):
            part.load_state_dict(s)


class Average:
    """Exponential moving average of parameters and floating-point buffers: decay min(ema, (1 + n) / (10 + n))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = [], []
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                mine.append(self.state[key])
                theirs.append(value)
            else:
                self.state[key].copy_(value)
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> float:
    """Run (or with `resume` continue) the training that `config` describes; returns the best validation result
    in percent (NaN if nothing could be measured), in the metric of the config or else the data set's usual one.

    Raises:
        FileExistsError: the output folder holds a run and `resume` is false.
        FileNotFoundError: data set missing, or nothing to resume.
        ValueError: data or settings that cannot be used.
        FloatingPointError: the loss became NaN or infinite; the batch is saved as ``nan_batch.pt`` in the output.
    """
    output = Path(config.output)
    last = output / "last.pt"
    if resume and not last.is_file():
        raise FileNotFoundError(f"nothing to resume: {last} does not exist")
    if not resume and last.is_file():
        raise FileExistsError(f"{output} already holds a run; give --resume to go on, or another output folder")
    output.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    _tune_allocator()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)

    train_data, val_data = (_load_data(config, split) for split in config.splits)
    schedule = Schedule(config, len(train_data))
    store = CropStore(train_data, config.padding, max(max(s.size) for s in config.stages), config.memory * 2**30)

    skeleton = train_data.skeleton
    model = create_model(config.model, num_keypoints=skeleton.num_keypoints)
    if config.init:
        path = resolve_weights(config.init, config.model)
        left = load_pretrained(model, config.model, skeleton.num_keypoints, path)
        if left and rank == 0:
            print(f"fastpose: {path.name} is for other keypoints; starting anew: {', '.join(left)}", file=sys.stderr)
    model = channels_last(model)
    optimizer, average = Optimizer(model, config), Average(model, config.ema)
    step, best = 0, -1.0
    if resume:
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.state, average.updates = state["average"], state["updates"]
        step, best = state["step"], state["best"]
    elif rank == 0:
        _write_config(config, output / "config.json")
    if rank == 0:
        _report(output / "data.json", train=train_data, val=val_data)
    network: nn.Module = model
    if world > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)

    log = _Log(output / "log.csv")
    column = {"PCK@0.2": "val_pck", "PCKh@0.5": "val_pckh", "AP": "val_ap"}[val_data.metric]
    progress = tqdm(total=schedule.total, initial=step, desc=config.model, unit="step", disable=quiet or rank > 0)
    stage_end = 0
    for stage, stage_steps, per_epoch in zip(config.stages, schedule.steps, schedule.per_epoch, strict=True):
        stage_start, stage_end = stage_end, stage_end + stage_steps
        if step >= stage_end:
            continue
        # the stage's first step enters the seed: otherwise each stage would repeat the augmentation of the one before
        seed = config.seed * 1000003 + stage_start
        dataset = CropDataset(store, stage.size, config.augment, seed, config.codec.convention)
        batches = ResumableBatches(
            len(store),
            stage.batch_size,
            stage_steps,
            seed,
            first_step=step - stage_start,
            rank=rank,
            world=world,
        )
        ahead = 4 if config.workers else None
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers, prefetch_factor=ahead)
        info = WeightsInfo(
            model=config.model,
            num_keypoints=skeleton.num_keypoints,
            skeleton=skeleton.name,
            input_size=stage.size,
            padding=config.padding,
            codec=config.codec,
            skeleton_definition={} if SKELETONS.get(skeleton.name) == skeleton else skeleton_to_dict(skeleton),
        )
        validate_steps = max(1, round(config.validate_every * per_epoch))
        model.train()
        started, images, losses = time.time(), 0, []
        for crops, keypoints, valid in loader:
            x = normalize(crops).contiguous(memory_format=torch.channels_last)
            loss = config.codec.loss(network(x), keypoints, valid)
            network.zero_grad()
            loss.backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                torch.save({"crops": crops, "keypoints": keypoints, "valid": valid}, output / "nan_batch.pt")
                raise FloatingPointError(f"loss is {value} at step {step}; the batch is in {output / 'nan_batch.pt'}")
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            factor = schedule.factor(step)
            optimizer.step(factor)
            average.update(model)
            step += 1
            images += len(crops) * world
            losses.append(value)
            progress.update()
            at_end = step == stage_end
            if ((step - stage_start) % validate_steps == 0 or at_end) and rank == 0:
                seconds = time.time() - started
                candidate = output / "candidate.safetensors"
                save_weights(candidate, average.state, info)
                result, val_data = validate(candidate, val_data)
                log.write(
                    step=step,
                    epoch=round((step - stage_start) / per_epoch, 2),
                    size=f"{stage.size[0]}x{stage.size[1]}",
                    lr_factor=round(factor, 4),
                    loss=round(float(np.mean(losses)), 4),
                    images_per_s=round(images / seconds, 1),
                    **{column: round(result, 2)},
                )
                progress.set_postfix(loss=f"{np.mean(losses):.3f}", **{column: f"{result:.1f}"})
                # of equals the later: with few images to validate on AP stays 0 for long
                if result >= best or not (output / "best.safetensors").is_file():
                    best = max(best, result) if math.isfinite(result) else best
                    os.replace(candidate, output / "best.safetensors")
                candidate.unlink(missing_ok=True)
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state,
                    "updates": average.updates,
                    "step": step,
                    "best": best,
                }
                write_atomically(last, functools.partial(torch.save, state))
                started, images, losses = time.time(), 0, []
        if rank == 0:
            save_weights(output / "final.safetensors", average.state, info)
    progress.close()
    if world > 1:
        torch.distributed.destroy_process_group()
    return best if best >= 0 else math.nan


def _load_data(config: TrainConfig, split: str) -> PoseData:
    skeleton, metric = config.skeleton or None, config.metric or None
    data = load_dataset(config.dataset, config.data, split, skeleton=skeleton, limit=config.limit, metric=metric)
    if len(data) == 0:
        raise ValueError(f"nobody to estimate in the split {split!r}: {data.report.to_text() or 'it is empty'}")
    return data


def _report(path: Path, **parts: PoseData) -> None:
    """Write what was found in the data and say what is wrong with it."""
    content = {}
    for name, data in parts.items():
        content[name] = {"images": len(data.image_files()), "people": len(data), "findings": data.report.to_dict()}
        if data.report.wrong:
            print(f"fastpose: in the {name} data:\n{data.report.to_text(wrong_only=True)}", file=sys.stderr)
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def validate(weights: Path, data: PoseData, flip_test: bool = False) -> tuple[float, PoseData]:
    """Score in percent of a weights file on the annotated boxes of `data`, and the part of `data` that could be used.

    This is what ``fastpose evaluate`` does.
    """
    from fastpose.evaluate import evaluate
    from fastpose.pipeline import PoseEstimator

    estimator = PoseEstimator("auto", weights, detector="none", flip_test=flip_test)
    result = evaluate(estimator, data)
    return result.score.value, result.data


class _Log:
    """Appends lines to a CSV file; the first line's keys are the header."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **row: object) -> None:
        new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["time", *row])
            writer.writerow([time.strftime("%Y-%m-%dT%H:%M:%S"), *row.values()])


def _write_config(config: TrainConfig, path: Path) -> None:
    import fastpose

    content = {
        "config": dataclasses.asdict(config),
        "command": sys.argv,
        "versions": {"fastpose": fastpose.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))


def _tune_allocator() -> None:
    """Keep freed memory in the process: by default glibc returns every large activation to the system and faults it
    in again, which costs a third of the training time on a CPU."""
    if sys.platform != "linux" or os.environ.get("FASTPOSE_TUNE_ALLOCATOR") == "0":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # constants of malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 << 20)
