"""What a hosted optimizer tells of itself: rows of a description, and the parts of a dump. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from farstep_server.core.schedules import ScheduleDump, ScheduleRow
from farstep_wire.layout import Layout, ParameterSpec
from farstep_wire.policy import Policy
from farstep_wire.settings import Settings


class Outcome(Enum):
    """What became of a contribution."""

    COMMITTED = "committed"
    STALE = "stale"
    ROLLED_BACK = "rolled back"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class WorkerRow:
    """One worker in a description."""

    worker: str
    standing: str
    version: int
    epoch: int
    contributions: int
    abstentions: int
    stale: int
    lease_seconds: float
    round_trip_seconds: float
    staleness: int


@dataclass(frozen=True)
class StateRow:
    """One entry of a parameter's state: a value, or the norm of a tensor."""

    name: str
    value: object
    norm: float | None


@dataclass(frozen=True)
class ParameterRow:
    """One parameter in a description."""

    parameter: ParameterSpec
    norm: float
    gradient_norm: float | None
    state: list[StateRow]


@dataclass(frozen=True)
class Description:
    """A hosted optimizer in full. ``rows`` is empty where the table was not asked for."""

    name: str
    optimizer: str
    version: int
    incarnation: int
    lineage: str
    policy: Policy
    ephemeral: bool
    device: str
    layout: Layout
    arguments: dict[str, Any]
    options: list[dict[str, Any]]
    workers: list[WorkerRow]
    state_bytes: int
    last_step_seconds: float
    stale: int
    rows: list[ParameterRow]
    settings: Settings
    schedules: list[ScheduleRow]
    averaged: int


@dataclass(frozen=True)
class Member:
    """What a dump keeps of a worker: its part of the dedup table and of the membership.

    ``settled`` is the last decided sequence number of the instance, 0 for none; the ``settled_`` fields are what a retry of
    it is answered with.
    """

    worker: str
    instance: str
    epoch: int
    live: bool
    settled: int = 0
    settled_outcome: Outcome = Outcome.COMMITTED
    settled_version: int = 0
    settled_contributions: int = 0
    settled_loss: object = None
    version: int = 0
    contributions: int = 0
    abstentions: int = 0
    stale: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Dump:
    """Everything that makes a hosted optimizer what it is, on the CPU and independent of the live one."""

    name: str
    optimizer: str
    arguments: dict[str, Any]
    layout: Layout
    options: list[dict[str, Any]]
    policy: Policy
    ephemeral: bool
    lineage: str
    incarnation: int
    version: int
    contents: Tensor
    state: list[list[Any]]
    members: list[Member]
    started: bool
    scalar_dtype: str = "float32"
    settings: Settings = field(default_factory=Settings)
    schedules: list[ScheduleDump] = field(default_factory=list)
    average: Tensor | None = None
    averaged: int = 0
