"""Threads that share one step's work, each with torch's own threads off.

Within one operation torch has its threads meet at the end, and where one of them does not have a processor just then, all
others wait for it; a step is hundreds of operations, and the server's workers may be on the same processors. Of whole
parameters each thread takes the next when it is through with its own, and they meet once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Work = TypeVar("Work")


class Team:
    """So many threads. ``settle``: is called in each of them, with its number, when it begins."""

    def __init__(self, size: int, settle: Callable[[int], None]) -> None:
        self.size = size
        started = threading.Barrier(size)

        def begin() -> None:
            torch.get_num_threads()  # which sets what a thread begins with, once
            torch.set_num_threads(1)
            settle(started.wait())

        self._threads = ThreadPoolExecutor(size, "farstep-team", begin)
        for future in [self._threads.submit(started.wait) for _ in range(size)]:
            future.result()

    def share(self, pieces: Sequence[Work], work: Callable[[Work, int], None]) -> None:
        """Call ``work`` with each piece and the number of the thread that does it, in about that order; raise its errors."""
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


_teams: list[Team] = []


def form_team(settle: Callable[[int], None]) -> None:
    """Start the process's threads, as many as torch uses within one operation, where those are several.

    To be called before there are other threads that use torch: what they begin with is set meanwhile.
    """
    size = torch.get_num_threads()
    if size > 1 and not _teams:
        _teams.append(Team(size, settle))
        torch.set_num_threads(size)


def team() -> Team | None:
    """Return the process's threads, if there are any."""
    return _teams[0] if _teams else None
