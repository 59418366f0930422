"""Async: every contribution is a step, in the order of the server's own history; nobody runs ahead further than allowed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import Async
from farstep.inspection import Round
from tests.data_parallel.crew import Crew, Worker, crew
from tests.support.servers import ServerProcess, Servers

STEPS = 25
OPTIONS = {"lr": 0.1, "momentum": 0.9}
CLASSES: dict[str, dict[str, Any]] = {"SGD": OPTIONS, "AdamW": {"lr": 0.05}}


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (3,))]


def gradients(worker: int, step: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return [torch.randn(shape, generator=generator) for shape in ((6, 4), (3,))]


def run(worker: Worker, steps: int, seen: list[tuple[int, int]]) -> None:
    """Take steps at this worker's own uneven pace; note the staleness that each reply told, by the contribution's number."""
    pace = random.Random(worker.number)
    for step in range(steps):
        time.sleep(pace.choice([0, 0, 0.001, 0.01]) * (1 + worker.number))
        worker.give(gradients(worker.number, step))
        worker.optimizer.step()
        seen.append((step + 1, worker.optimizer.remote.staleness))


def train(workers: Crew, steps: int = STEPS) -> dict[int, list[tuple[int, int]]]:
    """Have all workers run, and leave when they are done; return the staleness that each was told."""
    seen: dict[int, list[tuple[int, int]]] = {worker.number: [] for worker in workers.workers}

    def act(worker: Worker) -> None:
        run(worker, steps, seen[worker.number])
        if worker.number:
            worker.optimizer.remote.close()

    for future in [worker.do(act) for worker in workers.workers]:
        future.result(120)
    return seen


def replayed(history: Sequence[Round], cls: str, *, scale_lr: bool) -> list[Tensor]:
    """Return what torch makes of the contributions in the order of the history."""
    params = parameters()
    optimizer = getattr(torch.optim, cls)(params, **CLASSES[cls])
    rate = CLASSES[cls]["lr"]
    for record in history:
        [part] = record.parts
        optimizer.param_groups[0]["lr"] = rate / max(1, part.staleness) if scale_lr else rate
        for parameter, gradient in zip(params, gradients(int(part.worker), part.sequence - 1), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return params


@pytest.mark.parametrize("scale_lr", [False, True], ids=["plain", "scale_lr"])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_history_tells_what_happened(server: ServerProcess, name: str, cls: str, scale_lr: bool) -> None:
    """The bits are those of the same contributions in the history's order, the rate divided by the staleness it tells."""
    policy = Async(scale_lr=scale_lr)
    with crew(server.address, name, 3, parameters, cls, CLASSES[cls], policy) as workers:
        seen = train(workers)
        first = workers.workers[0].optimizer
        first.remote.pull()
        history = first.remote.history()
        assert [record.version for record in history] == list(range(1, 3 * STEPS + 1))
        assert {record.outcome for record in history} == {"committed"}
        told = {(part.worker, part.sequence): part.staleness for record in history for part in record.parts}
        assert len(told) == 3 * STEPS, "each contribution is in one step"
        assert told == {(str(worker), number): s for worker, row in seen.items() for number, s in row}
        expected = replayed(history, cls, scale_lr=scale_lr)
        assert all(torch.equal(own, other) for own, other in zip(workers.workers[0].params, expected, strict=True))
        assert first.param_groups[0]["lr"] == CLASSES[cls]["lr"], "only the step itself is scaled"


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_is_further_ahead_than_the_bound(server: ServerProcess, name: str, bound: int) -> None:
    """Counted twice: as the server says, and anew from the order of its commits."""
    with crew(server.address, name, 4, parameters, "SGD", OPTIONS, Async(max_staleness=bound)) as workers:
        train(workers)
        history = workers.workers[0].optimizer.remote.history()
    assert len(history) == 4 * STEPS
    counts = Counter({str(number): 0 for number in range(4)})
    largest = 0
    for record in history:
        [part] = record.parts
        # A worker that has done all its steps leaves, and holds up nobody any more.
        slowest = min((count for count in counts.values() if count < STEPS), default=STEPS)
        ahead = counts[part.worker] - slowest
        assert part.ahead <= bound
        assert ahead <= bound
        largest = max(largest, ahead)
        counts[part.worker] += 1
    print(f"max_staleness={bound}: the fastest was {largest} steps ahead at most")


def test_the_fast_wait_for_the_slowest_live_one(servers: Servers, name: str) -> None:
    """A worker that does nothing holds the others at the bound; when its lease has run out, they go on."""
    server = servers("--lease", "2")
    with crew(server.address, name, 2, parameters, "SGD", OPTIONS, Async(max_staleness=2)) as workers:
        fast, slow = workers.workers
        finished = threading.Event()

        def act(worker: Worker) -> None:
            run(worker, 6, [])
            finished.set()

        future = fast.do(act)
        workers.await_waiting([0])
        described = slow.optimizer.remote.describe()
        assert described.version == 3, "one step, and two ahead of the slow one"
        assert not finished.is_set()
        slow.optimizer._farstep.link._stream.keep_alive(1e9)  # no heartbeats: as if its machine had died
        future.result(60)
        assert fast.optimizer.remote.version == 6
        # It comes back level with the slowest, and is in time.
        slow.do(run, 2, []).result(60)
        assert max(part.ahead for record in fast.optimizer.remote.history() for part in record.parts) <= 2


def test_a_worker_learns_of_what_others_have_changed(server: ServerProcess, name: str) -> None:
    with crew(server.address, name, 2, parameters, "SGD", OPTIONS, Async()) as workers:
        one, other = workers.workers
        one.optimizer.param_groups[0]["lr"] = 0.02
        one.optimizer.param_groups[0]["mine"] = "text"
        one.give(gradients(0, 0))
        one.optimizer.step()
        assert other.optimizer.param_groups[0]["lr"] == 0.1
        other.give(gradients(1, 0))
        other.optimizer.step()
        assert (other.optimizer.param_groups[0]["lr"], other.optimizer.param_groups[0]["mine"]) == (0.02, "text")
        del one.optimizer.param_groups[0]["mine"]
        for worker in (one, other):
            worker.give(gradients(worker.number, 1))
            worker.optimizer.step()
        assert "mine" not in other.optimizer.param_groups[0]
        assert other.optimizer.remote.staleness == 1
