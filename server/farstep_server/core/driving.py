"""Closure-driven steps of a hosted optimizer, one at a time, from the acts that begin one to its commit or its undoing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from farstep_server.core import events as ev
from farstep_server.core.answers import Answers
from farstep_server.core.decisions import Decisions
from farstep_server.core.driven import DrivenStep
from farstep_server.core.identity import Identity
from farstep_server.core.options import GroupEdits
from farstep_server.core.pipeline import Pipeline
from farstep_server.core.rounds import weights
from farstep_wire.errors import (
    Applied,
    ClosureError,
    FarstepError,
    InternalError,
    InvalidRequestError,
    MismatchError,
    NonFiniteError,
)


def defect(error: Exception) -> FarstepError:
    """Return what a worker is told of an exception that no rule foresees."""
    return InternalError(f"{type(error).__name__}: {error}", applied=Applied.UNKNOWN)


class Driving:
    """The step under way, if there is one."""

    def __init__(
        self,
        identity: Identity,
        pipeline: Pipeline,
        decisions: Decisions,
        answers: Answers,
        clock: Callable[[], float],
    ) -> None:
        self._identity = identity
        self._pipeline = pipeline
        self._decisions = decisions
        self._answers = answers
        self._clock = clock
        self._step: DrivenStep | None = None
        self._aborted: FarstepError | None = None
        self._edits: GroupEdits = {}
        self._since = 0.0

    @property
    def under_way(self) -> bool:
        """Whether the parameters are those of a trial."""
        return self._step is not None

    def takes_part(self, worker: str) -> bool:
        """Whether the step under way waits for a worker."""
        return self._step is not None and worker in self._step.contributions

    def start(
        self, acts: Sequence[ev.Contribution], contributors: Sequence[ev.Contribution], edits: GroupEdits
    ) -> None:
        """Begin a step.

        InvalidRequestError: the contributors and the class do not agree that a closure drives it. MismatchError: some of the
        contributors give a weight and some do not.
        """
        if not self._pipeline.engine.entry.drives_closure or not all(act.closure for act in contributors):
            raise InvalidRequestError(
                f"{self._identity.optimizer} and the contributions disagree on whether the closure drives the step",
                applied=Applied.NO,
            )
        weights(contributors)
        self._since = self._clock()
        step = DrivenStep(self._pipeline, acts, edits)
        step.start()
        self._step, self._aborted, self._edits = step, None, edits
        self._go_on(step)

    def on_act(self, act: ev.Act) -> bool:
        """Take an act that comes in during the step; return whether it has to wait for the step's end.

        A participant that asks again is told again. One that has gone on to its next act gives the step up.
        """
        step = self._step
        assert step is not None, "under way"
        if step.given_up_by(act):
            self.given_up_by(act.worker)
            return True
        answers = step.asked_again(act)
        self._answers.replies += answers or []
        return answers is None

    def given_up_by(self, worker: str) -> None:
        """Undo the step where a participant answers it no more."""
        if self.takes_part(worker):
            text = f"worker {worker} gave the step up in the middle of an evaluation; it was rolled back"
            self.abort(ClosureError(text, applied=Applied.NO))

    def on_evaluation(self, event: ev.Evaluation) -> None:
        """Take a worker's result; ClosureError where the step it belongs to has ended."""
        if self._step is None or not self._step.takes(event):
            reason = f": {self._aborted}" if self._aborted is not None else ""
            raise ClosureError(
                f"the step that this evaluation belongs to has ended; it was rolled back{reason}", applied=Applied.NO
            )
        try:
            self._step.put(event)
        except ClosureError as error:
            self.abort(error)

    def drop(self, worker: str) -> None:
        """Go on without a worker, or undo the step where nobody is left."""
        if self._step is None or not self.takes_part(worker):
            return
        self._step.drop(worker)
        if not self._step.contributions:
            self.abort(ClosureError(f"worker {worker} left in an evaluation", applied=Applied.NO))

    def advance(self) -> bool:
        """Go on where every participant has answered; return whether that was so."""
        step = self._step
        if step is None or not step.complete:
            return False
        try:
            step.advance()
        except NonFiniteError as error:
            if self._pipeline.settings.non_finite == "raise":
                self.abort(error)
            else:
                self._skip(step, str(error))
        except MismatchError as error:
            self.abort(error)
        except FarstepError as error:
            # The step itself has raised, and has been undone.
            self._step, self._aborted = None, error
            self._decisions.rolled_back(step, error)
        except Exception as error:
            self.abort(defect(error))
            raise
        else:
            self._go_on(step)
        return True

    def _go_on(self, step: DrivenStep) -> None:
        if step.finished is None:
            self._answers.replies += step.enquiries()
            return
        self._step = None
        self._decisions.committed(step.settled(), self._edits, step.changed, self._clock() - self._since, step)

    def _skip(self, step: DrivenStep, notice: str) -> None:
        self._step = None
        step.roll_back()
        self._decisions.skipped(step.settled(), self._edits, notice, step)

    def abort(self, error: FarstepError) -> None:
        """Undo the step under way, if there is one, for the reason given."""
        step, self._step = self._step, None
        if step is not None:
            self._aborted = error
            step.roll_back()
            self._decisions.rolled_back(step, error)
