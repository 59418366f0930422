"""Sync with a timeout: a round goes on with those that are in time, and what comes late is refused, counted and told."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import Sync
from tests.data_parallel.crew import Crew, Worker, crew, mean
from tests.support.servers import ServerProcess

TIMEOUT = 0.3
OPTIONS = {"lr": 0.5, "momentum": 0.9}


def parameters() -> list[Tensor]:
    return [nn.Parameter(torch.zeros(3))]


def gradients(worker: int, step: int) -> list[Tensor | None]:
    return [torch.randn(3, generator=torch.Generator().manual_seed(10 * worker + step))]


def take(worker: Worker, step: int, **how: Any) -> float:
    """Take a step; return when it was over."""
    worker.give(gradients(worker.number, step))
    worker.optimizer.step(**how)
    return time.monotonic()


def expected(rounds: list[list[tuple[int, int]]]) -> Tensor:
    """Return the parameter after rounds of (worker, step)."""
    params = parameters()
    optimizer = torch.optim.SGD(params, **OPTIONS)  # type: ignore[arg-type]
    for contributions in rounds:
        [params[0].grad] = mean([gradients(worker, step) for worker, step in contributions])
        optimizer.step()
    return params[0].detach()


def rows(workers: Crew) -> dict[str, tuple[int, int]]:
    """Return each worker's contributions that counted, and those that came late."""
    described = workers.workers[0].optimizer.remote.describe()
    assert described.stale_contributions == sum(row.stale for row in described.workers)
    return {row.id: (row.contributions, row.stale) for row in described.workers}


def test_the_round_goes_on_without_the_late(server: ServerProcess, name: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = Sync(3, min_workers=2, timeout=TIMEOUT)
    with crew(server.address, name, 3, parameters, "SGD", OPTIONS, policy) as workers:
        one, two, late = workers.workers
        for future in [worker.do(take, 0) for worker in workers.workers]:
            future.result(60)  # the first round is of all three
        begun = time.monotonic()
        for future in [worker.do(take, 1) for worker in (one, two)]:
            assert future.result(60) - begun >= TIMEOUT * 0.9, "it waits for the third as long as it may"
        assert one.optimizer.remote.version == 2
        with caplog.at_level(logging.WARNING, "farstep"):
            late.do(take, 1).result(60)
        assert "was not used: its round was over; going on from version 2" in caplog.text
        assert late.optimizer.remote.version == 2
        assert torch.equal(late.params[0], one.params[0])
        assert rows(workers) == {"0": (2, 0), "1": (2, 0), "2": (1, 1)}
        for future in [worker.do(take, 2) for worker in workers.workers]:
            future.result(60)
        assert rows(workers) == {"0": (3, 0), "1": (3, 0), "2": (2, 1)}
        whole = [[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1)], [(0, 2), (1, 2), (2, 2)]]
        assert all(torch.equal(worker.params[0], expected(whole)) for worker in workers.workers)
        assert [[part.worker for part in record.parts] for record in one.optimizer.remote.history()] == [
            ["0", "1", "2"],
            ["0", "1"],
            ["0", "1", "2"],
        ]


def test_too_few_wait_past_the_timeout(server: ServerProcess, name: str) -> None:
    policy = Sync(3, min_workers=2, timeout=TIMEOUT)
    with crew(server.address, name, 3, parameters, "SGD", OPTIONS, policy) as workers:
        one, two, _ = workers.workers
        for future in [worker.do(take, 0) for worker in workers.workers]:
            future.result(60)
        waiting = one.do(take, 1)
        workers.await_waiting([0])
        time.sleep(2 * TIMEOUT)  # what must not happen has had its time, from when it could
        assert not waiting.done()
        two.do(take, 1).result(60)
        waiting.result(60)
        assert one.optimizer.remote.version == 2
        assert torch.equal(one.params[0], expected([[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1)]]))


def test_an_abstention_is_no_contribution(server: ServerProcess, name: str) -> None:
    policy = Sync(3, min_workers=2, timeout=TIMEOUT)
    with crew(server.address, name, 3, parameters, "SGD", OPTIONS, policy) as workers:
        one, two, three = workers.workers
        for future in [worker.do(take, 0) for worker in workers.workers]:
            future.result(60)
        waiting = [one.do(take, 1), two.do(lambda worker: worker.optimizer.remote.skip())]
        workers.await_waiting([0, 1])
        time.sleep(2 * TIMEOUT)
        assert not any(future.done() for future in waiting)
        three.do(take, 1).result(60)
        for future in waiting:
            future.result(60)
        assert torch.equal(one.params[0], expected([[(0, 0), (1, 0), (2, 0)], [(0, 1), (2, 1)]]))


def test_before_the_first_round_all_must_come(server: ServerProcess, name: str) -> None:
    with crew(server.address, name, 2, parameters, "SGD", OPTIONS, Sync(2, min_workers=1, timeout=TIMEOUT)) as workers:
        one, two = workers.workers
        waiting = one.do(take, 0)
        workers.await_waiting([0])
        time.sleep(2 * TIMEOUT)
        assert not waiting.done(), "the timeout is for the rounds after the first"
        two.do(take, 0).result(60)
        waiting.result(60)
        assert torch.equal(one.params[0], expected([[(0, 0), (1, 0)]]))
