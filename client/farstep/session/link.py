"""The link: a stream that is attached to a hosted optimizer, made anew when it breaks.

Every request is sent again after a reconnect. That is safe: requests that change anything carry a sequence number, which the
server answers from its record if it has settled it already.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import uuid4

from farstep.config import Remote
from farstep.embedded import embedded_server_ended
from farstep.session.arrivals import Arrival
from farstep.session.forks import one_thread
from farstep.transports.base import Carrier, Lane, Rest, SinkFor, Stream, Traffic, Transport
from farstep.transports.grpc import GrpcTransport
from farstep.transports.pipe import PipedStream
from farstep_wire import __version__
from farstep_wire.address import Address
from farstep_wire.convert import failure_from_proto
from farstep_wire.errors import (
    Applied,
    DeadlineError,
    DrainingError,
    FarstepError,
    FencedError,
    InternalError,
    LeaseError,
    RollbackError,
    UnavailableError,
)
from farstep_wire.frames import EMPTY, BytesSource, NullSink
from farstep_wire.limits import PROTOCOL
from farstep_wire.pipes import Pipes
from farstep_wire.v1 import optimizer_pb2 as pb

_LOGGER = logging.getLogger("farstep")
_LONGEST_HEARTBEAT_SECONDS = 20.0
_LEAVE_SECONDS = 2.0
# Beyond the time that an attach may wait on the server: its own word, that it waited in vain, comes within it.
_WORD_SECONDS = 0.5

Result = TypeVar("Result")
Exchange = Callable[[pb.ClientFrame], pb.ServerFrame]
OpenLane = Callable[[Exchange], Lane | Carrier | None]
OpenPipes = Callable[[Exchange, bool], Pipes | None]


@dataclass
class Standing:
    """Where this client stands with the hosted optimizer."""

    lineage: str = ""
    incarnation: int = 0
    version: int = 0
    epoch: int = 0
    sequence: int = 0
    settled: int = 0
    device: str = ""
    parameters: int = 0
    server_version: str = ""
    instance: str = field(default_factory=lambda: uuid4().hex)


class Link:
    """A client's connection to one hosted optimizer.

    ``describe_attach`` gives the Attach message and the layout's bytes; it is asked anew at each attempt. ``open_pipes`` and
    ``open_lane`` agree on pipes and on a lane for a stream that has just been attached.
    """

    def __init__(
        self,
        address: Address,
        remote: Remote,
        describe_attach: Callable[[], tuple[pb.Attach, BytesSource]],
        open_pipes: OpenPipes,
        open_lane: OpenLane,
    ) -> None:
        self.address = address
        self.standing = Standing()
        self.sent = False
        self._remote = remote
        self._describe_attach = describe_attach
        self._open_pipes = open_pipes
        self._open_lane = open_lane
        self.lane: Lane | None = None
        self.arrival: Arrival | None = None
        """The bytes of the last reply, where they are still on their way in."""
        self.broken_arrival = False
        """Whether the last parameters have not all come; for the session to pull them, and to say so."""
        self.streams = 0
        """How many streams there have been."""
        self._transport: Transport | None = None
        self._stream: Stream | None = None
        self._ended_traffic = Traffic()
        self._requests = 0
        self._process = os.getpid()
        self._broken_since: float | None = None

    @property
    def transport(self) -> str:
        """How tensors travel."""
        stream = self._stream
        if stream is None:
            return "grpc"
        way = self.lane or stream.carrier or stream
        return way.name

    @property
    def traffic(self) -> Traffic:
        """What has gone through the stream, and through those before it."""
        return self._ended_traffic if self._stream is None else self._ended_traffic + self._stream.traffic

    # Attaching.

    def attach(self, contents: Callable[[], BytesSource]) -> pb.Attached:
        """Attach for the first time, creating the hosted optimizer where the server asks for its parameters."""
        deadline = time.monotonic() + self._remote.timeouts.seconds("connect")

        def attempt() -> pb.Attached:
            reply = self._open(deadline)
            if reply.outcome == pb.Attached.OUTCOME_UPLOAD:
                reply = self._exchange(pb.ClientFrame(upload=pb.Upload()), contents(), deadline).attached
            self._take_standing(reply)
            self.choose_lane(deadline)
            return reply

        try:
            attached = self._until(attempt, deadline, self._not_reached)
        except BaseException:
            self._drop_stream()
            raise
        self.standing.version = attached.version
        return attached

    def choose_lane(self, deadline: float) -> None:
        """Agree with the server on the lane of the stream as it is, in place of the one that it has."""
        self._close_lane(settled=True)
        stream = self._whole()

        def exchange(frame: pb.ClientFrame) -> pb.ServerFrame:
            return self._exchange(frame, EMPTY, deadline)

        if stream.carrier is None:  # a carrier is of no particular layout
            found = self._open_lane(exchange)
            if isinstance(found, Carrier):
                stream.carrier = found
            else:
                self.lane = found
        if not isinstance(stream, PipedStream):
            pipes = self._open_pipes(exchange, self.lane is not None)
            if pipes is not None:
                self._stream = PipedStream(stream, pipes, str(self.address))

    def _open(self, deadline: float) -> pb.Attached:
        if self._transport is None:
            self._transport = GrpcTransport(self.address)
        self._stream = self._transport.open(deadline)
        self.streams += 1
        self._requests = 0
        attach, layout = self._describe_attach()
        attach.protocol, attach.client_version = PROTOCOL, __version__
        attach.instance = self.standing.instance
        attach.lineage, attach.incarnation = self.standing.lineage, self.standing.incarnation
        attach.version = self.standing.version
        attach.wait_ms = max(1, round((deadline - time.monotonic()) * 1000))
        return self._exchange(pb.ClientFrame(attach=attach), layout, deadline + _WORD_SECONDS).attached

    def _take_standing(self, attached: pb.Attached) -> None:
        standing = self.standing
        standing.lineage, standing.incarnation = attached.lineage, attached.incarnation
        standing.epoch, standing.settled = attached.epoch, attached.settled_sequence
        standing.parameters = sum(shard.parameters for shard in attached.shards)
        standing.device, standing.server_version = attached.device, attached.server_version
        assert self._stream is not None, "attached"
        self._stream.keep_alive(min(attached.lease_ms / 3000, _LONGEST_HEARTBEAT_SECONDS))

    def _reattach(self, deadline: float) -> None:
        before = self.standing.incarnation
        try:
            attached = self._open(deadline)
        except BaseException:
            # A stream that is not attached is none to go on with.
            self._drop_stream()
            raise
        if attached.incarnation == before and attached.version < self.standing.version:
            self._drop_stream()
            lost = self.standing.version
            self.standing.version = attached.version
            raise RollbackError(
                f"{self.address}: the server is back at version {attached.version}; this worker holds version {lost}, which "
                f"it had acknowledged. It was started again from an older snapshot. Call opt.remote.pull() and step again "
                f"to go on from version {attached.version}",
                applied=Applied.NO,
            )
        incarnation = self.standing.incarnation
        self._take_standing(attached)
        # What this worker holds is of the incarnation it knew; the server will say so if that has ended.
        self.standing.incarnation = incarnation
        try:
            self.choose_lane(deadline)
        except BaseException:
            self._drop_stream()
            raise
        _LOGGER.warning("farstep: attached to %s again (version %d)", self.address, attached.version)

    # Requests.

    def call(
        self,
        make: Callable[[], tuple[pb.ClientFrame, BytesSource]],
        handle: Callable[[Link, float], Result],
        *,
        reads: bool = False,
    ) -> Result:
        """Send a request and have ``handle`` take its replies; on a broken stream, do so again until the deadline.

        UnavailableError (DeadlineError where time ran out): ``applied`` is UNKNOWN, or NONE where the request only ``reads``.
        """
        self.finish_arrival()
        deadline = time.monotonic() + self._remote.timeouts.seconds("step")
        self._broken_since = None

        def attempt() -> Result:
            self._ensure(deadline)
            self.send(*make())
            try:
                return handle(self, deadline)
            except FencedError as error:
                # By whom, attaching again tells: by another process, and then this one is refused for good, or by an attach
                # of this very client that it had given up and that reached the server late.
                raise LeaseError(str(error), applied=error.applied) from error

        return self._until(attempt, deadline, lambda error: self._gave_up(error, reads=reads))

    def _ensure(self, deadline: float) -> None:
        self._leave_to_parent()
        if self._stream is None:
            self._reattach(self._limit(deadline))
            self._broken_since = None

    def _leave_to_parent(self) -> None:
        """In a forked child: give up what is the parent's, whose threads are not here."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        if self.arrival is not None:
            self.arrival, self.broken_arrival = None, True
        with one_thread():
            self._close_lane(settled=False)
        stream, self._stream, self._transport = self._stream, None, None
        if stream is not None:
            stream.abandon()

    def ensure(self) -> None:
        """Attach again where the connection has been given up."""
        deadline = time.monotonic() + self._remote.timeouts.seconds("step")
        self._broken_since = None
        self._until(lambda: self._ensure(deadline), deadline, lambda error: self._gave_up(error, reads=True))

    @property
    def open(self) -> bool:
        """Whether there is a stream to send on just now, and tensors go in its messages."""
        stream = self._stream
        beside = (
            self.lane is not None or stream is None or stream.carrier is not None or isinstance(stream, PipedStream)
        )
        return not beside and self._process == os.getpid()

    def send(self, frame: pb.ClientFrame, body: BytesSource = EMPTY) -> None:
        """Send a message on the stream as it is; UnavailableError where a request in between has lost it."""
        self._requests += 1
        frame.request = self._requests
        self._whole().send(frame, body)

    def _whole(self) -> Stream:
        if self._stream is None:
            # A closure may ask the server something of its own in the middle of a step.
            raise UnavailableError(f"the connection to {self.address} was given up in the middle of a request")
        return self._stream

    def receive(self, sink_for: SinkFor, deadline: float) -> pb.ServerFrame:
        """Return the next reply; a Failure is raised as the error it stands for."""
        with self._ended_by_nonsense():
            frame = self._whole().receive(sink_for, deadline)
        if frame.WhichOneof("body") == "failure":
            raise _failure(frame.failure)
        return frame

    def receive_first(self, sink_for: SinkFor, deadline: float) -> tuple[pb.ServerFrame, Rest | None]:
        """Return the next reply as soon as its header is there, and what receives the rest; see Stream."""
        with self._ended_by_nonsense():
            frame, rest = self._whole().receive_first(sink_for, deadline)
        if frame.WhichOneof("body") == "failure":
            raise _failure(frame.failure)
        return frame, rest

    def receive_rest(self, rest: Rest) -> None:
        """Receive what is left of a reply."""
        with self._ended_by_nonsense():
            rest(lambda _: None)

    @contextmanager
    def _ended_by_nonsense(self) -> Iterator[None]:
        """Drop the stream where a reply makes no sense: nobody would take the rest of it."""
        try:
            yield
        except UnavailableError:
            raise
        except FarstepError:
            self._drop_stream()
            raise

    def finish_arrival(self) -> None:
        """Wait for what is still on its way in; where it does not come, ``broken_arrival`` says so."""
        self._leave_to_parent()
        arrival = self.arrival
        if arrival is not None:
            whole = arrival.finish()
            self.arrival = None
            if not whole:
                self.broken_arrival = True
                self._drop_stream()

    def _exchange(self, frame: pb.ClientFrame, body: BytesSource, deadline: float) -> pb.ServerFrame:
        self.send(frame, body)
        return self.receive(lambda _: NullSink(), deadline)

    # Trying again.

    def _until(
        self, attempt: Callable[[], Result], deadline: float, give_up: Callable[[FarstepError], FarstepError]
    ) -> Result:
        pause = self._remote.retry.first
        while True:
            try:
                return attempt()
            except (UnavailableError, DrainingError, LeaseError) as error:
                self._drop_stream()
                now = time.monotonic()
                if (
                    isinstance(error, DeadlineError)
                    or now + pause >= self._limit(deadline)
                    or embedded_server_ended(self.address.target)
                ):
                    raise give_up(error) from error
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, self._remote.retry.longest)
            except FarstepError:
                raise
            except BaseException:
                # Interrupted between request and reply: the stream is out of step.
                self._drop_stream()
                raise

    def _limit(self, deadline: float) -> float:
        """Return until when to try again: a server that was here before has ``reconnect`` to come back."""
        if not self.standing.lineage:
            return deadline
        if self._broken_since is None:
            self._broken_since = time.monotonic()
        return min(deadline, self._broken_since + self._remote.timeouts.seconds("reconnect"))

    def _not_reached(self, error: FarstepError) -> FarstepError:
        seconds = self._remote.timeouts.seconds("connect")
        kind = DeadlineError if isinstance(error, DeadlineError) else UnavailableError
        return kind(
            f"no farstep server could be attached at {self.address} within {seconds:g} s ({error}). Check that "
            f"farstep-server runs there, that the address is the one it printed, and that nothing blocks the way: "
            f"farstep doctor --server {self.address}"
        )

    def _gave_up(self, error: FarstepError, *, reads: bool) -> FarstepError:
        applied = Applied.NONE if reads else Applied.UNKNOWN
        unknown = (
            "Nothing was to be changed by it"
            if reads
            else "Whether the step was applied is unknown: the next call finds out, and goes on from the server's parameters"
        )
        if isinstance(error, DeadlineError):
            seconds = self._remote.timeouts.seconds("step")
            return DeadlineError(
                f"{error} (timeouts.step is {seconds:g} s). {unknown}. A round waits for every live worker: farstep ls and "
                f"farstep show, with --server {self.address}, say whether one is missing or the server hangs",
                applied=applied,
            )
        return UnavailableError(
            f"{error}, and it could not be reached again in time. {unknown}. Check the server at {self.address}",
            applied=applied,
        )

    # Ending.

    def renew_lane(self) -> None:
        """Agree on a lane anew, the layout having changed; a stream that breaks at that is made again with the next request."""
        try:
            self.choose_lane(time.monotonic() + self._remote.timeouts.seconds("step"))
        except UnavailableError:
            self._drop_stream()
        except BaseException:
            self._drop_stream()
            raise

    def _close_lane(self, *, settled: bool) -> None:
        lane, self.lane = self.lane, None
        if lane is not None:
            lane.close(settled=settled)

    def _drop_stream(self) -> None:
        self._close_lane(settled=False)
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
            self._ended_traffic += stream.traffic
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def close(self) -> None:
        """Leave, as far as that can be said in a moment, and drop the connection."""
        self.finish_arrival()
        if self.broken_arrival:
            _LOGGER.warning("farstep: the last parameters from %s have not all come: these are a mixture", self.address)
        if self.lane is not None:
            self.lane.let_go()
        if self._stream is not None:
            try:
                self._exchange(pb.ClientFrame(leave=pb.Leave()), EMPTY, time.monotonic() + _LEAVE_SECONDS)
                self._close_lane(settled=True)
            except FarstepError:
                _LOGGER.debug("farstep: could not take leave of %s", self.address)
        self._drop_stream()


def _failure(message: object) -> FarstepError:
    assert isinstance(message, pb.ServerFrame().failure.__class__), "a Failure"
    error = failure_from_proto(message)
    if message.exception_type:
        error.__cause__ = _builtin_exception(message.exception_type, str(error))
    return error


def _builtin_exception(name: str, text: str) -> Exception | None:
    import builtins

    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind(text)
    return None


def internal(text: str) -> InternalError:
    """Return the error for a reply that makes no sense."""
    return InternalError(f"the server answered out of turn: {text}")
