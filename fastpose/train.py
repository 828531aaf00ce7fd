"""Training: one loop, readable from top to bottom.

A run is described by a `TrainConfig` (a recipe file plus overrides) and lives in one folder:

* ``config.json``: every setting, package and library versions, command line;
* ``log.csv``: one line per report (step, epoch, size, learning rate, loss, images/s) and per validation (PCK);
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastpose.checkpoints import WeightsInfo, save_weights
from fastpose.codecs import HeatmapCodec, SoftmaxHeatmapCodec, TopDownCodec
from fastpose.data import PoseData, load_lspet
from fastpose.data.crops import Augmentation, CropDataset, CropStore, ResumableBatches
from fastpose.files import write_atomically
from fastpose.layers import channels_last
from fastpose.metrics import pck, torso_lengths
from fastpose.models import create_model
from fastpose.preprocess import normalize


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
        data: folder of the unpacked data set; dataset: ``"lspet"``.
        stages: run one after the other under one learning rate schedule.
        optimizer: ``"adamw"``, or ``"muon"``: Muon for the weights of dense 1x1 convolutions, AdamW for the rest.
        lr: peak learning rate of AdamW; muon_lr: of Muon. Linear warm-up over `warmup` of all steps, constant until
            `decay_start` of them, then half a cosine to 0.
        weight_decay: on tensors with more than one dimension. clip: bound on the gradient's norm.
        ema: decay of the weights' moving average, which is what is validated and saved.
        padding: crop side in units of the box's longer side. codec: target, loss and decoder; ``codec.type`` is
            ``"softmax"``, ``"msra"``, ``"dark"`` or ``"udp"``, see `fastpose.codecs`.
        validate_every: epochs between validations; limit: use only the first people of each split (0: all).
        init: weights file to start from instead of random numbers.
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

    def __post_init__(self) -> None:
        if self.dataset != "lspet":
            raise ValueError(f"dataset must be 'lspet', got {self.dataset!r}")
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
    """Run (or with `resume` continue) the training that `config` describes; returns the best validation PCK@0.2.

    Raises:
        FileExistsError: the output folder holds a run and `resume` is false.
        FileNotFoundError: data set missing, or nothing to resume.
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

    train_data, val_data = load_lspet(config.data, "train"), load_lspet(config.data, "val")
    if config.limit:
        train_data = train_data.take(np.arange(min(config.limit, len(train_data))))
        val_data = val_data.take(np.arange(min(config.limit, len(val_data))))
    schedule = Schedule(config, len(train_data))
    store = CropStore(train_data, config.padding, side=max(max(s.size) for s in config.stages))

    skeleton = train_data.skeleton
    model = create_model(config.model, num_keypoints=skeleton.num_keypoints)
    if config.init:
        model = create_model(config.model, num_keypoints=skeleton.num_keypoints, weights=config.init).train()
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
    network: nn.Module = model
    if world > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)

    log = _Log(output / "log.csv")
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
            len(store.people),
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
                result, _ = validate(average.state, val_data, info)
                log.write(
                    step=step,
                    epoch=round((step - stage_start) / per_epoch, 2),
                    size=f"{stage.size[0]}x{stage.size[1]}",
                    lr_factor=round(factor, 4),
                    loss=round(float(np.mean(losses)), 4),
                    images_per_s=round(images / seconds, 1),
                    val_pck=round(result, 2),
                )
                progress.set_postfix(loss=f"{np.mean(losses):.3f}", val_pck=f"{result:.1f}")
                if result > best:
                    best = result
                    save_weights(output / "best.safetensors", average.state, info)
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
    return best


@torch.inference_mode()
def validate(
    state: dict[str, Tensor], data: PoseData, info: WeightsInfo, flip: bool = False
) -> tuple[float, np.ndarray[Any, Any]]:
    """PCK@0.2 (torso) of the weights `state` on `data`: over all keypoints, and per keypoint [K].

    This is `PoseEstimator` on the annotated boxes.
    """
    from fastpose.pipeline import estimate_crops

    codec = info.codec
    assert isinstance(codec, HeatmapCodec)
    model = create_model(info.model, num_keypoints=info.num_keypoints)
    model.load_state_dict(state)
    channels_last(model.eval())
    store = CropStore(data, info.padding, side=max(info.input_size))
    dataset = CropDataset(store, info.input_size, convention=codec.convention)
    flip_indices = data.skeleton.flip_indices if flip else None
    predicted = []
    for start in range(0, len(data), 32):
        samples = [dataset[i] for i in range(start, min(start + 32, len(data)))]
        crops = torch.stack([s[0] for s in samples])
        predicted.append(estimate_crops(model, crops, codec, flip_indices)[0].numpy())
    # compared in crop pixels: the map from image to crop keeps ratios of lengths
    truth = np.stack([np.asarray(dataset[i][1]) for i in range(len(data))])
    return pck(np.concatenate(predicted), truth, data.labelled, torso_lengths(truth, data.labelled, data.skeleton))


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
