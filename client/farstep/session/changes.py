"""A reply that brings only what has changed of the parameters: its bytes on their way in, and to their places.

The numbers of the rows come first, and are checked before anything is written. Rows wait in memory of their own until all have
come; what changed as a whole goes straight to its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farstep.session.link import internal
from farstep_wire.changes import check_rows, plan_changes
from farstep_wire.frames import ScatterSink
from farstep_wire.layout import Layout
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import memory


class ChangedSink:
    """Takes the bytes of one reply: a Sink. ``places``: the memory of each parameter, in its layout's strides.

    InternalError: what the server declares, or a row's number, does not fit the layout.
    """

    def __init__(self, changed: pb.Changed, total_bytes: int, layout: Layout, places: Sequence[memoryview]) -> None:
        counts = dict(zip(changed.in_rows, changed.rows, strict=False))
        if not len(counts) == len(changed.in_rows) == len(changed.rows):
            raise internal(f"{len(changed.rows)} counts of rows for {len(changed.in_rows)} parameters")
        try:
            plan = plan_changes(layout, list(changed.whole), counts)
        except ValueError as error:
            raise internal(str(error)) from None
        if plan.nbytes != total_bytes:
            raise internal(f"{total_bytes} bytes of changes, where {plan.nbytes} are declared")
        self.whole = [number for number, _ in plan.whole]
        self.rows = {
            place.number: (
                torch.zeros(place.index.shape, dtype=place.index.dtype),
                torch.zeros(place.values.shape, dtype=place.values.dtype),
            )
            for place in plan.rows
        }
        self._layout = layout
        self._index_bytes = plan.index_bytes
        targets = [(offset, places[number]) for number, offset in plan.whole]
        for place in plan.rows:
            index, values = self.rows[place.number]
            targets.append((place.index_offset, memory(index, place.index.nbytes)))
            targets.append((place.values_offset, memory(values, place.values.nbytes)))
        self._targets = ScatterSink(targets)

    def write(self, offset: int, data: memoryview) -> None:
        """Take the bytes that belong at the offset."""
        head = max(0, min(self._index_bytes - offset, len(data)))
        if head:
            self._targets.write(offset, data[:head])
            if offset + head == self._index_bytes:
                self._check()
        if head < len(data):
            self._targets.write(offset + head, data[head:])

    def _check(self) -> None:
        for number, (index, _) in self.rows.items():
            parameter = self._layout.parameters[number]
            try:
                check_rows(index, parameter.spec.shape[0], parameter.key)
            except ValueError as error:
                raise internal(str(error)) from None


def write_rows(tensor: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write rows into a parameter, on whatever device and with whatever strides; return what they were before."""
    with torch.no_grad():
        own = tensor.detach()
        index, values = index.to(own.device), values.to(own.device)
        before = own.index_select(0, index)
        own.index_copy_(0, index, values)
    return before
