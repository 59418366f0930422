"""What a hosted optimizer does, written down a second time and as plainly as can be.

One event after another, one plain ``torch.optim`` object on tensors of its own, nothing shared with the server's code.

The semantics in short:

* Whoever joins is a member under a new epoch; only a member's current session may act. Any act or heartbeat renews its lease.
* Sync: what is handed in waits until every live worker has, or the timeout has passed and enough have. Then it commits as a
  whole, as one step of the mean in worker order, or is refused as a whole. Who has joined since the first part of the round
  came in is not waited for.
* Async: each contribution is a step. A worker that its step has taken too far ahead is answered when the slowest has caught
  up, with the parameters of that later moment.
* Each act is decided once. Whoever asks again for what is decided is told the same outcome, with the parameters as they are.
* A rollback, and a load_state_dict, begins a new incarnation, in which no contribution to the old one counts.
* Every ticket is answered once, but for those that the worker has itself let go: by a reconnect (the answer to a
  contribution then goes to whoever asks again) or by zero_grad (which takes back what waits).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.optim import Optimizer

from farstep_wire.policy import Async, Sync
from tests.state_machine import words
from tests.state_machine.arithmetic import Numbers, SavedNumbers, same_state, total, weighted_mean
from tests.state_machine.words import (
    Act,
    Answer,
    Done,
    Gradients,
    Join,
    Joined,
    Load,
    Part,
    Push,
    Refused,
    Round,
    Stepped,
)

LEASE_SECONDS = 10.0


@dataclass
class Worker:
    """All that is known of a worker."""

    worker: str
    instance: str
    epoch: int = 0
    standing: str = "left"
    lease_ends: float = 0.0
    expected_from: int = 0
    decided: int = 0
    verdict: tuple[str, int] = ("committed", 0)
    version: int = 0
    contributions: int = 0
    abstentions: int = 0
    stale: int = 0
    staleness: int = 0
    steps: int = 0
    accumulated: list[Gradients] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether it is a member."""
        return self.standing == "live"


@dataclass
class Saved:
    """What a checkpoint keeps."""

    numbers: SavedNumbers
    version: int
    incarnation: int
    started: bool
    workers: list[Worker]


class Refusal(Exception):  # noqa: N818 - it is the word for it
    """Ends the handling of an event."""

    def __init__(self, error: str, applied: str = "NO") -> None:
        super().__init__(error)
        self.answer = Refused(error, applied)


class Model:
    """The sequential model. ``take`` handles one event and returns who is answered what."""

    def __init__(
        self, policy: Sync | Async, make: Callable[[list[Tensor]], Optimizer], initial: Iterable[Tensor]
    ) -> None:
        self.policy = policy
        self.numbers = Numbers(make, initial)
        self.version = 0
        self.incarnation = 1
        self.started = False
        self.workers: dict[str, Worker] = {}
        self.waiting: dict[str, Act] = {}
        self.opened_at = 0.0
        self.held: dict[str, tuple[Push, Stepped]] = {}
        self.rounds: list[Round] = []
        self.saved: list[Saved] = []
        self.answers: dict[int, Answer] = {}
        self.now = 0.0

    def take(self, event: words.Event, now: float) -> dict[int, Answer]:
        """Handle one event: first the leases that have run out, last the rounds that have become ready."""
        self.answers, self.now = {}, now
        for worker in self.live():
            if worker.lease_ends <= now:
                worker.standing = "expired"
                self._forget(worker)
        try:
            self._handle(event)
        except Refusal as refusal:
            self._answer(event.ticket, refusal.answer)  # type: ignore[union-attr]
        self._release()
        while acts := self._ready():
            for act in acts:
                del self.waiting[act.worker]
            self._commit(acts)
            self._release()
        return self.answers

    def _handle(self, event: words.Event) -> None:
        match event:
            case Join():
                self._join(event)
            case Act():
                self._act(event)
            case words.ZeroGrad():
                worker = self._member(event.worker, event.epoch)
                self.waiting.pop(event.worker, None)
                worker.accumulated.clear()
                self._answer(event.ticket, self._done())
            case words.Leave():
                leaving = self.workers.get(event.worker)
                if leaving is not None and leaving.epoch == event.epoch:  # not the late word of an old session
                    leaving.standing = "left"
                    self._forget(leaving)
                self._answer(event.ticket, self._done())
            case words.Touch():
                touched = self.workers.get(event.worker)
                if touched is not None and touched.live and touched.epoch == event.epoch:
                    touched.lease_ends = self.now + LEASE_SECONDS
            case words.Configure():
                self.numbers.clipping |= event.changes
            case words.Restore():
                self._restore(event)
            case words.Stop():
                for name in list(self.held):
                    self._tell_held(name)
                for act in self.waiting.values():
                    self._answer(act.ticket, Refused("DrainingError", "NONE"))
                self.waiting.clear()
            case words.Tick():
                pass

    def _answer(self, ticket: int, answer: Answer) -> None:
        assert ticket not in self.answers, f"ticket {ticket} is answered twice"
        self.answers[ticket] = answer

    def _done(self) -> Done:
        return Done(self.version, self.incarnation)

    # Members.

    def live(self) -> list[Worker]:
        """Return the members."""
        return [worker for worker in self.workers.values() if worker.live]

    def _member(self, name: str, epoch: int) -> Worker:
        worker = self.workers.get(name)
        if worker is None or worker.epoch != epoch:
            raise Refusal("FencedError")
        if not worker.live:
            raise Refusal("LeaseError")
        worker.lease_ends = self.now + LEASE_SECONDS
        return worker

    def _join(self, event: Join) -> None:
        worker = self.workers.setdefault(event.worker, Worker(event.worker, ""))
        resumed = worker.instance == event.instance
        if event.again and worker.instance and not resumed:
            raise Refusal("FencedError")
        if not (resumed and worker.live):
            level = self._level_of_newcomers(worker)
            worker.steps = max(worker.steps, level) if resumed else level
        held = self.held.pop(event.worker, None)
        if not resumed:
            if held is not None:
                self._answer(held[0].ticket, Refused("FencedError", "YES"))
            waiting = self.waiting.pop(event.worker, None)
            if waiting is not None:
                self._answer(waiting.ticket, Refused("FencedError", "NO"))
            # A round that is under way goes on without a newcomer.
            worker.expected_from = self.version + (self.started and bool(self.waiting))
            worker.instance, worker.decided, worker.version = event.instance, 0, self.version
            worker.verdict = ("committed", 0)
            worker.accumulated.clear()
        worker.epoch += 1
        worker.standing, worker.lease_ends = "live", self.now + LEASE_SECONDS
        lr = None if not event.again and self.version == 0 else self.numbers.lr
        answer = Joined(resumed, self.version, self.incarnation, worker.epoch, worker.decided, lr)
        self._answer(event.ticket, answer)

    def _level_of_newcomers(self, newcomer: Worker) -> int:
        others = [worker.steps for worker in self.live() if worker is not newcomer]
        return min(others) if others else max(worker.steps for worker in self.workers.values())

    def _forget(self, worker: Worker) -> None:
        waiting = self.waiting.pop(worker.worker, None)
        if waiting is not None:
            self._answer(waiting.ticket, Refused("LeaseError", "NO"))
        held = self.held.pop(worker.worker, None)
        if held is not None:
            self._answer(held[0].ticket, Refused("LeaseError", "YES"))
        worker.accumulated.clear()

    # Acts.

    def _act(self, act: Act) -> None:
        worker = self._member(act.worker, act.epoch)
        if act.sequence <= worker.decided:
            if isinstance(act, Push):
                outcome, contributions = worker.verdict
                self._tell(act, outcome, contributions, 0)
            else:
                self._answer(act.ticket, self._done())
        elif isinstance(act, words.Accumulate):
            worker.accumulated.append(act.gradients)
            worker.decided = act.sequence
            self._answer(act.ticket, self._done())
        elif not isinstance(act, Push) or self._counts(act, worker):
            if not self.waiting:
                self.opened_at = self.now
            self.waiting[act.worker] = act

    def _counts(self, push: Push, worker: Worker) -> bool:
        if push.incarnation != self.incarnation:
            self._reject(push, worker, "rolled back")
            return False
        if push.version > self.version:
            raise Refusal("RollbackError")
        if push.version < self.version and isinstance(self.policy, Sync):
            worker.stale += 1
            self._reject(push, worker, "stale")
            return False
        if push.gradients is not None and push.accumulated != len(worker.accumulated):
            raise Refusal("GradientsLostError")
        return True

    def _reject(self, push: Push, worker: Worker, outcome: str) -> None:
        worker.accumulated.clear()
        worker.version = self.version
        self._answer(push.ticket, self._stepped(outcome, 0, max(0, self.version - push.version)))

    def _stepped(self, outcome: str, contributions: int, staleness: int) -> Stepped:
        bits = self.numbers.bits()
        return Stepped(outcome, self.version, self.incarnation, contributions, staleness, bits, self.numbers.lr)

    def _tell(self, push: Push, outcome: str, contributions: int, staleness: int) -> None:
        self.held[push.worker] = (push, self._stepped(outcome, contributions, staleness))
        if not self._held_back(push.worker):
            self._tell_held(push.worker)

    def _tell_held(self, worker: str) -> None:
        push, stepped = self.held.pop(worker)
        self.workers[worker].version = self.version
        self._answer(push.ticket, self._stepped(stepped.outcome, stepped.contributions, stepped.staleness))

    def _release(self) -> None:
        for worker in list(self.held):
            if not self._held_back(worker):
                self._tell_held(worker)

    # Rounds.

    def ahead(self, worker: str) -> int:
        """Return how many steps a worker is ahead of the slowest live one."""
        if isinstance(self.policy, Sync):
            return 0
        return self.workers[worker].steps - min(other.steps for other in self.live())

    def _held_back(self, worker: str) -> bool:
        limit = self.policy.max_staleness if isinstance(self.policy, Async) else None
        return limit is not None and self.ahead(worker) > limit

    def _ready(self) -> list[Act]:
        if isinstance(self.policy, Async):
            free = [act for act in self.waiting.values() if isinstance(act, Load) or not self._held_back(act.worker)]
            return free[:1]
        acts = sorted(self.waiting.values(), key=lambda act: in_order(act.worker))
        return acts if acts and self._complete(self.policy) else []

    def _complete(self, policy: Sync) -> bool:
        live = self.live()
        if not self.started and len(live) < policy.workers:
            return False
        if all(worker.worker in self.waiting or worker.expected_from > self.version for worker in live):
            return True
        contributions = sum(isinstance(act, Push) and act.gradients is not None for act in self.waiting.values())
        return self.started and self.round_ends() <= self.now and contributions >= (policy.min_workers or len(live))

    def round_ends(self) -> float:
        """Return when the round's timeout passes."""
        seconds = self.policy.timeout.total_seconds() if isinstance(self.policy, Sync) and self.policy.timeout else None  # type: ignore[union-attr]
        return self.opened_at + seconds if self.waiting and seconds else float("inf")

    def next_deadline(self) -> float:
        """Return when something happens by the passing of time alone."""
        return min([self.round_ends(), *(worker.lease_ends for worker in self.live())])

    def _commit(self, acts: list[Act]) -> None:
        try:
            if len({type(act) for act in acts}) > 1:
                raise Refusal("MismatchError")
            if isinstance(acts[0], Load):
                self._load([act for act in acts if isinstance(act, Load)])
            else:
                self._step([act for act in acts if isinstance(act, Push)])
        except Refusal as refusal:
            self._remember("refused", acts)
            for act in acts:
                self._answer(act.ticket, refusal.answer)

    def _remember(self, outcome: str, acts: list[Act]) -> None:
        kind = "load_state_dict" if isinstance(acts[0], Load) else "step"
        parts = tuple(self._part(act) for act in acts)
        self.rounds.append(Round(kind, outcome, self.version, self.incarnation, parts))

    def _part(self, act: Act) -> Part:
        if not isinstance(act, Push):
            return Part(act.worker, act.sequence)
        staleness = max(0, self.version - act.version)
        return Part(act.worker, act.sequence, act.gradients is None, act.samples, staleness, self.ahead(act.worker))

    def _step(self, pushes: list[Push]) -> None:
        rates = {self.numbers.lr if push.lr is None else push.lr for push in pushes}
        if len(rates) > 1:
            raise Refusal("MismatchError")
        contributors = [push for push in pushes if push.gradients is not None]
        mean = self._mean(contributors) if contributors else []
        self.numbers.lr = rates.pop()
        outcome = "committed" if contributors else "skipped"
        self._remember(outcome, list(pushes))
        staleness = [part.staleness for part in self.rounds[-1].parts]
        if contributors:
            self.numbers.step(mean)
            self.version += 1
            self.started = True
            self.rounds[-1] = replace(self.rounds[-1], version=self.version)
        for push, stale in zip(pushes, staleness, strict=True):
            self._settle(push, outcome, len(contributors), stale)
        for push, stale in zip(pushes, staleness, strict=True):
            self._tell(push, outcome, len(contributors), stale)

    def _settle(self, push: Push, outcome: str, contributions: int, staleness: int) -> None:
        worker = self.workers[push.worker]
        worker.decided, worker.verdict = push.sequence, (outcome, contributions)
        worker.staleness = staleness
        worker.steps += 1
        if push.gradients is None:
            worker.abstentions += 1
        else:
            worker.contributions += 1
            worker.accumulated.clear()

    def _mean(self, pushes: list[Push]) -> Gradients:
        samples = [push.samples for push in pushes if push.samples is not None]
        if samples and len(pushes) > 1 and len(samples) < len(pushes):
            raise Refusal("MismatchError")
        own = [
            total([*self.workers[push.worker].accumulated, push.gradients])
            for push in pushes
            if push.gradients is not None
        ]
        return weighted_mean(own, samples or [1.0] * len(own))

    # The whole state.

    def _load(self, loads: list[Load]) -> None:
        first = loads[0]
        if any(load.options != first.options or not same_state(load.state, first.state) for load in loads):
            raise Refusal("MismatchError")
        self.numbers.load(first.state, first.options)
        self.incarnation += 1
        self._remember("committed", list(loads))
        for load in loads:
            self.workers[load.worker].decided = load.sequence
            self._answer(load.ticket, self._done())
        self._roll_back_waiting()

    def _roll_back_waiting(self) -> None:
        for act in [self.waiting.pop(name) for name in sorted(self.waiting, key=in_order)]:
            if isinstance(act, Push):
                worker = self.workers[act.worker]
                worker.decided, worker.verdict = act.sequence, ("rolled back", 0)
                self._reject(act, worker, "rolled back")
            else:
                self._answer(act.ticket, Refused("RollbackError", "NO"))

    def save(self) -> Saved:
        """Return a checkpoint of now."""
        workers = copy.deepcopy(list(self.workers.values()))
        return Saved(self.numbers.save(), self.version, self.incarnation, self.started, workers)

    def _restore(self, event: words.Restore) -> None:
        """Roll back: state and version are the old ones; what was decided since stays decided."""
        saved = self.saved[event.saved]
        self.numbers.restore(saved.numbers)
        self.version = saved.version
        self.incarnation += 1
        self.rounds.append(Round("restore", "committed", self.version, self.incarnation))
        for worker in self.workers.values():
            worker.expected_from = min(worker.expected_from, self.version)
        for push, _ in list(self.held.values()):
            del self.held[push.worker]
            worker = self.workers[push.worker]
            worker.decided, worker.verdict = push.sequence, ("rolled back", 0)
            self._reject(push, worker, "rolled back")
        self._roll_back_waiting()
        self._answer(event.ticket, self._done())

    def restarted(self, saved: Saved, now: float) -> Model:
        """Return the model of a server that begins with a checkpoint: nothing waits, the members have a fresh lease."""
        new = Model(self.policy, self.numbers.make, saved.numbers.tensors)
        new.numbers.restore(saved.numbers)
        new.now, new.saved = now, self.saved
        new.version, new.incarnation, new.started = saved.version, saved.incarnation, saved.started
        for old in copy.deepcopy(saved.workers):
            standing = "live" if old.live else "left"
            new.workers[old.worker] = replace(
                old, standing=standing, lease_ends=now + LEASE_SECONDS, expected_from=0, staleness=0, accumulated=[]
            )
        return new

    def rows(self) -> list[words.Row]:
        """Return the workers as a description lists them."""
        waiting = {*self.waiting, *self.held}
        return [
            words.Row(
                worker.worker, ("waiting" if worker.worker in waiting else "computing") if worker.live else worker.standing,
                worker.epoch, worker.version, worker.contributions, worker.abstentions, worker.stale, worker.staleness,
                worker.lease_ends - self.now,
            )
            for worker in sorted(self.workers.values(), key=lambda worker: in_order(worker.worker))
        ]  # fmt: skip


def in_order(worker: str) -> tuple[bool, int, str]:
    """Sort key: numbers by value, then names."""
    return (not worker.isdigit(), int(worker) if worker.isdigit() else 0, worker)
