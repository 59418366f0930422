"""Looking into a server: descriptions of what it hosts, and its snapshots, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from farstep.transports.grpc import open_channel
from farstep.transports.unary import raised_as_farstep
from farstep_wire.address import Address
from farstep_wire.convert import policy_from_proto
from farstep_wire.layout import TensorSpec
from farstep_wire.policy import Policy
from farstep_wire.settings import Settings
from farstep_wire.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    inspection_pb2,
    inspection_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
)
from farstep_wire.values import from_map, from_value, spec_from_proto, to_map


@dataclass(frozen=True)
class WorkerInfo:
    """One worker of a hosted optimizer. ``standing`` is computing, waiting, expired or left.

    ``round_trip``: its last bare round trip to the server, None where none was measured yet. ``staleness``: of its last
    contribution, in versions.
    """

    id: str
    standing: str
    version: int
    contributions: int
    abstentions: int
    stale: int
    lease: timedelta
    round_trip: timedelta | None
    staleness: int


@dataclass(frozen=True)
class StateInfo:
    """One entry of a parameter's state: a value, or a tensor's spec and Euclidean norm."""

    name: str
    value: Any
    spec: TensorSpec | None
    norm: float


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter: its spec, and the Euclidean norms of itself, its last gradient and its state."""

    key: str
    group: int
    spec: TensorSpec
    norm: float
    gradient_norm: float | None
    state: tuple[StateInfo, ...]


@dataclass(frozen=True)
class ScheduleInfo:
    """A learning-rate schedule on the server. ``ended``: why it has, None while it runs; ``part``: another one steps it."""

    scheduler: str
    every: int
    last_epoch: int
    ended: str | None
    part: bool


@dataclass(frozen=True)
class RoundPart:
    """A worker's part in a round.

    ``staleness``: versions committed between the one its gradients were taken at and the round. ``ahead``: steps that it was
    ahead of the slowest live worker when the round began, which ``Async(max_staleness)`` bounds. ``evaluations``: how many of
    the round's it answered.
    """

    worker: str
    sequence: int
    abstained: bool
    num_samples: float | None
    staleness: int
    ahead: int
    evaluations: int


@dataclass(frozen=True)
class Round:
    """One round, or another act that all workers took part in.

    ``version`` is that after it. ``kind``: step, load_state, add_param_group or restore. ``outcome``: committed, skipped (by
    all, or by the non-finite guard), rolled_back or refused; ``reason`` says why.
    """

    number: int
    version: int
    incarnation: int
    kind: str
    outcome: str
    parts: tuple[RoundPart, ...]
    evaluations: int
    duration: timedelta
    reason: str


@dataclass(frozen=True)
class Description:
    """A hosted optimizer. ``parameters`` is empty where the table was not asked for.

    ``averaged``: steps that the exponential moving average has taken in; 0: none is kept, or it has not begun.
    """

    name: str
    optimizer: str
    version: int
    incarnation: int
    lineage: str
    policy: Policy
    ephemeral: bool
    device: str
    live_workers: int
    parameter_bytes: int
    state_bytes: int
    groups: tuple[dict[str, Any], ...]
    group_sizes: tuple[int, ...]
    arguments: dict[str, Any]
    workers: tuple[WorkerInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    last_step: timedelta
    stale_contributions: int
    settings: Settings
    schedules: tuple[ScheduleInfo, ...]
    averaged: int


@dataclass(frozen=True)
class SnapshotInfo:
    """One snapshot in a server's data directory."""

    name: str
    version: int
    tag: str | None
    created: datetime
    size_bytes: int
    lineage: str
    incarnation: int


class Server:
    """Calls to one server's inspection, checkpoint and steering services."""

    def __init__(self, address: Address, channel: Any, timeout_seconds: float) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._inspection = inspection_pb2_grpc.InspectionServiceStub(channel)
        self._checkpoint = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        self._steering = steering_pb2_grpc.SteeringServiceStub(channel)

    def _call(self, method: Any, request: Any) -> Any:
        with raised_as_farstep(self._address, self._timeout_seconds):
            return method(request, timeout=self._timeout_seconds)

    def describe(self, name: str, *, parameters: bool = False) -> Description:
        """Describe one hosted optimizer."""
        request = inspection_pb2.DescribeRequest(name=name, parameters=parameters)
        return description_from_proto(self._call(self._inspection.Describe, request))

    def history(self, name: str, after: int = 0) -> list[Round]:
        """Return the rounds after that number that the server remembers, oldest first."""
        request = inspection_pb2.HistoryRequest(name=name, after=after)
        with raised_as_farstep(self._address, self._timeout_seconds):
            return [round_from_proto(item) for item in self._inspection.History(request, timeout=self._timeout_seconds)]

    def configure(self, name: str, changes: Mapping[str, Any]) -> Settings:
        """Change settings of a hosted optimizer; return all as they stand."""
        request = steering_pb2.ConfigureRequest(name=name, settings=to_map(changes, "settings"))
        return Settings(**from_map(self._call(self._steering.Configure, request).settings, "settings"))

    def declare_schedule(self, request: steering_pb2.DeclareScheduleRequest) -> steering_pb2.ScheduleState:
        """Put a schedule on the server, or find it there."""
        return self._call(self._steering.DeclareSchedule, request)  # type: ignore[no-any-return]

    def schedule_state(self, name: str, number: int) -> steering_pb2.ScheduleState:
        """Return a schedule's state."""
        request = steering_pb2.GetScheduleRequest(name=name, number=number)
        return self._call(self._steering.GetSchedule, request)  # type: ignore[no-any-return]

    def load_schedule(self, name: str, number: int, state: Mapping[str, Any]) -> steering_pb2.ScheduleState:
        """Replace a schedule's state."""
        request = steering_pb2.LoadScheduleRequest(name=name, number=number, state=to_map(state, "state"))
        return self._call(self._steering.LoadSchedule, request)  # type: ignore[no-any-return]

    def save(self, name: str, tag: str | None = None) -> SnapshotInfo:
        """Write a snapshot."""
        request = checkpoint_pb2.SaveRequest(name=name, tag=tag or "")
        return snapshot_from_proto(self._call(self._checkpoint.Save, request))

    def snapshots(self, name: str) -> list[SnapshotInfo]:
        """List the snapshots of a hosted optimizer, oldest first."""
        request = checkpoint_pb2.ListSnapshotsRequest(name=name)
        return [snapshot_from_proto(item) for item in self._call(self._checkpoint.ListSnapshots, request).snapshots]

    def restore(self, name: str, *, tag: str | None = None, version: int | None = None) -> SnapshotInfo:
        """Roll a hosted optimizer back to a snapshot."""
        request = checkpoint_pb2.RestoreRequest(name=name, tag=tag or "", version=version)
        return snapshot_from_proto(self._call(self._checkpoint.Restore, request))


@contextmanager
def connect(address: Address, timeout_seconds: float) -> Iterator[Server]:
    """Connect to a server for a few calls."""
    channel = open_channel(address)
    try:
        yield Server(address, channel, timeout_seconds)
    finally:
        channel.close()


def snapshot_from_proto(message: checkpoint_pb2.SnapshotInfo) -> SnapshotInfo:
    """Decode a snapshot's line."""
    created = datetime.fromtimestamp(message.created_unix, UTC)
    return SnapshotInfo(
        message.name, message.version, message.tag or None, created, message.size_bytes, message.lineage,
        message.incarnation,
    )  # fmt: skip


def description_from_proto(message: inspection_pb2.Description) -> Description:
    """Decode a description."""
    summary = message.summary
    return Description(
        name=summary.name,
        optimizer=summary.optimizer,
        version=summary.version,
        incarnation=summary.incarnation,
        lineage=summary.lineage,
        policy=policy_from_proto(summary.policy),
        ephemeral=summary.ephemeral,
        device=summary.device,
        live_workers=summary.live_workers,
        parameter_bytes=summary.parameter_bytes,
        state_bytes=message.state_bytes,
        groups=tuple(from_map(group, "param_groups") for group in message.groups),
        group_sizes=tuple(message.group_sizes),
        arguments=from_map(message.arguments, "arguments"),
        workers=tuple(_worker_from_proto(worker) for worker in message.workers),
        parameters=tuple(_parameter_from_proto(row) for row in message.parameters),
        last_step=timedelta(seconds=message.last_step_seconds),
        stale_contributions=message.stale_contributions,
        settings=Settings(**from_map(message.settings, "settings")),
        schedules=tuple(
            ScheduleInfo(item.scheduler, item.every, item.last_epoch, item.ended or None, item.part)
            for item in message.schedules
        ),
        averaged=message.averaged,
    )


def round_from_proto(message: inspection_pb2.Round) -> Round:
    """Decode a round of the history."""
    return Round(
        number=message.number,
        version=message.version,
        incarnation=message.incarnation,
        kind=inspection_pb2.Round.Kind.Name(message.kind).removeprefix("KIND_").lower(),
        outcome=inspection_pb2.Round.Outcome.Name(message.outcome).removeprefix("OUTCOME_").lower(),
        parts=tuple(
            RoundPart(
                part.worker, part.sequence, part.abstained, part.num_samples or None, part.staleness, part.ahead,
                part.evaluations,
            )
            for part in message.parts
        ),
        evaluations=message.evaluations,
        duration=timedelta(seconds=message.seconds),
        reason=message.reason,
    )  # fmt: skip


def _worker_from_proto(message: inspection_pb2.Worker) -> WorkerInfo:
    standing = inspection_pb2.Worker.Standing.Name(message.standing).removeprefix("STANDING_").lower()
    return WorkerInfo(
        message.id, standing, message.version, message.contributions, message.abstentions, message.stale,
        timedelta(seconds=message.lease_seconds),
        timedelta(seconds=message.round_trip_seconds) if message.round_trip_seconds else None, message.staleness,
    )  # fmt: skip


def _parameter_from_proto(message: inspection_pb2.ParameterRow) -> ParameterInfo:
    gradient = message.gradient_norm if message.HasField("gradient_norm") else None
    spec = spec_from_proto(message.spec, message.key)
    state = tuple(_state_from_proto(row) for row in message.state)
    return ParameterInfo(message.key, message.group, spec, message.norm, gradient, state)


def _state_from_proto(message: inspection_pb2.StateRow) -> StateInfo:
    spec = spec_from_proto(message.spec, message.name) if message.HasField("spec") else None
    value = from_value(message.value, message.name) if message.HasField("value") else None
    return StateInfo(message.name, value, spec, message.norm)
