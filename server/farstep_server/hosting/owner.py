"""The owner of a hosted optimizer: it alone mutates it, one event after another.

Events go through a queue to the owner's thread. For a small model handing over to another thread and back would take as long
as the step; there a contribution that finds the owner idle is handled on the thread that brings it. Either way exactly one
thread at a time is inside, held by ``_turn``. Large models always step on the owner's thread, whose pool of intra-op threads
is then the only one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from farstep_server.core import events as ev
from farstep_server.core.hosted import HostedOptimizer
from farstep_server.core.records import Dump
from farstep_server.logs import log_event
from farstep_wire.errors import DeadlineError, FarstepError, RemovedError

_LOGGER = logging.getLogger(__name__)

INLINE_BYTES = 1024 * 1024
"""Parameters of hosted optimizers whose contributions may be handled on the session's thread."""

# What leaves a hosted optimizer as it was.
_SILENT = (
    ev.Touch, ev.ReadParameters, ev.ReadState, ev.ReadDescription, ev.ReadHistory, ev.ReadSchedule, ev.TakeDump
)  # fmt: skip

ReplyKind = TypeVar("ReplyKind")


class FutureTicket:
    """A ticket whose holder waits for the reply."""

    def __init__(self) -> None:
        self._replies: queue.SimpleQueue[ev.Reply] = queue.SimpleQueue()

    def deliver(self, reply: ev.Reply) -> None:
        """Take the answer."""
        self._replies.put(reply)

    def result(self, timeout_seconds: float) -> ev.Reply:
        """Wait for the answer; DeadlineError where none comes in time, a refusal is raised."""
        try:
            reply = self._replies.get(timeout=timeout_seconds)
        except queue.Empty:
            raise DeadlineError(f"the hosted optimizer was busy for more than {timeout_seconds:g} s") from None
        if isinstance(reply, ev.Refusal):
            raise reply.error
        return reply


class Owner:
    """Runs one hosted optimizer until it is stopped or abandoned; ``on_end`` is told, on the owner's thread.

    ``changed`` is notified when ``changes`` has gone up, and once ``over`` is set, after the end. ``suspended``: it was ended
    in order to be hosted again after a restart.
    """

    def __init__(self, hosted: HostedOptimizer, on_end: Callable[[Owner], None]) -> None:
        self.hosted = hosted
        self.name = hosted.identity.name
        self.changed = threading.Condition()
        self.changes = 0
        self.suspended = False
        self.over = False
        self._on_end = on_end
        self._queue: queue.SimpleQueue[ev.Event] = queue.SimpleQueue()
        self._ended = False
        self._error: FarstepError = RemovedError(f"{self.name!r} is no longer hosted here")
        self._posting = threading.Lock()
        self._turn = threading.Lock()
        self._wakes_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"farstep-owner:{self.name}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it takes no more events."""
        return self._ended

    def post(self, event: ev.Event) -> None:
        """Hand over an event; after the end it is refused at once."""
        if isinstance(event, (ev.Contribution, ev.Evaluation)) and self._handled_inline(event):
            return
        with self._posting:
            if not self._ended:
                self._queue.put(event)
                return
        self._refuse(event)

    def _handled_inline(self, event: ev.Event) -> bool:
        small = self.hosted.engine.store.nbytes <= INLINE_BYTES
        if not small or not self._queue.empty() or not self._turn.acquire(blocking=False):
            return False
        try:
            if self._ended:
                return False
            self._handle(event)
            deadline = self.hosted.next_deadline()
        finally:
            self._turn.release()
        if deadline is not None and deadline < self._wakes_at:
            self._queue.put(ev.Tick())
        return True

    def ask(self, make: Callable[[ev.Ticket], ev.Event], kind: type[ReplyKind], timeout_seconds: float) -> ReplyKind:
        """Post an event and wait for its reply."""
        ticket = FutureTicket()
        self.post(make(ticket))
        reply = ticket.result(timeout_seconds)
        assert isinstance(reply, kind), f"{type(reply).__name__} where {kind.__name__} was due"
        return reply

    def stop(self, error: FarstepError, timeout_seconds: float) -> None:
        """Refuse all that waits with the error, end the thread, and wait for it."""
        self._error = error
        self.post(ev.Stop(FutureTicket(), error))
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_seconds)

    def suspend(self, error: FarstepError, timeout_seconds: float) -> Dump:
        """Stop, and return a dump with everything that was acknowledged: it is taken as the last event of all.

        The error, where it had ended before; DeadlineError where the step under way takes longer than the timeout.
        """
        self.suspended = True
        self._error = error
        reply = self.ask(lambda ticket: ev.Stop(ticket, error, dump=True), ev.DumpReply, timeout_seconds)
        self._thread.join(timeout_seconds)
        return reply.dump

    def _run(self) -> None:
        stopped = False
        while not stopped and not self.hosted.abandoned:
            event = self._next_event()
            with self._turn:
                self._handle(event)
                # In the same turn: what a Stop answered with must stay true.
                self._ended = stopped = isinstance(event, ev.Stop)
        with self._posting, self._turn:
            self._ended = True
        while not self._queue.empty():
            self._refuse(self._queue.get())
        self._on_end(self)
        self.over = True
        self._notify()

    def _next_event(self) -> ev.Event:
        with self._turn:
            deadline = self.hosted.next_deadline()
            self._wakes_at = float("inf") if deadline is None else deadline
        if deadline is None:
            return self._queue.get()
        try:
            return self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return ev.Tick()

    def _handle(self, event: ev.Event) -> None:
        replies = self.hosted.handle(event, time.monotonic())
        if (defect := self.hosted.defect) is not None:
            kind = type(event).__name__
            log_event(_LOGGER, logging.ERROR, "handler_failed", name=self.name, kind=kind, exc_info=defect)
        for ticket, reply in replies:
            ticket.deliver(reply)
        if not isinstance(event, _SILENT):
            self._notify()
        if isinstance(event, (ev.Join, ev.Leave)):
            fields = {"name": self.name, "worker": event.worker, "version": self.hosted.version}
            log_event(_LOGGER, logging.INFO, f"worker_{type(event).__name__.lower()}", **fields)

    def _notify(self) -> None:
        with self.changed:
            self.changes += 1
            self.changed.notify_all()

    def _refuse(self, event: ev.Event, error: FarstepError | None = None) -> None:
        ticket = getattr(event, "ticket", None)
        if ticket is not None:
            ticket.deliver(ev.Refusal(error or self._error))
