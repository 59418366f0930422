"""A step that a closure drives, evaluation by evaluation, with the workers of one round."""

from __future__ import annotations

from collections.abc import Sequence

from farstep_server.core.closures import ClosureRun, Progress, Raised, Returned, Wanted
from farstep_server.core.engine import Engine
from farstep_server.core.events import Contribution, Evaluation
from farstep_server.core.gradients import Gradients, materialize, reduce_gradients, reduce_losses
from farstep_server.core.options import GroupEdits, apply_edits, difference, frozen_options
from farstep_wire.errors import Applied, ClosureError, InvalidRequestError, StepFailedError
from farstep_wire.policy import worker_order


class DrivenStep:
    """One closure-driven step under way: who takes part, which evaluation is out, and what has come back.

    ``finished`` is set once the step has returned; until then every evaluation is answered by every participant.
    """

    def __init__(self, engine: Engine, contributions: Sequence[Contribution], edits: GroupEdits) -> None:
        self._engine = engine
        self.contributions = {contribution.worker: contribution for contribution in contributions}
        self._results: dict[str, Evaluation] = {}
        self._undo = engine.undo()
        self._run = ClosureRun(engine.optimizer)
        self.wanted = 0
        self.finished: Returned | None = None
        self.changed: GroupEdits = {}
        apply_edits(engine.optimizer, edits)
        self._options = frozen_options(engine.optimizer)

    def start(self) -> None:
        """Run to the first evaluation."""
        self._engine.store.before_write()
        self._take(self._run.start())

    def put(self, evaluation: Evaluation) -> None:
        """Take a worker's result; one for an evaluation that is over is a request out of turn."""
        if evaluation.number != self.wanted:
            raise InvalidRequestError(
                f"evaluation {evaluation.number} where {self.wanted} is awaited", applied=Applied.NO
            )
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

    def has_answered(self, worker: str) -> bool:
        """Whether a participant has answered the evaluation that is out."""
        return worker in self._results

    def drop(self, worker: str) -> None:
        """Go on without a participant."""
        self.contributions.pop(worker, None)
        self._results.pop(worker, None)

    def advance(self) -> None:
        """Reduce the results and run on to the next evaluation or the end."""
        order = sorted(self._results, key=worker_order)
        results = [self._results[worker] for worker in order]
        given = [self.contributions[worker].num_samples for worker in order]
        weights = [float(weight) for weight in given if weight is not None]
        used = weights if len(weights) == len(order) and len(order) > 1 else None
        gradients: list[Gradients] = []
        for result in results:
            assert result.staged is not None, "an evaluation without error has gradients"
            gradients.append(materialize(result.staged, self._engine.layout, self._engine.store.device)[0])
        loss = reduce_losses([result.loss for result in results], used)
        self._engine.set_gradients(reduce_gradients(gradients, used))
        self._results.clear()
        self._engine.store.before_write()
        self._take(self._run.resume(loss))

    def _take(self, progress: Progress) -> None:
        match progress:
            case Wanted(number):
                self.wanted = number
            case Raised(error):
                self._undo.restore()
                raise StepFailedError(str(error), applied=Applied.NO) from error
            case Returned():
                self.finished = progress
                self.changed = difference(self._options, self._engine.optimizer.param_groups)

    def roll_back(self) -> None:
        """Unwind the step and undo all it did."""
        if self.finished is None:
            self._run.abort()
        self._engine.store.before_write()
        self._undo.restore()
