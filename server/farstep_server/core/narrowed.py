"""Narrowed parameters on their way out: one reader narrows for itself, frame by frame; several share what is made."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from farstep_wire.copying import join_bytes
from farstep_wire.narrowing import Narrowing, NarrowSource, Places


class _Copy:
    """The narrowed bytes of one version, made as far as somebody has come to read. ``memory`` is overwritten."""

    def __init__(self, memory: bytearray) -> None:
        self.memory = memory
        self._tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._made = 0
        self._lock = threading.Lock()

    def join(self, places: Places, prefix: Sequence[bytes], start: int, stop: int) -> bytes:
        """Return the prefix and a range of the bytes as one; ``places`` are in the parameters of the version."""
        with self._lock:
            if self._made < stop:
                places.read(self._made, stop, self._tensor[self._made : stop])
                self._made = stop
        return join_bytes((*prefix, memoryview(self.memory)[start:stop]))


Spare = dict[torch.dtype, bytearray]
"""Memory of copies that nobody reads any more, for the next version's: taken anew, its pages would cost more than they save."""


class NarrowCopies:
    """What the readers of one version share. The owner adds them, before the first of them is read."""

    def __init__(self, spare: Spare) -> None:
        self._spare = spare
        self._readers = 0
        self._reading = 0
        self._copies: dict[torch.dtype, _Copy] = {}
        self._lock = threading.Lock()

    def add_reader(self) -> None:
        """There is one reader more."""
        with self._lock:
            self._readers += 1
            self._reading += 1

    def end_reader(self) -> None:
        """One has come to its end; the last one leaves the memory to others."""
        with self._lock:
            self._reading -= 1
            if not self._reading:
                self._spare.update((dtype, copy.memory) for dtype, copy in self._copies.items())
                self._copies.clear()

    def take(self, narrowing: Narrowing) -> _Copy | None:
        """Return the copy for a dtype; None for a single reader, which needs none."""
        with self._lock:
            if self._readers < 2:
                return None
            copy = self._copies.get(narrowing.dtype)
            if copy is None:
                memory = self._spare.pop(narrowing.dtype, None)
                if memory is None or len(memory) != narrowing.nbytes:
                    memory = bytearray(narrowing.nbytes)
                copy = self._copies[narrowing.dtype] = _Copy(memory)
            return copy


class NarrowReading:
    """One reader's narrowed bytes of the arena ``buffer``."""

    def __init__(self, narrowing: Narrowing, buffer: Tensor, copies: NarrowCopies | None) -> None:
        self._narrowing = narrowing
        self._copy = None if copies is None else copies.take(narrowing)
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
