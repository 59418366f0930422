"""What a step adds to an iteration whose forward and backward take as long as the transfer, and leave the processor alone.

What remains beside the same iteration with a local step is set beside what the transfer takes without overlap.
"""

from __future__ import annotations

import statistics

import pytest

from farstep_wire.limits import CHUNK_BYTES
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import farstep_server, grpc_server
from tests.benchmarks.report import Report, duration
from tests.benchmarks.sizes import FEW_ROUNDS, LARGE, WARM
from tests.benchmarks.transports import FUSED

pytestmark = pytest.mark.bench

_LOCAL, _STREAM = "torch.optim, fused Adam", "bare gRPC stream, there and back"
_PLAIN, _OVERLAPPED = "farstep grpc", "farstep grpc, overlap"


def test_overlap(report: Report) -> None:
    contest = Contest(LARGE)
    layer_seconds = 0.4 / 2 / LARGE.tensors
    with farstep_server() as server, grpc_server() as stream, crew(1) as own:
        contest.enter(own, _LOCAL, "iteration", layer_seconds=layer_seconds)
        contest.enter(own, _STREAM, "bare stream", address=stream, chunk_bytes=CHUNK_BYTES)
        for name, overlap in ((_PLAIN, False), (_OVERLAPPED, True)):
            how = {"address": server.address, "hosted": name.replace(" ", "-"), "transport": "grpc", **FUSED}
            contest.enter(own, name, "iteration", layer_seconds=layer_seconds, overlap=overlap, **how)
        contest.hold(FEW_ROUNDS, WARM, count=3)
    section = report.contest(f"Whole iterations, {LARGE}, one worker", contest, _LOCAL)
    medians = {name: statistics.median(seconds) for name, seconds in contest.seconds.items()}
    rest = medians[_LOCAL]
    transfer, added = medians[_PLAIN] - rest, max(0.0, medians[_OVERLAPPED] - rest)
    section.notes.append(
        f"The transfer takes {duration(transfer)}; with overlap {duration(added)} of it can be seen. Backward takes "
        f"twice as long as forward."
    )
    report.figure("4", f"what overlap leaves of the transfer, {LARGE}", added / transfer, 0.2)
    report.figure("4", f"what overlap leaves / bare stream, {LARGE}", added / medians[_STREAM], 0.2)
