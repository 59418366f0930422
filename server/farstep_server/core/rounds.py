"""Rounds: what the live workers have handed in for the next version, and whether that is enough.

waiting ──(an act of every live worker, or the timeout with enough of them)──> ready
ready ──(gradients, state or group taken over)──> committed: version + 1, a new round waits
ready ──(acts of different kinds, options that disagree, a step that raises)──> refused: nothing changed, a new round waits
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from farstep_server.core.events import Act, Contribution
from farstep_server.core.membership import WorkerRecord
from farstep_wire.errors import Applied, MismatchError
from farstep_wire.policy import Sync, worker_order


class Round:
    """The acts that have come in."""

    def __init__(self) -> None:
        self._acts: dict[str, Act] = {}
        self._opened_at = 0.0

    def __contains__(self, worker: str) -> bool:
        return worker in self._acts

    def __len__(self) -> int:
        return len(self._acts)

    def acts(self) -> list[Act]:
        """Return the acts in worker order."""
        return [self._acts[worker] for worker in sorted(self._acts, key=worker_order)]

    def put(self, act: Act, now: float) -> None:
        """Take an act; one that the worker had handed in before is replaced."""
        if not self._acts:
            self._opened_at = now
        self._acts[act.worker] = act

    def drop(self, worker: str) -> Act | None:
        """Forget a worker's act; return it."""
        return self._acts.pop(worker, None)

    def take(self) -> list[Act]:
        """Return the acts in worker order and forget them."""
        acts = self.acts()
        self._acts.clear()
        return acts

    def ready(self, policy: Sync, live: Sequence[WorkerRecord], version: int, started: bool, now: float) -> bool:
        """Whether the round may commit. Before the first commit as many workers must be live as the policy says."""
        if not self._acts or (not started and len(live) < policy.workers):
            return False
        if all(record.worker in self._acts or record.first_round > version for record in live):
            return True
        deadline = self.deadline(policy)
        if not started or deadline is None or now < deadline:
            return False
        contributions = sum(isinstance(act, Contribution) and not act.abstain for act in self._acts.values())
        return contributions >= (policy.min_workers or len(live))

    def deadline(self, policy: Sync) -> float | None:
        """Return when the round may commit without the rest."""
        if not self._acts or not isinstance(policy.timeout, timedelta):
            return None
        return self._opened_at + policy.timeout.total_seconds()


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
    return {"Contribution": "step", "LoadState": "load_state_dict", "AddGroup": "add_param_group"}[type(act).__name__]


def weights(acts: Sequence[Contribution]) -> list[float] | None:
    """Return the weights of a round's mean, None where all count alike; MismatchError where some give none."""
    given = [act.num_samples for act in acts]
    if all(weight is None for weight in given) or len(acts) == 1:
        return None
    for act in acts:
        if act.num_samples is None:
            raise MismatchError(
                f"worker {act.worker} gives no num_samples, other workers of the round do", applied=Applied.NO
            )
    return [float(weight) for weight in given if weight is not None]
