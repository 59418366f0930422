"""A proxy on the loopback interface between a client and its server: it counts, and it breaks what it is told to break.

One thread moves the bytes. A fault is armed beforehand and fires at the next bytes that it is about; ``fired`` counts how
often each kind did, so that a test can assert that its faults took place.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections import Counter
from typing import Literal, Self

Fault = Literal["drop request", "cut request", "drop reply", "cut reply"]

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


class Proxy:
    """Listens on a loopback port and passes connections on to a server. A context manager.

    ``measure``: also note the sizes of the gRPC messages that pass.
    """

    def __init__(self, target: str, *, measure: bool = False) -> None:
        self._target = target
        self._measure = measure
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
        self._thread = threading.Thread(target=self._run, name="proxy")

    def __enter__(self) -> Self:
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake_write.send(b"x")
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
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_read:
                    return
                if key.fileobj is self._listening:
                    self._accept()
                elif key.fileobj in self._live:
                    self._move(key.fileobj, buffer)  # type: ignore[arg-type]

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
        upward = side is pair.client
        try:
            count = side.recv_into(buffer)
            if not count:
                self._cut(pair)
                return
            data = buffer[:count]
            fault = self._due(upward, count)
            if fault is not None:
                if fault.startswith("cut"):
                    pair.other(side).sendall(data[: count // 2])
                self._cut(pair)
                return
            messages = pair.up if upward else pair.down
            if messages is not None:
                messages.feed(data)
            pair.other(side).sendall(data)
        except OSError:
            self._cut(pair)

    def _due(self, upward: bool, count: int) -> Fault | None:
        if count < _MESSAGE_BYTES:
            return None
        with self._lock:
            if not self._armed or self._armed[0].endswith("request") is not upward:
                return None
            fault = self._armed.pop(0)
            self.fired[fault] += 1
            return fault

    def _cut(self, pair: _Pair) -> None:
        for side in (pair.client, pair.server):
            if self._live.pop(side, None) is not None:
                self._selector.unregister(side)
                side.close()
