"""A step of a 10 KB model beside a bare gRPC echo of the same bytes, interleaved in one run.

The echo is the least that a step over a long-lived gRPC stream can cost: the same bytes there and back, in Python on both
sides, with nothing done to them. The local step of the same class is timed too, since a farstep step contains one.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable

import grpc
import pytest
import torch

from farstep import Remote, optim
from tests.benchmarks.processes import echo_server, farstep_server

pytestmark = pytest.mark.bench

_SHAPES = [(40, 32), (40,), (30, 40), (30,)]
_ROUNDS, _PER_ROUND = 40, 50


def _parameters() -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in _SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _microseconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return (time.perf_counter() - begun) * 1e6


def _interleaved(acts: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(_ROUNDS + 2):
        for name, act in acts.items():
            batch = [_microseconds(act) for _ in range(_PER_ROUND)]
            if number >= 2:
                times[name] += batch
    return times


def _percentile(values: list[float], fraction: float) -> float:
    return sorted(values)[int(len(values) * fraction)]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_step_beside_a_bare_echo(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    parameters, local_parameters = _parameters(), _parameters()
    message = bytes(sum(parameter.nbytes for parameter in parameters))
    with farstep_server() as address, echo_server() as echo_address, grpc.insecure_channel(echo_address) as channel:
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        replies = channel.stream_stream("/bench.Echo/Echo", None, None)(iter(outbox.get, None))

        def echo() -> None:
            outbox.put(message)
            assert len(next(replies)) == len(message)

        remote = getattr(optim, name)(parameters, lr=1e-3, remote=Remote(address, name=name))
        local = getattr(torch.optim, name)(local_parameters, lr=1e-3)
        times = _interleaved({"echo": echo, "farstep": remote.step, "local": local.step})
        remote.remote.close()
        outbox.put(None)
    p50 = {key: statistics.median(values) for key, values in times.items()}
    with capsys.disabled():
        print(f"\n{name}, {len(message)} bytes, {_ROUNDS * _PER_ROUND} steps, loopback TCP, microseconds")
        for key, values in times.items():
            print(
                f"  {key:8} p50 {p50[key]:7.0f}   p90 {_percentile(values, 0.9):7.0f}   p99 {_percentile(values, 0.99):7.0f}"
            )
        print(f"  step / echo, p50: {p50['farstep'] / p50['echo']:.2f} (target: at most 1.5)")
        print(f"  step / (echo + local step), p50: {p50['farstep'] / (p50['echo'] + p50['local']):.2f}")
    assert len(times["farstep"]) == len(times["echo"]) == _ROUNDS * _PER_ROUND
