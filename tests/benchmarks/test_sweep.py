"""Step time by model size and number of workers, beside DistributedDataParallel; also as a chart."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import psutil
import pytest

from tests.benchmarks import transports
from tests.benchmarks.chart import draw
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import farstep_server
from tests.benchmarks.report import Report, Section, duration
from tests.benchmarks.sizes import FEW_ROUNDS, QUICK, SWEEP, WARM, WRITE, Size

pytestmark = pytest.mark.bench

_WORKERS = [1, 2] if QUICK else [1, 2, 4, 8]
_OURS = ["farstep grpc", "farstep pg", "farstep shm", "farstep shm, adopted"]
_CHART = Path(__file__).with_name("step_time.png")
_SMALL_BYTES = 2_000_000
"""Up to here a turn is several steps: one alone would be lost in the noise."""


def _fits(size: Size, workers: int) -> bool:
    """Whether all contenders have room side by side: some 18 times the model for each worker, and two processes."""
    return workers * (18 * size.nbytes + 500_000_000) < psutil.virtual_memory().available


def _contests(workers: int) -> dict[Size, Contest]:
    contests = {}
    with farstep_server() as server, crew(workers) as peers, crew(workers) as own:
        for size in (size for size in SWEEP if _fits(size, workers)):
            contest = contests[size] = Contest(size)
            kind = "local" if workers == 1 else "ddp"
            contest.enter(peers, "torch.optim" if workers == 1 else "DDP (gloo)", kind, arguments={"fused": True})
            transports.enter(contest, own, server, _OURS)
            contest.hold(FEW_ROUNDS, WARM, count=10 if size.nbytes <= _SMALL_BYTES else 1)
            contest.drop()
    return contests


def test_sizes_and_workers(report: Report) -> None:
    times: dict[int, dict[str, dict[int, float]]] = {}
    for workers in _WORKERS:
        contests = _contests(workers)
        names = list(dict.fromkeys(itertools.chain.from_iterable(contest.seconds for contest in contests.values())))
        plural = "s" * (workers != 1)
        section = Section(f"{workers} worker{plural}, fused Adam, median step by model size", ("", *map(str, SWEEP)))
        own = times[workers] = {name: {} for name in names}
        for name in names:
            medians = {size: statistics.median(contest.seconds[name]) for size, contest in contests.items()}
            own[name] = {size.nbytes: seconds for size, seconds in medians.items()}
            section.rows.append((name, *(duration(seconds) for seconds in medians.values())))
        left_out = [str(size) for size in SWEEP if size not in contests]
        section.notes += [f"Left out, for the machine's memory: {', '.join(left_out)}"] if left_out else []
        report.sections.append(section)
        for contest in contests.values():
            report.refused |= contest.refused
    if WRITE and (problem := draw(times, _CHART)):
        report.refused["the chart"] = problem
    elif WRITE:
        report.charts.append(_CHART.name)
