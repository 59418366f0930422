"""Policies: how contributions become rounds. Shared by client and server; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


def as_timedelta(value: timedelta | float | None, name: str) -> timedelta | None:
    """Take a duration as a timedelta or as seconds; ValueError where it is not positive."""
    if value is None:
        return None
    duration = value if isinstance(value, timedelta) else timedelta(seconds=value)
    if duration <= timedelta(0):
        raise ValueError(f"{name} must be positive, not {value!r}")
    return duration


@dataclass(frozen=True)
class Sync:
    """Each live worker contributes or abstains once per round; the round commits when all have.

    ``workers``: how many must have joined before the first round commits. ``timeout``: how long after a round's first
    contribution it may commit without the rest, where at least ``min_workers`` have contributed. Without a timeout a round
    waits for every live worker; a worker that dies leaves when its lease runs out.
    """

    workers: int = 1
    min_workers: int | None = None
    timeout: timedelta | float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.workers, int) or self.workers < 1:
            raise ValueError(f"Sync: workers must be an int of at least 1, not {self.workers!r}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"Sync: min_workers must be between 1 and workers={self.workers}, not {self.min_workers!r}"
            )
        object.__setattr__(self, "timeout", as_timedelta(self.timeout, "Sync: timeout"))


@dataclass(frozen=True)
class Async:
    """Each contribution is a round of its own.

    ``max_staleness``: steps that a worker may run ahead of the slowest live one, as in stale-synchronous parallel (Ho et
    al. 2013); None: any number. ``scale_lr``: divide the learning rate of each step by the staleness of its gradients, the
    number of steps committed since the version they were taken at (Zhang et al. 2016).
    """

    max_staleness: int | None = None
    scale_lr: bool = False

    def __post_init__(self) -> None:
        if self.max_staleness is not None and (not isinstance(self.max_staleness, int) or self.max_staleness < 0):
            raise ValueError(f"Async: max_staleness must be None or an int of at least 0, not {self.max_staleness!r}")


Policy = Sync | Async


def worker_order(worker: str) -> tuple[int, int, str]:
    """Sort key of worker ids: numbers by value, then everything else by text."""
    return (0, int(worker), "") if worker.isascii() and worker.isdigit() else (1, 0, worker)
