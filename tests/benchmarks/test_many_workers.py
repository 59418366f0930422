"""Rounds of a Sync barrier by the number of workers, each a stream of its own from one of a few client processes.

Clients and server share the machine, so with many workers the rate is that of all the work of a round, the workers' own part
included. What the server costs is told by the processor time that its process takes.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.processes import Server, farstep_server
from tests.benchmarks.report import Report, Section, duration
from tests.benchmarks.sizes import QUICK
from tests.data_parallel import problems
from tests.data_parallel.herd import herd

pytestmark = pytest.mark.bench

_WORKERS = [1, 4] if QUICK else [1, 2, 4, 8, 16, 32, 64]
_PROCESSES = 4
_SMALL = sum(parameter.nbytes for parameter in problems.parameters())


def _seconds(server: Server, workers: int, rounds: int, elements: int) -> tuple[float, float]:
    """Return how long the rounds took for the worker that was the last to be done, and the server's processor time."""
    name = f"rounds-{elements}-{workers}"
    with herd(server.address, name, workers, min(workers, _PROCESSES), rounds, elements=elements) as own:
        before = server.cpu_seconds()
        own.go_on_all()
        results = own.read_all()
        taken = server.cpu_seconds() - before
        own.go_on_all()
    assert {version for result in results for version in result["versions"]} == {rounds}
    assert len({found for result in results for found in result["digests"]}) == 1
    return max(float(result["seconds"]) for result in results), taken


@pytest.mark.parametrize(("elements", "contributions"), [(0, 6400), (256_000, 512)], ids=["small", "1 MB"])
def test_server_time(report: Report, elements: int, contributions: int) -> None:
    size = f"{_SMALL} B" if not elements else "1 MB"
    columns = ("workers", "rounds per second", "a round", "server's processor time, a round", "a contribution")
    section = Section(f"Sync rounds of SGD with momentum, {size} of parameters, by the number of workers", columns)
    costs = []
    with farstep_server() as server:
        for workers in _WORKERS:
            rounds = max(8, contributions // workers // (40 if QUICK else 4)) + 1
            seconds, processor = _seconds(server, workers, rounds, elements)
            costs.append(processor / rounds / workers)
            each = seconds / (rounds - 1)
            cells = f"{1 / each:.1f}", duration(each), duration(costs[-1] * workers), duration(costs[-1])
            section.rows.append((str(workers), *cells))
    report.sections.append(section)
    text = f"server's time, {size}: {_WORKERS[-1]} workers / ({_WORKERS[-1]} × 1 worker)"
    report.figure("6", text, costs[-1] / costs[0], 1.0)
