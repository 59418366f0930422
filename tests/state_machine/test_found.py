"""What the state machine has found, each as the shortest program that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from farstep_wire.policy import Async, Sync
from tests.state_machine import words
from tests.state_machine.machine import Machine
from tests.state_machine.pair import Tally


@contextmanager
def machine(policy: Sync | Async, crew: int) -> Iterator[Any]:
    """Server and model, begun; at the end everyone who waits must be told."""
    state: Any = type("Machine", (Machine,), {"policy": policy, "tally": Tally()})()
    state.begin(optimizer="SGD", crew=crew)
    yield state
    state.teardown()


def test_after_a_rollback_rounds_wait_for_those_who_joined_at_a_later_version() -> None:
    with machine(Sync(2), 2) as state:
        state.checkpoint()
        state.trains(number=0, rounds=3)
        state.new_process(worker="2")
        state.roll_back(number=0)
        state.trains(number=0, rounds=2)
        state.steps(number=1, abstain=False, lr=None, samples=None)
        assert len(state.model.waiting) == 1


def test_a_worker_that_is_replaced_while_its_answer_is_held_back_is_told() -> None:
    with machine(Async(max_staleness=0), 2) as state:
        state.does_not_wait_for_the_answer(number=0)
        assert state.model.held
        state.new_process(worker="2")


def test_who_pulls_is_still_told_of_the_learning_rate_that_another_has_set() -> None:
    with machine(Async(), 2) as state:
        state.steps(number=0, abstain=False, lr=0.25, samples=None)
        state.pulls(number=1)
        state.steps(number=1, abstain=False, lr=None, samples=None)
        assert [process.lr for process in state.processes] == [0.25, 0.25]


def test_a_learning_rate_that_came_with_an_abstention_is_told_to_the_others() -> None:
    with machine(Async(), 2) as state:
        state.steps(number=1, abstain=True, lr=0.25, samples=None)
        state.steps(number=2, abstain=False, lr=None, samples=None)
        assert [process.lr for process in state.processes] == [0.25, 0.25]


def test_a_loaded_learning_rate_is_told_with_an_answer_that_was_held_back() -> None:
    with machine(Async(max_staleness=0), 2) as state:
        state.does_not_wait_for_the_answer(number=0)
        state.loads(number=0, variant=2)
        state.trains(number=1, rounds=1)
        assert [process.lr for process in state.processes] == [0.25, 0.25]


def test_what_waits_is_of_an_old_incarnation_once_a_state_was_loaded() -> None:
    with machine(Async(max_staleness=0), 2) as state:
        state.does_not_wait_for_the_answer(number=0)
        state.does_not_wait_for_the_answer(number=0)
        assert state.model.waiting
        state.loads(number=0, variant=1)
        assert not state.model.waiting


def test_a_newcomer_to_an_empty_place_is_level_with_who_was_there() -> None:
    with machine(Async(max_staleness=2), 1) as state:
        state.trains(number=0, rounds=5)
        state.time_passes(seconds=11.0, tick=True)
        state.new_process(worker="10")
        state.trains(number=0, rounds=4)
        assert not state.model.held


def test_a_round_that_an_expiry_has_completed_commits_at_once_also_when_the_event_is_refused() -> None:
    with machine(Sync(2), 2) as state:
        state.trains(number=0, rounds=1)
        state.new_process(worker="10")
        state.time_passes(seconds=4.0, tick=True)
        state.steps(number=0, abstain=False, lr=None, samples=None)
        version = state.model.version
        state.the_next_deadline_comes(tick=False)
        state.a_zombie_speaks(number=0, what="push")
        assert state.model.version == version + 1


def test_a_reconnect_does_not_put_off_the_end_of_a_round() -> None:
    with machine(Sync(2, min_workers=1, timeout=3.0), 2) as state:
        state.trains(number=0, rounds=1)
        state.steps(number=0, abstain=False, lr=None, samples=None)
        version = state.model.version
        state.time_passes(seconds=2.5, tick=True)
        state.reconnects(number=0, again=True)
        state.time_passes(seconds=1.0, tick=True)
        assert state.model.version == version + 1
        process = state.processes[1]
        assert state.both(state._push(process, 1), process) == {
            state.last_ticket: words.Stepped("stale", version + 1, 1, 0, 1, state.system.bits())
        }
