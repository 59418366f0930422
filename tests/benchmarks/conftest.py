"""The report of a benchmark run: printed at the end, and written where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.report import Report
from tests.benchmarks.sizes import STRICT, WRITE

RESULTS = Path(__file__).with_name("RESULTS.md")
_report = Report()


@pytest.fixture
def report() -> Iterator[Report]:
    """The report of this run. With FARSTEP_BENCH=strict a test fails that adds a target which is missed."""
    before = len(_report.targets)
    yield _report
    missed = [" ".join(target.row()) for target in _report.targets[before:] if target.met is False]
    assert not (STRICT and missed), "targets missed:\n  " + "\n  ".join(missed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the report; write it where FARSTEP_BENCH=write asks for it."""
    if not _report.sections:
        return
    text = _report.text()
    terminalreporter.write_line("")
    terminalreporter.write(text)
    if WRITE:
        RESULTS.write_text(text)
        terminalreporter.write_line(f"written to {RESULTS.name}")
