"""Rounds: what the live workers have handed in for the next version, and whether that is enough.

waiting ──(an act of every live worker, or the timeout with enough of them)──> ready
ready ──(gradients, state or group taken over)──> committed: version + 1, a new round waits
ready ──(acts of different kinds, options that disagree, a step that raises)──> refused: nothing changed, a new round waits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta

from farstep_server.core.events import Act, Contribution
from farstep_server.core.history import RoundKind
from farstep_server.core.membership import Membership, WorkerRecord
from farstep_wire.errors import Applied, MismatchError
from farstep_wire.policy import Async, Policy, Sync, worker_order

KINDS = {
    "Contribution": RoundKind.STEP,
    "LoadState": RoundKind.LOAD_STATE,
    "AddGroup": RoundKind.ADD_PARAM_GROUP,
}
"""What kind of round an act makes, by its class."""


class Rounds(ABC):
    """The acts that have come in and wait, and the policy's word on which of them may commit."""

    refuses_older: bool
    """Whether a contribution that was taken at an older version is refused."""

    def __init__(self) -> None:
        self._acts: dict[str, Act] = {}

    def acts(self) -> list[Act]:
        """Return the acts in worker order."""
        return [self._acts[worker] for worker in sorted(self._acts, key=worker_order)]

    def put(self, act: Act, now: float) -> None:
        """Take an act; one that the worker had handed in before is replaced."""
        del now
        self._acts.pop(act.worker, None)
        self._acts[act.worker] = act

    def drop(self, worker: str) -> Act | None:
        """Forget a worker's act; return it."""
        return self._acts.pop(worker, None)

    def take_all(self) -> list[Act]:
        """Return the acts in worker order and forget them."""
        acts = self.acts()
        self._acts.clear()
        return acts

    @abstractmethod
    def take_ready(self, members: Membership, version: int, *, started: bool, now: float) -> list[Act]:
        """Return the acts that make up the next commit, in worker order, and forget them; none where it is not due.

        ``started``: whether anything was committed yet.
        """

    def leading(self, members: Membership, version: int) -> list[Act]:
        """Return the acts of the first live workers in order, up to the first that is still missing from the round."""
        del members, version
        return []

    @property
    def gathering(self) -> bool:
        """Whether a round is under way, so that a worker who joins now is expected in the next one only."""
        return False

    def deadline(self) -> float | None:
        """Return when a commit may become due by the passing of time."""
        return None

    def ahead(self, worker: str, members: Membership) -> int:
        """Return how many steps a worker is ahead of the slowest live one."""
        del worker, members
        return 0

    def holds_back(self, worker: str, members: Membership) -> bool:
        """Whether a worker has to wait until the slowest live one has caught up."""
        del worker, members
        return False


class SyncRounds(Rounds):
    """One commit of all that live workers hand in. Before the first as many must be live as the policy says."""

    refuses_older = True

    def __init__(self, policy: Sync) -> None:
        super().__init__()
        self._policy = policy
        self._opened_at = 0.0

    def put(self, act: Act, now: float) -> None:
        """Take an act; the first one opens the round."""
        if not self._acts:
            self._opened_at = now
        super().put(act, now)

    @property
    def gathering(self) -> bool:
        """Whether an act has come in."""
        return bool(self._acts)

    def take_ready(self, members: Membership, version: int, *, started: bool, now: float) -> list[Act]:
        """Return the acts of all live workers, or of enough once the timeout has passed."""
        if not self._acts:
            return []
        return self.take_all() if self._ready(members.live(), version, started=started, now=now) else []

    def leading(self, members: Membership, version: int) -> list[Act]:
        """Return the acts of the first live workers in order, up to the first that is still missing."""
        leading = []
        for record in members.live():
            act = self._acts.get(record.worker)
            if act is not None:
                leading.append(act)
            elif record.first_round <= version:
                break
        return leading

    def _ready(self, live: Sequence[WorkerRecord], version: int, *, started: bool, now: float) -> bool:
        if not started and len(live) < self._policy.workers:
            return False
        if all(record.worker in self._acts or record.first_round > version for record in live):
            return True
        deadline = self.deadline()
        if not started or deadline is None or now < deadline:
            return False
        contributions = sum(isinstance(act, Contribution) and not act.abstain for act in self._acts.values())
        return contributions >= (self._policy.min_workers or len(live))

    def deadline(self) -> float | None:
        """Return when the round may commit without the rest."""
        if not self._acts or not isinstance(self._policy.timeout, timedelta):
            return None
        return self._opened_at + self._policy.timeout.total_seconds()


class AsyncRounds(Rounds):
    """Every act is a commit of its own, in the order of arrival.

    A worker that its step takes too far ahead gets the answer, and with it the parameters, when the slowest has caught up.
    So its gradients are used while they are fresh. One that did not wait for the answer is held back at its next act.
    """

    refuses_older = False

    def __init__(self, policy: Async) -> None:
        super().__init__()
        self._limit = policy.max_staleness

    def take_ready(self, members: Membership, version: int, *, started: bool, now: float) -> list[Act]:
        """Return the first act whose worker is not more steps ahead of the slowest live one than the policy allows."""
        for worker, act in self._acts.items():
            if not isinstance(act, Contribution) or not self.holds_back(worker, members):
                del self._acts[worker]
                return [act]
        return []

    def ahead(self, worker: str, members: Membership) -> int:
        """Return how many steps a worker is ahead of the slowest live one."""
        steps = {record.worker: record.steps for record in members.live()}
        return steps.get(worker, 0) - min(steps.values(), default=0)

    def holds_back(self, worker: str, members: Membership) -> bool:
        """Whether a worker is further ahead than the policy allows."""
        return self._limit is not None and self.ahead(worker, members) > self._limit


def rounds_for(policy: Policy) -> Rounds:
    """Return the rounds of a policy."""
    return AsyncRounds(policy) if isinstance(policy, Async) else SyncRounds(policy)


def check_alike(acts: Sequence[Act]) -> None:
    """MismatchError: workers of one round make different calls."""
    first = acts[0]
    for act in acts[1:]:
        if type(act) is not type(first):
            raise MismatchError(
                f"worker {first.worker} calls {what(first)} while worker {act.worker} calls {what(act)}; "
                f"all workers must make the same call",
                applied=Applied.NO,
            )


def what(act: Act) -> str:
    """Return the name of the call that an act stands for."""
    return KINDS[type(act).__name__].value


def weights(acts: Sequence[Contribution]) -> list[float] | None:
    """Return the weights of a round's mean, None where all count alike; MismatchError where some give none."""
    given = [act.num_samples for act in acts]
    if all(weight is None for weight in given) or len(acts) == 1:
        return None
    if None in given:
        without = acts[given.index(None)].worker
        giving = next(act for act in acts if act.num_samples is not None)
        raise MismatchError(
            f"workers disagree on num_samples: worker {giving.worker} gives {giving.num_samples:g}, worker {without} gives "
            f"none. Give it on each worker or on none, and step again",
            applied=Applied.NO,
        )
    return [float(weight) for weight in given if weight is not None]
