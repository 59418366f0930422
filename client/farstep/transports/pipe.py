"""Messages through pipes to a server on this host, beside the gRPC stream that they began on.

The thread that asks writes its request and waits for the reply itself, so there are no other threads on the way. The gRPC
stream stays as the sign of life: it carries the heartbeats, and the session ends with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from farstep.transports.base import SinkFor, Stream, Traffic
from farstep_wire.errors import ConfigurationError, DeadlineError, FarstepError, UnavailableError
from farstep_wire.frames import EMPTY, BytesSource, Incoming, decode, encode
from farstep_wire.pipes import PipeError, PipeName, Pipes, open_pipes
from farstep_wire.v1 import optimizer_pb2 as pb

Exchange = Callable[[pb.ClientFrame], pb.ServerFrame]


class PipedStream(Stream):
    """A stream whose messages take pipes. Its requests are written by the time that ``receive`` waits for a reply."""

    name = "pipe"

    def __init__(self, stream: Stream, pipes: Pipes, where: str) -> None:
        self._stream = stream
        self._pipes = pipes
        self._where = where
        self._waiting: list[Iterator[bytes]] = []
        self._sent_bytes = 0
        self._received_bytes = 0
        self._closed = False
        self._busy = False

    @property
    def traffic(self) -> Traffic:
        """What has gone through so far."""
        return self._stream.traffic + Traffic(self._sent_bytes, self._received_bytes)

    def send(self, frame: pb.ClientFrame, body: BytesSource = EMPTY) -> None:
        """Queue a message; see Stream."""
        self._waiting.append(encode(frame, body))

    def receive(self, sink_for: SinkFor, deadline: float) -> pb.ServerFrame:
        """Return the next reply; see Stream."""

        def check() -> None:
            if self._closed:
                raise UnavailableError(f"the connection to {self._where} was closed")
            if time.monotonic() > deadline:
                raise DeadlineError(f"the server at {self._where} did not answer in time")

        self._busy = True
        try:
            check()
            self._write(check)
            frame, payload = decode(pb.ServerFrame, self._next(check))
            incoming = Incoming(frame.total_bytes, sink_for(frame))
            incoming.take(frame.offset, payload)
            while not incoming.complete:
                part, payload = decode(pb.ServerFrame, self._next(check))
                incoming.take(part.offset, payload)
            return frame
        except PipeError as error:
            raise UnavailableError(f"the connection to {self._where} broke ({error})") from None
        finally:
            self._busy = False
            if self._closed:
                self._pipes.close()

    def _write(self, check: Callable[[], None]) -> None:
        waiting, self._waiting = self._waiting, []
        for messages in waiting:
            for data in messages:
                self._pipes.write(data, check)
                self._sent_bytes += len(data)

    def _next(self, check: Callable[[], None]) -> bytes:
        data = self._pipes.read(check)
        if data is None:
            raise PipeError("the server has ended the session")
        self._received_bytes += len(data)
        return data

    def keep_alive(self, interval_seconds: float) -> None:
        """Have heartbeats sent; see Stream."""
        self._stream.keep_alive(interval_seconds)

    def close(self) -> None:
        """End the stream."""
        if not self._closed:
            self._closed = True
            self._stream.close()
            if not self._busy:
                self._pipes.close()

    def abandon(self) -> None:
        """Close the child's copies of the ends; see Stream."""
        self._stream.abandon()
        self._pipes.close()


def agree_on_pipes(exchange: Exchange, directly_at: str) -> Pipes:
    """Agree with the server on pipes; PipeError or ConfigurationError where there can be none."""
    try:
        piped = exchange(pb.ClientFrame(direct=pb.Direct(directly_at=directly_at))).piped
    except (UnavailableError, ConfigurationError):
        raise
    except FarstepError as error:
        raise PipeError(str(error)) from None
    try:
        pipes, proof = open_pipes(piped.process, _name(piped.requests), _name(piped.replies))
    except PipeError as error:
        exchange(pb.ClientFrame(direct=pb.Direct(declined=str(error))))
        raise
    try:
        exchange(pb.ClientFrame(direct=pb.Direct(proof=proof)))
    except BaseException:
        pipes.close()
        raise
    return pipes


def _name(message: pb.PipeName) -> PipeName:
    return PipeName(message.descriptor, message.inode)
