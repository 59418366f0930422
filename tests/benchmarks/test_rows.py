"""A step of an embedding of which a few rows have gradients: those alone travel, beside replies with the whole table."""

from __future__ import annotations

import pytest
import torch

from farstep import Remote, optim
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import farstep_server
from tests.benchmarks.report import Report
from tests.benchmarks.sizes import FEW_ROUNDS, QUICK, WARM, Size
from tests.benchmarks.tables import TOUCHED, gradients

pytestmark = pytest.mark.bench

_TABLE = Size(50_000 if QUICK else 1_000_000, 32)
_PEER = "gloo's sparse all-reduce"


def _bytes_of_a_step(address: str, *, whole: bool) -> tuple[int, int]:
    own = torch.nn.Parameter(torch.zeros(_TABLE.tensors, _TABLE.elements))
    other = own.detach() if whole else None
    remote = Remote(address, name=f"bytes-{whole}", transport="grpc", worker=0)
    optimizer = optim.SparseAdam([own], lr=0.1, remote=remote)
    for gradient in gradients(_TABLE, 0)[:2]:
        own.grad = gradient
        if other is not None:
            torch.autograd.graph.increment_version(own)
        optimizer.step()
    traffic = optimizer.remote.step_traffic
    optimizer.remote.close()
    return traffic.sent, traffic.received


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_of_a_table(report: Report, workers: int) -> None:
    contest = Contest(_TABLE)
    yardstick = _PEER if workers > 1 else "torch.optim"
    ways = {"grpc": {}, "grpc, edits not looked for": {"detect_edits": False}, "grpc, whole table": {"whole": True}}
    with farstep_server() as server, crew(workers) as peers, crew(workers) as own:
        contest.enter(peers, yardstick, "gloo table" if workers > 1 else "local table")
        for way, how in {**ways, "shm": {"transport": "shm"}}.items():
            hosted = way.replace(", ", "-").replace(" ", "-")
            options = {"transport": "grpc", **how}
            contest.enter(own, f"farstep {way}", "farstep table", address=server.address, hosted=hosted, **options)
        contest.hold(FEW_ROUNDS, WARM)
        traffic = {whole: _bytes_of_a_step(server.address, whole=whole) for whole in (False, True)}
    section = report.contest(
        f"SparseAdam, a table of {_TABLE.tensors:,} × {_TABLE.elements} ({_TABLE}), {TOUCHED} rows a worker and step, "
        f"{workers} worker{'s' if workers > 1 else ''}",
        contest,
        yardstick,
    )
    (sent, received), (_, all_of_it) = traffic[False], traffic[True]
    section.notes.append(
        f"Over gRPC a step of one worker sends {sent:,} bytes, and {received:,} come back: {all_of_it:,} with the whole table."
    )
