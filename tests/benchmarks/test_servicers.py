"""gRPC's servicers in threads beside those of grpc.aio in an event loop: the same bytes, with nothing done to them.

farstep's run in threads: a large message is copied without Python's lock, so that several sessions do so at once, and a small
one is answered by the thread that read it.
"""

from __future__ import annotations

import pytest

from farstep_wire.limits import CHUNK_BYTES
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import grpc_server
from tests.benchmarks.report import Report
from tests.benchmarks.sizes import FEW_ROUNDS, LARGE, TINY, WARM

pytestmark = pytest.mark.bench

_THREADS, _LOOP = "gRPC, threads", "gRPC, event loop"


@pytest.mark.parametrize("workers", [1, 2])
def test_there_and_back(report: Report, workers: int) -> None:
    contest = Contest(LARGE)
    with grpc_server() as threads, grpc_server(aio=True) as loop, crew(workers) as own:
        for name, address in ((_THREADS, threads), (_LOOP, loop)):
            contest.enter(own, name, "bare stream", address=address, chunk_bytes=CHUNK_BYTES)
        contest.hold(FEW_ROUNDS, WARM)
    report.contest(f"Servicers, {workers} worker{'s' * (workers > 1)}, {LARGE} there and back", contest, _THREADS)


def test_echo(report: Report) -> None:
    contest = Contest(TINY)
    with grpc_server() as threads, grpc_server(aio=True) as loop, crew(1) as own:
        for name, address in ((_THREADS, threads), (_LOOP, loop)):
            contest.enter(own, name, "echo", address=address)
        contest.hold(FEW_ROUNDS, WARM, count=50)
    report.contest(f"Servicers, an echo of {TINY}", contest, _THREADS, tails=True)
