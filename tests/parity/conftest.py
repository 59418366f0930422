"""One real server for all parity tests, and the table of what they compared."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from farstep import Remote
from tests.benchmarks.processes import farstep_server

_compared: dict[str, Counter[str]] = defaultdict(Counter)
_numbers = count()


@pytest.fixture(scope="session")
def parity_address() -> Iterator[str]:
    """The address of a server process that lives as long as the session."""
    with farstep_server("--optimizer", "tests.parity.third_party:Counting") as address:
        yield address


@pytest.fixture
def remote(parity_address: str) -> Callable[..., Remote]:
    """Makes a Remote with a name of its own."""

    def make(**options: object) -> Remote:
        options.setdefault("name", f"parity-{next(_numbers)}")
        return Remote(parity_address, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def tally() -> Callable[[str, str, int], None]:
    """Count what was compared, by class and kind."""

    def add(name: str, kind: str, number: int = 1) -> None:
        _compared[name][kind] += number

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how much was compared with local torch, class by class."""
    if not _compared:
        return
    kinds = ["option sets", "steps", "constructor errors", "step errors", "crossings", "schedulers"]
    terminalreporter.section("compared with local torch, bit for bit")
    terminalreporter.write_line(f"{'class':20}" + "".join(f"{kind:>20}" for kind in kinds))
    for name in sorted(_compared):
        terminalreporter.write_line(f"{name:20}" + "".join(f"{_compared[name][kind]:>20}" for kind in kinds))
    totals = [sum(counter[kind] for counter in _compared.values()) for kind in kinds]
    terminalreporter.write_line(f"{'all':20}" + "".join(f"{total:>20}" for total in totals))
