"""Doing work before its results are asked for, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def reading_threads() -> int:
    """Threads that read and cut images fast enough to keep the network busy on the rest of torch's."""
    return max(1, torch.get_num_threads() // 4)


def run_ahead(function: Callable[[T], R], items: Iterable[T], ahead: int, threads: int = 1) -> Generator[R, None, None]:
    """``map(function, items)`` in `threads` threads, up to `ahead` results before they are asked for; in order.

    `items` is iterated over here, `function` runs in the threads. No more than `ahead` + 1 items and results exist at a
    time. An exception is raised when its result is due, that of `items` after all results before it. When the iterator
    is closed, at its end, by an exception or because nobody wants the rest, what has not begun is cancelled and the
    threads end. With `ahead` 0 it is `map`.
    """
    if ahead < 1:
        yield from map(function, items)
        return
    due: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastpose")
    source, failure = iter(items), None
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            due.append(pool.submit(function, item))
            if len(due) > ahead:
                yield due.popleft().result()
        while due:
            yield due.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)
