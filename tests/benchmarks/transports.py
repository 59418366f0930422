"""Every way in which farstep's tensors can travel, a contender each; one that the installed farstep refuses says why."""

from __future__ import annotations

import itertools
from typing import Any

from tests.benchmarks.crew import Contest, Crew
from tests.benchmarks.processes import Server
from tests.benchmarks.sizes import ONLY

FUSED: dict[str, Any] = {"optimizer": "Adam", "arguments": {"fused": True}}

OPTIONS: dict[str, dict[str, Any]] = {
    "farstep grpc": {"transport": "grpc"},
    "farstep grpc, detect_edits=False": {"transport": "grpc", "detect_edits": False},
    "farstep grpc, bfloat16": {"transport": "grpc", "wire_dtype": "bfloat16"},
    "farstep pipe": {"transport": "pipe"},
    "farstep pg": {"transport": "pg"},
    "farstep pg, detect_edits=False": {"transport": "pg", "detect_edits": False},
    "farstep shm": {"transport": "shm"},
    "farstep shm, detect_edits=False": {"transport": "shm", "detect_edits": False},
    "farstep shm, adopted": {"transport": "shm", "adopt_parameters": True, "detect_edits": False},
}

_numbers = itertools.count()


def enter(contest: Contest, crew: Crew, server: Server, names: list[str], **options: Any) -> None:
    """Enter farstep with these transports into a contest; each has a hosted optimizer of its own."""
    for name in (name for name in names if ONLY in name):
        chosen = OPTIONS[name] | (options or FUSED)
        hosted = f"bench-{next(_numbers)}"
        contest.enter(crew, name, "farstep", address=server.address, hosted=hosted, **chosen)
