"""What a hosted optimizer is, apart from its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from farstep_wire.policy import Policy


@dataclass(frozen=True)
class Identity:
    """What a hosted optimizer is, apart from its state."""

    name: str
    optimizer: str
    arguments: dict[str, Any]
    policy: Policy
    ephemeral: bool
    lineage: str
    lease_seconds: float
