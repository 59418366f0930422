"""The mean of a round's gradients, in worker order.

A sum in worker order followed by one division, whatever the order of arrival, so that its bits depend on the contributions
alone. One contribution is taken as it is: no copy, no division. A parameter for which some workers have no gradient is divided
by the weight of all that contributed, since theirs is the derivative of the mean loss; where no worker has one, there is none.

Gradients that lie in a worker's own memory are read and never written: their sum is made in memory of the server's. Sums
are made and divided in blocks that stay in the cache in between. Elements do not depend on their neighbours, so blocks leave
the bits as they are. A weighted sum is made in one piece, since torch fuses multiplication and addition in full vectors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from farstep_server.core.gradients import Gradients, accumulate
from farstep_wire.errors import Applied, MismatchError
from farstep_wire.layout import Layout

_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Part:
    """One worker's gradients in a round. ``borrowed``: they lie in its own memory and must not be written."""

    gradients: Gradients
    borrowed: bool = False


class Reducer:
    """Reduces rounds of one hosted optimizer. It keeps the memory for the mean of borrowed gradients from round to round."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._layout: Layout | None = None
        self._views: list[Tensor] = []

    def mean(self, parts: Sequence[Part], weights: Sequence[float] | None, layout: Layout) -> Gradients:
        """Return the (weighted) mean in the order given. The memory of the first that is not borrowed may be used for it."""
        if len(parts) == 1:
            return parts[0].gradients
        total = float(len(parts)) if weights is None else sum(weights)
        shares: Sequence[float | None] = list(repeat(None, len(parts))) if weights is None else weights
        return [
            self._one(
                number,
                [
                    (gradient, part.borrowed, share)
                    for part, share in zip(parts, shares, strict=True)
                    if (gradient := part.gradients[number]) is not None
                ],
                total,
                layout,
            )
            for number in range(len(layout.parameters))
        ]

    def own(self, part: Part, layout: Layout) -> Gradients:
        """Return gradients that may be written: a copy of borrowed ones."""
        if not part.borrowed:
            return part.gradients
        return [
            None if gradient is None else self._memory_of(number, gradient, layout).copy_(gradient)
            for number, gradient in enumerate(part.gradients)
        ]

    def _one(
        self, number: int, terms: list[tuple[Tensor, bool, float | None]], total: float, layout: Layout
    ) -> Tensor | None:
        if not terms:
            return None
        try:
            if any(tensor.is_sparse for tensor, _, _ in terms):
                return _sum_with_sparse(terms).div_(total)
            first, borrowed, share = terms[0]
            target = self._memory_of(number, first, layout) if borrowed else first
            if share is None:
                tensors = [tensor for tensor, _, _ in terms]
                return _blockwise_mean(target, tensors, total, layout.specs[number].strides)
            torch.mul(first, share, out=target)
            for tensor, _, other in terms[1:]:
                target.add_(tensor, alpha=1.0 if other is None else other)
            return target.div_(total)
        except RuntimeError as error:  # such as sparse over one dimension here and over two there
            raise MismatchError(
                f"the workers' gradients of parameter {number} cannot be added: {error}", applied=Applied.NO
            ) from error

    def _memory_of(self, number: int, like: Tensor, layout: Layout) -> Tensor:
        if layout is not self._layout or like.device != self._memory.device:
            self._memory = torch.empty(layout.gradients.nbytes, dtype=torch.uint8, device=like.device)
            offsets = layout.gradients.offsets
            self._views = [spec.view(self._memory, at) for spec, at in zip(layout.specs, offsets, strict=True)]
            self._layout = layout
        return self._views[number]


def _sum_with_sparse(terms: list[tuple[Tensor, bool, float | None]]) -> Tensor:
    accumulator: Tensor | None = None
    for tensor, borrowed, share in terms:
        accumulator = accumulate(accumulator, tensor.clone() if borrowed else tensor, share)
    assert accumulator is not None, "there are terms"
    return accumulator


def _blockwise_mean(target: Tensor, tensors: list[Tensor], total: float, strides: tuple[int, ...]) -> Tensor:
    alike = all(tensor.stride() == strides for tensor in (target, *tensors))
    if target.is_cpu and target.nbytes > _BLOCK_BYTES and alike:
        size = _BLOCK_BYTES // target.element_size()
        blocks = [torch.split(_flat(tensor), size) for tensor in (target, *tensors)]
        for block, *own in zip(*blocks, strict=True):
            _mean_into(block, own, total)
    else:
        _mean_into(target, tensors, total)
    return target


def _mean_into(target: Tensor, tensors: list[Tensor], total: float) -> None:
    if len(tensors) == 1:
        torch.div(tensors[0], total, out=target)
        return
    torch.add(tensors[0], tensors[1], out=target)
    for tensor in tensors[2:]:
        target.add_(tensor)
    target.div_(total)


def _flat(tensor: Tensor) -> Tensor:
    # The strides are those of the layout, whose gradients lie dense.
    return tensor.as_strided((tensor.numel(),), (1,))
