"""Requests of a session that have one reply: parameters, state, and acts that are merely done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from farstep.session.link import Link, internal
from farstep_wire.bundle import empty_buffer, read_bundle
from farstep_wire.frames import EMPTY, BufferSink, BytesSource, NullSink, Sink
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import memory

Make = Callable[[], tuple[pb.ClientFrame, BytesSource]]


def call_done(link: Link, make: Make) -> pb.Done:
    """Make a request that is answered by Done."""

    def handle(link: Link, deadline: float) -> pb.Done:
        frame = link.receive(lambda _: NullSink(), deadline)
        if frame.WhichOneof("body") != "done":
            raise internal(f"{frame.WhichOneof('body')} where done is due")
        return frame.done

    return link.call(make, handle)


def call_pull(
    link: Link, sink_for: Callable[[pb.ServerFrame], Sink], average: str = "", *, shared: bool = False
) -> pb.Parameters:
    """Have the parameters, or an average of them, written into a sink; or ``shared``, left in the lane, if there is one."""

    def handle(link: Link, deadline: float) -> pb.Parameters:
        frame = link.receive(sink_for, deadline)
        if frame.WhichOneof("body") != "parameters":
            raise internal(f"{frame.WhichOneof('body')} where parameters are due")
        return frame.parameters

    def make() -> tuple[pb.ClientFrame, BytesSource]:
        return pb.ClientFrame(pull=pb.Pull(average=average, shared=shared and link.lane is not None)), EMPTY

    return link.call(make, handle, reads=True)


def call_get_state(link: Link, indices: Sequence[int]) -> tuple[list[tuple[Any, Any]], pb.State]:
    """Return [(parameter index or other key, entries), ...] with CPU tensors, and the version they belong to."""
    buffer = empty_buffer(0)

    def sink_for(frame: pb.ServerFrame) -> Sink:
        nonlocal buffer
        buffer = empty_buffer(frame.total_bytes)
        return BufferSink(memory(buffer, frame.total_bytes))

    def handle(link: Link, deadline: float) -> pb.State:
        frame = link.receive(sink_for, deadline)
        if frame.WhichOneof("body") != "state":
            raise internal(f"{frame.WhichOneof('body')} where state is due")
        return frame.state

    request = pb.GetState(parameters=indices)
    state = link.call(lambda: (pb.ClientFrame(get_state=request), EMPTY), handle, reads=True)
    pairs = read_bundle(buffer, state.header_bytes, "state")
    return [(key, entries) for key, entries in pairs], state
