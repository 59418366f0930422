"""The mean of a round's gradients, made a few parameters at a time, while the optimizer steps with those before.

What is made lies in memory that the next few take over: it is still in the cache when the step reads it, never has to leave
it, and there is no second copy of all gradients. Elements do not depend on their neighbours, and torch's optimizers step each
parameter by itself, so the bits are those of the whole mean and one step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from farstep_server.core.gradients import Gradients
from farstep_wire.layout import Layout, align

_LEAST_BYTES, _MOST_BYTES = 4 * 1024 * 1024, 8 * 1024 * 1024
_MOST_AS_THEY_ARE_BYTES = 32 * 1024 * 1024
"""Where there is nothing to be made that should stay in the cache."""
_SHARES = 1.25
"""A slice is at most so small a part of what each thread has still to do: they are through at nearly the same time."""

Term = tuple[Tensor, bool, float | None]
"""A gradient, whether it is borrowed, and its weight, None where all count alike."""


@dataclass(frozen=True)
class Column:
    """One worker's gradients, whether they are borrowed, and their weight, None where all count alike."""

    gradients: Gradients
    borrowed: bool
    share: float | None


class Slices:
    """Runs of a layout's parameters whose gradients are made together, and memory for that: for so many at the same time.

    ``alone``: the runs of one parameter that is larger than a slice; there is memory for one of them at a time.
    ``as_they_are``: for one worker's gradients, which are not made, and take no memory.
    """

    def __init__(self, layout: Layout, at_once: int, *, as_they_are: bool = False) -> None:
        self.layout = layout
        self._most = _MOST_AS_THEY_ARE_BYTES if as_they_are else _MOST_BYTES
        self.overlap = any(parameter.storage for parameter in layout.parameters)
        """Whether parameters share memory, so that their order matters."""
        rest = layout.gradients.nbytes
        most = self._slice_bytes(rest, at_once)
        runs: list[tuple[range, int]] = []
        for index, spec in enumerate(layout.specs):
            size = align(spec.nbytes)
            rest -= size
            if runs and runs[-1][1] + size <= self._slice_bytes(rest, at_once):
                (run, before) = runs[-1]
                runs[-1] = range(run.start, index + 1), before + size
            else:
                runs.append((range(index, index + 1), size))
        self.alone = tuple(run for run, size in runs if size > most)
        self.together = tuple(run for run, size in runs if size <= most)
        if as_they_are:
            return
        buffers = [
            torch.empty(max((size for _, size in runs if place == 0 or size <= most), default=0), dtype=torch.uint8)
            for place in range(at_once)
        ]
        self._views = [
            self._in(buffer, self.together if place else [run for run, _ in runs])
            for place, buffer in enumerate(buffers)
        ]

    def _slice_bytes(self, rest: int, at_once: int) -> int:
        """Return how large a slice may be where so many bytes are to come (guided self-scheduling, Polychronopoulos 1987)."""
        return max(_LEAST_BYTES, min(self._most, int(rest / (_SHARES * at_once))))

    @property
    def runs(self) -> tuple[range, ...]:
        """All of them, in the layout's order."""
        return tuple(sorted((*self.alone, *self.together), key=lambda run: run.start))

    def views(self, run: range, place: int) -> list[Tensor]:
        """Return where a run's gradients are made; those at another place are not in their way."""
        return self._views[place][run]

    def _in(self, buffer: Tensor, runs: Sequence[range]) -> dict[range, list[Tensor]]:
        result = {}
        for run in runs:
            offsets = itertools.accumulate((align(self.layout.specs[index].nbytes) for index in run), initial=0)
            result[run] = [
                self.layout.specs[index].view(buffer, offset) for index, offset in zip(run, offsets, strict=False)
            ]
        return result


def _lie_alike(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether each column's tensors lie in one storage, and in all columns at the same distances."""
    distances = []
    for column in columns:
        first, last = column[0], column[-1]
        if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
            return False
        start = first.data_ptr()
        distances.append([tensor.data_ptr() - start for tensor in column])
    return all(other == distances[0] for other in distances[1:])


@dataclass(frozen=True)
class Means:
    """A mean that is not made yet. ``begun``: the sum of what came before the columns, which is read and never written.

    ``divisor``: what the sums are divided by, the number of workers or their weights' sum.
    """

    slices: Slices
    begun: Gradients | None
    columns: Sequence[Column]
    divisor: float
    counts: bool = field(default=True)
    """Whether the divisor is a number of workers, exact in any floating-point dtype."""

    def absent(self, number: int) -> bool:
        """Whether no worker has a gradient for a parameter."""
        return number in self.absent_ones

    @cached_property
    def absent_ones(self) -> frozenset[int]:
        """The parameters for which no worker has a gradient."""
        rows = [column.gradients for column in self.columns] + ([] if self.begun is None else [self.begun])
        numbers = [number for number, gradient in enumerate(rows[0]) if gradient is None] if rows else []
        return frozenset(number for number in numbers if all(row[number] is None for row in rows[1:]))

    @cached_property
    def _whole(self) -> bool:
        """Whether the sums are those of some workers' gradients alone, of every parameter, and all count alike."""
        return (
            self.begun is None
            and len(self.columns) > 1
            and all(column.share is None for column in self.columns)
            and not any(gradient is None for column in self.columns for gradient in column.gradients)
        )

    def make(self, run: range, place: int = 0, *, divided: bool = True) -> Gradients:
        """Return a run's gradients; those made at this place before are then gone. Not ``divided``: the sums.

        One worker's gradients are returned as they are.
        """
        if self.divisor == 1.0 and self.counts:
            return self.columns[0].gradients[run.start : run.stop]
        views = self.slices.views(run, place)
        if not (self._whole and self._at_once(run, views, divided)):
            return [self._one(number, view, divided) for number, view in zip(run, views, strict=True)]
        return list(views)

    def _at_once(self, run: range, views: list[Tensor], divided: bool) -> bool:
        """Make a run's gradients in one operation where they lie alike, in one piece; False where they do not."""
        if any(view.dtype != views[0].dtype for view in views):
            return False
        columns: list[Any] = [views, *(column.gradients[run.start : run.stop] for column in self.columns)]
        if not _lie_alike(columns):
            return False
        size = (views[-1].data_ptr() - views[0].data_ptr()) // views[0].element_size() + views[-1].numel()
        target, *pieces = (torch.as_strided(column[0], (size,), (1,)) for column in columns)
        _into(target, None, [(piece, True, None) for piece in pieces], self.divisor if divided else None)
        return True

    def again(self, number: int) -> Tensor | None:
        """Return one parameter's mean, of the workers' gradients as they lie there by now."""
        spec = self.slices.layout.specs[number]
        return self._one(number, torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype), divided=True)

    def _one(self, number: int, target: Tensor, divided: bool) -> Tensor | None:
        if self.absent(number):
            return None
        divisor = self.divisor if divided else None
        begun = None if self.begun is None else self.begun[number]
        terms = [
            (gradient, column.borrowed, column.share)
            for column in self.columns
            if (gradient := column.gradients[number]) is not None
        ]
        return blockwise(target, begun, terms, target.stride(), divisor)


_BLOCK_BYTES = 1024 * 1024


def blockwise(
    target: Tensor, begun: Tensor | None, terms: Sequence[Term], strides: tuple[int, ...], divisor: float | None
) -> Tensor:
    """Make the sum of what was begun and of terms in ``target``, which may be what was begun or the first term; divide it.

    In blocks that stay in the cache between one operation and the next. A weighted sum is made in one piece, since torch fuses
    multiplication and addition in full vectors alone.
    """
    tensors = [tensor for tensor, _, _ in terms] if begun is None else [begun, *(tensor for tensor, _, _ in terms)]
    plain = all(share is None for _, _, share in terms)
    alike = all(tensor.stride() == strides for tensor in (target, *tensors))
    if plain and alike and target.is_cpu and target.nbytes > _BLOCK_BYTES:
        size = _BLOCK_BYTES // target.element_size()
        blocks = zip(*(torch.split(_flat(tensor), size) for tensor in (target, *tensors)), strict=True)
        for block, *pieces in blocks:
            own: list[Term] = [(piece, False, None) for piece in pieces]
            _into(block, None, own, divisor)
    else:
        _into(target, begun, terms, divisor)
    return target


def _into(target: Tensor, begun: Tensor | None, terms: Sequence[Term], divisor: float | None) -> None:
    if begun is not None:
        terms = [(begun, False, None), *terms]
    (first, _, share), *rest = terms
    if share is not None:
        torch.mul(first, share, out=target)
    elif rest and rest[0][2] is None:
        torch.add(first, rest[0][0], out=target)
        del rest[0]
    elif rest:
        torch.add(first, rest[0][0], alpha=rest[0][2], out=target)
        del rest[0]
    elif target is not first:
        target.copy_(first)
    for tensor, _, weight in rest:
        if weight is None:
            target.add_(tensor)
        else:
            target.add_(tensor, alpha=weight)
    if divisor is not None:
        target.div_(divisor)


def _flat(tensor: Tensor) -> Tensor:
    # The strides are those of the layout, whose gradients lie dense.
    return tensor.as_strided((tensor.numel(),), (1,))
