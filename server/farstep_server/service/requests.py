"""Requests of a session: what a frame declares is checked before memory is taken, and what arrived becomes an event."""

from __future__ import annotations

import math
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from torch import Tensor

from farstep_server.core import events as ev
from farstep_server.core.gradients import Staged, check_indices
from farstep_server.core.parameters import tensor_memory
from farstep_server.service.early import EarlyGradients
from farstep_server.service.receiving import Arrival, WireFormats
from farstep_server.service.sharing import Sharing
from farstep_server.service.staging import StagingBuffers, new_buffer
from farstep_wire.bundle import read_bundle
from farstep_wire.convert import edited_from_proto, edits_from_proto, forms_from_proto, layout_from_proto
from farstep_wire.errors import InvalidRequestError
from farstep_wire.frames import BufferSink, Incoming
from farstep_wire.layout import GradientPlan, Layout
from farstep_wire.limits import LAYOUT_BYTES
from farstep_wire.v1 import common_pb2 as cpb
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import from_value

_WITH_BYTES = frozenset(
    {"attach", "upload", "contribution", "accumulate", "evaluation", "load_state", "add_param_group"}
)
NO_LAYOUT = Layout((), ())


@dataclass
class Request:
    """A request whose bytes are on their way into ``buffer``."""

    frame: pb.ClientFrame
    kind: str
    buffer: Tensor
    incoming: Incoming
    layout: Layout
    arrival: Arrival | None = None
    views: list[Tensor | None] | None = None
    elsewhere: Staged | None = None

    def event(self, ticket: ev.Ticket, worker: str) -> ev.Event:
        """Return the event that the complete request stands for; ValueError or TypeError names a bad field."""
        match self.kind:
            case "contribution":
                return self._contribution(ticket, worker, self.frame.contribution)
            case "accumulate":
                return self._accumulate(ticket, worker, self.frame.accumulate)
            case "evaluation":
                return self._evaluation(ticket, worker, self.frame.evaluation)
            case "zero_grad":
                return ev.ZeroGrad(ticket, worker, self.frame.zero_grad.epoch)
            case "pull":
                return ev.ReadParameters(ticket, worker, self.frame.pull.average, self.frame.pull.shared)
            case "get_state":
                return ev.ReadState(ticket, edited_from_proto(self.frame.get_state.parameters, self.layout))
            case "load_state":
                return self._load_state(ticket, worker, self.frame.load_state)
            case "add_param_group":
                return self._add_group(ticket, worker, self.frame.add_param_group)
        raise InvalidRequestError(f"{self.kind} is no request of a session")

    def _contribution(self, ticket: ev.Ticket, worker: str, message: pb.Contribution) -> ev.Contribution:
        if not math.isfinite(message.num_samples) or message.num_samples < 0:
            raise ValueError(f"num_samples must be positive and finite, not {message.num_samples}")
        _check_sequence(message.sequence)
        return ev.Contribution(
            ticket,
            worker,
            message.epoch,
            message.sequence,
            message.version,
            message.incarnation,
            None if message.abstain else self._staged(),
            edits_from_proto(message.edits, len(self.layout.group_sizes)),
            message.abstain,
            message.closure,
            message.num_samples or None,
            message.omit_parameters,
            message.accumulated,
            message.shared or message.leaves_parameters,
            message.takes_changes and not (message.abstain or message.closure),
        )

    def _accumulate(self, ticket: ev.Ticket, worker: str, message: pb.Accumulate) -> ev.Accumulate:
        _check_sequence(message.sequence)
        staged = self._staged()
        assert staged is not None, "planned with gradients"
        return ev.Accumulate(ticket, worker, message.epoch, message.sequence, staged)

    def _staged(self) -> Staged | None:
        if self.arrival is None or self.elsewhere is not None:
            return self.elsewhere
        self.arrival.finish(self.buffer, self.layout)
        staged = Staged(self.arrival.plan, self.buffer, self.views)
        check_indices(staged, self.layout)
        return staged

    def _evaluation(self, ticket: ev.Ticket, worker: str, message: pb.Evaluation) -> ev.Evaluation:
        staged = self._staged()
        loss = None if message.error else from_value(message.loss, "loss")
        return ev.Evaluation(
            ticket, worker, message.epoch, message.sequence, message.number, loss, staged, message.error, message.shared
        )

    def _load_state(self, ticket: ev.Ticket, worker: str, message: pb.LoadState) -> ev.LoadState:
        tree = read_bundle(self.buffer, message.header_bytes, "the bundle")
        if not isinstance(tree, dict) or tree.keys() != {"state", "groups"}:
            raise ValueError("the bundle must hold 'state' and 'groups'")
        _check_sequence(message.sequence)
        state, groups = tree["state"], tree["groups"]
        if not isinstance(groups, list) or len(groups) != len(self.layout.group_sizes):
            raise ValueError(f"'groups' must be a list of {len(self.layout.group_sizes)} groups")
        if not all(isinstance(group, dict) for group in groups):
            raise ValueError(f"'groups' must hold the options of each group, not {groups!r}")
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in state):
            raise ValueError("each entry of 'state' must be a pair of key and entries")
        for key, _ in state:
            if not isinstance(key, (int, str)):
                raise ValueError(f"'state' has the key {key!r}")
            if isinstance(key, int) and not 0 <= key < len(self.layout.parameters):
                raise ValueError(f"state of parameter {key}; there are {len(self.layout.parameters)}")
        return ev.LoadState(
            ticket, worker, message.epoch, message.sequence, [(key, value) for key, value in state], groups
        )

    def _add_group(self, ticket: ev.Ticket, worker: str, message: pb.AddParamGroup) -> ev.AddGroup:
        _check_sequence(message.sequence)
        if message.layout_bytes > self.buffer.numel():
            raise ValueError(f"a layout of {message.layout_bytes} bytes in a body of {self.buffer.numel()}")
        layout, options = read_layout(self.buffer[: message.layout_bytes])
        contents = self.buffer[message.layout_bytes :]
        if len(options) != 1 or contents.numel() != layout.arena.nbytes:
            raise ValueError(
                f"one group and {layout.arena.nbytes} bytes of parameters are due; "
                f"{len(options)} groups and {contents.numel()} bytes came"
            )
        return ev.AddGroup(ticket, worker, message.epoch, message.sequence, layout, options[0], contents.clone())


def _check_sequence(sequence: int) -> None:
    if sequence < 1:
        raise ValueError(f"sequence numbers begin at 1, not {sequence}")


def read_layout(buffer: Tensor) -> tuple[Layout, list[dict[str, object]]]:
    """Decode a serialized Layout; ValueError names the field."""
    try:
        return layout_from_proto(cpb.Layout.FromString(bytes(tensor_memory(buffer))))
    except DecodeError as error:
        raise ValueError(f"the layout of {buffer.numel()} bytes cannot be read: {error}") from None


class Decoder:
    """Begins requests: says where their bytes go, or refuses them before any memory is taken."""

    def __init__(self, limit_bytes: int, sharing: Sharing, formats: WireFormats, *, pinned: bool) -> None:
        self._limit_bytes = limit_bytes
        self._formats = formats
        self._sharing = sharing
        self._staging = StagingBuffers(limit_bytes, pinned=pinned)
        self.early = EarlyGradients(self._staging)

    def begin(self, frame: pb.ClientFrame, layout: Layout, *, keep_last: bool) -> Request:
        """Return the request that a frame begins; InvalidRequestError or ResourceExhaustedError where it cannot be.

        ``keep_last``: the gradients of the last one are still read.
        """
        kind = frame.WhichOneof("body") or ""
        if kind == "stage":
            return self._stage(frame, layout, keep_last=keep_last)
        try:
            arrival = self._arrival(frame, kind, layout)
        except ValueError as error:
            raise InvalidRequestError(f"{kind}: {error}") from None
        _check_size(
            frame, kind, layout.arena.nbytes if kind == "upload" else None if arrival is None else arrival.nbytes
        )
        if arrival is None:
            buffer = new_buffer(frame.total_bytes, self._limit_bytes)
            incoming = Incoming(frame.total_bytes, BufferSink(tensor_memory(buffer)))
            return Request(frame, kind, buffer, incoming, layout)
        if _came_early(frame, kind):
            buffer = new_buffer(arrival.plan.nbytes, self._limit_bytes)
        else:
            self.early.forget()
            buffer = self._staging.take(arrival.plan.nbytes, keep_last=keep_last)
        incoming = Incoming(frame.total_bytes, arrival.sink(buffer))
        views = self._staging.views(layout) if arrival.plan is layout.dense_plan else None
        request = Request(frame, kind, buffer, incoming, layout, arrival, views)
        if _lies_elsewhere(frame, kind):
            request.elsewhere = self._elsewhere(frame, kind, layout, arrival.plan, buffer)
        return request

    def _stage(self, frame: pb.ClientFrame, layout: Layout, *, keep_last: bool) -> Request:
        try:
            sink = self.early.sink(frame.stage.parameters, frame.total_bytes, layout, keep_last=keep_last)
        except ValueError as error:
            raise InvalidRequestError(f"stage: {error}") from None
        incoming = Incoming(frame.total_bytes, sink)
        return Request(frame, "stage", new_buffer(0, self._limit_bytes), incoming, layout)

    def _elsewhere(
        self, frame: pb.ClientFrame, kind: str, layout: Layout, plan: GradientPlan, buffer: Tensor
    ) -> Staged:
        forms = forms_from_proto(getattr(frame, kind).forms, layout)
        place = self.early if _came_early(frame, kind) else self._sharing
        try:
            return place.staged(layout, forms, plan, buffer)
        except ValueError as error:
            raise InvalidRequestError(f"{kind}: {error}") from None

    def _arrival(self, frame: pb.ClientFrame, kind: str, layout: Layout) -> Arrival | None:
        none = _lies_elsewhere(frame, kind)
        if kind == "contribution":
            message = frame.contribution
            if message.takes_changes and self._formats.wire.parameters is not None:
                raise ValueError("takes_changes in a session whose parameters are narrowed")
            edited = edited_from_proto(message.edited_parameters, layout)
            none = none or message.abstain or message.closure
            forms = {} if none else forms_from_proto(message.forms, layout)
            return self._formats.arrival(layout, forms, edited, no_gradients=none)
        if kind == "accumulate":
            forms = {} if none else forms_from_proto(frame.accumulate.forms, layout)
            return self._formats.arrival(layout, forms, no_gradients=none)
        if kind == "evaluation" and not frame.evaluation.error:
            forms = {} if none else forms_from_proto(frame.evaluation.forms, layout)
            return self._formats.arrival(layout, forms, no_gradients=none)
        return None


def _check_size(frame: pb.ClientFrame, kind: str, expected: int | None) -> None:
    """InvalidRequestError: a request declares other bytes than it takes."""
    if kind not in _WITH_BYTES and frame.total_bytes:
        raise InvalidRequestError(f"{kind}: {frame.total_bytes} bytes are declared; it takes none")
    if kind == "attach" and frame.total_bytes > LAYOUT_BYTES:
        raise InvalidRequestError(f"attach: a layout of {frame.total_bytes} bytes; at most {LAYOUT_BYTES} are possible")
    if expected is not None and frame.total_bytes != expected:
        raise InvalidRequestError(f"{kind}: {frame.total_bytes} bytes are declared, the layout takes {expected}")


def _lies_elsewhere(frame: pb.ClientFrame, kind: str) -> bool:
    """Whether a request's gradients are said to be here already: in shared memory, or come before it."""
    return _came_early(frame, kind) or _in_shared_memory(frame, kind)


def _came_early(frame: pb.ClientFrame, kind: str) -> bool:
    """Whether a request's gradients are said to have come before it."""
    message = frame.contribution
    return kind == "contribution" and message.staged and not (message.abstain or message.closure or message.shared)


def _in_shared_memory(frame: pb.ClientFrame, kind: str) -> bool:
    """Whether a request's gradients are said to lie in shared memory."""
    if kind == "contribution":
        return frame.contribution.shared and not (frame.contribution.abstain or frame.contribution.closure)
    return kind in {"accumulate", "evaluation"} and getattr(frame, kind).shared
