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
    columns = ("", "server, first step", "later steps", "at most", "worker", "at most")
    section = Section("Peak memory, one worker, 102 MB, Adam; the server beyond an idle one", columns)
    for name, how in OPTIONS.items():
        if ONLY not in name:
            continue
        try:
            found = peaks(servers(), how)
        except AssertionError as error:
            report.refused[name] = str(error).strip().rpartition("\n")[2].partition(": ")[2]
            continue
        amounts = found.server_first, found.server_later, SERVER_MOST, found.worker, local + ALLOWED
        section.rows.append((name, *map(mib, amounts)))
        text = f"server's peak, {name} / (parameters + state + staging + 64 MiB)"
        report.figure("5", f"{text}, first step", found.server_first / SERVER_MOST, 1.0)
        report.figure("5", f"{text}, later steps", found.server_later / SERVER_MOST, 1.0)
        report.figure("5", f"worker's peak, {name} / (local SGD + 64 MiB)", found.worker / (local + ALLOWED), 1.0)
    report.sections.append(section)
