"""How much was compared with local torch, class by class: counted where tests run, printed once at the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

KINDS = (
    "option sets",
    "steps",
    "constructor errors",
    "step errors",
    "refused alike",
    "dtypes",
    "crossings",
    "schedulers",
)
_compared: dict[str, Counter[str]] = defaultdict(Counter)


def count(name: str, kind: str, number: int) -> None:
    """Count comparisons of a kind for a class."""
    assert kind in KINDS
    _compared[name][kind] += number


def counted() -> dict[str, dict[str, int]]:
    """Return what was counted in this process, as plain values."""
    return {name: dict(counts) for name, counts in _compared.items()}


def add(other: Mapping[str, Mapping[str, int]]) -> None:
    """Add what another process has counted."""
    for name, counts in other.items():
        _compared[name].update(counts)


def table() -> list[str]:
    """Return the lines of the table; none where nothing was counted."""
    if not _compared:
        return []
    lines = [f"{'class':18}" + "".join(f"{kind:>{len(kind) + 2}}" for kind in KINDS)]
    totals: Counter[str] = sum(_compared.values(), Counter())
    for name, counts in [*sorted(_compared.items()), ("all", totals)]:
        lines.append(f"{name:18}" + "".join(f"{counts[kind]:>{len(kind) + 2}}" for kind in KINDS))
    return lines
