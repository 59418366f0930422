"""Workers in processes of their own that are to be struck down, and what tells afterwards what was made of their gradients."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from farstep import Retry, Sync, Timeouts
from farstep.inspection import Round
from farstep_wire.errors import FarstepError
from tests.data_parallel.crew import mean
from tests.faults.models import parameters, remote_optimizer, set_gradients
from tests.support.nursery import Talk

OPTIONS: dict[str, Any] = {"momentum": 0.9}
PATIENT = Timeouts(connect=60, step=90, reconnect=60)
_LONGEST_COMPUTATION_SECONDS = 0.02


def train(talk: Talk, address: str, name: str, worker: int, workers: int, seed: int) -> None:
    """Step until told to end; say which version it holds, and since when, at the start and after each step."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    params = parameters()
    optimizer = remote_optimizer(
        params, address, name, worker=worker, policy=Sync(workers), timeouts=PATIENT, retry=Retry(0.01, 0.1),
        options=OPTIONS,
    )  # fmt: skip
    step = 0
    talk.say({"version": optimizer.remote.version, "time": time.monotonic()})
    while not talk.heard(chance.uniform(0, _LONGEST_COMPUTATION_SECONDS)) and not talk.over:
        step += 1
        set_gradients(params, step, worker)
        try:
            optimizer.step()
        except FarstepError as error:
            talk.say({"error": type(error).__name__, "applied": error.applied.name, "text": str(error)})
            return
        talk.say({"version": optimizer.remote.version, "time": time.monotonic()})
    optimizer.remote.close()


def replay(rounds: Sequence[Round]) -> list[torch.nn.Parameter]:
    """Return the parameters that the rounds of a history lead to, each with the gradients of its parts, in worker order."""
    params, scratch = parameters(), parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, **OPTIONS)
    for one in rounds:
        gradients = []
        for part in one.parts:
            set_gradients(scratch, part.sequence, int(part.worker))
            gradients.append([parameter.grad for parameter in scratch])
        for parameter, gradient in zip(params, mean(gradients), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return params


def check_rounds(rounds: Sequence[Round], births: dict[int, int]) -> None:
    """Every round is a step from gradients taken at its own version, and none of a life of a worker is in two of them."""
    assert [one.version for one in rounds] == list(range(1, len(rounds) + 1))
    assert {one.outcome for one in rounds} == {"committed"}
    assert {part.staleness for one in rounds for part in one.parts} == {0}
    for worker, lives in births.items():
        sequences = [part.sequence for one in rounds for part in one.parts if part.worker == str(worker)]
        begun = 1 + sum(later <= earlier for earlier, later in pairwise(sequences))
        assert begun <= lives, f"worker {worker}: contributions of {begun} lives where there were {lives}: {sequences}"
