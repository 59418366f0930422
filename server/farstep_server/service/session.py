"""One worker's session: a reader that turns frames into events, and a writer that turns replies into frames.

A session begins on one thread, gRPC's own: it reads a request and yields the reply, with no hand-over in between. The first
reply that is not there at once (a round waits for other workers) splits it for good: reading goes on in a thread of its own,
so that heartbeats and the client's departure are seen meanwhile, and gRPC's thread waits on the outbox and yields frames. The
outbox is closed by whichever side ends first, so neither can wait for the other.

gRPC's threads, and not the event loop of grpc.aio, which takes longer for large messages and for small ones (measured side by
side in tests/benchmarks/test_servicers.py).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

from farstep_server.core import events as ev
from farstep_server.core.parameters import ParameterReader
from farstep_server.hosting.directory import Blueprint, Directory
from farstep_server.hosting.owner import Owner
from farstep_server.logs import log_event
from farstep_server.service.attaching import ON_EXISTING, blueprint_of, check_protocol
from farstep_server.service.encoding import attached, encode_reply
from farstep_server.service.grouping import Grouping
from farstep_server.service.outbox import Item, Outbox
from farstep_server.service.piping import Piping, messages
from farstep_server.service.receiving import WireFormats
from farstep_server.service.requests import NO_LAYOUT, Decoder, Request
from farstep_server.service.sharing import Sharing
from farstep_wire.convert import wire_from_proto
from farstep_wire.errors import (
    Applied,
    FarstepError,
    InternalError,
    InvalidRequestError,
)
from farstep_wire.frames import Incoming, NullSink, decode, encode
from farstep_wire.layout import Layout
from farstep_wire.pipes import PipeError, Pipes
from farstep_wire.process_group import GroupError
from farstep_wire.v1 import optimizer_pb2 as pb

_LOGGER = logging.getLogger(__name__)
_JOIN_SECONDS = 60.0
_TOUCH_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 3600.0
_AT_ONCE_BYTES = 16 * 1024
_STEPS = frozenset({"contribution", "accumulate", "evaluation"})


class _EndedError(Exception):
    """The session has ended while something was waited for."""


class SessionTicket:
    """Puts the reply to one request into the session's outbox. ``waiting``: the requests whose gradients are still read."""

    def __init__(self, outbox: Outbox, request: int, waiting: set[int]) -> None:
        self._outbox = outbox
        self._request = request
        self._waiting = waiting

    def deliver(self, reply: ev.Reply) -> None:
        """Take the answer."""
        self._waiting.discard(self._request)
        self._outbox.put((self._request, reply))


def _is_small(item: Item) -> bool:
    """Whether a reply is one of few bytes, all of them there."""
    reply = item[1]
    if not isinstance(reply, (ev.StepReply, ev.EvaluateReply, ev.DoneReply, ev.Refusal)):
        return reply is None
    parameters = getattr(reply, "parameters", None)
    return not isinstance(parameters, ParameterReader) or parameters.nbytes <= _AT_ONCE_BYTES


@dataclass(frozen=True)
class _Creation:
    """A name that this session has reserved."""

    blueprint: Blueprint
    attach: pb.Attach


@dataclass(frozen=True)
class _Seat:
    """Where this session is attached."""

    owner: Owner
    worker: str
    epoch: int


class Session:
    """One stream. ``frames`` runs on the handler's thread until the stream ends."""

    def __init__(
        self, directory: Directory, requests: Iterator[bytes], is_active: Callable[[], bool], peer: str
    ) -> None:
        self._directory = directory
        self._requests = requests
        self._is_active = is_active
        self._outbox = Outbox()
        self._sharing = Sharing(directory.limit_bytes)
        self._grouping = Grouping(served=directory.serves_groups, peer=peer, stall_seconds=directory.lease_seconds)
        self._formats = WireFormats(directory.limit_bytes)
        pinned = directory.device.type == "cuda"
        self._decoder = Decoder(directory.limit_bytes, self._sharing, self._formats, pinned=pinned)
        self._creation: _Creation | None = None
        self._seat: _Seat | None = None
        self._pending: Request | None = None
        self._incoming: Incoming | None = None
        self._number = 0
        self._kind = ""
        self._last_touch = 0.0
        self._awaited = 0
        self._waiting: set[int] = set()
        self._piping = Piping()
        self._pipes: Pipes | None = None
        self._split = False
        self._ending = threading.Lock()
        self._ended = False
        directory.session_opened()

    def frames(self) -> Iterator[bytes]:
        """Yield the frames of the replies, each as soon as it is there."""
        yield from self._converse()
        pipes = self._pipes = self._piping.take()
        if pipes is not None:
            stream, self._requests = self._requests, messages(pipes, self._check)
            threading.Thread(target=self._converse_in, args=(pipes,), name="farstep-pipe", daemon=True).start()
            self._watch(stream)

    def _converse_in(self, pipes: Pipes) -> None:
        """Go on in pipes until the session ends."""
        replies = self._converse()
        try:
            for data in replies:
                pipes.write(data, self._check)
        except (PipeError, _EndedError):
            # The worker is gone. What was for it is kept for when it is back.
            pass
        finally:
            replies.close()
            self.end()
            self._outbox.write_with(None)
            pipes.close_outgoing()
            if not self._split:
                pipes.close_incoming()

    def _watch(self, stream: Iterator[bytes]) -> None:
        """Take heartbeats from the stream that the session began on, and end with it."""
        try:
            for data in stream:
                frame, _ = decode(pb.ClientFrame, data)
                if self._ended or self._seat is None or frame.WhichOneof("body") != "heartbeat":
                    break
                self._beat(self._seat, frame.heartbeat)
        except Exception as error:  # noqa: BLE001 - however a stream breaks, it is its end
            log_event(_LOGGER, logging.DEBUG, "stream_broke", reason=str(error))
        finally:
            self.end()

    def _converse(self) -> Generator[bytes, None, None]:
        while self._read_one():
            while not self._outbox.empty():
                item = self._outbox.take()
                if item is None:
                    return
                self._awaited -= 1
                yield from self._encoded(item)
                self._outbox.done()
            if self._piping.agreed:
                return
            if self._awaited > 0:
                break
        else:
            self.end()
            while not self._outbox.empty() and (item := self._outbox.take()) is not None:
                yield from self._encoded(item)
                self._outbox.done()
            return
        self._split = True
        if self._pipes is not None:
            self._outbox.write_with(partial(self._write_at_once, self._pipes))
        threading.Thread(target=self._read_all, name="farstep-session", daemon=True).start()
        while (item := self._outbox.take()) is not None:
            yield from self._encoded(item)
            self._outbox.done()

    def _write_at_once(self, pipes: Pipes, item: Item) -> Item | None:
        """Write a small reply on the thread that has it; return what is left for the session's own."""
        try:
            if self._ended or not _is_small(item) or self._grouping.group is not None or not pipes.is_clear:
                return item
            item = list(self._encoded(item))
            if pipes.write_at_once(item):
                return None
        except PipeError:
            self.end()
            return None
        except Exception:  # noqa: BLE001 - the session's own thread meets it too, and says so; this one has other replies
            pass
        return item

    def _encoded(self, item: Item) -> Iterator[bytes]:
        if not isinstance(item, tuple):
            yield from item
            return
        first, reply = item
        if isinstance(first, pb.ServerFrame):
            yield first.SerializeToString()
            return
        assert reply is not None, "a numbered item has a reply"
        frame, body = encode_reply(first, reply)
        if not isinstance(body, ParameterReader):
            yield from encode(frame, body)
            return
        self._formats.narrow(body)
        try:
            if self._grouping.announce(frame, body):
                yield frame.SerializeToString()
                self._grouping.send(frame, body)
            else:
                yield from encode(frame, body)
        except GroupError as error:
            self._group_failed(error)
        finally:
            body.close()

    def _group_failed(self, error: GroupError) -> None:
        """End the session: the client attaches again, with another group, and asks again."""
        if self._is_active():
            log_event(_LOGGER, logging.WARNING, "group_failed", reason=str(error))
        self.end()

    def end(self) -> None:
        """End the session and give up what it has reserved; may be called from any thread, and more than once."""
        with self._ending:
            first, self._ended = not self._ended, True
            creation, self._creation = self._creation, None
        if creation is not None:
            self._directory.release(creation.blueprint.name, creation.attach.worker)
        if first:
            self._sharing.withdraw()
            self._piping.withdraw()
            self._grouping.end()
            self._directory.session_closed()
        self._outbox.end()

    # The reader.

    def _read_one(self) -> bool:
        """Take one frame; return whether the session goes on."""
        try:
            data = next(self._requests, None)
            return self._ended_early() if data is None else self._take(data)
        except _EndedError:
            return False
        except FarstepError as error:
            self._refuse(error)
            return False
        except Exception as error:  # noqa: BLE001 - a defect here must not take the others down
            if self._is_active():
                log_event(_LOGGER, logging.ERROR, "session_failed", exc_info=error)
                self._refuse(InternalError(f"{type(error).__name__}: {error}"))
            return False

    def _read_all(self) -> None:
        while self._read_one():
            pass
        self.end()
        if self._pipes is not None:
            self._pipes.close_incoming()

    def _ended_early(self) -> bool:
        """The client will send no more; refuse the request that it has not finished."""
        if self._pending is not None:
            self._refuse(InvalidRequestError(f"{self._pending.kind}: the stream ended after {self._pending.incoming}"))
        return False

    def _take(self, data: bytes) -> bool:
        """Take one frame; return whether the session goes on. A malformed frame ends it, a refused request does not."""
        try:
            frame, payload = decode(pb.ClientFrame, data)
            begins = frame.WhichOneof("body") is not None
            if begins == (self._incoming is not None):
                problem = "begins a request before the last one is whole" if begins else "continues no request"
                raise InvalidRequestError(f"request {frame.request}: a frame {problem}")
            if begins:
                self._begin(frame)
            else:
                self._show_life()
            assert self._incoming is not None, "a request is under way"
            if frame.blocks:
                return self._take_from_group(frame)
            self._incoming.take(frame.offset, payload)
        except FarstepError as error:
            self._refuse(error)
            return False
        if self._incoming.complete:
            self._complete()
        return True

    def _complete(self) -> None:
        request, self._pending, self._incoming = self._pending, None, None
        if request is not None:
            self._guarded(request)

    def _take_from_group(self, frame: pb.ClientFrame) -> bool:
        """Receive the bytes of the request that has just begun; return whether the session goes on."""
        request = self._pending
        if request is None:
            # Refused, and nobody receives what the client sends.
            return False
        try:
            self._grouping.receive(frame.blocks, request.buffer, frame.total_bytes, self._show_life)
        except ValueError as error:
            raise InvalidRequestError(f"{request.kind}: {error}") from None
        except GroupError as error:
            self._group_failed(error)
            return False
        self._complete()
        return True

    def _show_life(self) -> None:
        # A transfer may take longer than the lease; its frames are a sign of life, told once a second at most.
        now = time.monotonic()
        if self._seat is not None and now - self._last_touch > _TOUCH_SECONDS:
            self._last_touch = now
            self._seat.owner.post(ev.Touch(self._seat.worker, self._seat.epoch))

    def _begin(self, frame: pb.ClientFrame) -> None:
        self._number, self._kind = frame.request, frame.WhichOneof("body") or ""
        try:
            if self._waiting and (self._kind in _STEPS or self._kind == "stage"):
                # Its gradients would come to lie where those of the one before are read.
                raise InvalidRequestError(f"{self._kind} before request {min(self._waiting)} was answered")
            keep_last = self._seat is not None and not self._seat.owner.hosted.engine.entry.trusted
            self._pending = self._decoder.begin(frame, self._layout(), keep_last=keep_last)
            self._incoming = self._pending.incoming
        except FarstepError as error:
            # The rest of the refused request's bytes is on its way; it is read and dropped.
            self._refuse(error)
            self._incoming = Incoming(frame.total_bytes, NullSink())

    def _layout(self) -> Layout:
        if self._seat is not None:
            return self._seat.owner.hosted.engine.layout
        return NO_LAYOUT if self._creation is None else self._creation.blueprint.layout

    def _refuse(self, error: FarstepError) -> None:
        if self._kind in _STEPS and error.applied is Applied.NONE:
            error.applied = Applied.NO
        self._waiting.discard(self._number)
        self._awaited = max(self._awaited, 1)
        self._outbox.put((self._number, ev.Refusal(error)))

    def _guarded(self, request: Request) -> None:
        try:
            self._dispatch(request)
        except FarstepError as error:
            self._refuse(error)
        except (ValueError, TypeError) as error:
            self._refuse(InvalidRequestError(f"{request.kind}: {error}"))

    def _dispatch(self, request: Request) -> None:
        if request.kind == "attach":
            self._on_attach(request, request.frame.attach)
        elif request.kind == "upload":
            self._on_upload(request)
        elif self._seat is None:
            raise InvalidRequestError(f"{request.kind} before the session is attached")
        elif request.kind == "stage":
            self._decoder.early.came(request.frame.stage.parameters)
        elif request.kind == "direct":
            self._on_direct(self._seat, request.frame.direct)
        elif request.kind == "share":
            self._on_share(self._seat, request.frame.share)
        elif request.kind == "group":
            self._answer(pb.ServerFrame(request=self._number, grouped=self._grouping.meet(request.frame.group)))
        else:
            self._post(request, self._seat)

    def _beat(self, seat: _Seat, heartbeat: pb.Heartbeat) -> None:
        seconds = heartbeat.round_trip_seconds
        seat.owner.post(ev.Touch(seat.worker, seat.epoch, seconds if 0 < seconds < math.inf else 0.0))

    def _post(self, request: Request, seat: _Seat) -> None:
        if request.kind == "heartbeat":
            self._beat(seat, request.frame.heartbeat)
            return
        ticket = SessionTicket(self._outbox, self._number, self._waiting)
        self._awaited += 1
        if request.kind in _STEPS:
            self._waiting.add(self._number)
        elif request.kind == "zero_grad":
            self._waiting.clear()
            self._decoder.early.forget()
        if request.kind == "leave":
            seat.owner.post(ev.Leave(ticket, seat.worker, seat.epoch))
        else:
            seat.owner.post(request.event(ticket, seat.worker))

    # Attaching.

    def _on_attach(self, request: Request, attach: pb.Attach) -> None:
        if self._seat is not None or self._creation is not None:
            raise InvalidRequestError("attach in a session that is attached")
        check_protocol(attach)
        blueprint = blueprint_of(request, attach)
        entry, wire = self._directory.entry(blueprint.optimizer), wire_from_proto(attach)
        if wire.compresses and entry.drives_closure:
            raise InvalidRequestError(
                f"attach: Wire: gradients={wire.gradients!r} with {blueprint.optimizer}, whose closure needs them as they are"
            )
        self._formats.wire = wire
        if attach.lineage:
            owner: Owner | None = self._directory.find_again(blueprint.name)
        else:
            wait = min(attach.wait_ms / 1000, _LONGEST_WAIT_SECONDS)
            on_existing = ON_EXISTING.get(attach.on_existing, "attach")
            owner = self._directory.find_or_reserve(blueprint, attach.worker, on_existing, wait, self._is_active)
        if owner is None:
            self._reserved(_Creation(blueprint, attach))
            frame = pb.ServerFrame(request=self._number, attached=pb.Attached(outcome=pb.Attached.OUTCOME_UPLOAD))
            self._answer(frame)
        else:
            self._join(owner, blueprint, attach, None)

    def _reserved(self, creation: _Creation) -> None:
        with self._ending:
            self._creation = creation
            ended = self._ended
        if ended:
            self.end()

    def _on_upload(self, request: Request) -> None:
        with self._ending:
            creation, self._creation = self._creation, None
        if creation is None:
            raise InvalidRequestError("upload where no creation was begun")
        owner = self._directory.create(creation.blueprint, creation.attach.worker, request.buffer)
        try:
            self._join(owner, creation.blueprint, creation.attach, pb.Attached.OUTCOME_CREATED)
        except FarstepError:
            # Its own creator does not fit it: nobody has it, so it must not keep the name.
            self._directory.remove(creation.blueprint.name)
            raise

    def _join(
        self, owner: Owner, blueprint: Blueprint, attach: pb.Attach, outcome: pb.Attached.Outcome.ValueType | None
    ) -> None:
        def event(ticket: ev.Ticket) -> ev.Join:
            return ev.Join(
                ticket, attach.worker, attach.instance, blueprint.policy, blueprint.layout, blueprint.options,
                blueprint.optimizer, attach.lineage, blueprint.settings, self._grouping,
            )  # fmt: skip

        reply = owner.ask(event, ev.JoinReply, _JOIN_SECONDS)
        self._seat = _Seat(owner, attach.worker, reply.epoch)
        joined = pb.Attached.OUTCOME_RESUMED if reply.resumed else pb.Attached.OUTCOME_JOINED
        frame = pb.ServerFrame(request=self._number, attached=attached(reply, joined if outcome is None else outcome))
        self._answer(frame)

    def _on_share(self, seat: _Seat, share: pb.Share) -> None:
        frame = pb.ServerFrame(request=self._number)
        if share.declined:
            self._sharing.withdraw()
            log_event(_LOGGER, logging.INFO, "sharing_declined", worker=seat.worker, reason=share.declined[:500])
            frame.done.SetInParent()
        elif share.proof:
            self._sharing.confirm(share.proof)
            frame.done.SetInParent()
        else:
            onlooker = (seat.worker, seat.epoch) if share.looks_on else None
            shared = self._sharing.offer(seat.owner, self._directory.listening, share.directly_at, onlooker)
            frame.shared.CopyFrom(shared)
        self._answer(frame)

    def _on_direct(self, seat: _Seat, direct: pb.Direct) -> None:
        frame = pb.ServerFrame(request=self._number)
        if direct.declined:
            self._piping.withdraw()
            log_event(_LOGGER, logging.INFO, "pipes_declined", worker=seat.worker, reason=direct.declined[:500])
            frame.done.SetInParent()
        elif direct.proof:
            self._piping.confirm(direct.proof)
            frame.done.SetInParent()
        elif self._split or self._pipes is not None:
            raise InvalidRequestError("direct: the session has begun, and goes on where it is")
        else:
            frame.piped.CopyFrom(self._piping.offer(self._directory.listening, direct.directly_at))
        self._answer(frame)

    def _check(self) -> None:
        if self._ended:
            raise _EndedError

    def _answer(self, frame: pb.ServerFrame) -> None:
        self._awaited += 1
        self._outbox.put((frame, None))
