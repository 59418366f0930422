"""Narrowed parameters on their way out: one reader narrows for itself, frame by frame; several share what is made."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from farstep_wire.narrowing import Narrowing, NarrowSource, Places


class _Copy:
    """The narrowed bytes of one version, made as far as somebody has come to read."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = bytearray(nbytes)
        self._tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self._made = 0
        self._lock = threading.Lock()

    def join(self, places: Places, prefix: Sequence[bytes], start: int, stop: int) -> bytes:
        """Return the prefix and a range of the bytes as one; ``places`` are in the parameters of the version."""
        with self._lock:
            if self._made < stop:
                places.read(self._made, stop, self._tensor[self._made : stop])
                self._made = stop
        return b"".join((*prefix, memoryview(self._bytes)[start:stop]))


class NarrowCopies:
    """What the readers of one version share; nothing is kept that none of them reads any more.

    ``readers``: how many there are. The owner counts them, before the first of them is read.
    """

    def __init__(self) -> None:
        self.readers = 0
        self._copies: WeakValueDictionary[torch.dtype, _Copy] = WeakValueDictionary()
        self._lock = threading.Lock()

    def take(self, narrowing: Narrowing) -> _Copy | None:
        """Return the copy for a dtype; None for a single reader, which needs none."""
        if self.readers < 2:
            return None
        with self._lock:
            copy = self._copies.get(narrowing.dtype)
            if copy is None:
                copy = self._copies[narrowing.dtype] = _Copy(narrowing.nbytes)
            return copy


class NarrowReading:
    """One reader's narrowed bytes of the arena ``buffer``."""

    def __init__(self, narrowing: Narrowing, buffer: Tensor, copies: NarrowCopies) -> None:
        self._narrowing = narrowing
        self._copy = copies.take(narrowing)
        self.move_to(buffer)

    def move_to(self, buffer: Tensor) -> None:
        """Read on from another buffer that holds the same."""
        self._places = self._narrowing.places_in(buffer)
        self._source = NarrowSource(self._places, self._narrowing.nbytes)

    def join(self, prefix: Sequence[bytes], start: int, stop: int) -> bytes:
        """Return the prefix and a range of the bytes as one."""
        if self._copy is None:
            return self._source.join(prefix, start, stop)
        return self._copy.join(self._places, prefix, start, stop)
