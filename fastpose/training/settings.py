"""What decides the outcome of a run: `TrainConfig`, read from a recipe and overrides by `fastpose.config`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastpose.checkpoints import DEFAULT_WEIGHTS
from fastpose.codecs import AssociativeEmbeddingCodec, Codec, HeatmapCodec, SoftmaxHeatmapCodec
from fastpose.data import DATASETS, METRICS, usual_metric
from fastpose.data.crops import Augmentation
from fastpose.models import is_bottom_up, model_entry
from fastpose.models._registry import check_codec

OPTIMIZERS = ("adamw", "muon", "adam", "sgd")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Stage:
    """A part of the schedule at one input size: `size` (height, width), `epochs`, `batch_size`.

    mosaic: most people in a scene, if not the number of the whole run.
    """

    size: tuple[int, int]
    epochs: float
    batch_size: int = 32
    mosaic: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run.

    Attributes:
        data: folder of the unpacked data set; dataset: its kind, see `fastpose.data.load_dataset`; splits: names of the
            parts to train and validate on; skeleton: for dataset "custom", a file or the name of a built-in one.
        options: fields of the network's config dataclass that differ from its default.
        metric: decides which weights are the best: "PCK@0.2", "PCKh@0.5" or "AP"; empty: as usual for the data set.
        stages: run one after the other under one learning rate schedule. Default: 210 epochs at the network's size.
        optimizer: ``"adamw"`` (betas 0.9, 0.99); ``"muon"``: Muon for the weights of dense convolutions, AdamW for
            the rest; ``"adam"`` (betas 0.9, 0.999), whose weight decay is a part of the gradient; ``"sgd"`` with
            `momentum`.
        lr: peak learning rate; muon_lr: of Muon. Linear warm-up over the fraction `warmup` of all steps, or, if it is 1
            or more, over so many steps.
        milestones, gamma: after each of these epochs, counted over all stages, the rate is multiplied by gamma. Without
            milestones it is constant until the fraction `decay_start` of all steps, then half a cosine to 0.
        weight_decay: on tensors with more than one dimension. clip: bound on the gradient's norm, 0 for none.
        ema: decay of the weights' moving average, which is what is validated and saved; 0: the weights themselves.
        padding: crop side in units of the box's longer side. codec: target, loss and decoder; ``codec.type`` is
            ``"softmax"`` (default), ``"msra"``, ``"dark"`` or ``"udp"``, for bottom-up networks ``"associative"``; see
            `fastpose.codecs`.
        mosaic: for bottom-up networks: train and validate on scenes of up to so many people put together from the data
            set's images, each of which shows one; 0: on the images as they are.
        validate_every: epochs between validations; limit: use only the first images of each split (0: all).
        memory: decoded people are kept in memory up to so many gigabytes per process, the others are read every time.
        teacher: a trained top-down network to learn from beside the labels, a name with shipped weights or a fastpose
            file, with flip test where its weights recommend it; teacher_weight: the share of its targets in the loss,
            the labels' is the rest; for bottom-up networks in the loss on positions.
        init: weights to start from instead of random numbers, "default" or a file; if they are for other keypoints,
            everything but the last layer is taken.
        initialization: of a network without `init`: ``"torch"``: as PyTorch initialises layers; ``"hrnet"``: the
            weights of all convolutions normally distributed with standard deviation 0.001, their biases 0, as in
            HRNet's code. The heatmaps then begin near 0.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        precision: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` for autocast; the loss is computed in float32, and
            scaled against underflow for float16.
        compile: run the network through `torch.compile`. sync_batch_norm: batch statistics over all processes.
        tensorboard: write the log for TensorBoard too.
    """

    data: str
    output: str
    model: str = "mobileposenet"
    options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "lspet"
    stages: tuple[Stage, ...] = ()
    optimizer: str = "adamw"
    lr: float = 3e-3
    muon_lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 0.02
    warmup: float = 0.03
    decay_start: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    clip: float = 10.0
    ema: float = 0.998
    padding: float = 1.10
    codec: Codec | None = None
    augment: Augmentation = field(default_factory=Augmentation)
    mosaic: int = 0
    validate_every: float = 2.0
    workers: int = 1
    threads: int = 0
    seed: int = 0
    limit: int = 0
    teacher: str = ""
    teacher_weight: float = 0.5
    init: str = ""
    initialization: str = "torch"
    splits: tuple[str, str] = ("train", "val")
    skeleton: str = ""
    metric: str = ""
    memory: float = 8.0
    device: str = "auto"
    precision: str = "float32"
    compile: bool = False
    sync_batch_norm: bool = False
    tensorboard: bool = False

    @property
    def bottom_up(self) -> bool:
        """Whether the network finds all people of an image itself."""
        return is_bottom_up(self.model)

    @property
    def teacher_weights(self) -> tuple[str, str]:
        """The teacher's weights and network as `checkpoints.resolve_weights` takes them."""
        return ("default", self.teacher) if self.teacher in DEFAULT_WEIGHTS else (self.teacher, "auto")

    @property
    def measure(self) -> str:
        """What weights are chosen by, one of `fastpose.data.METRICS`."""
        return self.metric or ("AP" if self.mosaic else usual_metric(self.dataset))

    def __post_init__(self) -> None:
        bottom_up = self.bottom_up
        if self.codec is None:
            codec = AssociativeEmbeddingCodec() if bottom_up else SoftmaxHeatmapCodec()
            object.__setattr__(self, "codec", codec)
        if not self.stages:
            object.__setattr__(self, "stages", (Stage(model_entry(self.model).input_size, 210.0),))
        for name, known in (
            ("dataset", DATASETS), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS),
            ("initialization", ("torch", "hrnet")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.metric not in ("", *METRICS):
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if bottom_up and self.metric == "PCKh@0.5":
            raise ValueError("a bottom-up network can be validated by AP or PCK@0.2, not by PCKh@0.5")
        assert self.codec is not None
        check_codec(self.model, self.codec)
        if isinstance(self.codec, HeatmapCodec) and self.codec.stride != 4:
            raise ValueError(
                f"codec.stride must be 4: {self.model}'s heatmaps are a quarter of the image, got {self.codec.stride}"
            )
        if self.teacher and isinstance(self.codec, AssociativeEmbeddingCodec) and not self.codec.position:
            raise ValueError(
                "a teacher tells a bottom-up network where keypoints are: codec.position must be above 0, got 0"
            )
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight must be between 0 and 1, got {self.teacher_weight}")
        if self.mosaic < 0 or (self.mosaic and not bottom_up):
            raise ValueError(f"mosaic must be a number of people, for bottom-up networks only, got {self.mosaic}")
        for stage in self.stages:
            if min(stage.size) < 1 or not 0 < stage.epochs < math.inf or stage.batch_size < 1:
                raise ValueError(f"stages need a positive size, number of epochs and batch_size, got {stage}")
            if stage.mosaic < 0 or (stage.mosaic and not self.mosaic):
                raise ValueError(f"a stage's mosaic must be a number of people, in runs with mosaics only, got {stage}")
        if not 0 < self.validate_every < math.inf:
            raise ValueError(f"validate_every must be positive and finite, got {self.validate_every}")
        for name in ("threads", "seed", "workers", "limit", "memory"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "muon_lr", "warmup", "clip", "weight_decay", "gamma", "momentum"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.padding > 0:
            raise ValueError(f"padding must be positive, got {self.padding}")
        if not 0 <= self.decay_start <= 1:
            raise ValueError(f"decay_start must be between 0 and 1, got {self.decay_start}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {self.ema}")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must be epochs in ascending order, got {list(self.milestones)}")
