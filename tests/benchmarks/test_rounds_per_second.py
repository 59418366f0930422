"""Rounds of a Sync barrier per second, by the number of workers, each a stream of its own from one of a few client processes.

Clients and server share the machine, so with many workers the figures are those of all the work of a round, the workers' own
part included: a local step of the same class is timed beside them to show how little of that is the optimizer.
"""

from __future__ import annotations

import time

import pytest
import torch

from tests.benchmarks.processes import farstep_server
from tests.data_parallel import problems
from tests.data_parallel.herd import OPTIONS, herd

pytestmark = pytest.mark.bench

_WORKERS = [1, 2, 4, 8, 16, 32, 64]
_PROCESSES = 4
_CONTRIBUTIONS = 6400


def _local_microseconds(steps: int = 2000) -> float:
    params = problems.parameters()
    for parameter, gradient in zip(params, problems.dense(params, 0, 0), strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.SGD(params, **OPTIONS)
    optimizer.step()
    begun = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    return (time.perf_counter() - begun) / steps * 1e6


def _seconds(address: str, workers: int, rounds: int) -> float:
    """Return how long the rounds took for the worker that was the last to be done."""
    with herd(address, f"rounds-{workers}", workers, min(workers, _PROCESSES), rounds) as own:
        own.go_on_all()
        results = own.read_all()
        own.go_on_all()
    assert {version for result in results for version in result["versions"]} == {rounds}
    assert len({found for result in results for found in result["digests"]}) == 1
    return max(float(result["seconds"]) for result in results)


def test_rounds_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    with farstep_server() as address:
        for workers in _WORKERS:
            rounds = max(50, _CONTRIBUTIONS // workers // 4) + 1
            rows.append((workers, rounds - 1, _seconds(address, workers, rounds)))
    local = _local_microseconds()
    with capsys.disabled():
        size = sum(parameter.nbytes for parameter in problems.parameters())
        print(
            f"\nSync rounds of SGD with momentum, {size} bytes of parameters, loopback TCP; a local step: {local:.0f} µs"
        )
        print(
            f"{'workers':>8}{'rounds':>8}{'rounds/s':>10}{'contributions/s':>17}{'ms/round':>10}{'µs/contribution':>17}"
        )
        for workers, rounds, seconds in rows:
            rate = rounds / seconds
            print(
                f"{workers:>8}{rounds:>8}{rate:>10.1f}{rate * workers:>17.0f}{1e3 / rate:>10.2f}"
                f"{1e6 / rate / workers:>17.0f}"
            )
