"""Acts that cannot be decided at once: behind a closure-driven step, and under a bound on staleness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from farstep_server.core import events as ev
from farstep_server.core.records import Description, Outcome
from farstep_server.hosting.owner import Owner
from farstep_wire.errors import Applied, ClosureError, FencedError, MismatchError
from farstep_wire.policy import Async, Sync
from tests.server.harness import (
    LAYOUT,
    WAIT_SECONDS,
    Inbox,
    Machine,
    blueprint,
    contribution,
    host,
    join,
    parameters,
    step,
)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path / "data")
    yield machine
    machine.crash()


def driven(machine: Machine, policy: Sync | Async) -> Owner:
    plan = blueprint(policy=policy, optimizer="LBFGS", arguments={"lr": 0.5}, options=[{"lr": 0.5}])
    return host(machine.directory, plan)


def start_driven_step(owner: Owner, worker: str = "0") -> Inbox:
    inbox = Inbox()
    owner.post(contribution(owner, inbox, 1, worker=worker, closure=True))
    return inbox


def evaluate(owner: Owner, number: int, *, worker: str = "0", error: str = "") -> ev.Reply:
    inbox = Inbox()
    staged = contribution(owner, inbox, 1).staged
    owner.post(ev.Evaluation(inbox, worker, 1, 1, number, torch.tensor(1.0), staged, error))
    return inbox.take()


def test_a_dump_waits_for_the_end_of_a_closure_driven_step(machine: Machine) -> None:
    owner = driven(machine, Sync(1))
    join(owner)
    assert isinstance(start_driven_step(owner).take(), ev.EvaluateReply)
    dump, state = Inbox(), Inbox()
    owner.post(ev.TakeDump(dump))
    owner.post(ev.ReadState(state))
    refusal = state.take()
    assert isinstance(refusal, ev.Refusal)
    assert isinstance(refusal.error, MismatchError)
    assert dump.empty
    reply, number = evaluate(owner, 0), 1
    while isinstance(reply, ev.EvaluateReply):
        assert dump.empty
        reply, number = evaluate(owner, number), number + 1
    assert isinstance(reply, ev.StepReply)
    taken = dump.take()
    assert isinstance(taken, ev.DumpReply)
    assert taken.dump.version == 1
    assert torch.equal(LAYOUT.views(taken.dump.contents)[0], parameters(owner)[0])


def test_what_waits_behind_a_step_is_taken_up_when_a_closure_raises(machine: Machine) -> None:
    owner = driven(machine, Sync(1))
    join(owner)
    assert isinstance(start_driven_step(owner).take(), ev.EvaluateReply)
    join(owner, "1")
    late, dump = Inbox(), Inbox()
    owner.post(contribution(owner, late, 1, worker="1", closure=True))
    owner.post(ev.TakeDump(dump))
    refusal = evaluate(owner, 0, error="ValueError()")
    assert isinstance(refusal, ev.Refusal)
    assert isinstance(refusal.error, ClosureError)
    taken = dump.take()
    assert isinstance(taken, ev.DumpReply)
    assert torch.equal(LAYOUT.views(taken.dump.contents)[0], torch.ones(2))
    # Worker 1's part is in the round now: the step begins as soon as worker 0 tries again.
    again = Inbox()
    owner.post(contribution(owner, again, 2, closure=True))
    assert isinstance(again.take(), ev.EvaluateReply)
    assert isinstance(late.take(), ev.EvaluateReply)


def test_a_refused_act_that_waited_is_refused_to_its_own_worker(machine: Machine) -> None:
    owner = driven(machine, Sync(1))
    join(owner)
    assert isinstance(start_driven_step(owner).take(), ev.EvaluateReply)
    join(owner, "1")
    late = Inbox()
    owner.post(contribution(owner, late, 1, worker="1", closure=True))
    owner.post(ev.Leave(None, "1", 1))
    refusal = evaluate(owner, 0, error="ValueError()")
    assert isinstance(refusal, ev.Refusal)
    assert isinstance(refusal.error, ClosureError)
    own = late.take()
    assert isinstance(own, ev.Refusal)
    assert isinstance(own.error, FencedError)


def test_a_late_worker_does_not_hold_up_those_who_came_before(machine: Machine) -> None:
    owner = host(machine.directory, blueprint(policy=Async(max_staleness=1)))
    join(owner)
    for sequence in range(1, 6):
        step(owner, sequence)
    join(owner, "1")
    assert step(owner, 6).version == 6  # one ahead of the newcomer
    ahead = Inbox()
    owner.post(contribution(owner, ahead, 7))
    step(owner, 1, worker="1")
    reply = ahead.take()
    assert isinstance(reply, ev.StepReply)
    assert reply.outcome is Outcome.COMMITTED


def test_a_worker_that_abstains_holds_up_nobody(machine: Machine) -> None:
    owner = host(machine.directory, blueprint(policy=Async(max_staleness=0)))
    join(owner)
    join(owner, "1")
    for sequence in range(1, 4):
        ahead = Inbox()
        owner.post(contribution(owner, ahead, sequence))
        assert step(owner, sequence, worker="1", abstain=True).outcome is Outcome.SKIPPED
        assert outcome(ahead) == (Outcome.COMMITTED, sequence)


def test_who_runs_ahead_gets_the_parameters_of_the_moment_when_the_slowest_has_caught_up(machine: Machine) -> None:
    owner = host(machine.directory, blueprint(policy=Async(max_staleness=0)))
    join(owner)
    join(owner, "1")
    ahead = Inbox()
    owner.post(contribution(owner, ahead, 1))
    owner.ask(ev.ReadDescription, Description, WAIT_SECONDS)
    assert (owner.hosted.version, ahead.empty) == (1, True)  # applied at once, answered later
    step(owner, 1, worker="1")
    reply = ahead.take()
    assert isinstance(reply, ev.StepReply)
    assert (reply.outcome, reply.version, reply.staleness) == (Outcome.COMMITTED, 2, 0)


def test_an_answer_that_waits_is_given_to_who_asks_again(machine: Machine) -> None:
    owner = host(machine.directory, blueprint(policy=Async(max_staleness=0)))
    join(owner)
    join(owner, "1")
    lost, again = Inbox(), Inbox()
    owner.post(contribution(owner, lost, 1))
    assert join(owner, lineage=owner.hosted.identity.lineage).resumed
    owner.post(contribution(owner, again, 1, epoch=2))
    assert step(owner, 1, worker="1").version == 2
    assert outcome(again) == (Outcome.COMMITTED, 2)
    assert owner.hosted.version == 2
    assert lost.empty


def test_who_does_not_wait_for_the_answer_is_held_back_at_the_next_step(machine: Machine) -> None:
    owner = host(machine.directory, blueprint(policy=Async(max_staleness=0)))
    join(owner)
    join(owner, "1")
    first, second = Inbox(), Inbox()
    owner.post(contribution(owner, first, 1))
    owner.post(contribution(owner, second, 2))
    owner.ask(ev.ReadDescription, Description, WAIT_SECONDS)
    assert owner.hosted.version == 1
    step(owner, 1, worker="1")
    assert outcome(first) == (Outcome.COMMITTED, 2)
    step(owner, 2, worker="1")
    assert outcome(second) == (Outcome.COMMITTED, 4)
    [*_, last] = owner.hosted.decisions.history.after(0)
    assert max(part.ahead for part in last.parts) == 0


@pytest.mark.parametrize("applied", [Applied.YES, Applied.NO])
def test_what_waits_goes_with_its_worker(applied: Applied, machine: Machine) -> None:
    owner = host(machine.directory, blueprint(policy=Async(max_staleness=0)))
    join(owner)
    join(owner, "1")
    first, second = Inbox(), Inbox()
    owner.post(contribution(owner, first, 1))
    owner.post(contribution(owner, second, 2))
    owner.post(ev.Leave(None, "0", 1))
    refusal = (first if applied is Applied.YES else second).take()
    assert isinstance(refusal, ev.Refusal)
    assert isinstance(refusal.error, FencedError)
    assert refusal.error.applied is applied
    assert step(owner, 1, worker="1").version == 2


def outcome(inbox: Inbox) -> tuple[Outcome, int]:
    reply = inbox.take()
    assert isinstance(reply, ev.StepReply)
    return reply.outcome, reply.version
