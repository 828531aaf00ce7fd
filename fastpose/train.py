"""Training: one loop, readable from top to bottom.

A run is described by a `TrainConfig` (a recipe file plus overrides) and lives in one folder:

* ``config.json``: every setting, package and library versions, command line; ``--config RUN/config.json`` repeats it;
* ``data.json``: how many images and people there are, and what was left out and why;
* ``log.csv``: one line per validation (step, epoch, size, learning rate, loss, images/s, PCK, PCKh or AP in percent);
* ``last.pt``: everything needed to go on after a kill (parameters, optimizer, average, step, best result), written
  with every validation and every quarter of an hour;
* ``mosaics/``: of a bottom-up network trained on mosaics, those to validate on;
* ``best.safetensors``, ``final.safetensors``: averaged weights, ready for `create_model(weights=...)`.

The randomness of a sample depends on the seed and the sample's number only, so a resumed run draws the same batches.

Started by ``torchrun --nproc-per-node N -m fastpose train ...`` the run is data-parallel: every process takes its
share of each batch and of the people to validate on. On a CPU, N processes of one thread are a third faster than one
process of N threads.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastpose.checkpoints import WeightsInfo, load_pretrained, resolve_weights, save_weights
from fastpose.data import PoseData
from fastpose.data.crops import ResumableBatches
from fastpose.data.scenes import collate_scenes
from fastpose.distributed import choose_device, process_group, rank, wait_for_all, world_size
from fastpose.evaluate import evaluate
from fastpose.layers import channels_last
from fastpose.models import create_model
from fastpose.pipeline import PoseEstimator
from fastpose.preprocess import normalize
from fastpose.skeletons import Skeleton, definition_of
from fastpose.training.optim import Average, Optimizer, Schedule
from fastpose.training.records import (
    Log,
    check_config,
    check_data,
    fingerprint,
    random_state,
    read_state,
    report_data,
    save_state,
    set_random_state,
    write_config,
)
from fastpose.training.samples import (
    Store,
    check_splits,
    check_validation,
    load_split,
    make_dataset,
    open_store,
    scenes_to_validate,
)
from fastpose.training.settings import Stage, TrainConfig
from fastpose.training.sync_norm import synchronize_batch_norm
from fastpose.training.teacher import Teacher

SAVE_AFTER = 900.0  # seconds: how much is lost at most, but for the time of a validation

__all__ = ["Average", "Optimizer", "Schedule", "Stage", "TrainConfig", "train", "validate"]


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> float:
    """Run (or with `resume` continue) the training that `config` describes; returns the best validation result
    in percent (NaN if nothing could be measured), in the metric of the config or else the data set's usual one.

    Raises:
        FileExistsError: the output folder holds a run and `resume` is false.
        FileNotFoundError: data set missing, or nothing to resume.
        ValueError: data or settings that cannot be used, or other settings than those of the run to resume.
        FloatingPointError: the loss or, except with float16, a gradient became NaN or infinite; the batch is saved as
            ``nan_batch.pt`` in the output.
    """
    _tune_allocator()
    device = choose_device(config.device)
    with process_group(device):
        return _train(config, device, resume, quiet)


def _train(config: TrainConfig, device: torch.device, resume: bool, quiet: bool) -> float:
    output, first = Path(config.output), rank() == 0
    last = output / "last.pt"
    resume = _check_output(config, output, resume)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)

    train_data, val_data = (load_split(config, split) for split in config.splits)
    check_splits(config, train_data, val_data)
    val_data = scenes_to_validate(config, val_data, output, resume) if config.bottom_up else val_data
    check_validation(val_data)
    data = {"train": fingerprint(train_data), "val": fingerprint(val_data)}
    state: dict[str, Any] = read_state(last) if resume else {}
    check_data(state.get("data", {}), data)
    store = open_store(config, train_data, quiet or not first)
    schedule = Schedule(config, len(store))

    model = _create_model(config, train_data.skeleton, resume).to(device)
    _check_stages(config, model)
    if first:
        for warning in _warnings(config, schedule, train_data.skeleton):
            print(f"fastpose: {warning}", file=sys.stderr)
    optimizer, average = Optimizer(model, config, device), Average(model, config.ema)
    step, best = 0, -1.0
    if resume:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"], state["updates"])
        step, best = state["step"], state["best"]
    network = _wrap(model, config, device)
    teacher = Teacher(config, train_data.skeleton, device) if config.teacher else None
    if resume:
        set_random_state(state["random"], device)  # last: networks are made with random weights
    state.clear()  # as large as all there is
    if first:
        if not resume:
            write_config(config, device, world_size(), output / "config.json")
        report_data(output / "data.json", train=train_data, val=val_data)
        log = Log(output, step, config.tensorboard)

    def save() -> None:
        save_state(
            last,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            average=average.state,
            updates=average.updates,
            step=step,
            best=best,
            data=data,
            random=random_state(device),
        )

    saved, told = time.time(), [data.report.to_dict() for data in (train_data, val_data)]
    column = {"PCK@0.2": "val_pck", "PCKh@0.5": "val_pckh", "AP": "val_ap"}[val_data.metric]
    progress = tqdm(total=schedule.total, initial=step, desc=config.model, unit="step", disable=quiet or not first)
    stage_end = 0
    for stage, stage_steps, per_epoch in zip(config.stages, schedule.steps, schedule.per_epoch, strict=True):
        stage_start, stage_end = stage_end, stage_end + stage_steps
        if step >= stage_end:
            continue
        loader = _loader(config, store, stage, stage_start, stage_steps, step, device)
        info = _weights_info(config, stage, train_data.skeleton)
        validate_steps = max(1, round(config.validate_every * per_epoch))
        model.train()
        started, images, losses = time.time(), 0, []
        for batch in loader:
            pixels, *targets = (part.to(device, non_blocking=True) for part in batch)
            x = normalize(pixels).contiguous(memory_format=torch.channels_last)
            with _autocast(config, device):
                outputs = network(x)
            loss = _loss(config, outputs, targets) if teacher is None else teacher.loss(x, outputs, targets)
            value = float(loss.detach())
            if not math.isfinite(value):
                _fail(output, step, batch, f"loss is {value}")
            optimizer.backward(loss)
            factor = schedule.factor(step)
            if not optimizer.step(factor) and not optimizer.may_skip:
                _fail(output, step, batch, "a gradient is not finite")
            average.update(model)
            step += 1
            images += len(pixels) * world_size()
            losses.append(value)
            progress.update()
            if (step - stage_start) % validate_steps and step < stage_end:
                if first and time.time() - saved > SAVE_AFTER:
                    save()
                    saved = time.time()
                continue

            # everything from here on happens once per validation
            seconds = time.time() - started
            candidate = output / "candidate.safetensors"
            if first:
                save_weights(candidate, average.state, info)
                if step == stage_end:  # before last.pt says that it is done
                    save_weights(output / "final.safetensors", average.state, info)
            wait_for_all()
            result, used = validate(candidate, val_data, device=device)
            # of equals the later: with few images to validate on AP stays 0 for long; of what cannot be measured too
            better = result >= best or (math.isnan(result) and best < 0)
            best = result if result >= best else best
            if first:
                store.report_others()
                found = [data.report.to_dict() for data in (train_data, used)]
                if found != told:  # images that could not be read this time
                    known = ("train", "val") if found[1] == told[1] else ("train",)
                    report_data(output / "data.json", told=known, train=train_data, val=used)
                    told = found
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
                if better or not (output / "best.safetensors").is_file():
                    os.replace(candidate, output / "best.safetensors")
                candidate.unlink(missing_ok=True)
                save()
                saved = time.time()
            started, images, losses = time.time(), 0, []
    progress.close()
    return best if best >= 0 else math.nan


def _check_output(config: TrainConfig, output: Path, resume: bool) -> bool:
    """Make the folder, unless it holds another run than the one that is wanted. The same answer in every process.

    Returns whether there is something to go on from: a run killed before it saved anything begins again.
    """
    last = output / "last.pt"
    saved = last.exists()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file, expected a folder or the name of a new one")
    if resume and not output.is_dir():
        raise FileNotFoundError(f"nothing to resume: {output} does not exist")
    if not resume and saved:
        raise FileExistsError(f"{output} already holds a run; give --resume to go on, or another output folder")
    if resume:
        check_config(config, output / "config.json", world_size())
    output.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    if rank() == 0:
        for name in ("last", "candidate", "final", "log", "config", "data", "nan_batch"):
            for left in output.glob(f".{name}.*"):  # of writing that was killed
                left.unlink(missing_ok=True)
        if resume and not saved:
            print(f"fastpose: {output} was killed before it saved anything; it begins again", file=sys.stderr)
    return saved


def _create_model(config: TrainConfig, skeleton: Skeleton, resume: bool = False) -> nn.Module:
    k = skeleton.num_keypoints
    model = create_model(config.model, num_keypoints=k, **config.options)
    if config.initialization == "hrnet":
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.001)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    if config.init and not resume:
        path = resolve_weights(config.init, config.model)
        left = load_pretrained(model, config.model, k, path)
        if left and rank() == 0:
            print(f"fastpose: {path.name} is for other keypoints; starting anew: {', '.join(left)}", file=sys.stderr)
    return channels_last(model)


def _check_stages(config: TrainConfig, model: nn.Module) -> None:
    """All of them before the first: hours may lie between."""
    multiple = int(getattr(model, "input_multiple", 1))
    for stage in config.stages:
        if any(side % multiple for side in stage.size):
            raise ValueError(f"stages: {config.model} takes sides that are multiples of {multiple}, got {stage.size}")
        if stage.batch_size % world_size():
            raise ValueError(
                f"stages: batch_size must be a multiple of the number of processes, {world_size()}, got {stage}"
            )


def _warnings(config: TrainConfig, schedule: Schedule, skeleton: Skeleton) -> list[str]:
    """What is allowed and rarely meant."""
    found = []
    epochs = sum(stage.epochs for stage in config.stages)
    if config.augment.mirror and not skeleton.flip_pairs and skeleton.num_keypoints > 1:
        found.append(
            "images are mirrored and no keypoints are a pair of left and right: each keeps its name. If that is wrong, "
            "name the pairs (flip_pairs in a skeleton file) or give augment.mirror=0"
        )
    if config.milestones and config.milestones[0] >= epochs:
        found.append(f"all milestones, {list(config.milestones)}, lie behind the run's {epochs:g} epochs")
    if config.warmup >= schedule.total > 1:
        found.append(f"warmup={config.warmup:g} are more steps than the run's {schedule.total}")
    return found


def _wrap(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """`model` as it is called in training; its parameters stay where they are and keep their names."""
    if config.sync_batch_norm and world_size() > 1:
        synchronize_batch_norm(model, device)
    if config.compile:
        model.compile()
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _loader(
    config: TrainConfig, store: Store, stage: Stage, stage_start: int, steps: int, step: int, device: torch.device
) -> DataLoader[Any]:
    """Batches (images, targets of the codec's loss) of this process from `step` to the end of the stage."""
    # the stage's first step enters the seed: otherwise each stage would repeat the augmentation of the one before
    seed = config.seed * 1000003 + stage_start
    dataset = make_dataset(config, store, stage, seed)
    batches = ResumableBatches(
        len(store),
        stage.batch_size,
        steps,
        seed,
        first_step=step - stage_start,
        rank=rank(),
        world=world_size(),
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        pin_memory=device.type == "cuda",
        collate_fn=collate_scenes if config.bottom_up else None,
        # others give every worker a copy of the people in memory
        multiprocessing_context="fork" if config.workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # not the network's: a run that is resumed makes one loader more
    )


def _weights_info(config: TrainConfig, stage: Stage, skeleton: Skeleton) -> WeightsInfo:
    assert config.codec is not None
    return WeightsInfo(
        model=config.model,
        num_keypoints=skeleton.num_keypoints,
        skeleton=skeleton.name,
        input_size=stage.size,
        padding=config.padding,
        codec=config.codec,
        flip_test=config.augment.mirror > 0,  # mirrored images are strange to others
        options=config.options,
        skeleton_definition=definition_of(skeleton),
    )


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float16
    return torch.autocast(device.type, dtype, enabled=config.precision != "float32")


def _loss(config: TrainConfig, outputs: Any, targets: list[Tensor]) -> Tensor:
    """The codec's loss in float32, whatever the network computed in."""
    assert config.codec is not None
    maps: Any = outputs.float() if isinstance(outputs, Tensor) else [o.float() for o in outputs]
    return config.codec.loss(maps, *targets)


def _fail(output: Path, step: int, batch: list[Tensor], what: str) -> None:
    path = output / "nan_batch.pt"
    save_state(path, step=step, images=batch[0], targets=list(batch[1:]))
    raise FloatingPointError(f"{what} at step {step}; the batch is in {path}")


def validate(
    weights: Path, data: PoseData, flip_test: bool = False, device: torch.device | None = None
) -> tuple[float, PoseData]:
    """Score in percent of a weights file on the annotated boxes of `data`, and the part of `data` that could be used.

    This is what ``fastpose evaluate`` does. In a process group every process must call it; each takes its share.
    """
    estimator = PoseEstimator("auto", weights, detector="none", flip_test=flip_test, device=device)
    result = evaluate(estimator, data, share=True)
    return result.score.value, result.data


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
