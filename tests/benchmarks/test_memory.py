"""Peak memory of a step of 102 MB with Adam, on both sides; see tests/memory for the parts that are checked in every run."""

from __future__ import annotations

import pytest

from tests.benchmarks.report import Report, Section
from tests.benchmarks.sizes import ONLY
from tests.benchmarks.transports import OPTIONS
from tests.memory.peaks import ALLOWED, SERVER_MOST, TENSORS, mib, peak, peaks
from tests.support.servers import Servers

pytestmark = pytest.mark.bench


def test_peaks(report: Report, servers: Servers) -> None:
    local = peak("torch.optim", "SGD", TENSORS, None)
    columns = ("", "server, beyond an idle one", "at most", "worker", "at most")
    section = Section("Peak memory, one worker, 102 MB, Adam", columns)
    for name, how in OPTIONS.items():
        if ONLY not in name:
            continue
        try:
            server, worker = peaks(servers(), "large", how)
        except AssertionError as error:
            report.refused[name] = str(error).strip().rpartition("\n")[2].partition(": ")[2]
            continue
        section.rows.append((name, mib(server), mib(SERVER_MOST), mib(worker), mib(local + ALLOWED)))
        report.figure(
            "5", f"server's peak, {name} / (parameters + state + staging + 64 MiB)", server / SERVER_MOST, 1.0
        )
        report.figure("5", f"worker's peak, {name} / (local SGD + 64 MiB)", worker / (local + ALLOWED), 1.0)
    report.sections.append(section)
