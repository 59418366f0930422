"""How a session's contributions come in, and its parameters go out, by the wire format that it has attached with.

Whatever the format, what a contribution brings ends as float32 in the session's one staging buffer, so that nothing behind this
module knows of it. Narrowed gradients are widened there frame by frame. Encoded ones come into a small buffer of their own, and
are decoded when all of them are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from farstep_server.core.parameters import ParameterReader, tensor_memory
from farstep_server.service.staging import new_buffer
from farstep_wire.compression import CompressedPlan, compress_plan
from farstep_wire.frames import BufferSink, Sink
from farstep_wire.layout import GradientForm, GradientPlan, Layout, plan_gradients
from farstep_wire.narrowing import Narrowing, WideningSink, narrow_gradients, narrow_parameters
from farstep_wire.wire_format import EXACT, Wire


class Arrival(ABC):
    """A contribution's bytes on their way in: ``nbytes`` on the wire, and ``plan``, which says where they are to lie."""

    plan: GradientPlan
    nbytes: int

    @abstractmethod
    def sink(self, buffer: Tensor) -> Sink:
        """Return where received bytes go, so that they come to lie in a buffer as planned."""

    def finish(self, buffer: Tensor, layout: Layout) -> None:
        """Do what is left to be done once all bytes are there; ValueError names what is wrong with them."""
        del buffer, layout


class _Exact(Arrival):
    def __init__(self, plan: GradientPlan) -> None:
        self.plan, self.nbytes = plan, plan.nbytes

    def sink(self, buffer: Tensor) -> Sink:
        return BufferSink(tensor_memory(buffer))


class _Narrow(Arrival):
    def __init__(self, plan: GradientPlan, format_name: str) -> None:
        self.plan = plan
        self._narrowing = narrow_gradients(plan, format_name)
        self.nbytes = self._narrowing.nbytes

    def sink(self, buffer: Tensor) -> Sink:
        return WideningSink(self._narrowing.places_in(buffer))


class _Compressed(Arrival):
    def __init__(self, plan: CompressedPlan, limit_bytes: int) -> None:
        self.plan, self.nbytes = plan.plan, plan.nbytes
        self._plan = plan
        self._limit_bytes = limit_bytes
        self._wire = torch.empty(0, dtype=torch.uint8)

    def sink(self, buffer: Tensor) -> Sink:
        del buffer
        if self._wire.numel() < self.nbytes:
            self._wire = new_buffer(self.nbytes, self._limit_bytes)
        return BufferSink(tensor_memory(self._wire))

    def finish(self, buffer: Tensor, layout: Layout) -> None:
        self._plan.decode(self._wire, buffer, layout)


class WireFormats:
    """A session's wire format. What it makes of a layout is kept until another layout comes."""

    def __init__(self, limit_bytes: int) -> None:
        self.wire: Wire = EXACT
        self._limit_bytes = limit_bytes
        self._usual: tuple[Layout, Arrival] | None = None
        self._narrowing: tuple[Layout, Narrowing] | None = None

    def arrival(
        self, layout: Layout, forms: dict[int, GradientForm], edited: Sequence[int] = (), *, no_gradients: bool = False
    ) -> Arrival:
        """Return how a contribution comes in; ValueError names the parameter whose form does not fit it."""
        if no_gradients:
            return _Exact(plan_gradients(layout, forms, edited, no_gradients=True))
        if forms or edited:
            return self._new(layout, forms, edited)
        if self._usual is None or self._usual[0] is not layout:
            self._usual = layout, self._new(layout, {}, ())
        return self._usual[1]

    def _new(self, layout: Layout, forms: dict[int, GradientForm], edited: Sequence[int]) -> Arrival:
        wire = self.wire
        if wire.gradients is None:
            return _Exact(plan_gradients(layout, forms, edited))
        if wire.compresses:
            plan = compress_plan(layout, forms, edited, wire)
            return _Compressed(plan, self._limit_bytes)
        return _Narrow(plan_gradients(layout, forms, edited), str(wire.gradients))

    def narrow(self, reader: ParameterReader) -> None:
        """Have parameters that are about to be sent read as the session wants them."""
        if self.wire.parameters is None:
            return
        if self._narrowing is None or self._narrowing[0] is not reader.layout:
            self._narrowing = reader.layout, narrow_parameters(reader.layout, str(self.wire.parameters))
        reader.narrow(self._narrowing[1])
