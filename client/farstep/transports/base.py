"""What every transport promises.

A transport opens streams. A stream carries whole messages, in order, in both directions: a frame as header and the bytes
that belong to it. Any failure of a stream is an UnavailableError, after which the stream is of no more use; a DeadlineError
says that the time allowed has passed. Nothing on a stream waits without a deadline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from farstep.transports.views import View
from farstep_wire.frames import EMPTY, Body, BytesSource, Sink
from farstep_wire.v1 import optimizer_pb2 as pb

SinkFor = Callable[[pb.ServerFrame], Sink]
"""Chooses where the bytes of a reply go, from its header; may raise to refuse it."""

Rest = Callable[[Callable[[int], None]], None]
"""Receives what is left of a reply, and tells after each part how many bytes there are by then; raises as ``receive`` does."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a session's messages: of whole frames, heartbeats included, before the transport adds what it needs."""

    sent: int = 0
    received: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent - other.sent, self.received - other.received)


class Carrier(ABC):
    """Another way for the bytes of a stream's messages, whose headers alone then go through the stream; it ends with it.

    What goes wrong is an UnavailableError, after which neither is of more use.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The transport's name, as in ``Remote(transport=...)``."""

    @abstractmethod
    def announce(self, frame: pb.ClientFrame, body: BytesSource) -> Body | None:
        """Say in a message's frame how its bytes come, and return them for ``send``; None: they go with the message."""

    @abstractmethod
    def send(self, frame: pb.ClientFrame, body: Body) -> None:
        """Begin to send the bytes of a message that is on its way. They are left alone until ``settle``."""

    @abstractmethod
    def settle(self) -> None:
        """The server has answered the last message, and did not refuse it: its bytes are free."""

    @abstractmethod
    def receive(self, frame: pb.ServerFrame, sink: Sink, deadline: float) -> None:
        """Receive the bytes of a reply; ``deadline`` is on ``time.monotonic``. The sink may have been written to in part."""

    @abstractmethod
    def close(self) -> None:
        """Give it up; may be called more than once and from any thread."""


class Stream(ABC):
    """One session's stream. ``send`` may be called from any thread, ``receive`` from one at a time."""

    name = "grpc"
    """What its messages travel by."""
    carrier: Carrier | None = None
    """What takes the bytes of messages, where something does."""

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """What has gone through so far. A message that is queued counts once it is sent."""

    @abstractmethod
    def send(self, frame: pb.ClientFrame, body: BytesSource = EMPTY) -> None:
        """Queue a message. Its bytes are read later: their owner leaves them alone until the reply has come."""

    @abstractmethod
    def receive(self, sink_for: SinkFor, deadline: float) -> pb.ServerFrame:
        """Return the next reply once all its bytes are in the sink.

        ``deadline`` is on ``time.monotonic``. DeadlineError: it has passed; UnavailableError: the stream broke. In both
        cases the sink may have been written to in part.
        """

    def receive_first(self, sink_for: SinkFor, deadline: float) -> tuple[pb.ServerFrame, Rest | None]:
        """Return the next reply as soon as its header is there, and what receives the rest of its bytes, where some are left.

        That may be called from another thread, once, and before anything else is received.
        """
        return self.receive(sink_for, deadline), None

    @abstractmethod
    def keep_alive(self, interval_seconds: float) -> None:
        """From now on send a heartbeat whenever nothing else has been sent for that long.

        Also measure a bare round trip a moment from now and then at that interval, at most one at a time and off the path of
        the steps, and report each in a heartbeat.
        """

    @abstractmethod
    def close(self) -> None:
        """End the stream; may be called more than once and from any thread."""

    def abandon(self) -> None:
        """Give up this process's part in it, in a child that was forked from the one that it belongs to."""
        return


class Lane(ABC):
    """Another way for gradients and parameters than a stream's own bytes; it belongs to one stream and ends with it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The transport's name, as in ``Remote(transport=...)``."""

    @abstractmethod
    def put(self, gradients: Sequence[Tensor | None]) -> bool:
        """Lay out gradients for the next request, one per parameter, dense CPU tensors with the layout's strides.

        False: they cannot go this way just now, and go in the message.
        """

    @abstractmethod
    def take(self, changes: int, sink: Sink) -> bool:
        """Copy the parameters that a reply speaks of into a sink. False: they have changed since; the sink has a mixture."""

    @property
    def adopted(self) -> bool:
        """Whether the parameters lie in the server's memory, so that there is nothing to take."""
        return False

    def adopt(self) -> None:
        """Have the parameters lie there from now on, where that was asked for; they hold what the server has there."""
        return

    @property
    def left(self) -> bool:
        """Whether the server does not go on with it, and another one is to be agreed on."""
        return False

    @property
    def view(self) -> View | None:
        """The view of the server's parameters in which this worker's may lie."""
        return None

    def let_go(self) -> None:
        """Have the parameters be this worker's own, which the server is about to be told that it does not wait any more."""
        return

    @abstractmethod
    def close(self, *, settled: bool) -> None:
        """Give it up. ``settled``: nothing that was put is awaited; else it may still be read, and is never written again."""


class Transport(ABC):
    """Opens streams to one server."""

    @abstractmethod
    def open(self, deadline: float) -> Stream:
        """Return a new stream; UnavailableError where no server answers by the deadline on ``time.monotonic``."""

    @abstractmethod
    def close(self) -> None:
        """Give up everything that is held for the server; streams end."""
