"""A step of 102 MB with a fused Adam, beside what bounds it and what a user would pick instead.

The floor is what has to be done in any case: all workers' gradients added and a fused Adam, in one process's memory. The bare
exchanges move the bytes of the gradients there and those of the parameters back, with nothing done to them. gloo with a
replicated fused Adam is what DistributedDataParallel does between backward and the next forward.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from farstep_wire.limits import CHUNK_BYTES
from tests.benchmarks import transports
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import farstep_server, flight_server, gloo_peer, grpc_server, rpc_server
from tests.benchmarks.report import Report
from tests.benchmarks.sizes import FEW_ROUNDS, LARGE, ROUNDS, WARM

pytestmark = pytest.mark.bench

_LOCAL, _STREAM, _FLIGHT, _GLOO = "torch.optim", "bare gRPC stream", "Arrow Flight exchange", "gloo send and receive"
_GRPC, _BFLOAT16, _PG = "farstep grpc", "farstep grpc, bfloat16", "farstep pg"
_RAY = "Ray parameter server, as documented"
_SHM, _UNSEEN, _ADOPTED = "farstep shm", "farstep shm, detect_edits=False", "farstep shm, adopted"
_DDP = "DDP: gloo + replicated Adam"


def _enter_rpc(stack: ExitStack, contest: Contest, workers: int) -> None:
    """Enter a parameter server by torch RPC, whose shared-memory transport polls without a pause."""
    own = stack.enter_context(crew(workers, restless=True))
    store = f"{own.directory.name}/rpc"
    own.held = [stack.enter_context(rpc_server(workers, store))]
    contest.enter(own, "torch RPC parameter server", "torch rpc", store=store)


def test_one_worker(report: Report) -> None:
    contest = Contest(LARGE)
    with ExitStack() as stack:
        server = stack.enter_context(farstep_server())
        peers, own = stack.enter_context(crew(1)), stack.enter_context(crew(1))
        stream, flight = stack.enter_context(grpc_server()), stack.enter_context(flight_server())
        store = peers.directory.name
        stack.enter_context(gloo_peer(f"{store}/pair", LARGE.tensors * LARGE.elements))
        contest.enter(peers, _LOCAL, "local", arguments={"fused": True})
        contest.enter(peers, _STREAM, "bare stream", address=stream, chunk_bytes=CHUNK_BYTES)
        contest.enter(peers, _FLIGHT, "flight", address=flight)
        contest.enter(peers, _GLOO, "gloo echo", store=f"{store}/pair")
        _enter_rpc(stack, contest, 1)
        transports.enter(contest, own, server, list(transports.OPTIONS))
        contest.hold(ROUNDS, WARM)
    report.contest(f"One worker, {LARGE}, fused Adam", contest, _LOCAL)
    size = str(LARGE)
    report.ratio("2", f"grpc, 1 worker, {size} / (bare stream + step)", contest, _GRPC, (_STREAM, _LOCAL), 1.15)
    report.ratio("2", f"grpc, 1 worker, {size} / (Arrow Flight + step)", contest, _GRPC, (_FLIGHT, _LOCAL), 1.1)
    report.ratio("2", f"grpc with bfloat16 / with float32, 1 worker, {size}", contest, _BFLOAT16, (_GRPC,), 0.6)
    report.ratio("2", f"pg, 1 worker, {size} / (bare gloo + step)", contest, _PG, (_GLOO, _LOCAL), 1.2)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers(report: Report, workers: int) -> None:
    contest = Contest(LARGE)
    with ExitStack() as stack:
        server = stack.enter_context(farstep_server())
        one, peers, own = (stack.enter_context(crew(count)) for count in (1, workers, workers))
        contest.enter(one, "floor", "floor", workers=workers)
        contest.enter(peers, _DDP, "ddp")
        _enter_rpc(stack, contest, workers)
        # With four workers not all of them have room side by side.
        names = list(transports.OPTIONS) if workers == 2 else [_GRPC, _SHM, _UNSEEN, _ADOPTED]
        transports.enter(contest, own, server, names)
        contest.hold(ROUNDS, WARM)
    report.contest(f"{workers} workers, {LARGE}, fused Adam", contest, "floor")
    text = f"{workers} workers, {LARGE}"
    least, adopted = (2.5, 3.5) if workers == 2 else (3.5, 5.0)
    for name, most, faster in ((_SHM, 1.5, least), (_UNSEEN, 1.5, least), (_ADOPTED, 1.15, adopted)):
        if workers == 2:
            report.ratio("1", f"{name} / floor, {text}", contest, name, ("floor",), most)
        report.ratio("1", f"{_DDP} / {name}, {text}", contest, _DDP, (name,), faster, at_most=False)


def test_ray(report: Report) -> None:
    """In a contest of its own: Ray's processes are never quite idle."""
    contest = Contest(LARGE)
    with farstep_server() as server, crew(1) as one, crew(2) as own:
        contest.enter(one, "floor", "floor", workers=2)
        contest.enter(one, _RAY, "ray", workers=2, documented=True)
        contest.enter(one, "Ray, one array, summed in place", "ray", workers=2, documented=False)
        transports.enter(contest, own, server, [_GRPC, _SHM, _ADOPTED])
        contest.hold(FEW_ROUNDS, WARM)
    report.contest(f"2 workers, {LARGE}, fused Adam, beside Ray", contest, "floor")
    text = f"Ray / shm, 2 workers, {LARGE}"
    report.ratio("1", text, contest, _RAY, (_SHM,), 10.0, at_most=False)
