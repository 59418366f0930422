"""The ``pg`` transport: the bytes of tensors through a process group of torch.distributed, beside the stream with the rest.

Copies on the way out: none for gradients of 128 KiB or more, which are sent from where they lie; smaller ones are gathered in
blocks. Copies on the way in: none for parameters of that size; smaller ones come in blocks and are copied to their places.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from farstep.transports.base import Carrier
from farstep_wire.errors import ConfigurationError, DeadlineError, InternalError, UnavailableError
from farstep_wire.frames import Body, BytesSource, ScatterSink, Sink
from farstep_wire.process_group import TOKEN_BYTES, Group, GroupError, Making, Posted, Unsupported, blocks, places
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import memory

Exchange = Callable[[pb.ClientFrame], pb.ServerFrame]

_MAKING_SECONDS = 20.0
_MOMENT_SECONDS = 0.5
_RANK = 1
_SETTLED_SECONDS = 2.0
_MOST_GATHERED = 16
"""Blocks of several tensors, which are copies, that are under way at once: 32 MiB."""
_GRADIENTS = frozenset({"contribution", "accumulate", "evaluation"})


def make_carrier(exchange: Exchange, generation: int, stall_seconds: float) -> ProcessGroupCarrier:
    """Make a process group with the server by way of a stream.

    ConfigurationError: there can be none, here or there. UnavailableError: it could not be made this time.
    """
    token = secrets.token_bytes(TOKEN_BYTES)
    request = pb.Group(generation=generation, backend="gloo", token=token)
    reply = exchange(pb.ClientFrame(group=request)).grouped
    try:
        making = Making(_RANK, reply.worker_host, token, reply.token, _MAKING_SECONDS)
    except Unsupported as error:
        raise ConfigurationError(f"transport 'pg': {error}") from None
    try:
        return ProcessGroupCarrier(_made(making, reply, exchange, generation), stall_seconds)
    except BaseException:
        making.give_up()
        raise


def _made(making: Making, reply: pb.Grouped, exchange: Exchange, generation: int) -> Group:
    """Carry what either end writes to the other, until both are there."""
    deadline = time.monotonic() + _MAKING_SECONDS
    while making.group is None or not reply.ready:
        making.put({entry.key: entry.value for entry in reply.entries})
        fresh = making.take(_MOMENT_SECONDS)
        if making.error:
            kind = ConfigurationError if making.hopeless else UnavailableError
            raise kind(f"transport 'pg': no process group can be made with the server: {making.error}")
        if time.monotonic() > deadline:
            raise UnavailableError(f"transport 'pg': no process group could be made within {_MAKING_SECONDS:g} s")
        entries = [pb.GroupEntry(key=key, value=value) for key, value in fresh.items()]
        reply = exchange(pb.ClientFrame(group=pb.Group(generation=generation, entries=entries))).grouped
    return making.group


class ProcessGroupCarrier(Carrier):
    """One session's process group. Gradients and parameters take it; all else goes with the messages.

    ``stall_seconds``: how long a block may take, once the one before has come.
    """

    def __init__(self, group: Group, stall_seconds: float) -> None:
        self._group = group
        self._stall_seconds = stall_seconds
        # gloo may fail to wake who waits for a block that was being sent when the connection broke. So nobody waits for
        # them: the server's answer says that it has them, and the end of the stream that it never will.
        self._under_way: deque[Posted] = deque()
        self._body: Body | None = None
        self._gathered = 0

    @property
    def name(self) -> str:
        """The transport's name."""
        return "pg"

    def announce(self, frame: pb.ClientFrame, body: BytesSource) -> Body | None:
        """Take gradients; see Carrier."""
        if frame.WhichOneof("body") not in _GRADIENTS or not isinstance(body, Body) or not body.nbytes:
            return None
        frame.total_bytes = body.nbytes
        frame.blocks.extend(stop - start for start, stop in blocks(body.spans()))
        return body

    def send(self, frame: pb.ClientFrame, body: Body) -> None:
        """Begin to send the gradients; see Carrier."""
        try:
            self._finish()
            self._body = body
            for start, stop in places(frame.blocks, body.nbytes):
                pieces = body.slices(start, stop)
                if len(pieces) > 1:
                    self._make_room()
                    pieces = [memoryview(bytearray().join(pieces))]
                self._under_way.append(self._group.post(_of(pieces[0])))
        except GroupError as error:
            raise UnavailableError(str(error)) from None

    def _make_room(self) -> None:
        """Wait for the oldest blocks, where many copies are under way."""
        self._gathered += 1
        if self._gathered > _MOST_GATHERED:
            while self._under_way:
                self._group.wait(self._under_way.popleft(), self._stall_seconds)
            self._gathered = 1

    def settle(self) -> None:
        """Let go of what was sent: the server has it; see Carrier."""
        try:
            self._finish()
        except GroupError as error:
            raise UnavailableError(str(error)) from None

    def _finish(self) -> None:
        # A moment at most: it has gone through already, or never will, since the server did not take it.
        while self._under_way:
            self._group.wait(self._under_way.popleft(), _SETTLED_SECONDS)
        self._body, self._gathered = None, 0

    def receive(self, frame: pb.ServerFrame, sink: Sink, deadline: float) -> None:
        """Receive parameters; see Carrier."""
        try:
            for batch in _batches(places(frame.blocks, frame.total_bytes), sink):
                stall_seconds = min(self._stall_seconds, deadline - time.monotonic())
                arriving = self._group.receive([tensor for tensor, _ in batch], stall_seconds)
                for tensor, (_, start) in zip(arriving, batch, strict=True):
                    if start is not None:
                        sink.write(start, memory(tensor, tensor.numel()))
        except GroupError as error:
            late = time.monotonic() >= deadline
            raise (DeadlineError if late else UnavailableError)(str(error)) from None
        except ValueError as error:
            raise InternalError(f"the server announced {error}") from None

    def close(self) -> None:
        """Give the group up."""
        self._group.close()
        self._under_way.clear()
        self._body = None


def _batches(ranges: list[tuple[int, int]], sink: Sink) -> Iterator[list[tuple[Tensor, int | None]]]:
    """Yield the tensors that blocks come into: a parameter's own memory, or else memory from where they go on to an offset.

    Of the latter no more than _MOST_GATHERED at a time.
    """
    batch: list[tuple[Tensor, int | None]] = []
    staged = 0
    for start, stop in ranges:
        window = sink.window(start, stop) if isinstance(sink, ScatterSink) else None
        staged += window is None
        if staged > _MOST_GATHERED:
            yield batch
            batch, staged = [], 1
        batch.append((torch.empty(stop - start, dtype=torch.uint8), start) if window is None else (_of(window), None))
    yield batch


def _of(data: memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
