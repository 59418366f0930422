"""Workers of a hosted optimizer: leases, epochs, and the dedup table that makes contributions count once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from farstep_server.core.records import Member, Outcome, WorkerRow
from farstep_wire.errors import Applied, FencedError, LeaseError
from farstep_wire.policy import worker_order


@dataclass
class Settled:
    """The answer that a retry of the last settled contribution gets."""

    outcome: Outcome = Outcome.COMMITTED
    version: int = 0
    contributions: int = 0
    loss: object = None


@dataclass
class WorkerRecord:
    """One worker. ``settled_sequence`` is the last contribution of this instance that is decided."""

    worker: str
    instance: str
    epoch: int
    deadline: float
    live: bool = True
    left: bool = False
    first_round: int = 0
    settled_sequence: int = 0
    settled: Settled | None = None
    version: int = 0
    contributions: int = 0
    abstentions: int = 0
    stale: int = 0
    staleness: int = 0
    round_trip_seconds: float = 0.0
    steps: int = 0
    """Steps of its own, by which stale-synchronous workers are compared; a newcomer starts level with the slowest."""


class Membership:
    """All workers that were ever here, and who is live."""

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._records: dict[str, WorkerRecord] = {}
        self._live: tuple[WorkerRecord, ...] | None = None
        self._none_ends_before = math.inf

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(sorted(self._records.values(), key=lambda record: worker_order(record.worker)))

    def __getitem__(self, worker: str) -> WorkerRecord:
        return self._records[worker]

    def live(self) -> Sequence[WorkerRecord]:
        """Return the live workers in worker order."""
        if self._live is None:
            self._live = tuple(record for record in self if record.live)
        return self._live

    def knows(self, worker: str, instance: str) -> bool:
        """Whether this instance of a worker was here before."""
        record = self._records.get(worker)
        return record is not None and record.instance == instance

    def join(self, worker: str, instance: str, now: float) -> tuple[WorkerRecord, bool]:
        """Let a worker in, or in again under a new epoch; return its record and whether its instance was here before."""
        record = self._records.get(worker)
        if record is None:
            record = self._records[worker] = WorkerRecord(worker, instance, 0, now, live=False)
            resumed = False
        else:
            resumed = self.knows(worker, instance)
        if not resumed:
            record.instance, record.settled_sequence, record.settled = instance, 0, None
        if not (resumed and record.live):
            # A newcomer is level with the slowest; one that comes back is not ahead of where it was.
            level = self._level(worker)
            record.steps = max(record.steps, level) if resumed else level
        record.epoch += 1
        record.live, record.left = True, False
        self._live = None
        self._renew(record, now)
        return record, resumed

    def _renew(self, record: WorkerRecord, now: float) -> None:
        record.deadline = now + self.lease_seconds
        self._none_ends_before = min(self._none_ends_before, record.deadline)

    def _level(self, worker: str) -> int:
        """Return the steps of the slowest other live worker; where none is, the most that any has made."""
        live = [other.steps for other in self._records.values() if other.live and other.worker != worker]
        return min(live) if live else max(record.steps for record in self._records.values())

    def expect_all(self, version: int) -> None:
        """Expect every worker in the rounds from that version on: it is an older one, after a rollback."""
        for record in self._records.values():
            record.first_round = min(record.first_round, version)

    def check(self, worker: str, epoch: int, now: float) -> WorkerRecord:
        """Return the record of a member that speaks, and renew its lease; FencedError where it speaks no more."""
        record = self._records.get(worker)
        if record is None or record.epoch != epoch:
            current = "none" if record is None else str(record.epoch)
            raise FencedError(
                f"worker {worker}: this session (epoch {epoch}) has been replaced (epoch now: {current}); another process "
                f"attached as the same worker. Give each worker its own id",
                applied=Applied.NO,
            )
        if not record.live:
            raise LeaseError(
                f"worker {worker}: its lease of {self.lease_seconds:g} s ran out and the round went on without it; "
                f"attach again to go on",
                applied=Applied.NO,
            )
        self._renew(record, now)
        return record

    def touch(self, worker: str, epoch: int, now: float, round_trip_seconds: float = 0.0) -> None:
        """Renew a lease; the word of a fenced session changes nothing."""
        record = self._records.get(worker)
        if record is not None and record.live and record.epoch == epoch:
            self._renew(record, now)
            record.round_trip_seconds = round_trip_seconds or record.round_trip_seconds

    def leave(self, worker: str, epoch: int) -> bool:
        """End a membership; return whether that session was the current one."""
        record = self._records.get(worker)
        if record is None or record.epoch != epoch:
            return False
        record.live, record.left = False, True
        self._live = None
        return True

    def expire(self, now: float) -> list[str]:
        """End the memberships whose lease has run out; return them."""
        if now < self._none_ends_before:
            return []
        expired = [record for record in self.live() if record.deadline <= now]
        for record in expired:
            record.live = False
            self._live = None
        self._none_ends_before = min((record.deadline for record in self.live()), default=math.inf)
        return [record.worker for record in expired]

    def next_deadline(self) -> float | None:
        """Return when the next lease runs out."""
        return min((record.deadline for record in self.live()), default=None)

    def members(self) -> list[Member]:
        """Return what a dump keeps."""
        return [_member(record) for record in self]

    def restore(self, members: list[Member], now: float) -> None:
        """Take over a dump's workers; those that were live get a fresh lease to come back in."""
        self._live = None
        self._none_ends_before = now + self.lease_seconds
        for member in members:
            answer = Settled(
                member.settled_outcome, member.settled_version, member.settled_contributions, member.settled_loss
            )
            self._records[member.worker] = WorkerRecord(
                member.worker,
                member.instance,
                member.epoch,
                now + self.lease_seconds,
                live=member.live,
                left=not member.live,
                settled_sequence=member.settled,
                settled=answer if member.settled else None,
                version=member.version,
                contributions=member.contributions,
                abstentions=member.abstentions,
                stale=member.stale,
                steps=member.steps,
            )

    def rows(self, waiting: set[str], now: float) -> list[WorkerRow]:
        """Return the workers for a description."""
        return [
            WorkerRow(
                record.worker,
                _standing(record, waiting),
                record.version,
                record.epoch,
                record.contributions,
                record.abstentions,
                record.stale,
                record.deadline - now,
                record.round_trip_seconds,
                record.staleness,
            )
            for record in self
        ]


def _member(record: WorkerRecord) -> Member:
    answer = record.settled or Settled()
    return Member(
        record.worker,
        record.instance,
        record.epoch,
        record.live,
        record.settled_sequence,
        answer.outcome,
        answer.version,
        answer.contributions,
        answer.loss,
        record.version,
        record.contributions,
        record.abstentions,
        record.stale,
        record.steps,
    )


def _standing(record: WorkerRecord, waiting: set[str]) -> str:
    if record.live:
        return "waiting" if record.worker in waiting else "computing"
    return "left" if record.left else "expired"
