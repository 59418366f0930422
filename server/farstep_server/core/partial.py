"""Parameters that are read in part: those that have changed since the version that the reader's worker holds.

Rows are gathered when the reply is made, a copy of no more than them. What changed as a whole is read from the arena as it is
sent, as by any other reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from farstep_server.core.changes import Changes
from farstep_server.core.parameters import ParameterReader, ParameterStore, tensor_memory
from farstep_wire.changes import ChangePlan, plan_changes
from farstep_wire.layout import Layout
from farstep_wire.narrowing import Narrowing

_WORTHWHILE = 0.5
"""Part of the arena's bytes up to which a reply brings only what has changed."""
_COPIED_BYTES = 1024 * 1024
"""Up to this size what changed as a whole is gathered too: then the next step need not mind that it is still being sent."""
_ZEROS = bytes(64)

_Piece = tuple[int, int, int | Tensor]
"""Offset in the reply, bytes, and where they begin in the arena, or the tensor that they are."""


class ChangedReader(ParameterReader):
    """What has changed of the parameters ``since`` a version, in the bytes of ``farstep_wire.changes``."""

    def __init__(self, buffer: Tensor, layout: Layout, plan: ChangePlan, changes: Changes, since: int) -> None:
        super().__init__(buffer, layout)
        self.plan = plan
        self.since = since
        self.nbytes = plan.nbytes
        self.reads_on = sum(layout.specs[number].nbytes for number, _ in plan.whole) > _COPIED_BYTES
        """Whether it still reads the arena, once made."""
        self._pieces = sorted(self._gathered(buffer, layout, changes), key=lambda piece: piece[0])
        self._first = 0

    def _gathered(self, buffer: Tensor, layout: Layout, changes: Changes) -> Iterator[_Piece]:
        for place in self.plan.rows:
            rows, spec = changes[place.number], layout.specs[place.number]
            assert rows is not None, "planned in rows"
            values = spec.view(buffer, layout.arena.offsets[place.number]).index_select(0, rows)
            yield place.index_offset, rows.nbytes, rows.view(torch.uint8)
            yield place.values_offset, values.nbytes, values.view(-1).view(torch.uint8)
        for number, offset in self.plan.whole:
            start, nbytes = layout.arena.offsets[number], layout.specs[number].nbytes
            yield offset, nbytes, start if self.reads_on else buffer[start : start + nbytes].clone()

    def narrow(self, narrowing: Narrowing) -> None:
        """They are never narrowed: sessions that narrow take whole parameters."""
        raise AssertionError("a session with narrowed parameters takes no changes")

    def _read(self, buffer: Tensor, start: int, stop: int) -> Iterator[memoryview | bytes]:
        # Ranges are read in order, so what lies before them is done with.
        end = start
        for index in range(self._first, len(self._pieces)):
            offset, nbytes, source = self._pieces[index]
            if offset >= stop:
                break
            low, high = max(offset, start), min(offset + nbytes, stop)
            if low >= high:
                self._first = index
                continue
            yield _ZEROS[: low - end]
            own = buffer[source : source + nbytes] if isinstance(source, int) else source
            yield tensor_memory(own)[low - offset : high - offset]
            end = high
        yield _ZEROS[: stop - end]


def read_changed(store: ParameterStore, version: int) -> ChangedReader | None:
    """Return a reader of what has changed since a version; None where that is not known, or so much that all goes as well.

    In shared memory workers may write to the arena, and on a device other than the CPU all is copied to the host anyway: there
    it is None.
    """
    changes = None if store.shared is not None or store.device.type != "cpu" else store.journal.since(version)
    if changes is None:
        return None
    layout = store.layout
    counts = {number: rows.numel() for number, rows in sorted(changes.items()) if rows is not None}
    whole = sorted(number for number, rows in changes.items() if rows is None)
    worthwhile = _WORTHWHILE * store.nbytes
    if _least(layout, whole, counts) > worthwhile:
        return None
    plan = plan_changes(layout, whole, counts)
    if plan.nbytes > worthwhile:
        return None
    reader = ChangedReader(store.host(), layout, plan, changes, version)
    return store.register(reader) if reader.reads_on else reader


def _least(layout: Layout, whole: Sequence[int], counts: dict[int, int]) -> int:
    """Return how many bytes there are at least, before anything is planned."""
    rows = sum(
        count * (8 + layout.specs[number].nbytes // layout.specs[number].shape[0]) for number, count in counts.items()
    )
    return rows + sum(layout.specs[number].nbytes for number in whole)
