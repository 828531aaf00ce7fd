"""Schedule, optimizers and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastpose.training.muon import Muon
from fastpose.training.settings import TrainConfig


class Schedule:
    """Which stage and learning rate factor belong to a step. Step counts are fixed by the data set's length."""

    def __init__(self, config: TrainConfig, samples: int) -> None:
        self.config = config
        self.per_epoch = [samples // s.batch_size for s in config.stages]
        for stage, steps in zip(config.stages, self.per_epoch, strict=True):
            if steps == 0:
                raise ValueError(
                    f"the data set has {samples} samples, fewer than one batch of {stage.batch_size}: "
                    "give the stages a smaller batch_size"
                )
        self.steps = [max(1, round(s.epochs * n)) for s, n in zip(config.stages, self.per_epoch, strict=True)]
        self.total = sum(self.steps)

    def epoch(self, step: int) -> float:
        """Epochs over all stages that are done before `step`."""
        done = 0.0
        for steps, per_epoch in zip(self.steps, self.per_epoch, strict=True):
            done += min(step, steps) / per_epoch
            step -= min(step, steps)
        return done

    def factor(self, step: int) -> float:
        """Learning rate of `step` in units of the peak."""
        c = self.config
        warm = c.warmup if c.warmup >= 1 else c.warmup * self.total
        if step < warm:
            return (step + 1) / (warm + 1)
        if c.milestones:
            done = self.epoch(step) + 1e-9  # not late by a rounding error
            return float(c.gamma ** sum(done >= m for m in c.milestones))
        start = c.decay_start * self.total
        if step < start:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - start) / max(self.total - start, 1)))


class Optimizer:
    """The optimizer of the config with gradient scaling (float16 only) and clipping behind one interface.

    Per step: ``backward(loss)``, then ``step(factor)``.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.clip = config.clip or math.inf
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Muon takes matrices only: 2-D parameters that share storage with the [O, I, k, k] weights
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and config.optimizer == "muon"]
        self.matrices = [m.weight for m in convolutions if m.weight.requires_grad and _is_dense(m)]
        self.views = [nn.Parameter(_in_order(p, p.detach()).view(p.shape[0], -1)) for p in self.matrices]
        taken = {id(p) for p in self.matrices}
        others = [p for p in self.parameters if id(p) not in taken]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        first: torch.optim.Optimizer
        if config.optimizer == "sgd":
            first = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        elif config.optimizer == "adam":
            first = torch.optim.Adam(groups, lr=config.lr)
        else:
            first = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))
        self.parts: list[torch.optim.Optimizer] = [first]
        self.rates = [config.lr]
        if self.views:
            self.parts.append(Muon(self.views, lr=config.muon_lr, weight_decay=config.weight_decay))
            self.rates.append(config.muon_lr)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss` in place of those of the step before."""
        for p in self.parameters:
            p.grad = None
        self.scaler.scale(loss).backward()

    def step(self, factor: float) -> bool:
        """Clip and step with `factor` times the learning rates; false, and no step, if a gradient is not finite.

        With float16 that happens now and then, until the scale is small enough.
        """
        for p, view in zip(self.matrices, self.views, strict=True):
            view.grad = None if p.grad is None else _in_order(p, p.grad).reshape(view.shape)
        for part in self.parts:
            self.scaler.unscale_(part)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        finite = math.isfinite(float(norm))
        if finite:
            for part, rate in zip(self.parts, self.rates, strict=True):
                for group in part.param_groups:
                    group["lr"] = rate * factor
                self.scaler.step(part)
        self.scaler.update()
        return finite

    @property
    def may_skip(self) -> bool:
        """Whether a gradient that is not finite is no failure."""
        return self.scaler.is_enabled()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts], "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, s in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(s)
        self.scaler.load_state_dict(state["scaler"])


def _is_dense(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and min(conv.weight.shape[:2]) >= 8


def _in_order(weight: Tensor, values: Tensor) -> Tensor:
    """`values`, shaped like a convolution's `weight`, with its dimensions in the order of the weight's memory."""
    return values.permute(0, 2, 3, 1) if weight.is_contiguous(memory_format=torch.channels_last) else values


class Average:
    """Exponential moving average of parameters and floating-point buffers: decay min(ema, (1 + n) / (10 + n)).

    `state` has the names and shapes of the model's state dict.
    """

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

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Go on from what `state` and `updates` were."""
        for key, value in state.items():
            self.state[key].copy_(value)
        self.updates = updates
