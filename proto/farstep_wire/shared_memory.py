"""Memory that a server and a worker on its host both see.

A segment is an anonymous memory file of the server's. It has no name in any file system, so nothing is left behind however
either side ends, and no quota of a mount counts. It is sealed: neither side can shrink it under the other's feet. Its pages
are taken when it is made, so that a lack of memory is an error then and no fault later. The worker opens it through
the server's entry in /proc, which the kernel grants to processes of the same user in the same process namespace alone.

A page stands before the content. It holds a random nonce, by which the worker knows that what it opened is what the server
meant; a place for the worker's own nonce, by which the server knows the same; and the number of times that the content was
about to be changed, by which a reader knows whether what it copied was whole. Two more numbers are for those who look on for
long: the count at which the last change was complete, and whether the content is left as it is, its maker having moved on.

A reader may also map the content privately. It then has the maker's pages under its own tensors until it writes to one, which
the kernel copies for it at that moment.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HEADER_BYTES = 4096
NONCE_BYTES = 16
_NAME = "farstep"
_COUNTER_OFFSET, _COMPLETE_OFFSET, _LEFT_OFFSET = 64, 72, 80
_PROOF_OFFSET = 128
_PROT_READ, _PROT_WRITE, _MAP_SHARED, _MAP_PRIVATE = 1, 2, 1, 2


class SharedMemoryError(Exception):
    """Memory cannot be shared here; the text says why."""


@dataclass(frozen=True)
class SegmentName:
    """How the other side finds a segment: a descriptor of the process that made it, the content's size, and the nonce."""

    process: int
    descriptor: int
    nbytes: int
    nonce: bytes


class Segment:
    """A mapped segment.

    ``content``: uint8 of the content's size, at a page's beginning; it and all views of it keep the memory mapped.
    ``changes``, ``complete``, ``left``: views of the numbers in the header (int64, one element each).
    """

    def __init__(self, descriptor: int, nbytes: int, *, writable: bool) -> None:
        self.nbytes = nbytes
        self._memory = map_file(descriptor, HEADER_BYTES + nbytes, writable=writable)
        header = torch.frombuffer(self._memory, dtype=torch.uint8, count=HEADER_BYTES)
        self.content = self.tensor(torch.uint8, 0, nbytes)
        self.changes = header[_COUNTER_OFFSET : _COUNTER_OFFSET + 8].view(torch.int64)
        self.complete = header[_COMPLETE_OFFSET : _COMPLETE_OFFSET + 8].view(torch.int64)
        self.left = header[_LEFT_OFFSET : _LEFT_OFFSET + 8].view(torch.int64)
        self._nonce = header[:NONCE_BYTES]
        self._proof = header[_PROOF_OFFSET : _PROOF_OFFSET + NONCE_BYTES]

    def tensor(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """Return elements of the content as a tensor with a storage of its own; ``offset`` is in bytes."""
        return tensor_at(self._memory, dtype, offset, count)

    @property
    def nonce(self) -> bytes:
        """What its maker wrote into it."""
        return bytes(self._nonce.tolist())

    @property
    def proof(self) -> bytes:
        """What the other side wrote into it."""
        return bytes(self._proof.tolist())

    def prove(self) -> bytes:
        """Write a new nonce for its maker to find; return it."""
        proof = secrets.token_bytes(NONCE_BYTES)
        self._proof.copy_(torch.frombuffer(bytearray(proof), dtype=torch.uint8))
        return proof


def tensor_at(memory: ctypes.Array[ctypes.c_char], dtype: torch.dtype, offset: int, count: int) -> Tensor:
    """Return elements of a mapped segment's content as a tensor with a storage of its own; ``offset`` is in bytes."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=HEADER_BYTES + offset)


class OwnSegment(Segment):
    """A segment of this process, open for others until ``hide``; SharedMemoryError where there can be none."""

    def __init__(self, nbytes: int) -> None:
        self._descriptor = _create(HEADER_BYTES + nbytes)
        self._hide = weakref.finalize(self, os.close, self._descriptor)
        super().__init__(self._descriptor, nbytes, writable=True)
        self._nonce.copy_(torch.frombuffer(bytearray(secrets.token_bytes(NONCE_BYTES)), dtype=torch.uint8))

    @property
    def name(self) -> SegmentName:
        """How another process finds it."""
        return SegmentName(os.getpid(), self._descriptor, self.nbytes, self.nonce)

    def hide(self) -> None:
        """Let no further process open it."""
        self._hide()


class PrivateSegment(Segment):
    """A segment that is mapped twice: as it is, and ``own``, header and content, of which a page is copied on writing."""

    def __init__(self, descriptor: int, nbytes: int, *, writable: bool) -> None:
        super().__init__(descriptor, nbytes, writable=writable)
        self.own = map_file(descriptor, HEADER_BYTES + nbytes, writable=True, private=True)


def private_segment(nbytes: int) -> PrivateSegment:
    """Make a segment that no other process sees; SharedMemoryError where there can be none."""
    descriptor = _create(HEADER_BYTES + nbytes)
    try:
        return PrivateSegment(descriptor, nbytes, writable=True)
    finally:
        os.close(descriptor)


def open_segment(name: SegmentName, *, writable: bool, private: bool = False) -> Segment:
    """Map the segment of another process; SharedMemoryError where it is not to be seen from here, or is not the one meant.

    ``private``: a second time, copied on writing; see ``PrivateSegment``.
    """
    if not _possible():
        raise SharedMemoryError(f"this system ({sys.platform}) has no anonymous memory files")
    path = f"/proc/{name.process}/fd/{name.descriptor}"
    try:
        if not re.fullmatch(rf"/memfd:{_NAME} \(deleted\)", str(Path(path).readlink())):
            raise SharedMemoryError(f"{path} is no segment: the server runs elsewhere, or in a container of its own")
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise SharedMemoryError(
            f"{path} cannot be opened ({error.strerror}): the server runs on another host, in a container of its own, or as "
            f"another user"
        ) from None
    try:
        if os.fstat(descriptor).st_size != HEADER_BYTES + name.nbytes or not _sealed(descriptor):
            raise SharedMemoryError(f"{path} is not the segment of {name.nbytes} bytes that the server speaks of")
        kind = PrivateSegment if private else Segment
        segment = kind(descriptor, name.nbytes, writable=writable)
    finally:
        os.close(descriptor)
    if segment.nonce != name.nonce:
        raise SharedMemoryError(
            f"{path} is a segment of another server: this one runs on another host or in a container"
        )
    return segment


def _possible() -> bool:
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def _create(nbytes: int) -> int:
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        raise SharedMemoryError(f"this system ({sys.platform}) has no anonymous memory files")
    import fcntl

    available = _available_bytes()
    if nbytes > available:
        # The kernel would rather kill some process than refuse.
        raise SharedMemoryError(f"{nbytes} bytes of shared memory are more than the {available} that are available")
    try:
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise SharedMemoryError(f"no memory file can be made: {error.strerror}") from None
    try:
        os.fchmod(descriptor, 0o600)
        os.posix_fallocate(descriptor, 0, nbytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        os.close(descriptor)
        raise SharedMemoryError(f"no {nbytes} bytes of shared memory can be had: {error.strerror}") from None
    return descriptor


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _sealed(descriptor: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)


def map_file(descriptor: int, nbytes: int, *, writable: bool, private: bool = False) -> ctypes.Array[ctypes.c_char]:
    """Map a file; it stays mapped as long as something refers to the array. ``private``: copied on writing.

    Not the standard library's ``mmap``: that keeps a duplicate of the descriptor open, and torch warns of its read-only ones.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    protection = _PROT_READ | (_PROT_WRITE if writable else 0)
    address = libc.mmap(None, nbytes, protection, _MAP_PRIVATE if private else _MAP_SHARED, descriptor, 0)
    if address in {None, ctypes.c_void_p(-1).value}:
        raise SharedMemoryError(f"{nbytes} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
    memory = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(memory, libc.munmap, address, nbytes).atexit = False
    return memory
