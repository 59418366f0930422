"""Four workers over a bad network: replies get lost, connections break, bytes come late, requests come twice."""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from farstep import Retry, Sync, Timeouts, inspection
from farstep.inspection import Round
from farstep_wire.address import parse_address
from tests.data_parallel.crew import mean
from tests.faults.models import parameters, remote_optimizer, same_bits, set_gradients
from tests.support.proxy import Fault, Proxy
from tests.support.servers import ServerProcess

BIG = os.environ.get("FARSTEP_SOAK") == "big"
WORKERS = 4
STEPS = 20_000 if BIG else 2000
OPTIONS: dict[str, Any] = {"momentum": 0.9}

# In one contribution of so many, per worker: 10 % of the replies are lost, and the rest is on top.
PLAN: dict[Fault, float] = {
    "drop reply": 0.09,
    "cut reply": 0.01,
    "drop request": 0.01,
    "cut request": 0.01,
    "repeat request": 0.01,
    "delay request": 0.01,
    "delay reply": 0.01,
}
_HISTORY_EVERY = 1000


class Worker:
    """One worker behind a proxy of its own, which it tells what to break in each of its steps."""

    def __init__(self, number: int, proxy: Proxy, name: str) -> None:
        self.number = number
        self.proxy = proxy
        self.params = parameters()
        self.planned: Counter[str] = Counter()
        self.duplicates = 0
        self._random = random.Random(number)
        self.optimizer = remote_optimizer(
            self.params, proxy.address, name, policy=Sync(WORKERS), worker=number, options=OPTIONS,
            timeouts=Timeouts(connect=60, step=100, reconnect=60), retry=Retry(0.002, 0.05),
        )  # fmt: skip

    def step(self, number: int, *, faulty: bool) -> None:
        """Take one step; what is armed for it has fired when it returns."""
        if faulty and (fault := self._fault()) is not None:
            self.planned[fault] += 1
            self.proxy.arm(fault)
        set_gradients(self.params, number, self.number)
        self.optimizer.step()
        # The server had settled the contribution before it was sent once more.
        standing = self.optimizer._farstep.link.standing
        self.duplicates += standing.settled == standing.sequence

    def _fault(self) -> Fault | None:
        kinds = list(PLAN)
        [fault] = self._random.choices([*kinds, None], [*PLAN.values(), 1 - sum(PLAN.values())])
        return fault


def local_run(steps: int) -> list[torch.nn.Parameter]:
    params, scratch = parameters(), parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, **OPTIONS)
    for step in range(steps):
        gradients = []
        for worker in range(WORKERS):
            set_gradients(scratch, step, worker)
            gradients.append([p.grad for p in scratch])
        for parameter, gradient in zip(params, mean(gradients), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return params


class Historian:
    """Gathers the history before the server forgets it."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        self._address = parse_address(server.address)
        self._name = name
        self.rounds: list[Round] = []

    def gather(self) -> None:
        with inspection.connect(self._address, 60) as server:
            self.rounds += server.history(self._name, self.rounds[-1].number if self.rounds else 0)


def train(workers: list[Worker], historian: Historian, *, faulty: bool) -> None:
    """Have each worker take all steps on a thread of its own."""

    def run(worker: Worker) -> None:
        for step in range(STEPS):
            worker.step(step, faulty=faulty)
            if worker.number == 0 and step % _HISTORY_EVERY == _HISTORY_EVERY - 1:
                historian.gather()

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(run, workers))


@pytest.mark.soak
@pytest.mark.timeout(STEPS * 0.2)
def test_every_contribution_counts_once(server: ServerProcess, name: str) -> None:
    historian = Historian(server, name)
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(server.address, delay_seconds=0.02)) for _ in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as pool:
            workers = list(pool.map(lambda number: Worker(number, proxies[number], name), range(WORKERS)))
        train(workers, historian, faulty=True)
        historian.gather()
        described = workers[0].optimizer.remote.describe()
        for worker in workers:
            worker.optimizer.remote.close()
    _check_faults(workers)
    assert described.version == STEPS
    assert [row.contributions for row in described.workers] == [STEPS] * WORKERS
    assert [(row.abstentions, row.stale) for row in described.workers] == [(0, 0)] * WORKERS
    # Each round is a step of all four, and no contribution is in two of them.
    assert [(round_.version, round_.outcome) for round_ in historian.rounds] == [
        (step + 1, "committed") for step in range(STEPS)
    ]
    applied = [(part.worker, part.sequence) for round_ in historian.rounds for part in round_.parts]
    assert len(applied) == len(set(applied)) == STEPS * WORKERS
    expected = local_run(STEPS)
    assert all(same_bits(worker.params, expected) for worker in workers)


def _check_faults(workers: list[Worker]) -> None:
    fired: Counter[str] = Counter()
    for worker in workers:
        assert worker.proxy.fired == worker.planned, "what was armed for a step fired in it"
        fired += worker.proxy.fired
    contributions = STEPS * WORKERS
    duplicates = sum(worker.duplicates for worker in workers)
    connections = sum(worker.proxy.connections for worker in workers)
    print(f"{contributions} contributions; faults: {dict(fired)}; {duplicates} duplicates; {connections} connections")
    for fault, share in PLAN.items():
        assert 0.5 * share < fired[fault] / contributions < 1.5 * share, f"{fault}: {fired[fault]}"
    lost = fired["drop reply"] + fired["cut reply"]
    assert 0.09 < lost / contributions < 0.11
    assert 0.9 * lost < duplicates, "what was settled was sent again"
