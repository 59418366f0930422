"""Transfers beside computation: gradients leave during ``backward``, parameters come in during the next ``forward``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from farstep.session.arrivals import Arrival
from farstep.session.binding import Binding, Load
from farstep.session.early import BUCKET_BYTES, EarlyGradients
from farstep.session.lazy import LateParameters
from farstep.session.link import Link
from farstep.transports.base import Rest

__all__ = ["BUCKET_BYTES", "Overlap", "OverlapOptions", "check_modules"]


@dataclass(frozen=True)
class OverlapOptions:
    """``modules``: those whose parameters may come late; none: all that are found to own some. ``late``: whether any may."""

    modules: tuple[nn.Module, ...] = ()
    bucket_bytes: int = BUCKET_BYTES
    late: bool = True


class Overlap:
    """What overlaps in one session, as long as its layout stays as it is. ``pull_again``: takes over whole parameters."""

    def __init__(
        self,
        binding: Binding,
        link: Callable[[], Link | None],
        pull_again: Callable[[], None],
        options: OverlapOptions,
    ) -> None:
        self._binding = binding
        self._link = link
        self._pull_again = pull_again
        self.late = options.late
        """Whether parameters may come late."""
        tensors, layout = binding.tensors, binding.layout
        self._late = LateParameters(tensors, options.modules, self.await_some, self.await_all)
        self._early = EarlyGradients(tensors, layout, link, self._late.produced, options.bucket_bytes)
        ends = zip(layout.arena.offsets, layout.specs, strict=True)
        self._ends = [offset + spec.nbytes for offset, spec in ends]

    def no_sync(self) -> AbstractContextManager[None]:
        """Send nothing early meanwhile."""
        return self._early.paused()

    def complete(self, link: Link, load: Load) -> bool:
        """Send what is missing of a contribution of which some has been sent; False where it goes whole."""
        return link.open and load.dense is not None and self._early.complete(link, load.dense)

    def settled(self) -> None:
        """The contribution is over."""
        self._early.settled()

    def begin(self, link: Link, rest: Rest) -> None:
        """Have the parameters come in, and wait for those that may not be late."""
        self._late.begin()
        self._binding.expect()
        link.arrival = Arrival(rest, self._binding.settle)

    def await_needed(self) -> None:
        """Wait for the parameters that may not be late."""
        self.await_some(self._late.must)

    def await_some(self, numbers: Iterable[int]) -> None:
        """Wait until these parameters are there."""
        link = self._link()
        arrival = None if link is None else link.arrival
        if arrival is None:
            return
        end = max((self._end(number) for number in numbers), default=0)
        if not arrival.wait_for(end):
            self.await_all()

    def _end(self, number: int) -> int:
        return self._ends[number]

    def await_all(self) -> None:
        """Wait until all parameters are there."""
        link = self._link()
        if link is not None and link.arrival is not None:
            link.finish_arrival()
            if link.broken_arrival:
                self._pull_again()

    def close(self) -> None:
        """Let nothing overlap any more."""
        self._early.close()
        self._late.close()


def check_modules(modules: Sequence[object]) -> tuple[nn.Module, ...]:
    """Return the modules; TypeError for what is none."""
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"overlap takes modules, not {type(module).__name__}")
    return tuple(module for module in modules if isinstance(module, nn.Module))
