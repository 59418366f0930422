"""The mean of a round's gradients, in worker order.

A sum in worker order followed by one division, whatever the order of arrival, so that its bits depend on the contributions
alone. One contribution is taken as it is: no copy, no division. A parameter for which some workers have no gradient is divided
by the weight of all that contributed, since theirs is the derivative of the mean loss; where no worker has one, there is none.

Gradients that lie in a worker's own memory are read and never written: their sum is made in memory of the server's. Sums
are made and divided in blocks that stay in the cache in between, which leaves the bits as they are.

While a round waits for slow workers, the gradients of the first in order are added up already. That sum too lies in memory of
the server's, and what went into it stays as it is: if one of them drops out, the sum is made anew from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farstep_server.core.gradients import Gradients, Staged, accumulate
from farstep_server.core.means import Column, Means, Slices, Term, blockwise
from farstep_server.core.team import team
from farstep_wire.errors import Applied, MismatchError
from farstep_wire.layout import Layout


@dataclass(frozen=True)
class Part:
    """One worker's gradients in a round.

    ``borrowed``: they lie in its own memory and must not be written. ``source``: what they came in, by which they are known
    again. ``dense``: all of them are, and lie on the CPU.
    """

    gradients: Gradients
    borrowed: bool = False
    source: Staged | None = None
    dense: bool = False


class _Memory:
    """Memory of the server's for one gradient per parameter."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        buffer = torch.empty(layout.gradients.nbytes, dtype=torch.uint8, device=device)
        places = zip(layout.specs, layout.gradients.offsets, strict=True)
        self.views = [spec.view(buffer, offset) for spec, offset in places]


class Reducer:
    """Reduces the rounds of one hosted optimizer. ``keep_last``: the optimizer may keep the gradients of its last step.

    Memory for sums is taken when the first one is made there, and kept from round to round.
    """

    def __init__(self, *, keep_last: bool) -> None:
        self._memories: list[_Memory | None] = [None, None] if keep_last else [None]
        self._slices: dict[bool, Slices] = {}
        self._begun: list[tuple[object, float | None]] = []
        self._sums: Gradients = []

    def begin(self, parts: Sequence[Part], weights: Sequence[float] | None, layout: Layout) -> None:
        """Add up what the first workers of a round have handed in, dense gradients on the CPU; the others are to follow."""
        keys = _keys(parts, weights)
        if len(keys) < 2 or not all(map(_can_wait, parts)):
            return
        done = self._done_of(keys)
        if not done:
            self._sums = [None] * len(layout.parameters)
        for number in range(len(layout.parameters)):
            terms = _terms(parts[done:], keys[done:], number)
            if terms:
                self._sums[number] = self._sum(
                    self._sums[number], terms, self._memory(number, layout, terms[0][0].device)
                )
        self._begun = keys

    def mean(self, parts: Sequence[Part], weights: Sequence[float] | None, layout: Layout) -> Gradients:
        """Return the (weighted) mean in the order given. The memory of the first that is not borrowed may be used for it."""
        if len(parts) == 1:
            return parts[0].gradients
        total = float(len(parts)) if weights is None else sum(weights)
        keys = _keys(parts, weights)
        done = self._done_of(keys)
        sums = self._sums if done else [None] * len(layout.parameters)
        result = []
        for number in range(len(layout.parameters)):
            terms = _terms(parts[done:], keys[done:], number)
            try:
                result.append(self._one(number, sums[number], terms, total, layout))
            except RuntimeError as error:  # such as sparse over one dimension here and over two there
                raise MismatchError(
                    f"the workers' gradients of parameter {number} cannot be added: {error}", applied=Applied.NO
                ) from error
        self.forget()
        self._memories.reverse()
        return result

    def means(self, parts: Sequence[Part], weights: Sequence[float] | None, layout: Layout) -> Means | None:
        """Return the (weighted) mean in the order given as one that is made while the optimizer steps.

        None where it cannot be: only dense gradients on the CPU, in the server's own memory or in a worker's, can wait.
        """
        if not all(map(_can_wait, parts)):
            return None
        if len(parts) == 1:
            weights = None
        keys = _keys(parts, weights)
        done = self._done_of(keys)
        begun = self._sums if done else None
        columns = [
            Column(part.gradients, part.borrowed, share)
            for part, (_, share) in zip(parts[done:], keys[done:], strict=True)
        ]
        self.forget()
        self._memories.reverse()
        total = float(len(parts)) if weights is None else sum(weights)
        return Means(self._slices_of(layout, len(parts) == 1), begun, columns, total, counts=weights is None)

    def _slices_of(self, layout: Layout, as_they_are: bool) -> Slices:
        known = self._slices.get(as_they_are)
        if known is None or known.layout is not layout:
            threads = team()
            at_once = 1 if threads is None else threads.size
            known = self._slices[as_they_are] = Slices(layout, at_once, as_they_are=as_they_are)
        return known

    def own(self, part: Part, layout: Layout) -> Gradients:
        """Return gradients that may be written: a copy of borrowed ones."""
        if not part.borrowed:
            return part.gradients
        own: Gradients = [
            None if gradient is None else self._memory(number, layout, gradient.device).copy_(gradient)
            for number, gradient in enumerate(part.gradients)
        ]
        self._memories.reverse()
        return own

    def forget(self) -> None:
        """Forget the sum that was begun."""
        self._begun, self._sums = [], []

    def _done_of(self, keys: list[tuple[object, float | None]]) -> int:
        """Return how many of a round's parts the sum holds that was begun; one that holds others is forgotten."""
        begun = self._begun
        alike = len(begun) <= len(keys) and all(
            known[0] is own[0] and known[1] == own[1] for known, own in zip(begun, keys, strict=False)
        )
        if not alike:
            self.forget()
        return len(self._begun)

    def _one(self, number: int, begun: Tensor | None, terms: list[Term], total: float, layout: Layout) -> Tensor | None:
        if begun is None and not terms:
            return None
        if any(tensor.is_sparse for tensor, _, _ in terms):
            if begun is not None:
                terms = [(begun, False, None), *terms]
            return _sum_with_sparse(terms).div_(total)
        if begun is not None:
            return blockwise(begun, begun, terms, layout.specs[number].strides, total)
        first, borrowed, _ = terms[0]
        target = self._memory(number, layout, first.device) if borrowed else first
        return blockwise(target, None, terms, layout.specs[number].strides, total)

    def _sum(self, begun: Tensor | None, terms: list[Term], target: Tensor) -> Tensor:
        return blockwise(target, begun, terms, target.stride(), None)

    def _memory(self, number: int, layout: Layout, device: torch.device) -> Tensor:
        memory = self._memories[0]
        if memory is None or memory.layout is not layout or memory.device != device:
            memory = self._memories[0] = _Memory(layout, device)
        return memory.views[number]


def _keys(parts: Sequence[Part], weights: Sequence[float] | None) -> list[tuple[object, float | None]]:
    shares: Sequence[float | None] = [None] * len(parts) if weights is None else weights
    return [(part if part.source is None else part.source, share) for part, share in zip(parts, shares, strict=True)]


def _terms(parts: Sequence[Part], keys: Sequence[tuple[object, float | None]], number: int) -> list[Term]:
    return [
        (gradient, part.borrowed, share)
        for part, (_, share) in zip(parts, keys, strict=True)
        if (gradient := part.gradients[number]) is not None
    ]


def _can_wait(part: Part) -> bool:
    return part.source is not None and part.dense


def _sum_with_sparse(terms: list[Term]) -> Tensor:
    accumulator: Tensor | None = None
    for tensor, borrowed, share in terms:
        accumulator = accumulate(accumulator, tensor.clone() if borrowed else tensor, share)
    assert accumulator is not None, "there are terms"
    return accumulator
