"""What a step costs as the model grows: linear means the same time per byte, from 10 MB to 2 GB."""

from __future__ import annotations

import statistics

import psutil
import pytest

from tests.benchmarks import transports
from tests.benchmarks.crew import Contest, crew
from tests.benchmarks.processes import farstep_server
from tests.benchmarks.report import Report, Section, duration
from tests.benchmarks.sizes import FEW_ROUNDS, HALF_HUGE, HUGE, LARGE, MEDIUM, ONLY, WARM, Size

pytestmark = pytest.mark.bench

# A step's memory in sizes of the model, with room to spare: parameters and gradients twice in the worker, which also steps a
# local Adam; parameters, Adam's state and buffers for gradients in the server.
_COPIES = 12


def _sizes() -> list[Size]:
    room = psutil.virtual_memory().available
    return [MEDIUM, LARGE, next((size for size in (HUGE, HALF_HUGE) if size.nbytes * _COPIES < room), LARGE)]


@pytest.mark.parametrize("name", [name for name in ("farstep grpc", "farstep shm") if ONLY in name])
def test_time_per_byte(report: Report, name: str) -> None:
    section = Section(f"{name}, one worker, fused Adam, by size", ("size", "median", "ns per KB", "torch.optim"))
    per_byte = {}
    for size in _sizes():
        contest = Contest(size)
        with farstep_server() as server, crew(1) as own:
            contest.enter(own, "torch.optim", "local", arguments={"fused": True})
            transports.enter(contest, own, server, [name])
            contest.hold(FEW_ROUNDS, WARM)
        medians = {name: statistics.median(seconds) for name, seconds in contest.seconds.items()}
        if name not in medians:
            report.refused |= contest.refused
            break
        per_byte[size.nbytes] = medians[name] / size.nbytes
        cells = duration(medians[name]), f"{per_byte[size.nbytes] * 1e12:.0f}", duration(medians["torch.optim"])
        section.rows.append((str(size), *cells))
    if per_byte:
        report.sections.append(section)
        text = f"{name}, time per byte: most / least of {section.rows[0][0]} to {section.rows[-1][0]}"
        report.figure("6", text, max(per_byte.values()) / min(per_byte.values()), 1.3)
