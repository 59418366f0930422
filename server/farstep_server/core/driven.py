"""A step that a closure drives, evaluation by evaluation, with the workers of one round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from farstep_server.core.closures import ClosureRun, Progress, Raised, Returned, Wanted
from farstep_server.core.events import Act, Contribution, EvaluateReply, Evaluation, Refusal, Replies, Ticket
from farstep_server.core.gradients import materialize, reduce_losses
from farstep_server.core.options import GroupEdits, apply_edits, difference, frozen_options
from farstep_server.core.parameters import Onlooker
from farstep_server.core.pipeline import Pipeline
from farstep_server.core.reduction import Part
from farstep_wire.errors import Applied, ClosureError, FarstepError, InvalidRequestError, StepFailedError
from farstep_wire.policy import worker_order


class DrivenStep:
    """One closure-driven step under way: who takes part, which evaluation is out, and what has come back.

    ``finished`` is set once the step has returned; until then every evaluation is answered by every participant.
    """

    def __init__(self, pipeline: Pipeline, acts: Sequence[Contribution], edits: GroupEdits) -> None:
        engine = pipeline.engine
        self._pipeline = pipeline
        self._engine = engine
        self._acts = list(acts)
        self.contributions = {act.worker: act for act in acts if not act.abstain}
        self._tickets: dict[str, Ticket] = {act.worker: act.ticket for act in acts}
        self._shared = {act.worker: act.shared for act in acts}
        self._asked: set[str] = set()
        self._results: dict[str, Evaluation] = {}
        self._undo = engine.undo()
        self._run = ClosureRun(engine.optimizer)
        self._wanted = 0
        self._answered: Counter[str] = Counter()
        self.finished: Returned | None = None
        self.changed: GroupEdits = {}
        apply_edits(engine.optimizer, edits)
        self._options = frozen_options(engine.optimizer)

    def start(self) -> None:
        """Take over what users changed, the first worker's word first, and run to the first evaluation."""
        for act in reversed(self.contributions.values()):
            if act.staged is not None:
                edited = materialize(act.staged, self._engine.layout, self._engine.store.device)[1]
                with self._engine.store.while_waiting(self._waiting):
                    self._engine.write_parameters(edited)
        with self._engine.store.while_waiting(self._waiting):
            self._engine.store.before_write()
            self._take(self._run.start())

    # What the participants are told.

    def enquiries(self) -> Replies:
        """Ask every participant for the evaluation that is out."""
        self._asked.update(self.contributions)
        return [(self._tickets[worker], self._enquiry(worker)) for worker in self.contributions]

    def _enquiry(self, worker: str) -> EvaluateReply:
        return EvaluateReply(self._wanted, self._engine.store.read(shared=self._shared[worker]))

    def asked_again(self, act: Act) -> Replies | None:
        """Answer a participant that comes back in the middle of the step; None where the act belongs to no participant."""
        own = self.contributions.get(act.worker)
        if own is None or own.sequence != act.sequence:
            return None
        self._tickets[act.worker] = act.ticket
        self._shared[act.worker] = isinstance(act, Contribution) and act.shared
        return [] if act.worker in self._results else [(act.ticket, self._enquiry(act.worker))]

    def given_up_by(self, act: Act) -> bool:
        """Whether a participant has gone on to its next act: it was interrupted, and answers no evaluation any more."""
        own = self.contributions.get(act.worker)
        return own is not None and act.sequence > own.sequence

    def refusals(self, error: FarstepError) -> Replies:
        """Refuse the step to all that wait for a reply; who evaluates now will learn of it by the reply to the result."""
        return [(ticket, Refusal(error)) for worker, ticket in self._tickets.items() if worker not in self._asked]

    def settled(self) -> list[Contribution]:
        """Return the acts that the finished step settles, with the tickets that wait for it now."""
        return [
            replace(act, ticket=self._tickets[act.worker], shared=self._shared[act.worker])
            for act in self._acts
            if act.worker in self._tickets
        ]

    @property
    def _waiting(self) -> list[Onlooker]:
        """Those that wait for a reply and do not evaluate just now."""
        there = [act for act in self._acts if act.worker in self._tickets and act.worker not in self._asked]
        return [(act.worker, act.epoch) for act in there]

    # What they answer.

    def put(self, evaluation: Evaluation) -> None:
        """Take a participant's result.

        InvalidRequestError: it is for an evaluation that is over. ClosureError: the closure raised there.
        """
        if evaluation.number != self._wanted:
            raise InvalidRequestError(
                f"evaluation {evaluation.number} where {self._wanted} is awaited", applied=Applied.NO
            )
        self._tickets[evaluation.worker] = evaluation.ticket
        self._shared[evaluation.worker] = evaluation.shared
        self._asked.discard(evaluation.worker)
        if evaluation.error:
            raise ClosureError(
                f"the closure raised on worker {evaluation.worker}: {evaluation.error}. The step was rolled back",
                applied=Applied.NO,
            )
        self._results[evaluation.worker] = evaluation

    @property
    def complete(self) -> bool:
        """Whether every participant has answered."""
        return len(self._results) == len(self.contributions)

    def drop(self, worker: str) -> None:
        """Go on without a participant."""
        self.contributions.pop(worker, None)
        self._results.pop(worker, None)
        self._tickets.pop(worker, None)
        self._asked.discard(worker)

    def advance(self) -> None:
        """Reduce the results and run on to the next evaluation or the end."""
        order = sorted(self._results, key=worker_order)
        results = [self._results[worker] for worker in order]
        given = [self.contributions[worker].num_samples for worker in order]
        weights = [float(weight) for weight in given if weight is not None]
        used = weights if len(weights) == len(order) and len(order) > 1 else None
        parts: dict[str, Part] = {}
        for result in results:
            assert result.staged is not None, "an evaluation without error has gradients"
            self._answered[result.worker] += 1
            parts[result.worker] = self._pipeline.part(result.staged)[0]
        loss = reduce_losses([result.loss for result in results], used)
        # The guard looks at the gradients where the step begins: a line search may well try a point where they overflow.
        self._engine.set_gradients(self._pipeline.reduce(parts, used, guarded=self._wanted == 0))
        self._engine.clip_gradients(self._pipeline.settings)
        self._results.clear()
        with self._engine.store.while_waiting(self._waiting):
            self._engine.store.before_write()
            self._take(self._run.resume(loss))

    @property
    def evaluations(self) -> int:
        """How many evaluations were asked for."""
        return self._run.evaluations

    def answered(self, worker: str) -> int:
        """Return how many evaluations of a worker went into the step."""
        return self._answered[worker]

    @property
    def acts(self) -> list[Contribution]:
        """The acts that began the step, of those who have left since too."""
        return self._acts

    def _take(self, progress: Progress) -> None:
        match progress:
            case Wanted(number):
                self._wanted = number
            case Raised(error):
                self._undo.restore()
                raise StepFailedError(str(error), applied=Applied.NO) from error
            case Returned():
                self.finished = progress
                self.changed = difference(self._options, self._engine.optimizer.param_groups)

    def takes(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation belongs to this step."""
        own = self.contributions.get(evaluation.worker)
        return own is not None and own.sequence == evaluation.sequence

    def roll_back(self) -> None:
        """Unwind the step and undo all it did."""
        if self.finished is None:
            self._run.abort()
        with self._engine.store.while_waiting(self._waiting):
            self._engine.store.before_write()
            self._undo.restore()
