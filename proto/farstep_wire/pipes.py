"""Two pipes between a server and a worker on its host, one in each direction, for messages that are to arrive soon.

Where both sides are on one host, a message through a network stack and the threads of its library takes several times as
long as one through a pipe, which the reader's own thread waits for. The server makes the pipes; the worker opens its ends
through the server's entry in /proc, which the kernel grants to processes of the same user in the same process namespace
alone. They have no name, and nothing is left of them however either side ends.
"""

from __future__ import annotations

import os
import secrets
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from farstep_wire.limits import MESSAGE_BYTES

PROOF_BYTES = 16
_LENGTH_BYTES = 4
_READ_BYTES = 256 * 1024
_ROOM_BYTES = 32 * 1024
"""What surely fits into a pipe of the usual size that is clear; one that is short of memory has less."""
_LOOK_SECONDS = 0.25
"""How often who waits looks whether to go on waiting."""
_REPLY_SECONDS, _REQUEST_SECONDS = 0.001, 0.0003
"""Who usually waits no longer than this for a reply, or for a request, may stay awake meanwhile."""


class PipeError(Exception):
    """There are no pipes, or the other side is gone; the text says why."""


Check = Callable[[], None]
"""Called now and then while something is waited for; raises what is to end the waiting."""


class _Alertness:
    """Whether to look again and again for what is about to come, or to sleep until it is there.

    To fall asleep and be woken takes both sides as long as a small step. So who is usually woken within ``limit_seconds``
    stays awake about as long as that, and no longer (Karlin et al., "Empirical studies of competitive spinning", 1991). One
    thread of a process at a time does, and whoever else wants the processor gets it.
    """

    _one = threading.Lock()

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._usual = 0.0
        self._possible = len(os.sched_getaffinity(0)) > 1

    def wait(self, poll: select.poll, milliseconds: float) -> bool:
        """Return whether there is something to read, which may take as long as that."""
        begun = time.perf_counter()
        there = self._awake(poll, begun) or bool(poll.poll(milliseconds))
        self._usual += (min(time.perf_counter() - begun, 4 * self._limit_seconds) - self._usual) / 8
        return there

    def _awake(self, poll: select.poll, begun: float) -> bool:
        if not self._possible or self._usual > self._limit_seconds or not self._one.acquire(blocking=False):
            return False
        try:
            until = begun + min(2 * self._usual, self._limit_seconds)
            while not poll.poll(0):
                if time.perf_counter() > until:
                    return False
                os.sched_yield()
            return True
        finally:
            self._one.release()


class Pipes:
    """One side's ends. One thread at a time reads, and one writes. ``alert_seconds``: how long a reader may stay awake."""

    def __init__(self, incoming: int, outgoing: int, alert_seconds: float) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        for descriptor in (incoming, outgoing):
            os.set_blocking(descriptor, False)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(incoming, select.POLLIN)
        self._writable.register(outgoing, select.POLLOUT)
        self._left = b""
        self._alertness = _Alertness(alert_seconds)

    def read(self, check: Check) -> bytes | None:
        """Return the next message; None where the other side has ended. PipeError: it has ended within a message."""
        data = bytearray(self._left)
        self._left = b""
        while len(data) < (size := _size(data)):
            self._wait_to_read(check)
            part = os.read(self._incoming, max(_READ_BYTES, size - len(data)))
            if not part:
                if data:
                    raise PipeError("the other side has ended in the middle of a message")
                return None
            if not data and len(part) == _size(part):
                return part[_LENGTH_BYTES:]
            data += part
        self._left = bytes(data[size:])
        return bytes(data[_LENGTH_BYTES:size])

    def write(self, message: bytes, check: Check) -> None:
        """Write a message. PipeError: the other side has ended."""
        parts = [memoryview(len(message).to_bytes(_LENGTH_BYTES, "little")), memoryview(message)]
        while parts:
            try:
                written = os.writev(self._outgoing, parts)
            except BlockingIOError:
                self._wait(self._writable, check)
                continue
            except BrokenPipeError:
                raise PipeError("the other side has ended") from None
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][written:]

    @property
    def _room_bytes(self) -> int:
        import fcntl

        return min(_ROOM_BYTES, fcntl.fcntl(self._outgoing, fcntl.F_GETPIPE_SZ) // 2)

    @property
    def is_clear(self) -> bool:
        """Whether the other side has read everything."""
        import fcntl
        import termios

        return fcntl.ioctl(self._outgoing, termios.FIONREAD, bytes(4)) == bytes(4)

    def write_at_once(self, messages: Sequence[bytes]) -> bool:
        """Write messages into a clear pipe without waiting; False, with nothing written, where they are too long for that.

        PipeError: a part of them was written, and nothing more must be.
        """
        parts = [part for message in messages for part in (len(message).to_bytes(_LENGTH_BYTES, "little"), message)]
        size = sum(map(len, parts))
        if size > self._room_bytes:
            return False
        if os.writev(self._outgoing, parts) != size:
            raise PipeError("a clear pipe had no room")
        return True

    def _wait_to_read(self, check: Check) -> None:
        while not self._alertness.wait(self._readable, _LOOK_SECONDS * 1000):
            check()

    def _wait(self, poll: select.poll, check: Check) -> None:
        while not poll.poll(_LOOK_SECONDS * 1000):
            check()

    def close_incoming(self) -> None:
        """Close the end that is read; nobody reads any more."""
        if self._incoming >= 0:
            os.close(self._incoming)
            self._incoming = -1

    def close_outgoing(self) -> None:
        """Close the end that is written; nobody writes any more."""
        if self._outgoing >= 0:
            os.close(self._outgoing)
            self._outgoing = -1

    def close(self) -> None:
        """Close both ends."""
        self.close_incoming()
        self.close_outgoing()


def _size(data: bytes | bytearray) -> int:
    """Return the size of the message that data begin with, its length included; as long as that is not known, of the length."""
    if len(data) < _LENGTH_BYTES:
        return _LENGTH_BYTES
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if size > MESSAGE_BYTES:
        raise PipeError(f"a message of {size} bytes; at most {MESSAGE_BYTES} are possible")
    return _LENGTH_BYTES + size


@dataclass(frozen=True)
class PipeName:
    """A descriptor of the process that made the pipe, and the pipe's number in the running kernel."""

    descriptor: int
    inode: int


class OwnPipes:
    """Pipes of this process, whose other ends are open for another until ``hand_over``; PipeError where there can be none."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise PipeError(f"this system ({sys.platform}) shows no descriptors of other processes")
        try:
            theirs, outgoing = os.pipe()
            try:
                incoming, others = os.pipe()
            except OSError:
                os.close(theirs)
                os.close(outgoing)
                raise
        except OSError as error:
            raise PipeError(f"no pipe can be made: {error.strerror}") from None
        self.replies, self.requests = _named(theirs), _named(others)
        self.pipes = Pipes(incoming, outgoing, _REQUEST_SECONDS)
        self.proof = secrets.token_bytes(PROOF_BYTES)
        os.write(outgoing, self.proof)

    def hand_over(self) -> Pipes:
        """Close the other side's ends, which it has opened, and return this side's."""
        self._close_others()
        return self.pipes

    def close(self) -> None:
        """Close all ends."""
        self._close_others()
        self.pipes.close()

    def _close_others(self) -> None:
        os.close(self.replies.descriptor)
        os.close(self.requests.descriptor)


def _named(descriptor: int) -> PipeName:
    return PipeName(descriptor, os.fstat(descriptor).st_ino)


def open_pipes(process: int, requests: PipeName, replies: PipeName) -> tuple[Pipes, bytes]:
    """Open the other ends of a server's pipes; return them and the proof that was in them.

    PipeError: they are not to be seen from here.
    """
    incoming = _open(process, replies, os.O_RDONLY)
    try:
        outgoing = _open(process, requests, os.O_WRONLY)
    except PipeError:
        os.close(incoming)
        raise
    pipes = Pipes(incoming, outgoing, _REPLY_SECONDS)
    try:
        return pipes, os.read(incoming, PROOF_BYTES)
    except OSError as error:
        pipes.close()
        raise PipeError(f"the pipe of process {process} is not the server's: {error.strerror}") from None


def _open(process: int, name: PipeName, flags: int) -> int:
    path = f"/proc/{process}/fd/{name.descriptor}"
    try:
        found = Path(path).stat()
        # Nothing is read from what is another's: its bytes would be missing there.
        if not stat.S_ISFIFO(found.st_mode) or found.st_ino != name.inode:
            raise PipeError(f"{path} is not the server's pipe: it runs elsewhere, or in a container of its own")
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PipeError(
            f"{path} cannot be opened ({error.strerror}): the server runs on another host, in a container of its own, or as "
            f"another user"
        ) from None
