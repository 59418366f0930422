"""The hosted optimizer under test, spoken to in the words of the model: events are translated in, replies out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farstep_server.core import events as ev
from farstep_server.core.engine import Engine
from farstep_server.core.gradients import Staged
from farstep_server.core.hosted import HostedOptimizer
from farstep_server.core.identity import Identity
from farstep_server.core.options import frozen_options
from farstep_server.core.parameters import ParameterReader
from farstep_server.core.records import Description, Dump
from farstep_server.core.registry import Registry
from farstep_server.hosting.dumps import decode_dump, encode_dump
from farstep_server.store import Snapshot, SnapshotInfo
from farstep_wire.errors import DrainingError
from farstep_wire.layout import Layout, ParameterSpec, TensorSpec, plan_gradients
from farstep_wire.policy import Async, Sync
from tests.server.harness import arena
from tests.state_machine import words
from tests.state_machine.model import LEASE_SECONDS

SHAPES = [(3, 2), (5,)]
LAYOUT = Layout(
    tuple(
        ParameterSpec(f"p{index}", TensorSpec.contiguous(torch.float32, shape), 0) for index, shape in enumerate(SHAPES)
    ),
    (2,),
)
ARGUMENTS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.5, "momentum": 0.9}, "Adam": {"lr": 0.5}}


@dataclass(frozen=True)
class Ticket:
    """Whom to answer."""

    number: int

    def deliver(self, reply: ev.Reply) -> None:
        """Not called: replies are what ``handle`` returns."""
        raise AssertionError(f"the state machine has delivered {reply} by itself")


NOBODY = Ticket(-1)


class System:
    """One life of a hosted optimizer."""

    def __init__(self, policy: Sync | Async, optimizer: str, contents: Tensor) -> None:
        registry = Registry()
        entry = registry.get(optimizer)
        assert entry is not None
        arguments = ARGUMENTS[optimizer]
        options = [frozen_options(entry.cls([torch.nn.Parameter(torch.ones(1))], **arguments))[0]]
        identity = Identity(
            "net", optimizer, arguments, policy, ephemeral=False, lineage="feed", lease_seconds=LEASE_SECONDS
        )
        engine = Engine(entry, arguments, LAYOUT, options, contents, torch.device("cpu"))
        self.hosted = HostedOptimizer(identity, engine, clock=lambda: 0.0)
        self.last_dump: Dump | None = None
        self._seen = 0
        self._readers: list[tuple[ParameterReader, bytes]] = []

    @classmethod
    def restarted(cls, dump: Dump, now: float) -> System:
        """Return the next life, which begins with what a dump holds."""
        dump = stored(dump)
        system = cls(dump.policy, dump.optimizer, dump.contents)
        system.hosted.resume_from(dump, now)
        return system

    def take(self, event: words.Event, now: float, dumps: list[Dump]) -> dict[int, words.Answer]:
        """Handle an event; return who is answered what."""
        late, self._readers = self._readers, []
        answers: dict[int, words.Answer] = {}
        for ticket, reply in self.hosted.handle(self._event(event, dumps), now):
            assert isinstance(ticket, Ticket)
            if isinstance(reply, ev.DumpReply):
                self.last_dump = reply.dump
            if ticket == NOBODY:
                continue
            assert ticket.number not in answers, f"ticket {ticket.number} is answered twice"
            answers[ticket.number] = self._answer(reply)
        assert self.hosted.defect is None, repr(self.hosted.defect)
        for reader, bits in late:
            assert read(reader) == bits, "who reads an answer late must see the parameters of its version"
        return answers

    def ask(self, make: Callable[[ev.Ticket], ev.Event], now: float) -> Any:
        """Return the reply to a question; nobody else is answered at that."""
        [(ticket, reply)] = self.hosted.handle(make(Ticket(0)), now)
        assert ticket == Ticket(0)
        return reply

    # Events in.

    def _event(self, event: words.Event, dumps: list[Dump]) -> ev.Event:
        match event:
            case words.Join():
                return self._join(event)
            case words.Push():
                edits: Any = {} if event.lr is None else {0: ({"lr": event.lr}, ())}
                return ev.Contribution(
                    Ticket(event.ticket), event.worker, event.epoch, event.sequence, event.version, event.incarnation,
                    None if event.gradients is None else staged(event.gradients), edits,
                    abstain=event.gradients is None, num_samples=event.samples, accumulated=event.accumulated,
                )  # fmt: skip
            case words.Accumulate():
                return ev.Accumulate(
                    Ticket(event.ticket), event.worker, event.epoch, event.sequence, staged(event.gradients)
                )
            case words.Load():
                state: list[tuple[Any, Any]] = [
                    (index, {key: clone(value) for key, value in entries.items()})
                    for index, entries in event.state.items()
                ]
                return ev.LoadState(
                    Ticket(event.ticket), event.worker, event.epoch, event.sequence, state, [dict(event.options)]
                )
            case words.ZeroGrad():
                return ev.ZeroGrad(Ticket(event.ticket), event.worker, event.epoch)
            case words.Leave():
                return ev.Leave(Ticket(event.ticket), event.worker, event.epoch)
            case words.Touch():
                return ev.Touch(event.worker, event.epoch)
            case words.Configure():
                return ev.Configure(NOBODY, event.changes)
            case words.Restore():
                return ev.Restore(Ticket(event.ticket), stored(dumps[event.saved]))
            case words.Stop():
                return ev.Stop(NOBODY, DrainingError("the server is draining"), dump=True)
            case _:
                return ev.Tick()

    def _join(self, event: words.Join) -> ev.Join:
        identity = self.hosted.identity
        options = frozen_options(self.hosted.engine.optimizer)
        return ev.Join(
            Ticket(event.ticket), event.worker, event.instance, identity.policy, LAYOUT, options, identity.optimizer,
            identity.lineage if event.again else "",
        )  # fmt: skip

    # Replies out.

    def _answer(self, reply: ev.Reply) -> words.Answer:
        match reply:
            case ev.JoinReply():
                lr = float(reply.options[0]["lr"]) if reply.options else None
                return words.Joined(reply.resumed, reply.version, reply.incarnation, reply.epoch, reply.settled, lr)
            case ev.StepReply():
                assert reply.parameters is not None
                bits = read(reply.parameters, to_the_end=False)
                self._readers.append((reply.parameters, bits))
                return words.Stepped(
                    reply.outcome.value, reply.version, reply.incarnation, reply.contributions, reply.staleness, bits,
                    reply.edits.get(0, ({}, ()))[0].get("lr"),
                )  # fmt: skip
            case ev.DoneReply():
                return words.Done(reply.version, reply.incarnation)
            case ev.Refusal():
                return words.Refused(type(reply.error).__name__, reply.error.applied.name)
        raise AssertionError(f"nobody expects {reply}")

    # What can be seen.

    def bits(self) -> bytes:
        """Return the bytes of the parameters as they stand."""
        return words.bits_of(list(self.hosted.engine.store.tensors))

    def news(self, now: float) -> list[words.Round]:
        """Return the rounds that were entered into the history since it was last asked for."""
        reply: ev.HistoryReply = self.ask(lambda ticket: ev.ReadHistory(ticket, self._seen), now)
        assert [round_.number for round_ in reply.rounds] == list(
            range(self._seen + 1, self._seen + 1 + len(reply.rounds))
        )
        self._seen += len(reply.rounds)
        return [
            words.Round(
                round_.kind.value, round_.outcome.value, round_.version, round_.incarnation,
                tuple(
                    words.Part(part.worker, part.sequence, part.abstained, part.num_samples, part.staleness, part.ahead)
                    for part in round_.parts
                ),
            )
            for round_ in reply.rounds
        ]  # fmt: skip

    def rows(self, now: float) -> list[words.Row]:
        """Return the workers of a description."""
        reply: Description = self.ask(ev.ReadDescription, now)
        return [
            words.Row(
                row.worker, row.standing, row.epoch, row.version, row.contributions, row.abstentions, row.stale,
                row.staleness, row.lease_seconds,
            )
            for row in reply.workers
        ]  # fmt: skip

    def pull(self, now: float) -> tuple[int, int, bytes]:
        """Return version, incarnation and parameters as a reader sees them."""
        reply: ev.ParametersReply = self.ask(ev.ReadParameters, now)
        return reply.version, reply.incarnation, read(reply.parameters)

    def dump(self, now: float) -> Dump:
        """Return a checkpoint."""
        reply: ev.DumpReply = self.ask(ev.TakeDump, now)
        return reply.dump


def staged(gradients: words.Gradients) -> Staged:
    """Return gradients as they come over the wire."""
    plan = plan_gradients(LAYOUT, {index: None for index, gradient in enumerate(gradients) if gradient is None})
    buffer = torch.zeros(plan.nbytes, dtype=torch.uint8)
    for pieces, gradient in zip(plan.pieces, gradients, strict=True):
        for spec, offset in pieces:
            assert gradient is not None
            spec.view(buffer, offset).copy_(gradient)
    return Staged(plan, buffer)


def stored(dump: Dump) -> Dump:
    """Return a dump as it comes back from disk."""
    manifest, tensors = encode_dump(dump)
    info = SnapshotInfo(dump.name, dump.version, None, 0.0, 0, dump.lineage, dump.incarnation)
    copies = {key: clone(tensor) for key, tensor in tensors.items()}
    return decode_dump(Snapshot(info, json.loads(json.dumps(manifest)), copies))


def contents(tensors: list[Tensor]) -> Tensor:
    """Return the parameters' bytes."""
    return arena(LAYOUT, *tensors)


def clone(value: Any) -> Any:
    """Return a copy that shares no memory."""
    return value.clone() if isinstance(value, Tensor) else value


def read(reader: ParameterReader, *, to_the_end: bool = True) -> bytes:
    """Return what a reader sees; to the end of the last parameter only, it can be read once more."""
    stop = reader.nbytes if to_the_end else reader.nbytes - 1  # the last byte is padding
    buffer = torch.frombuffer(bytearray(reader.join((), 0, stop).ljust(reader.nbytes, b"\0")), dtype=torch.uint8)
    return words.bits_of(LAYOUT.views(buffer))
