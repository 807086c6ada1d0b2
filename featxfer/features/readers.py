"""Threads that read images ahead of what is computed of them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_MOST_READERS = 16

S = TypeVar("S")
T = TypeVar("T")


def read_ahead(run: Callable[[T], S], items: Iterable[T], count: int) -> Generator[S, None, None]:
    """What `run` gives for each item, in order, computed by threads `count` items ahead."""
    pool = ThreadPoolExecutor(reader_count(), "featxfer-reader", _one_core)
    waiting: deque[Future[S]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(run, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def reader_count() -> int:
    """As many as this process has cores: its share of them where torchrun started several."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(_MOST_READERS, share))


def _one_core() -> None:
    """Makes torch's operations in this thread run in it alone: there are several such threads."""
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()  # torch sets the number when it is first asked, so it is asked before
    threadpool_limits(1, user_api="openmp")
