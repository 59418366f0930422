"""Parameters in a private mapping of an arena that is written from elsewhere.

What is written to the arena is there at once, and what is written to the parameters goes to a copy of its page that the kernel
makes at that moment. So which pages are copies says where the user may have changed something, without reading the rest, and
the bytes say whether it was a change.

A child that is forked would go on seeing what is written to the arena: before that, the pages are made copies.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from farstep.transports.pages import PAGE_BYTES, Pages
from farstep_wire.layout import Layout, TensorSpec
from farstep_wire.shared_memory import PrivateSegment, SharedMemoryError, tensor_at
from farstep_wire.values import memory, uses


class PrivateParameters:
    """Parameters that can lie in a segment's private mapping. SharedMemoryError: they cannot."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout, segment: PrivateSegment) -> None:
        if any(parameter.storage for parameter in layout.parameters):
            raise SharedMemoryError("some of the parameters share memory with each other")
        self._tensors = list(tensors)
        self._specs = layout.specs
        self._offsets = layout.arena.offsets
        self._segment = segment
        self._pages = Pages(segment)
        self.arena = [spec.view(segment.content, offset) for spec, offset in self._spots]
        """The parameters as they lie in the arena."""
        self._pointers = [self._pages.address + offset for offset in self._offsets]
        ends = [offset + max(spec.nbytes, 1) for spec, offset in self._spots]
        self._own_pages = [
            (self._pages.number(offset), self._pages.number(end - 1) + 1)
            for offset, end in zip(self._offsets, ends, strict=True)
        ]
        self._undisturbed = False
        self._untouched = False
        self.inside = False
        """Whether the parameters lie there just now."""

    @property
    def _spots(self) -> list[tuple[TensorSpec, int]]:
        return list(zip(self._specs, self._offsets, strict=True))

    def enter(self) -> bool:
        """Have the parameters, whose bytes the arena has, lie there; False where their memory is not theirs alone."""
        if not all(map(_is_free, self._tensors)):
            return False
        with torch.no_grad():
            for number, (spec, offset) in enumerate(self._spots):
                self._leave_behind(number)
                content = tensor_at(self._segment.own, torch.uint8, offset, spec.nbytes)
                self._tensors[number].data = spec.view(content, 0)
        self._pages.populate()
        self.inside = True
        _INSIDE.add(self)
        return True

    def _leave_behind(self, number: int) -> None:
        """A parameter is about to move from its memory."""

    def edited(self) -> list[int]:
        """Return the parameters whose bytes are not those of the arena."""
        copied = self._pages.copied()
        self._untouched = self._undisturbed and not copied
        suspects = {*self._written(copied), *self._displaced()}
        return sorted(number for number in suspects if self._differs(number))

    def _written(self, copied: Sequence[tuple[int, int]]) -> list[int]:
        """Return the parameters that some of the pages belong to."""
        starts = [start for start, _ in copied]
        result = []
        for number, (first, behind) in enumerate(self._own_pages):
            before = bisect_left(starts, behind)
            if before and copied[before - 1][1] > first:
                result.append(number)
        return result

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Until this ends none but this package runs: pages that nobody had written to by then need not be searched again."""
        self._undisturbed = True
        try:
            yield
        finally:
            self._undisturbed = self._untouched = False

    def show(self) -> None:
        """Have the parameters be as the arena has them."""
        if not self._untouched:
            self._pages.reset()
        with torch.no_grad():
            for number in self._displaced():
                self._tensors[number].copy_(self.arena[number])

    @property
    def displaced(self) -> bool:
        """Whether some of the parameters were given other memory since."""
        return bool(self._displaced())

    def _displaced(self) -> list[int]:
        pairs = zip(self._tensors, self._pointers, strict=True)
        return [
            number for number, (tensor, pointer) in enumerate(pairs) if tensor.numel() and tensor.data_ptr() != pointer
        ]

    def _differs(self, number: int) -> bool:
        own, theirs = self._tensors[number].detach(), self.arena[number]
        if own.device.type != "cpu" or own.stride() != theirs.stride():
            own = torch.empty_like(theirs).copy_(own)
        size = self._specs[number].nbytes
        return memory(own, size) != memory(theirs, size) if size < PAGE_BYTES else not _same_bits(own, theirs)

    def keep(self) -> None:
        """Make every page a copy."""
        self._untouched = False
        if self.inside:
            self._pages.keep()


def _is_free(tensor: Tensor) -> bool:
    """Whether nobody can tell where a tensor lies: it is a plain one, whose memory no other refers to, no process, no file."""
    if type(tensor) not in {Tensor, torch.nn.Parameter} or tensor.is_shared():  # type: ignore[no-untyped-call]
        return False
    storage = tensor.untyped_storage()
    return uses(storage) <= 1 and storage.filename is None


def _same_bits(left: Tensor, right: Tensor) -> bool:
    size = left.nbytes
    words = torch.int64 if size % 8 == 0 else torch.uint8

    def flat(tensor: Tensor) -> Tensor:
        return torch.frombuffer(memory(tensor, size), dtype=words)

    return torch.equal(flat(left), flat(right))


_INSIDE: weakref.WeakSet[PrivateParameters] = weakref.WeakSet()


def _before_fork() -> None:
    for parameters in list(_INSIDE):
        parameters.keep()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
