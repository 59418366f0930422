"""A session's replies on their way out, in the order in which they were given.

A thread of the session's own takes them, which has to be woken for that. Where many sessions wait for the same round it is
cheaper that whoever has their replies writes them, one after the other: ``write_with`` says how.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from farstep_server.core import events as ev
from farstep_wire.v1 import optimizer_pb2 as pb

Item = tuple[pb.ServerFrame, None] | tuple[int, ev.Reply] | Sequence[bytes]
"""A reply's frame, a request's number and its reply, or frames that are encoded already."""


class Outbox:
    """The replies that are not out yet. Whoever takes one says ``done`` when it is out, or will never be."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._behind = 0
        self._write: Callable[[Item], Item | None] | None = None

    def put(self, item: Item) -> None:
        """Give a reply; may be called from any thread."""
        with self._lock:
            rest: Item | None = item
            if self._write is not None and not self._behind:
                rest = self._write(item)
            if rest is not None:
                self._behind += 1
                self._queue.put(rest)

    def end(self) -> None:
        """Nothing more is to go out."""
        self._queue.put(None)

    def empty(self) -> bool:
        """Whether there is nothing to take."""
        return self._queue.empty()

    def take(self) -> Item | None:
        """Return the next one once it is there; None at the end."""
        return self._queue.get()

    def done(self) -> None:
        """What was taken last is out."""
        with self._lock:
            self._behind -= 1

    def write_with(self, write: Callable[[Item], Item | None] | None) -> None:
        """Have replies written at once where nothing is before them.

        ``write`` returns what is left to be taken, or None; it must not wait. None: nothing is written at once any more.
        """
        with self._lock:
            self._write = write
