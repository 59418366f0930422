"""A hosted optimizer against a plain sequential model, under whatever workers, time and people may do, in any order."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from farstep_wire.policy import Async, Sync
from tests.state_machine.machine import Machine
from tests.state_machine.pair import Tally

BIG = os.environ.get("FARSTEP_SOAK") == "big"
POLICIES = [
    Sync(1),
    Sync(2),
    Sync(3, min_workers=2, timeout=2.0),
    Sync(4, min_workers=1, timeout=3.0),
    Sync(4),
    Async(),
    Async(max_staleness=0),
    Async(max_staleness=2),
]
STEPS_PER_EXAMPLE = 50
EXAMPLES = 100 if BIG else 10
STEPS = (10_000 if BIG else 2_000) // len(POLICIES)
"""The least that each policy must see."""


@pytest.mark.soak
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_server_and_model_agree(policy: Sync | Async) -> None:
    tally = Tally()
    machine = type("Machine", (Machine,), {"policy": policy, "tally": tally})
    run_state_machine_as_test(
        seed(POLICIES.index(policy))(machine),  # other steps for each policy, the same in each run
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS_PER_EXAMPLE,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{policy}: {tally.steps} steps, {tally.events} events, {tally.commits} commits; rounds: {tally.outcomes}")
    assert tally.steps >= STEPS
    assert tally.commits > 0
