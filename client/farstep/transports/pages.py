"""The pages of a private mapping: which of them were written since they were a file's, and so are copies.

The kernel lists them where it can (PAGEMAP_SCAN, Linux 6.7), else it says so of every page; see the kernel's
Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import torch
from torch import Tensor

from farstep_wire.shared_memory import HEADER_BYTES, PrivateSegment, SharedMemoryError

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MADV_DONTNEED, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 4, 22, 23

Runs = list[tuple[int, int]]
"""Pages that follow each other: the first one's number, and the number behind the last one's."""


class Pages:
    """The pages of a private mapping's content. SharedMemoryError: the kernel does not tell which of them are copies."""

    def __init__(self, segment: PrivateSegment) -> None:
        self._memory = segment.own
        self.address = ctypes.addressof(segment.own) + HEADER_BYTES
        self._first = self.address // PAGE_BYTES
        self._count = self.number(max(segment.nbytes, 1) - 1) + 1
        libc = ctypes.CDLL(None, use_errno=True)
        self._advise = libc.madvise
        self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._copied = _copied_scanned
        try:
            self._check()
        except _NoScanError:
            self._copied = _copied_read
            self._check()

    def _check(self) -> None:
        header = torch.frombuffer(self._memory, dtype=torch.uint8, count=1)
        header.add_(0)
        seen = self._copied(ctypes.addressof(self._memory) // PAGE_BYTES, 1) == [(0, 1)]
        if not seen or (HEADER_BYTES % PAGE_BYTES == 0 and self._copied(self._first, self._count)):
            raise SharedMemoryError("the kernel does not tell which pages were written")

    def number(self, offset: int) -> int:
        """Return which page a byte of the content lies in."""
        return (self.address + offset) // PAGE_BYTES - self._first

    def copied(self) -> Runs:
        """Return which pages are copies; all of them where the kernel does not say so this time."""
        try:
            return self._copied(self._first, self._count)
        except (SharedMemoryError, _NoScanError):
            return [(0, self._count)]

    def populate(self) -> None:
        """Have the pages mapped before they are read, if the kernel can."""
        self._advise(self._first * PAGE_BYTES, self._count * PAGE_BYTES, _MADV_POPULATE_READ)

    def reset(self) -> None:
        """Have no page be a copy."""
        for start, stop in self.copied():
            self._advise((self._first + start) * PAGE_BYTES, (stop - start) * PAGE_BYTES, _MADV_DONTNEED)

    def keep(self) -> None:
        """Make every page a copy."""
        if self._advise(self._first * PAGE_BYTES, self._count * PAGE_BYTES, _MADV_POPULATE_WRITE):
            size = len(self._memory) - HEADER_BYTES
            content = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=HEADER_BYTES)
            content[::PAGE_BYTES].add_(0)
            content[-1:].add_(0)


# A copy is in memory or in swap, and no file's.


class _NoScanError(Exception):
    """The kernel has no PAGEMAP_SCAN."""


_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
_SCAN_FIELDS = struct.Struct("=12Q")
_WALK_END = 4
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGIONS = 512


def _copied_scanned(first: int, count: int) -> Runs:
    """Return which of so many pages are copies, by PAGEMAP_SCAN."""
    import fcntl

    regions = (ctypes.c_uint64 * (3 * _REGIONS))()
    start, end = first * PAGE_BYTES, (first + count) * PAGE_BYTES
    runs: Runs = []
    descriptor = _open_pagemap()
    try:
        while start < end:
            request = bytearray(
                _SCAN_FIELDS.pack(
                    _SCAN_FIELDS.size, 0, start, end, 0, ctypes.addressof(regions), _REGIONS, 0,
                    _IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_PRESENT,
                )
            )  # fmt: skip
            found = fcntl.ioctl(descriptor, _SCAN, request)
            bounds = [bound // PAGE_BYTES - first for bound in regions[: 3 * found]]
            for begun, ended in zip(bounds[::3], bounds[1::3], strict=True):
                if runs and runs[-1][1] == begun:
                    runs[-1] = runs[-1][0], ended
                else:
                    runs.append((begun, ended))
            start = _SCAN_FIELDS.unpack(request)[_WALK_END]
    except OSError as error:
        if error.errno in {errno.ENOTTY, errno.EINVAL}:
            raise _NoScanError from None
        raise SharedMemoryError(f"/proc/self/pagemap cannot be searched: {error.strerror}") from None
    finally:
        os.close(descriptor)
    return runs


def _copied_read(first: int, count: int) -> Runs:
    """Return which of so many pages are copies, by what is said of each; see proc_pid_pagemap(5)."""
    entries = bytearray(8 * count)
    descriptor = _open_pagemap()
    try:
        read = os.preadv(descriptor, [entries], 8 * first)
    except OSError as error:
        raise SharedMemoryError(f"/proc/self/pagemap cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if read != len(entries):
        raise SharedMemoryError("/proc/self/pagemap says too little")
    bits = (torch.frombuffer(entries, dtype=torch.int64) >> 61) & 7
    return _runs((bits & 6).bool() & ~(bits & 1).bool())


def _open_pagemap() -> int:
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SharedMemoryError(f"/proc/self/pagemap cannot be opened: {error.strerror}") from None


def _runs(flags: Tensor) -> Runs:
    """Return the runs of what is true."""
    if not bool(flags.any()):
        return []
    edges = torch.diff(
        flags.to(torch.int8), prepend=torch.zeros(1, dtype=torch.int8), append=torch.zeros(1, dtype=torch.int8)
    )
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, stops, strict=True))
