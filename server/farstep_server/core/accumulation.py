"""Gradients that workers have accumulated here, each until its next contribution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from farstep_server.core.gradients import Gradients, accumulate


@dataclass
class _Accumulated:
    count: int
    gradients: Gradients


class Accumulators:
    """What each worker has accumulated: the sum, in the order in which it came, as ``backward`` would have left it."""

    def __init__(self) -> None:
        self._held: dict[str, _Accumulated] = {}

    def count(self, worker: str) -> int:
        """Return how many sets of gradients went into a worker's sum."""
        held = self._held.get(worker)
        return 0 if held is None else held.count

    def add(self, worker: str, gradients: Gradients) -> None:
        """Add gradients to a worker's sum. Their memory is not kept."""
        held = self._held.get(worker)
        if held is None:
            own = [None if gradient is None else gradient.clone() for gradient in gradients]
            self._held[worker] = _Accumulated(1, own)
            return
        held.gradients = [_sum(own, new, in_place=True) for own, new in zip(held.gradients, gradients, strict=True)]
        held.count += 1

    def with_last(self, worker: str, gradients: Gradients) -> Gradients:
        """Return a worker's sum with the last gradients added; the sum itself stays as it is."""
        held = self._held.get(worker)
        if held is None:
            return gradients
        return [_sum(own, last, in_place=False) for own, last in zip(held.gradients, gradients, strict=True)]

    def drop(self, worker: str) -> None:
        """Forget a worker's sum."""
        self._held.pop(worker, None)


def _sum(own: Tensor | None, new: Tensor | None, *, in_place: bool) -> Tensor | None:
    if new is None:
        return own if own is None or in_place else own.clone()
    if own is None:
        return new.clone()
    return accumulate(own if in_place else own.clone(), new, None)
