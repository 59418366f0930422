"""Threads that share one step's work, each with torch's own threads off.

Within one operation torch has its threads meet at the end, and where one of them does not have a processor just then, all
others wait for it; a step is hundreds of operations, and the server's workers may be on the same processors. Of whole
parameters each thread takes the next when it is through with its own, and they meet once.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Work = TypeVar("Work")


class Team:
    """So many threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        started = threading.Barrier(size)
        processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        own = iter(processors)

        def begin() -> None:
            torch.get_num_threads()  # which sets what a thread begins with, once
            torch.set_num_threads(1)
            if size == len(processors):
                # One that is handed Python's lock is woken on the processor of the thread that let go of it, and would stay
                # there beside it for as long as a step takes.
                os.sched_setaffinity(0, {next(own)})
            started.wait()

        self._threads = ThreadPoolExecutor(size, "farstep-team", begin)
        for future in [self._threads.submit(started.wait) for _ in range(size)]:
            future.result()

    def share(self, pieces: Sequence[Work], work: Callable[[Work, int], None]) -> None:
        """Call ``work`` with each piece and the number of the thread that does it, the first ones first; raise what it raises."""
        taken = iter(pieces)
        lock = threading.Lock()

        def run(number: int) -> None:
            while True:
                with lock:
                    piece = next(taken, None)
                if piece is None:
                    return
                work(piece, number)

        futures = [self._threads.submit(run, number) for number in range(min(self.size, len(pieces)))]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]


@functools.cache
def team() -> Team | None:
    """Return the process's threads, as many as torch uses within one operation; None where that is one.

    The first call is to come before there are other threads that use torch: what they begin with is set meanwhile.
    """
    size = torch.get_num_threads()
    if size == 1:
        return None
    own = Team(size)
    torch.set_num_threads(size)
    return own
