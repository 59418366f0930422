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

import ctypes
import os
import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from farstep_wire.layout import Layout, TensorSpec
from farstep_wire.shared_memory import HEADER_BYTES, PrivateSegment, SharedMemoryError, tensor_at
from farstep_wire.values import memory, uses

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MADV_DONTNEED, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 4, 22, 23
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
        self._pages = _Pages(segment)
        self._arena = [spec.view(segment.content, offset) for spec, offset in self._spots]
        self._pointers = [self._pages.address + offset for offset in self._offsets]
        ends = [offset + max(spec.nbytes, 1) for spec, offset in self._spots]
        self._first = torch.tensor([self._pages.number(offset) for offset in self._offsets], dtype=torch.int64)
        self._behind = torch.tensor([self._pages.number(end - 1) + 1 for end in ends], dtype=torch.int64)
        self._changes = -1
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
        within = torch.zeros(len(copied) + 1, dtype=torch.int64)
        torch.cumsum(copied, 0, out=within[1:])
        suspects = set((within[self._behind] > within[self._first]).nonzero().flatten().tolist())
        suspects.update(self._displaced())
        return sorted(number for number in suspects if self._differs(number))

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
        return memory(own, size) != memory(theirs, size) if size < _PAGE_BYTES else not _same_bits(own, theirs)

    def keep(self) -> None:
        """Make every page a copy; those of a step that is under way when it is complete."""
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


class _Pages:
    """The pages of a private mapping's content."""

    def __init__(self, segment: PrivateSegment) -> None:
        self._memory = segment.own
        self.address = ctypes.addressof(segment.own) + HEADER_BYTES
        self._first = self.address // _PAGE_BYTES
        self._count = self.number(max(segment.nbytes, 1) - 1) + 1
        libc = ctypes.CDLL(None, use_errno=True)
        self._advise = libc.madvise
        self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._check()

    def _check(self) -> None:
        """SharedMemoryError where the kernel does not tell which pages are copies."""
        header = torch.frombuffer(self._memory, dtype=torch.uint8, count=1)
        header.add_(0)
        if not bool(_copied(ctypes.addressof(self._memory) // _PAGE_BYTES, 1)) or (
            HEADER_BYTES % _PAGE_BYTES == 0 and bool(self.copied().any())
        ):
            raise SharedMemoryError("the kernel does not tell which pages were written")

    def number(self, offset: int) -> int:
        """Return which page a byte of the content lies in."""
        return (self.address + offset) // _PAGE_BYTES - self._first

    def copied(self) -> Tensor:
        """Return, for each page, whether it is a copy (bool)."""
        return _copied(self._first, self._count)

    def populate(self) -> None:
        """Have the pages mapped before they are read, if the kernel can."""
        self._advise(self._first * _PAGE_BYTES, self._count * _PAGE_BYTES, _MADV_POPULATE_READ)

    def reset(self) -> None:
        """Have no page be a copy."""
        for start, stop in _runs(self.copied()):
            self._advise((self._first + start) * _PAGE_BYTES, (stop - start) * _PAGE_BYTES, _MADV_DONTNEED)

    def keep(self) -> None:
        """Make every page a copy."""
        if bool(self.copied().all()):
            return
        if self._advise(self._first * _PAGE_BYTES, self._count * _PAGE_BYTES, _MADV_POPULATE_WRITE):
            size = len(self._memory) - HEADER_BYTES
            content = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=HEADER_BYTES)
            content[::_PAGE_BYTES].add_(0)
            content[-1:].add_(0)


def _copied(first: int, count: int) -> Tensor:
    """Return which of so many pages are this process's own: in memory or swap, and not of a file; see proc_pid_pagemap(5)."""
    entries = bytearray(8 * count)
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            read = os.preadv(descriptor, [entries], 8 * first)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SharedMemoryError(f"/proc/self/pagemap cannot be read: {error.strerror}") from None
    if read != len(entries):
        raise SharedMemoryError("/proc/self/pagemap says too little")
    bits = (torch.frombuffer(entries, dtype=torch.int64) >> 61) & 7
    return (bits & 6).bool() & ~(bits & 1).bool()


def _runs(flags: Tensor) -> list[tuple[int, int]]:
    """Return the runs of what is true, as beginning and end."""
    if not bool(flags.any()):
        return []
    edges = torch.diff(
        flags.to(torch.int8), prepend=torch.zeros(1, dtype=torch.int8), append=torch.zeros(1, dtype=torch.int8)
    )
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, stops, strict=True))


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
