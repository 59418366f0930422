"""A worker that is killed in an evaluation of a distributed closure-driven step."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from farstep import inspection
from farstep_wire.address import parse_address
from farstep_wire.errors import ClosureError
from tests.faults.models import same_bits
from tests.stalls import fits
from tests.support.nursery import Nursery
from tests.support.servers import Servers

LEASE = 1.0
SCHEDULING = 1.0
"""What two busy cores may add before a process runs at all."""


@pytest.mark.parametrize("evaluation", [0, 1, 3])
def test_a_kill_in_an_evaluation_ends_in_a_commit_or_a_rollback(servers: Servers, name: str, evaluation: int) -> None:
    """The history says which: the three that are left answer every evaluation, the dead one those before its end."""
    server = servers("--lease", f"{LEASE}s")
    with Nursery([fits.__name__, "torch._dynamo"]) as nursery, ThreadPoolExecutor(3) as pool:
        victim = nursery.bear(fits.stands_still, address=server.address, name=name, worker=3, evaluation=evaluation)
        runs = [pool.submit(_fit, server.address, name, worker) for worker in range(3)]
        assert victim.talk.hear() == "in the evaluation"
        begun = time.monotonic()
        victim.kill()
        outcomes = [run.result(60) for run in runs]
    assert time.monotonic() - begun < LEASE + 1 + SCHEDULING
    with inspection.connect(parse_address(server.address), 30) as view:
        [record] = view.history(name)
        version = view.describe(name).version
    counts = {part.worker: part.evaluations for part in record.parts}
    print(f"killed in evaluation {evaluation}: {record.outcome}, evaluations {counts}")
    assert counts["3"] == evaluation
    assert {counts[str(worker)] for worker in range(3)} == {calls for _, calls, _ in outcomes} == {record.evaluations}
    assert record.outcome in {"committed", "rolled_back"}
    committed = record.outcome == "committed"
    assert version == record.version == int(committed)
    assert {error is None for _, _, error in outcomes} == {committed}
    for params, _, error in outcomes:
        assert same_bits(params, outcomes[0][0])
        assert error is None or isinstance(error, ClosureError)


def _fit(address: str, name: str, worker: int) -> tuple[list[Any], int, ClosureError | None]:
    """Take one step; return the parameters, the number of the closure's calls, and the error, where the step was undone."""
    parameter, optimizer = fits.quadratic(address, name, worker)
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        return fits.loss_at(optimizer, parameter, worker)

    failed = None
    try:
        optimizer.step(closure)
    except ClosureError as error:
        failed = error
    return [parameter], calls, failed
