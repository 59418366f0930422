"""The ``grpc`` transport: one long-lived bidirectional stream per session.

Copies on the way out: one, from the gradients' own memory into the frame that gRPC takes (and one inside gRPC). On the way
in: one, from the frame that gRPC gives into the parameters' own memory (and one inside gRPC).

A blocked read has no timeout of its own in gRPC; a watchdog shared by all streams of the process cancels the call whose
deadline has passed. It also sends the heartbeats, and has the round trip measured that they report.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import grpc

from farstep.transports.base import Rest, SinkFor, Stream, Traffic, Transport
from farstep_wire.address import Address
from farstep_wire.errors import ConfigurationError, DeadlineError, FarstepError, InternalError, UnavailableError
from farstep_wire.frames import EMPTY, BytesSource, Incoming, Sink, decode, encode
from farstep_wire.limits import MESSAGE_BYTES
from farstep_wire.v1 import inspection_pb2
from farstep_wire.v1 import optimizer_pb2 as pb

_WATCHDOG_SECONDS = 0.1
_FIRST_ROUND_TRIP_SECONDS = 0.2
"""How long after the attach: soon, so that a short run has a figure too, but not while models are being built."""
_ROUND_TRIP_INTERVAL_SECONDS = 1.0
"""Shortest time between two measurements, however short the lease is."""
_ROUND_TRIP_DEADLINE_SECONDS = 10.0
_REFUSAL_SECONDS = 2.0
"""For the word of a server that does not take the bytes of a message."""
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
# On one host: gRPC's guess of how much should be under way grows to tens of MiB there, and moves nothing faster. Over a network
# it is left to gRPC.
_LOOPBACK_OPTIONS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2 * 1024 * 1024)]


_opened = False
_inherited = False


def open_channel(address: Address) -> grpc.Channel:
    """Return a channel to the address; it connects when it is first used.

    ConfigurationError: this process was forked from one that had opened a channel.
    """
    global _opened  # noqa: PLW0603 - gRPC itself is one per process
    if _inherited:
        raise ConfigurationError(
            f"this process (pid {os.getpid()}) was forked from one that is connected to a farstep server, and gRPC does "
            f"not work in such a child: start it with multiprocessing's method 'spawn' or 'forkserver', or fork before "
            f"the first optimizer is built. Children that leave the optimizer alone, as a DataLoader's do, are safe"
        )
    _opened = True
    options = _OPTIONS + _LOOPBACK_OPTIONS if address.is_loopback else _OPTIONS
    return grpc.insecure_channel(address.target, options=options)


class _RoundTrip:
    """Measures bare round trips beside a stream, one at a time. Blocks nobody; a call that hangs ends by its deadline.

    The watchdog alone calls ``tick``. Nothing is locked: a finalizer may ``close`` it in the very thread that is in ``tick``.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        service = inspection_pb2.DESCRIPTOR.services_by_name["InspectionService"]
        self._method: Any = channel.unary_unary(f"/{service.full_name}/GetServer", None, None)
        self._call: Any = None
        self._closed = False
        self._interval_seconds = math.inf
        self._due = math.inf
        self._news = False
        self.seconds = 0.0
        """What the last one took; 0: there is none yet."""

    def begin(self, interval_seconds: float) -> None:
        """Measure in a moment, and at that interval from then on; called again, it changes the interval."""
        first = math.isinf(self._due)
        self._interval_seconds = max(interval_seconds, _ROUND_TRIP_INTERVAL_SECONDS)
        self._due = time.monotonic() + (_FIRST_ROUND_TRIP_SECONDS if first else self._interval_seconds)

    def tick(self, now: float) -> bool:
        """Start a measurement where one is due; return whether one has come since the last call."""
        if self._call is None and now >= self._due:
            self._due = now + self._interval_seconds
            self._start()
        news, self._news = self._news, False
        return news

    def _start(self) -> None:
        started = time.monotonic()

        def done(call: Any) -> None:
            seconds = time.monotonic() - started
            if call.code() is grpc.StatusCode.OK:
                self.seconds, self._news = seconds, True
            self._call = None

        try:
            self._call = call = self._method.future(b"", timeout=_ROUND_TRIP_DEADLINE_SECONDS)
        except ValueError:  # the channel has just been closed
            return
        call.add_done_callback(done)
        if self._closed:
            call.cancel()

    def close(self) -> None:
        """End the measurement under way; tick is called no more."""
        self._closed = True
        call = self._call
        if call is not None:
            call.cancel()


def _nobody_counts(received: int) -> None:
    del received


class GrpcStream(Stream):
    """One call of OptimizerService.Session."""

    def __init__(self, channel: grpc.Channel, address: Address) -> None:
        self._address = address
        self._outbox: queue.SimpleQueue[tuple[pb.ClientFrame, BytesSource] | None] = queue.SimpleQueue()
        service = pb.DESCRIPTOR.services_by_name["OptimizerService"]
        method = channel.stream_stream(f"/{service.full_name}/Session", None, None)
        self._closed = False
        self._timed_out = False
        self.deadline: float | None = None
        self._heartbeat_seconds = math.inf
        self._round_trip = _RoundTrip(channel)
        self.last_sent = time.monotonic()
        # Each has one writer: gRPC's thread that asks for messages, and whoever receives.
        self._sent_bytes = 0
        self._received_bytes = 0
        self._not_carried: UnavailableError | None = None
        self._call: Any = method(self._messages())
        _watchdog.watch(self)

    def _messages(self) -> Iterator[bytes]:
        while (item := self._outbox.get()) is not None:
            for data in encode(*item):
                self._sent_bytes += len(data)
                yield data
            # Not until the next message comes: the gradients of this one would take their memory for as long.
            del item, data

    def _next(self) -> bytes:
        data: bytes = next(self._call)
        self._received_bytes += len(data)
        return data

    @property
    def traffic(self) -> Traffic:
        """What has gone through so far."""
        return Traffic(self._sent_bytes, self._received_bytes)

    def send(self, frame: pb.ClientFrame, body: BytesSource = EMPTY) -> None:
        """Queue a message, and send its bytes where they go by a carrier."""
        self.last_sent = time.monotonic()
        carrier = self.carrier
        carried = None if carrier is None else carrier.announce(frame, body)
        self._outbox.put((frame, body if carried is None else EMPTY))
        if carrier is None or carried is None:
            return
        try:
            carrier.send(frame, carried)
            self._sent_bytes += carried.nbytes
        except UnavailableError as error:
            self._not_carried = error

    def receive(self, sink_for: SinkFor, deadline: float) -> pb.ServerFrame:
        """Return the next reply; see Stream."""
        if self._not_carried is None:
            return self._receive(sink_for, deadline)
        # The server may have refused the message, and then says why.
        try:
            frame = self._receive(sink_for, min(deadline, time.monotonic() + _REFUSAL_SECONDS))
        except UnavailableError:
            raise self._not_carried from None
        if frame.WhichOneof("body") != "failure":
            raise self._not_carried
        return frame

    def receive_first(self, sink_for: SinkFor, deadline: float) -> tuple[pb.ServerFrame, Rest | None]:
        """Return the next reply's header, and what receives the rest; see Stream."""
        if self._not_carried is not None:
            return self.receive(sink_for, deadline), None
        return self._receive_first(sink_for, deadline)

    def _receive(self, sink_for: SinkFor, deadline: float) -> pb.ServerFrame:
        frame, rest = self._receive_first(sink_for, deadline)
        if rest is not None:
            rest(_nobody_counts)
        return frame

    def _receive_first(self, sink_for: SinkFor, deadline: float) -> tuple[pb.ServerFrame, Rest | None]:
        with self._by(deadline):
            frame, payload = decode(pb.ServerFrame, self._next())
            if self.carrier is not None and frame.WhichOneof("body") != "failure":
                self.carrier.settle()
            if frame.blocks:
                return self._receive_carried(frame, sink_for(frame), deadline), None
            incoming = Incoming(frame.total_bytes, sink_for(frame))
            incoming.take(frame.offset, payload)
        return frame, None if incoming.complete else partial(self._rest, incoming, deadline)

    def _rest(self, incoming: Incoming, deadline: float, progress: Callable[[int], None]) -> None:
        with self._by(deadline):
            while not incoming.complete:
                part, payload = decode(pb.ServerFrame, self._next())
                incoming.take(part.offset, payload)
                progress(incoming.received)

    @contextmanager
    def _by(self, deadline: float) -> Iterator[None]:
        """Have the watchdog cancel the call after the deadline; name what breaks."""
        self.deadline = deadline
        try:
            yield
        except StopIteration:
            raise UnavailableError(f"the server at {self._address} ended the session") from None
        except grpc.RpcError as error:
            raise self._broken(error) from None
        finally:
            self.deadline = None

    def _receive_carried(self, frame: pb.ServerFrame, sink: Sink, deadline: float) -> pb.ServerFrame:
        if self.carrier is None:
            raise InternalError(f"the server at {self._address} answers by a way that was not agreed on")
        self.carrier.receive(frame, sink, deadline)
        self._received_bytes += frame.total_bytes
        return frame

    def _broken(self, error: grpc.RpcError) -> FarstepError:
        if self._timed_out:
            return DeadlineError(f"the server at {self._address} did not answer in time")
        call: Any = error
        detail = f"{call.code().name}: {call.details()}" if hasattr(call, "code") else str(error)
        return UnavailableError(f"the connection to {self._address} broke ({detail})")

    def keep_alive(self, interval_seconds: float) -> None:
        """Have the watchdog send heartbeats and measure round trips."""
        self._heartbeat_seconds = interval_seconds
        self._round_trip.begin(interval_seconds)

    def close(self) -> None:
        """End the stream."""
        if not self._closed:
            self._closed = True
            self._outbox.put(None)
            self._call.cancel()
            self._round_trip.close()
            if self.carrier is not None:
                self.carrier.close()

    # Called by the watchdog.

    def tick(self, now: float) -> None:
        """Cancel the call where its deadline has passed; send a heartbeat where one is due or has something to report."""
        deadline = self.deadline
        if deadline is not None and now > deadline:
            self._timed_out = True
            self._call.cancel()
        elif not self._closed and self._call.is_active():
            # Not once the stream is broken: a measurement would have the channel connect again, for nobody.
            news = self._round_trip.tick(now)
            if news or now - self.last_sent > self._heartbeat_seconds:
                heartbeat = pb.Heartbeat(round_trip_seconds=self._round_trip.seconds)
                self.send(pb.ClientFrame(heartbeat=heartbeat))


class _Watchdog:
    """One thread for all streams of the process; it ends when there are none."""

    def __init__(self) -> None:
        self._streams: WeakSet[GrpcStream] = WeakSet()
        self._lock = threading.Lock()
        self._running = False

    def watch(self, stream: GrpcStream) -> None:
        with self._lock:
            self._streams.add(stream)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="farstep-watchdog", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_WATCHDOG_SECONDS)
            with self._lock:
                streams = [stream for stream in self._streams if not stream._closed]
                if not streams:
                    self._streams.clear()
                    self._running = False
                    return
            now = time.monotonic()
            for stream in streams:
                stream.tick(now)
            del streams


_watchdog = _Watchdog()


class GrpcTransport(Transport):
    """A channel to one server."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._channel = open_channel(address)

    def open(self, deadline: float) -> Stream:
        """Return a new stream on the channel once it is connected."""
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=max(0.0, deadline - time.monotonic()))
        except grpc.FutureTimeoutError:
            raise UnavailableError(f"no farstep server answers at {self._address}") from None
        finally:
            ready.cancel()
        try:
            return GrpcStream(self._channel, self._address)
        except ValueError as error:
            raise InternalError(f"the channel to {self._address} is closed: {error}") from None

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def _forget_threads_after_fork() -> None:
    global _watchdog, _inherited  # noqa: PLW0603 - the thread of the parent is not here
    _watchdog = _Watchdog()
    _inherited = _inherited or _opened


os.register_at_fork(after_in_child=_forget_threads_after_fork)
