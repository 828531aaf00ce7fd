"""Several processes at one task: data-parallel training and shared evaluation, started by ``torchrun``.

Everything here also works in a single process, where there is nothing to share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from fastpose.stream import reading_threads, run_ahead

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


def choose_device(name: str) -> torch.device:
    """The device called `name`; ``"auto"``: a GPU if there is one. Processes of ``torchrun`` take a GPU each.

    Raises:
        ValueError: CUDA is asked for and torch has none, or fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= count:
            raise ValueError(f"device {name!r}: GPU {index} is needed, torch sees {count}")
        device = torch.device("cuda", index)
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes of ``torchrun`` (NCCL on GPUs, Gloo otherwise) until the end of the block."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def wait_for_all() -> None:
    """Return once every process of the group has come here."""
    if world_size() > 1:
        dist.barrier()


def shared_map(
    read: Callable[[T], S],
    function: Callable[[S], R],
    items: Sequence[T],
    *,
    share: bool = True,
    unit: str = "it",
    quiet: bool = True,
) -> list[R]:
    """``[function(read(item)) for item in items]``, with the items dealt out among the processes of the group.

    Every process must call it with the same items and gets all results, which must be picklable. Each item is worked on
    alone, so that results do not depend on the number of processes. `read` runs in threads, some items ahead.

    Args:
        share: without it this process does everything. unit, quiet: of the progress bar, shown by the first process.
    """
    world, own = (world_size(), rank()) if share else (1, 0)
    at = range(own, len(items), world)
    threads = min(reading_threads(), 4)  # an item can be a batch of large images: some are held at a time
    with contextlib.closing(run_ahead(read, (items[i] for i in at), threads, threads)) as contents:
        shown = tqdm(contents, total=len(at), unit=unit, disable=quiet or own > 0)
        mine = {i: function(content) for i, content in zip(at, shown, strict=True)}
    parts: list[Any] = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    merged = {i: result for part in parts for i, result in part.items()}
    return [merged[i] for i in range(len(items))]
