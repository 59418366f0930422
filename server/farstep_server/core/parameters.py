"""The parameters of a hosted optimizer: one arena, the views in it, and what readers of it see.

A reply carries the parameters of one version, but is sent while the owner may already step to the next. Readers therefore
hold a ``ParameterReader``; before the owner writes, it calls ``before_write``, which moves readers that have not finished
onto a copy. Where all have finished, which is the rule under Sync, nothing is copied.

The arena may lie in memory that workers on the same host see. They copy from it without asking; a count of its changes tells
them afterwards whether what they copied was whole.

Workers may also look on: their own parameters are the arena's pages. What they see must change only while they wait for a
reply. Where a write comes at another time, to one of them at least, the arena moves on to other memory and leaves them what
they see.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar
from weakref import ref

import torch
from torch import Tensor

from farstep_server.core.changes import Journal
from farstep_server.core.narrowed import NarrowCopies, NarrowReading, Spare
from farstep_wire.copying import join_bytes
from farstep_wire.errors import FarstepError
from farstep_wire.layout import Layout
from farstep_wire.narrowing import Narrowing


def tensor_memory(buffer: Tensor) -> memoryview:
    """Return the bytes of a uint8 CPU buffer. The caller keeps the buffer alive."""
    if buffer.numel() == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B")


class ParameterReader:
    """The bytes of the parameters at one version, to be read in ranges by another thread.

    ``layout``: what lies where. ``copies``: what it shares with other readers of the version. ``holdable``: the owner can leave
    the buffer to those who read it in place; else they get a copy.
    """

    def __init__(
        self, buffer: Tensor, layout: Layout, copies: NarrowCopies | None = None, *, holdable: bool = True
    ) -> None:
        self.nbytes = buffer.numel()
        self.layout = layout
        self._buffer: Tensor | None = buffer
        self._copies = copies
        self._narrowing: Narrowing | None = None
        self._narrowed: NarrowReading | None = None
        self._holdable = holdable
        self._held = False
        self._lock = threading.Lock()

    def narrow(self, narrowing: Narrowing) -> None:
        """Read them narrowed, from the beginning; each range is then made when it is read."""
        self._narrowing, self.nbytes = narrowing, narrowing.nbytes

    def join(self, prefix: Sequence[bytes], start: int, stop: int) -> bytes:
        """Return the prefix and a range of the bytes as one; the last range ends the reading."""
        with self._lock:
            assert self._buffer is not None, "read after its end"
            if self._narrowing is None:
                result = join_bytes((*prefix, *self._read(self._buffer, start, stop)))
            else:
                if self._narrowed is None:
                    self._narrowed = NarrowReading(self._narrowing, self._buffer, self._copies)
                result = self._narrowed.join(prefix, start, stop)
            if stop == self.nbytes:
                self._end()
        return result

    def _read(self, buffer: Tensor, start: int, stop: int) -> Iterable[memoryview | bytes]:
        return (tensor_memory(buffer)[start:stop],)

    def _end(self) -> None:
        if self._buffer is not None and self._copies is not None:
            self._copies.end_reader()
        self._buffer = self._narrowed = None

    def close(self) -> None:
        """End the reading early."""
        with self._lock:
            self._end()

    def hold(self) -> Tensor:
        """Return all of the bytes, to be read in place by others; until ``close`` nobody writes there."""
        with self._lock:
            assert self._buffer is not None, "read after its end"
            if not self._holdable:
                self._buffer = self._buffer.clone()
            self._held = True
            return self._buffer

    def move_to(self, copy: Tensor) -> bool:
        """Read on from a copy of the buffer; False where others read in place."""
        with self._lock:
            if self._buffer is not None and not self._held:
                self._buffer = copy
                if self._narrowed is not None:
                    self._narrowed.move_to(copy)
            return self._buffer is None or not self._held or not self._holdable

    @property
    def open(self) -> bool:
        """Whether bytes are still to be read."""
        return self._buffer is not None


Reader = TypeVar("Reader", bound=ParameterReader)


class SharedArena(Protocol):
    """Memory that workers see: ``content``, uint8, and one int64 each.

    ``changes`` counts the changes as they begin, ``complete`` is that count when the last is complete, ``left`` is not zero
    once the arena lies elsewhere.
    """

    content: Tensor
    changes: Tensor
    complete: Tensor
    left: Tensor


Onlooker = tuple[str, int]
"""A worker and the epoch of its session."""


@dataclass(frozen=True)
class InSharedMemory:
    """The word that the parameters lie in shared memory, whole as long as it counts that many changes."""

    changes: int


Parameters = ParameterReader | InSharedMemory
"""How a reply brings the parameters."""


def _takes_gradients(view: Tensor) -> bool:
    # Quantized weights among a model's parameters are integers, which torch's optimizers pass over.
    return view.is_floating_point() or view.is_complex()


class ParameterStore:
    """The arena on its device, and on the host where that is another."""

    def __init__(self, layout: Layout, device: torch.device, contents: Tensor) -> None:
        self.layout = layout
        self.device = device
        self.buffer = contents.to(device) if device.type != "cpu" else contents
        self.tensors = [torch.nn.Parameter(view, _takes_gradients(view)) for view in layout.views(self.buffer)]
        self._host = contents
        self._host_is_current = True
        self._readers: list[ref[ParameterReader]] = []
        self._spare: Spare = {}
        self._copies = NarrowCopies(self._spare)
        self.shared: SharedArena | None = None
        self._make: Callable[[int], SharedArena] | None = None
        self._onlookers: set[Onlooker] = set()
        self._waiting: Collection[Onlooker] = ()
        self.journal = Journal(self.nbytes // 16)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self.buffer.numel()

    def share(self, make: Callable[[int], SharedArena]) -> SharedArena:
        """Move the arena to shared memory, where it is not there yet; ``make`` is given its size in bytes."""
        self._make = make
        if self.shared is None:
            shared = make(self.nbytes)
            shared.content.copy_(self.host())
            shared.changes.add_(1)
            shared.complete.copy_(shared.changes)
            # Readers that have not finished keep the memory that they read, which nobody writes to any more.
            self._readers.clear()
            self._move_to(shared.content)
            self.shared = shared
        return self.shared

    def look_on(self, onlooker: Onlooker) -> bool:
        """Let a worker have its parameters lie in the arena; False where they could not, the arena lying on another device."""
        if self.shared is None or self.device.type != "cpu":
            return False
        self._onlookers.add(onlooker)
        return True

    def look_away(self, onlooker: Onlooker) -> None:
        """A worker looks on no more."""
        self._onlookers.discard(onlooker)

    @contextmanager
    def while_waiting(self, waiting: Collection[Onlooker]) -> Iterator[None]:
        """Say who waits for a reply, and may see the parameters change, as long as the block runs."""
        self._waiting = waiting
        try:
            yield
        finally:
            self._waiting = ()
            if self.shared is not None:
                self.shared.complete.copy_(self.shared.changes)

    def _leave_onlookers(self) -> None:
        """Move on to other memory where somebody looks on who does not wait for a change."""
        if self.shared is None or all(onlooker in self._waiting for onlooker in self._onlookers):
            return
        left, self.shared = self.shared, None
        self._onlookers.clear()
        assert self._make is not None, "made once"
        try:
            self.share(self._make)
        except FarstepError:
            self._readers.clear()
            self._move_to(left.content.clone())
        else:
            # No count of the one stands for the other's content.
            self._count_from(left)
        left.left.fill_(1)

    def _count_from(self, left: SharedArena) -> None:
        assert self.shared is not None, "made just now"
        self.shared.changes.copy_(left.changes + 1)

    def _move_to(self, content: Tensor) -> None:
        """Go on in other memory, which holds what the arena does; readers may keep what was it until now."""
        self._host = content
        if self.device.type == "cpu":
            self.buffer = content
            for tensor, view in zip(self.tensors, self.layout.views(self.buffer), strict=True):
                tensor.data = view

    def read(self, *, shared: bool) -> Parameters:
        """Return how the parameters as they stand are read: in shared memory, where that is wanted and there is some."""
        if not shared or self.shared is None:
            return self.reader()
        self.host()
        return InSharedMemory(int(self.shared.changes))

    def reader(self) -> ParameterReader:
        """Return a reader of the parameters as they stand."""
        buffer = self.host()
        reader = ParameterReader(buffer, self.layout, self._copies, holdable=self.shared is None)
        self._copies.add_reader()
        return self.register(reader)

    def register(self, reader: Reader) -> Reader:
        """Have a reader of the parameters as they stand keep them, whatever is written meanwhile."""
        self._readers.append(ref(reader))
        return reader

    def host(self) -> Tensor:
        """Return the arena's bytes on the host as they stand; the owner must not keep it over a write."""
        if not self._host_is_current:
            self._detach_readers()
            self._host.copy_(self.buffer)
            self._host_is_current = True
        return self._host

    def before_write(self) -> None:
        """Must be called before the parameters change."""
        self.journal.writes += 1
        if self.device.type == "cpu":
            self._detach_readers()
        else:
            self._host_is_current = False

    def _detach_readers(self) -> None:
        self._leave_onlookers()
        if self.shared is not None:
            self.shared.changes.add_(1)
        known = [reader() for reader in self._readers]
        unfinished = [reader for reader in known if reader is not None and reader.open]
        if unfinished:
            copy = self._host.clone()
            staying = [reader for reader in unfinished if not reader.move_to(copy)]
            if staying:
                self._move_to(copy if len(staying) == len(unfinished) else copy.clone())
        self._readers.clear()
        self._copies = NarrowCopies(self._spare)

    def write(self, contents: Tensor) -> None:
        """Replace all parameters by the bytes of another arena of the same layout."""
        self.before_write()
        self.buffer.copy_(contents)

    def extended(self, layout: Layout, group: Layout, contents: Tensor) -> ParameterStore:
        """Return a store for the layout with one more group, whose own arena is ``contents`` on the host.

        The tensors that are there already keep their identity; the old store must not be used afterwards.
        """
        with self.while_waiting(list(self._onlookers)):
            self.before_write()
        arena = torch.zeros(layout.arena.nbytes, dtype=torch.uint8)
        for target, source in zip(layout.views(arena), [*self.tensors, *group.views(contents)], strict=True):
            target.copy_(source.detach())
        larger = ParameterStore(layout, self.device, arena)
        for old, new in zip(self.tensors, larger.tensors, strict=False):
            old.data = new.data
        larger.tensors = self.tensors + larger.tensors[len(self.tensors) :]
        return larger
