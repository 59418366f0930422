"""Parameters that are the server's pages until something is written to them on this side.

The parameters' arena is mapped a second time, privately, and the parameters lie in that mapping: what the server writes is
there at once, and what is written here goes to a copy of its page that the kernel makes at that moment. So a step brings the
new parameters without a copy; which pages are copies says where the user may have changed something, without reading the rest,
and the bytes say whether it was a change. The server promises to write only while this worker waits for its reply; before a
write at another time it moves on, and leaves these pages as they are.

All that lasts as long as the connection. When it ends, or the process is about to fork, the pages are made copies, and stay
where they are.
"""

from __future__ import annotations

import os
import time
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

_COMPLETE_SECONDS = 5.0
"""How long a step of the server's that is under way may take to end, before what lies here is taken for a mixture."""


class View:
    """Parameters in a private mapping of the server's arena. SharedMemoryError: they cannot lie there."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout, segment: PrivateSegment) -> None:
        if any(parameter.storage for parameter in layout.parameters):
            raise SharedMemoryError("some of the parameters share memory with each other")
        self._tensors = list(tensors)
        self._specs = layout.specs
        self._offsets = layout.arena.offsets
        self._segment = segment
        self._pages = Pages(segment)
        self._arena = [spec.view(segment.content, offset) for spec, offset in self._spots]
        self._pointers = [self._pages.address + offset for offset in self._offsets]
        ends = [offset + max(spec.nbytes, 1) for spec, offset in self._spots]
        self._own_pages = [
            (self._pages.number(offset), self._pages.number(end - 1) + 1)
            for offset, end in zip(self._offsets, ends, strict=True)
        ]
        self._changes = -1
        self._undisturbed = False
        self._untouched = False
        self.inside = False
        """Whether the parameters are the server's pages just now."""

    @property
    def _spots(self) -> list[tuple[TensorSpec, int]]:
        return list(zip(self._specs, self._offsets, strict=True))

    def enter(self) -> bool:
        """Have the parameters, which hold what the server has, lie in its pages; False where theirs are not theirs alone."""
        if not all(map(_is_free, self._tensors)):
            return False
        self._changes = int(self._segment.changes)
        with torch.no_grad():
            for tensor, (spec, offset) in zip(self._tensors, self._spots, strict=True):
                content = tensor_at(self._segment.own, torch.uint8, offset, spec.nbytes)
                tensor.data = spec.view(content, 0)
        self._pages.populate()
        self.inside = True
        _VIEWS.add(self)
        return True

    @property
    def whole(self) -> bool:
        """Whether the pages that are the server's are of the version that was taken over last."""
        return self._changes == int(self._segment.changes)

    def edited(self) -> list[int]:
        """Return the parameters whose bytes are not those of the server's."""
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

    def settle(self, changes: int) -> bool:
        """Take over the server's parameters; False where they are not those after that many changes."""
        if int(self._segment.changes) != changes or bool(self._segment.left):
            return False
        self._changes = changes
        self._show()
        return True

    def received(self) -> None:
        """The parameters hold what the server has, which came another way."""
        if not bool(self._segment.left):
            self._changes = int(self._segment.changes)
            self._show()

    def _show(self) -> None:
        if not self._untouched:
            self._pages.reset()
        with torch.no_grad():
            for number in self._displaced():
                self._tensors[number].copy_(self._arena[number])

    def _displaced(self) -> list[int]:
        """Return the parameters that were given other memory since."""
        pairs = zip(self._tensors, self._pointers, strict=True)
        return [
            number for number, (tensor, pointer) in enumerate(pairs) if tensor.numel() and tensor.data_ptr() != pointer
        ]

    def _differs(self, number: int) -> bool:
        own, theirs = self._tensors[number].detach(), self._arena[number]
        if own.device.type != "cpu" or own.stride() != theirs.stride():
            own = torch.empty_like(theirs).copy_(own)
        size = self._specs[number].nbytes
        return memory(own, size) != memory(theirs, size) if size < PAGE_BYTES else not _same_bits(own, theirs)

    def keep(self) -> None:
        """Make every page a copy; those of a step that is under way when it is complete."""
        self._untouched = False
        if self.inside:
            until = time.monotonic() + _COMPLETE_SECONDS
            while (
                not self.whole
                and int(self._segment.complete) != int(self._segment.changes)
                and time.monotonic() < until
            ):
                time.sleep(0.001)
            self._pages.keep()

    def leave(self) -> None:
        """Keep the parameters as they are; what the server does from now on is not seen any more."""
        self.keep()
        self.inside = False


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


_VIEWS: weakref.WeakSet[View] = weakref.WeakSet()


def _before_fork() -> None:
    # The child's pages would go on being the server's.
    for view in list(_VIEWS):
        view.keep()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
