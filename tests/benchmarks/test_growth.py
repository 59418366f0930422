"""What a step costs as the model grows: linear means the same time per byte, from 10 MB to 2 GB."""

from __future__ import annotations

import statistics

import psutil
import pytest

from tests.benchmarks import transports
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import farstep_server
from tests.benchmarks.report import Report, Section, duration, quartiles
from tests.benchmarks.sizes import FEW_ROUNDS, HALF_HUGE, HUGE, LARGE, MEDIUM, ONLY, QUICK, WARM, Size

pytestmark = pytest.mark.bench

_NAMES = [name for name in ("farstep grpc", "farstep shm") if ONLY in name]
_COPIES = 9
"""A step's memory in sizes of the model, with room to spare: parameters, gradients and what they come from in the worker;
parameters, Adam's state and buffers for gradients in the server."""


def _sizes() -> list[Size]:
    room = psutil.virtual_memory().available
    return [MEDIUM, LARGE, *[size for size in (HALF_HUGE, HUGE) if size.nbytes * _COPIES < room]]


@pytest.mark.parametrize("name", _NAMES)
def test_time_per_byte(report: Report, name: str) -> None:
    section = Section(f"{name}, one worker, fused Adam, by size", ("size", "median", "quartiles", "ns per KB"))
    per_byte = {}
    for size in _sizes():
        contest = Contest(size)
        rounds, warm = (3, 1) if size.nbytes > LARGE.nbytes and not QUICK else (FEW_ROUNDS, WARM)
        with farstep_server() as server, crew(1) as own:
            transports.enter(contest, own, server, [name])
            contest.hold(rounds, warm)
        if contest.refused:
            report.refused |= contest.refused
            break
        seconds = contest.seconds[name]
        median = statistics.median(seconds)
        per_byte[size] = median / size.nbytes
        spread = " – ".join(map(duration, quartiles(seconds)))
        section.rows.append((str(size), duration(median), spread, f"{per_byte[size] * 1e12:.0f}"))
    if per_byte:
        report.sections.append(section)
        text = f"{name}, time per byte: most / least of {section.rows[0][0]} to {section.rows[-1][0]}"
        report.figure("6", text, max(per_byte.values()) / min(per_byte.values()), 1.3)
