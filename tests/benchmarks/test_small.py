"""A step of a 10 KB model beside a bare gRPC echo of the same bytes.

The echo is the least that a step over a long-lived gRPC stream can cost: the same bytes there and back, in Python on both
sides, with nothing done to them. The local step of the same class is timed too, since a farstep step contains one.
"""

from __future__ import annotations

import pytest

from tests.benchmarks import transports
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import farstep_server, grpc_server
from tests.benchmarks.report import Report
from tests.benchmarks.sizes import QUICK, TINY

pytestmark = pytest.mark.bench

_TURNS, _STEPS = (3, 10) if QUICK else (40, 50)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_step_beside_a_bare_echo(report: Report, optimizer: str) -> None:
    contest = Contest(TINY)
    names = [name for name in transports.OPTIONS if "bfloat16" not in name]
    with farstep_server() as server, grpc_server() as address, crew(1) as peers, crew(1) as own:
        contest.enter(peers, "bare gRPC echo", "echo", address=address)
        contest.enter(peers, "torch.optim", "local", optimizer=optimizer)
        transports.enter(contest, own, server, names, optimizer=optimizer)
        contest.hold(_TURNS, 2, count=_STEPS)
    report.contest(f"One worker, {TINY}, {optimizer}", contest, "bare gRPC echo", tails=True)
    for way in ("grpc", "pipe"):
        text = f"{way}, {TINY}, {optimizer} / bare echo"
        report.ratio("3", text, contest, f"farstep {way}", ("bare gRPC echo",), 1.3)
