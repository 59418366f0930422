"""Server and model side by side: one event at a time goes to both, and all that can be seen must agree."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hypothesis.stateful import RuleBasedStateMachine, rule

from farstep_server.core.records import Dump
from farstep_wire.policy import Async, Sync
from tests.state_machine import words
from tests.state_machine.arithmetic import same_state
from tests.state_machine.model import Model
from tests.state_machine.processes import Process
from tests.state_machine.system import System

Ledger = list[tuple[str, str, int]]
"""Worker, instance and sequence of all contributions that the state as it stands is made of."""


class Tally:
    """What a run of the machine has done, over all its examples."""

    def __init__(self) -> None:
        self.steps = 0
        self.events = 0
        self.commits = 0
        self.outcomes: dict[str, int] = {}


def step(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Make a rule of a method, and count how often it is followed."""

    def decorate(method: Callable[..., None]) -> Any:
        @functools.wraps(method)
        def counted(self: Pair, **drawn: Any) -> None:
            self.tally.steps += 1
            method(self, **drawn)

        return rule(**strategies)(counted)

    return decorate


class Pair(RuleBasedStateMachine):
    """Server and model. ``policy`` and ``tally`` are set by who runs it."""

    policy: Sync | Async = Sync(1)
    tally = Tally()
    model: Model
    system: System

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.tickets: dict[int, tuple[Process, words.Act | None, int]] = {}
        self.processes: list[Process] = []
        self.zombies: list[Process] = []
        self.dumps: list[Dump] = []
        self.ledgers: list[Ledger] = []
        self.ledger: Ledger = []
        self.last_ticket = 0
        self.agreeing = False

    def ticket(self) -> int:
        self.last_ticket += 1
        return self.last_ticket

    def both(self, event: words.Event, process: Process | None = None) -> dict[int, words.Answer]:
        """Give an event to both; compare all that can be seen; let the processes hear their answers."""
        if process is not None and (ticket := getattr(event, "ticket", None)):
            self.tickets[ticket] = (process, event if isinstance(event, words.Act) else None, process.epoch)
        self.tally.events += 1
        self.agreeing = False
        expected = self.model.take(event, self.now)
        answers = self.system.take(event, self.now, self.dumps)
        agree("answers", answers, expected)
        self.compare()
        for ticket, answer in expected.items():
            self.deliver(ticket, answer, answers[ticket])
        self.agreeing = True
        return expected

    def compare(self) -> None:
        model, system = self.model, self.system
        hosted = system.hosted
        agree("version, incarnation", (hosted.version, hosted.incarnation), (model.version, model.incarnation))
        agree("parameters", system.bits(), model.numbers.bits())
        state = dict(hosted.engine.read_state())
        own = model.numbers.optimizer.state_dict()["state"]
        assert same_state(state, own), f"state:\n  server {state}\n  model  {own}"
        agree("lr", hosted.engine.optimizer.param_groups[0]["lr"], model.numbers.lr)
        agree("next deadline", hosted.next_deadline() or float("inf"), model.next_deadline())
        agree("workers", system.rows(self.now), model.rows())
        news = system.news(self.now)
        agree("rounds", news, model.rounds)
        self.enter(news)
        model.rounds.clear()

    def enter(self, news: list[words.Round]) -> None:
        """Keep the list of all that was ever applied to the state as it is now, from the server's own history."""
        limit = self.policy.max_staleness if isinstance(self.policy, Async) else None
        for round_ in news:
            self.tally.outcomes[round_.outcome] = self.tally.outcomes.get(round_.outcome, 0) + 1
            if round_.kind != "step" or round_.outcome != "committed":
                continue
            self.tally.commits += 1
            applied = [
                (part.worker, self.model.workers[part.worker].instance, part.sequence)
                for part in round_.parts
                if not part.abstained
            ]
            assert not set(applied) & set(self.ledger), "a contribution was applied twice"
            assert limit is None or all(part.ahead <= limit for part in round_.parts)
            self.ledger += applied

    def deliver(self, ticket: int, expected: words.Answer, answer: words.Answer) -> None:
        if ticket not in self.tickets:
            return
        process, act, epoch = self.tickets.pop(ticket)
        if isinstance(expected, words.Joined):
            process.lr = process.lr if expected.lr is None else expected.lr
        elif act is None and expected == words.Refused("FencedError", "NO") and process in self.processes:
            self.processes.remove(process)  # another process is this worker: it has to begin anew
            self.zombies.append(process)
        elif process.epoch != epoch:
            return  # it has reconnected since: nobody reads this answer
        told = answer.lr if isinstance(answer, words.Stepped) else None
        process.hears(act, expected, told, self.model.numbers.lr)


def agree(what: str, server: object, model: object) -> None:
    """Fail where the two differ, and say in what."""
    assert server == model, f"{what}:\n  server {server}\n  model  {model}"
