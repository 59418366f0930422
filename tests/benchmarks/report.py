"""What the benchmarks have found: tables of medians, ratios beside their targets, and the machine that they hold for."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from tests.benchmarks.crew import Contest
from tests.benchmarks.sizes import QUICK

_LOAD_AT_START = os.getloadavg()[0]
_STEADY = 1.5
_PACKAGES = ("torch", "grpcio", "protobuf", "numpy", "pyarrow", "ray")


def duration(seconds: float) -> str:
    """Return a time such as "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            break
    amount = seconds * scale
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:.{digits}f} {unit}"


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third."""
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return first, third


def unsteady(seconds: Sequence[float]) -> bool:
    """Whether they are spread so far that something else must have been at work."""
    first, third = quartiles(seconds)
    return third > _STEADY * first


def percentile(seconds: Sequence[float], fraction: float) -> float:
    """Return the value that so much of them do not exceed."""
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * fraction))]


@dataclass
class Section:
    """One table: rows of text under columns of which the first is the name."""

    title: str
    columns: tuple[str, ...]
    left: int = 1
    """So many columns are text, the others numbers."""
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return it in Markdown, padded so that it also reads as plain text."""
        rows = [row + ("",) * (len(self.columns) - len(row)) for row in [self.columns, *self.rows]]
        widths = [max(len(row[place]) for row in rows) for place in range(len(self.columns))]
        text = [self._line(row, widths) for row in rows]
        rule = [("-" * width if place < self.left else "-" * (width - 1) + ":") for place, width in enumerate(widths)]
        return [
            f"### {self.title}",
            "",
            text[0],
            self._line(rule, widths),
            *text[1:],
            *[line for note in self.notes for line in ("", note)],
        ]

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        padded = (cell.ljust(width) if place < self.left else cell.rjust(width) for place, (cell, width) in pairs)
        return f"| {' | '.join(padded)} |"


@dataclass(frozen=True)
class Target:
    """A ratio and what it should be."""

    number: str
    text: str
    limit: float
    at_most: bool
    value: float | None
    reason: str = ""
    doubtful: bool = False
    """Something else was at work on the machine."""

    @property
    def met(self) -> bool | None:
        """Whether it is as it should be; None where it was not measured."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def row(self) -> tuple[str, ...]:
        """Return its row in the table of targets."""
        bound = f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        if self.value is None:
            return self.number, self.text, bound, "-", f"not measured: {self.reason}"
        verdict = ("met" if self.met else "MISSED") + (", but unsteady" if self.doubtful else "")
        return self.number, self.text, bound, f"{self.value:.2f}", verdict


@dataclass
class Report:
    """All sections and targets of one run."""

    sections: list[Section] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""

    def contest(self, title: str, contest: Contest, yardstick: str, *, tails: bool = False) -> Section:
        """Add a table with a row for each contender, each beside the yardstick; ``tails``: p90 and p99 too."""
        spread = ("p90", "p99") if tails else ("quartiles",)
        section = Section(title, ("", "median", *spread, f"× {yardstick}"))
        base = statistics.median(contest.seconds[yardstick])
        for name, seconds in contest.seconds.items():
            median = statistics.median(seconds)
            if tails:
                cells: tuple[str, ...] = (duration(percentile(seconds, 0.9)), duration(percentile(seconds, 0.99)))
            else:
                cells = (" – ".join(map(duration, quartiles(seconds))),)
            section.rows.append((name, duration(median), *cells, f"{median / base:.2f}"))
        section.rows += [(name, "-", *("-" for _ in spread), "-") for name in contest.refused]
        self.refused |= contest.refused
        self.sections.append(section)
        return section

    def ratio(
        self,
        number: str,
        text: str,
        contest: Contest,
        over: str,
        under: Sequence[str],
        limit: float,
        *,
        at_most: bool = True,
    ) -> None:
        """Add a target: the median of ``over`` by the sum of the medians of ``under``, which are contenders' names."""
        missing = [name for name in (over, *under) if not contest.seconds.get(name)]
        value, doubtful = None, False
        if not missing:
            medians = {name: statistics.median(contest.seconds[name]) for name in (over, *under)}
            value = medians[over] / sum(medians[name] for name in under)
            doubtful = any(unsteady(contest.seconds[name]) for name in medians)
        reason = "no " + ", ".join(missing) if missing else ""
        self.targets.append(Target(number, text, limit, at_most, value, reason, doubtful))

    def figure(self, number: str, text: str, value: float, limit: float, *, at_most: bool = True) -> None:
        """Add a target whose ratio is known."""
        self.targets.append(Target(number, text, limit, at_most, value))

    def missed(self) -> list[str]:
        """Return the targets that are not met."""
        return [" ".join(target.row()) for target in self.targets if target.met is False]

    def text(self) -> str:
        """Return all of it in Markdown."""
        lines = ["# What the benchmarks found", "", *machine()]
        if self.targets:
            columns = ("number", "ratio", "target", "measured", "")
            rows = [target.row() for target in sorted(self.targets, key=lambda target: target.number)]
            lines += ["", *Section("Targets", columns, left=5, rows=rows).lines()]
        for section in self.sections:
            lines += ["", *section.lines()]
        if self.refused:
            lines += ["", *Section("Not measured", ("", "because"), left=2, rows=list(self.refused.items())).lines()]
        for chart in self.charts:
            lines += ["", f"![step time by model size and workers]({chart})"]
        return "\n".join(lines) + "\n"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return found[0] if found else platform.machine()


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def machine() -> list[str]:
    """Describe the machine and what the figures were taken with."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    shared = psutil.disk_usage("/dev/shm").total / 2**30
    threads = (
        f"One worker has {torch.get_num_threads()} threads of torch's, as has the server; several share the cores."
    )
    hardware = f"{cores} cores of {_cpu_name()}, {memory:.1f} GiB of memory ({shared:.1f} GiB for /dev/shm)"
    software = f"Linux {platform.release()}, Python {platform.python_version()}, {_versions()}"
    load = f"The load average was {_LOAD_AT_START:.1f} when it began."
    date = f"{datetime.now(UTC):%Y-%m-%d}{', QUICK: small sizes, few rounds, no figures to quote' if QUICK else ''}"
    return [
        f"{hardware}, {software}.",
        f"{threads} Everything runs on this one machine, over loopback where there is a network. {load} {date}.",
        "",
        "Each table is one run: contenders take turns, and the figures are medians. Only ratios within a table mean anything.",
        f"Unsteady is what has its third quartile beyond {_STEADY:g} times the first: something else was at work.",
    ]
