"""A proxy on the loopback interface between a client and its server: it counts, and it breaks what it is told to break.

One thread moves the bytes. A fault is armed beforehand and fires at the next bytes that it is about; ``fired`` counts how
often each kind did, so that a test can assert that its faults took place.

drop     the bytes are lost, and the connection with them
cut      so is the second half of them
delay    they are held back for a moment, and all that comes behind them on that way
repeat   the request arrives, and a moment later the connection breaks without a reply: what the client sends again is a
         duplicate

TCP itself never delivers bytes twice; a message comes twice only because its sender got no reply and sends it again. That is
what ``repeat request`` brings about while the first copy may still be waiting, and ``drop reply`` once it was answered.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Self

Fault = Literal[
    "drop request", "cut request", "repeat request", "delay request", "drop reply", "cut reply", "delay reply"
]

_CHUNK_BYTES = 1024 * 1024
# Pings, settings and window updates pass; what is longer carries a message.
_MESSAGE_BYTES = 120


class Messages:
    """Reads one direction of an HTTP/2 connection and notes the sizes of the gRPC messages in it."""

    def __init__(self, *, preface: bool) -> None:
        self._buffer = bytearray()
        self._skip = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") if preface else 0
        self._streams: dict[int, _Stream] = {}
        self._frame = 0
        self._stream: _Stream | None = None

    def feed(self, data: memoryview) -> None:
        """Take the next bytes."""
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
            elif self._frame:
                step = min(self._frame, len(data) - position)
                assert self._stream is not None, "in a DATA frame"
                self._stream.feed(data[position : position + step])
                self._frame -= step
                position += step
            else:
                step = min(9 - len(self._buffer), len(data) - position)
                self._buffer += data[position : position + step]
                position += step
                if len(self._buffer) == 9:
                    self._header(bytes(self._buffer))
                    self._buffer.clear()

    def _header(self, header: bytes) -> None:
        length, kind, flags = int.from_bytes(header[:3]), header[3], header[4]
        if kind == 0:
            assert not flags & 8, "gRPC pads no DATA frames"
            self._stream = self._streams.setdefault(int.from_bytes(header[5:]), _Stream())
            self._frame = length
        else:
            self._skip = length

    @property
    def sizes(self) -> list[int]:
        """Sizes of the first call's messages, in bytes, as their prefixes declare them: a client's session.

        What else a client calls on the connection, to measure a round trip, is left out.
        """
        return self._streams[min(self._streams)].sizes if self._streams else []


class _Stream:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._prefix = bytearray()
        self._rest = 0

    def feed(self, data: memoryview) -> None:
        position = 0
        while position < len(data):
            if self._rest:
                step = min(self._rest, len(data) - position)
                self._rest -= step
            else:
                step = min(5 - len(self._prefix), len(data) - position)
                self._prefix += data[position : position + step]
                if len(self._prefix) == 5:
                    self._rest = int.from_bytes(self._prefix[1:])
                    self.sizes.append(self._rest)
                    self._prefix.clear()
            position += step


class _Pair:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket, *, measured: bool) -> None:
        self.client, self.server = client, server
        self.up = Messages(preface=True) if measured else None
        self.down = Messages(preface=False) if measured else None

    def other(self, side: socket.socket) -> socket.socket:
        return self.server if side is self.client else self.client


@dataclass(frozen=True)
class _Held:
    """Bytes that a side has sent and that are held back; nothing more is read from it meanwhile. None: then it ends."""

    side: socket.socket
    data: bytes | None
    due: float


class Proxy:
    """Listens on a loopback port and passes connections on to a server. A context manager.

    ``measure``: also note the sizes of the gRPC messages that pass. ``delay_seconds``: how long a delay is. ``message_bytes``:
    from which size on bytes are taken for a message.
    """

    def __init__(
        self, target: str, *, measure: bool = False, delay_seconds: float = 0.05, message_bytes: int = _MESSAGE_BYTES
    ) -> None:
        self._target = target
        self._measure = measure
        self._delay_seconds = delay_seconds
        self._message_bytes = message_bytes
        self._armed: list[Fault] = []
        self._lock = threading.Lock()
        self.fired: Counter[str] = Counter()
        self.connections = 0
        self.pairs: list[_Pair] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._wake_read, self._wake_write = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._live: dict[socket.socket, _Pair] = {}
        self._held: list[_Held] = []
        self._still = False
        self._still_at = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="proxy")

    def __enter__(self) -> Self:
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._wake()
        self._thread.join()
        for pair in set(self._live.values()):
            self._cut(pair)
        for one in (self._listening, self._wake_read, self._wake_write):
            one.close()
        self._selector.close()

    def arm(self, *faults: Fault) -> None:
        """Let these faults happen, one after another, at the next messages that they are about."""
        with self._lock:
            self._armed.extend(faults)

    def blackhole(self) -> None:
        """Move no more bytes until ``heal``: connections stand open, new ones too, and nothing comes through."""
        with self._lock:
            self._still = True
            self.fired["blackhole"] += 1
        self._wake()

    def blackhole_at_reply(self, number: int) -> None:
        """Do so when that many replies have come on a connection; the last of them is held back. Only where it measures."""
        self._still_at = number

    @property
    def replies(self) -> int:
        """How many gRPC messages have come from the server on the newest connection. Only where it measures."""
        down = self.pairs[-1].down
        return 0 if down is None else len(down.sizes)

    def heal(self) -> None:
        """Let the bytes through again, those that were held back first."""
        with self._lock:
            self._still = False
        self._wake()

    def _wake(self) -> None:
        self._wake_write.send(b"x")

    @property
    def sizes(self) -> list[int]:
        """Sizes of the gRPC messages of all sessions that passed, in both directions."""
        found: list[int] = []
        for pair in self.pairs:
            for messages in (pair.up, pair.down):
                found += messages.sizes if messages is not None else []
        return found

    # The thread.

    def _run(self) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while not self._closing:
            with self._lock:
                still = self._still
            if still:
                self._wake_read.recv(64)  # blocks until heal, or the end
                continue
            for key, _ in self._selector.select(self._until_due()):
                if key.fileobj is self._wake_read:
                    self._wake_read.recv(64)
                elif key.fileobj is self._listening:
                    self._accept()
                elif key.fileobj in self._live:
                    self._move(key.fileobj, buffer)  # type: ignore[arg-type]
                if self._still:
                    break
            else:
                self._release()

    def _until_due(self) -> float | None:
        due = min((held.due for held in self._held), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _release(self) -> None:
        """Deliver what was held back for long enough, or end the connection that it belongs to."""
        now = time.monotonic()
        while held := next((held for held in self._held if held.due <= now), None):
            pair = self._live[held.side]
            if held.data is None:
                self._cut(pair)
                continue
            self._held.remove(held)
            self._selector.register(held.side, selectors.EVENT_READ)
            (self._send if held.due == 0.0 else self._deliver)(pair, held.side, memoryview(held.data))

    def _hold(self, side: socket.socket, data: bytes | None, due: float) -> None:
        self._selector.unregister(side)
        self._held.append(_Held(side, data, due))

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            server = self._connect()
        except OSError:
            client.close()
            return
        self.connections += 1
        pair = _Pair(client, server, measured=self._measure)
        self.pairs.append(pair)
        for side in (client, server):
            self._live[side] = pair
            self._selector.register(side, selectors.EVENT_READ)

    def _connect(self) -> socket.socket:
        if self._target.startswith("unix:"):
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target.removeprefix("unix:"))
            except OSError:
                server.close()
                raise
            return server
        host, _, port = self._target.rpartition(":")
        return socket.create_connection((host, int(port)))

    def _move(self, side: socket.socket, buffer: memoryview) -> None:
        pair = self._live[side]
        try:
            count = side.recv_into(buffer)
        except OSError:
            count = 0
        if not count:
            self._cut(pair)
            return
        data = buffer[:count]
        match self._due(side is pair.client, count):
            case None:
                self._deliver(pair, side, data)
            case "delay request" | "delay reply":
                self._hold(side, bytes(data), time.monotonic() + self._delay_seconds)
            case "repeat request":
                self._deliver(pair, side, data)
                for each in (pair.client, pair.server) if side in self._live else ():
                    self._hold(each, None, time.monotonic() + self._delay_seconds)
            case "cut request" | "cut reply":
                self._deliver(pair, side, data[: count // 2])
                self._cut(pair)
            case _:
                self._cut(pair)

    def _deliver(self, pair: _Pair, side: socket.socket, data: memoryview) -> None:
        messages = pair.up if side is pair.client else pair.down
        if messages is not None:
            messages.feed(data)
            if self._still_at and messages is pair.down and len(messages.sizes) >= self._still_at:
                self._still_at = 0
                self.blackhole()
                self._hold(side, bytes(data), 0.0)
                return
        self._send(pair, side, data)

    def _send(self, pair: _Pair, side: socket.socket, data: memoryview) -> None:
        try:
            pair.other(side).sendall(data)
        except OSError:
            self._cut(pair)

    def _due(self, upward: bool, count: int) -> Fault | None:
        if count < self._message_bytes:
            return None
        with self._lock:
            if not self._armed or self._armed[0].endswith("request") is not upward:
                return None
            fault = self._armed.pop(0)
            self.fired[fault] += 1
            return fault

    def _cut(self, pair: _Pair) -> None:
        for side in (pair.client, pair.server):
            if self._live.pop(side, None) is None:
                continue
            if any(held.side is side for held in self._held):
                self._held = [held for held in self._held if held.side is not side]
            else:
                self._selector.unregister(side)
            side.close()
