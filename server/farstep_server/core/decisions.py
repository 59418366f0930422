"""What is done once the outcome of a round is known: state that follows a step, the dedup table, the history, the answers."""

from __future__ import annotations

from collections.abc import Sequence

from farstep_server.core import events as ev
from farstep_server.core.answers import Answer, Answers, Standing
from farstep_server.core.driven import DrivenStep
from farstep_server.core.history import History, Part, RoundKind, RoundOutcome
from farstep_server.core.membership import Membership, Settled, WorkerRecord
from farstep_server.core.options import GroupEdits, merged
from farstep_server.core.pipeline import Pipeline
from farstep_server.core.records import Outcome
from farstep_server.core.rounds import KINDS, Rounds
from farstep_wire.errors import FarstepError, StepFailedError


class Decisions:
    """Settles rounds. ``started``: whether anything was committed yet.

    ``decided`` counts what was decided, by whatever outcome: what makes two dumps of one version differ.
    """

    def __init__(
        self, pipeline: Pipeline, members: Membership, rounds: Rounds, answers: Answers, standing: Standing
    ) -> None:
        self._pipeline = pipeline
        self._members = members
        self._rounds = rounds
        self._answers = answers
        self._standing = standing
        self.history = History()
        self.started = False
        self.decided = 0
        self.last_step_seconds = 0.0

    def committed(
        self,
        acts: Sequence[ev.Contribution],
        edits: GroupEdits,
        changed: GroupEdits,
        seconds: float,
        driven: DrivenStep | None = None,
    ) -> None:
        """A step was made of the acts. ``changed``: the options that the optimizer itself changed."""
        scheduled, notice = self._pipeline.committed()
        loss = None if driven is None or driven.finished is None else driven.finished.value
        parts = self._parts(acts, driven)
        # Who left in the middle of a closure-driven step is part of its history, but has nothing to be told.
        everyone = parts if driven is None else self._parts(driven.acts, driven)
        self._standing.version += 1
        self._pipeline.engine.store.journal.is_version(self._standing.version)
        self.started = True
        self.last_step_seconds = seconds
        self._remember(RoundOutcome.COMMITTED, everyone, driven, seconds=seconds)
        self._settle(acts, parts, Outcome.COMMITTED, edits, merged([changed, scheduled]), loss, notice)

    def skipped(
        self, acts: Sequence[ev.Contribution], edits: GroupEdits, notice: str, driven: DrivenStep | None = None
    ) -> None:
        """No step was made: every worker abstained, or the guard's word is in the notice."""
        self._pipeline.engine.edit_options(edits)
        parts = self._parts(acts, driven)
        self._remember(RoundOutcome.SKIPPED, parts, driven, reason=notice or "every worker abstained")
        self._settle(acts, parts, Outcome.SKIPPED, edits, {}, None, notice)

    def refused(self, acts: Sequence[ev.Act], error: FarstepError) -> None:
        """Nothing has changed, and all who wait are told why."""
        answered = {id(ticket) for ticket, _ in self._answers.replies}
        for act in acts:
            if id(act.ticket) not in answered:
                self._answers.put(act.ticket, ev.Refusal(error))
        outcome = RoundOutcome.ROLLED_BACK if isinstance(error, StepFailedError) else RoundOutcome.REFUSED
        self._remember(outcome, self._parts(acts), kind=KINDS[type(acts[0]).__name__], reason=str(error))

    def rolled_back(self, driven: DrivenStep, error: FarstepError) -> None:
        """A closure-driven step was undone, and all who wait are told why."""
        self._answers.replies += driven.refusals(error)
        self._remember(RoundOutcome.ROLLED_BACK, self._parts(driven.acts, driven), driven, reason=str(error))

    def collective(self, acts: Sequence[ev.Act], kind: RoundKind) -> None:
        """What all workers asked for together was done."""
        self._remember(RoundOutcome.COMMITTED, self._parts(acts), kind=kind)
        for act in acts:
            self.record(act)
            self._answers.put(act.ticket, self._answers.done())

    def restored(self) -> None:
        """A snapshot was restored."""
        self._remember(RoundOutcome.COMMITTED, (), kind=RoundKind.RESTORE)

    def record(self, act: ev.Act) -> WorkerRecord:
        """Enter an act into the dedup table."""
        record = self._members[act.worker]
        record.settled_sequence = act.sequence
        self.decided += 1
        return record

    def _settle(
        self,
        acts: Sequence[ev.Contribution],
        parts: Sequence[Part],
        outcome: Outcome,
        edits: GroupEdits,
        changed: GroupEdits,
        loss: object,
        notice: str,
    ) -> None:
        used = sum(not act.abstain for act in acts)
        # The workers of one round know each other's edits, which agree.
        self._answers.log.note(edits, self._standing.version, [act.worker for act in acts])
        self._answers.log.note(changed, self._standing.version)
        for act, part in zip(acts, parts, strict=True):
            record = self.record(act)
            record.settled = Settled(outcome, self._standing.version, used, loss)
            record.abstentions += act.abstain
            record.contributions += outcome is Outcome.COMMITTED and not act.abstain
            record.staleness = part.staleness
            record.steps += 1
            if not act.abstain:
                self._pipeline.accumulated.drop(act.worker)
        for act, part in zip(acts, parts, strict=True):
            self._answers.tell(Answer(act, outcome, used, loss, part.staleness, notice))

    def _remember(
        self,
        outcome: RoundOutcome,
        parts: tuple[Part, ...],
        driven: DrivenStep | None = None,
        *,
        kind: RoundKind = RoundKind.STEP,
        seconds: float = 0.0,
        reason: str = "",
    ) -> None:
        at = self._standing
        evaluations = 0 if driven is None else driven.evaluations
        self.history.add(
            at.version, at.incarnation, kind, outcome, parts, evaluations=evaluations, seconds=seconds, reason=reason
        )

    def _parts(self, acts: Sequence[ev.Act], driven: DrivenStep | None = None) -> tuple[Part, ...]:
        return tuple([self._part(act, driven) for act in acts])

    def _part(self, act: ev.Act, driven: DrivenStep | None) -> Part:
        if not isinstance(act, ev.Contribution):
            return Part(act.worker, act.sequence)
        ahead = self._rounds.ahead(act.worker, self._members)
        answered = 0 if driven is None else driven.answered(act.worker)
        staleness = max(0, self._standing.version - act.version)
        return Part(act.worker, act.sequence, act.abstain, act.num_samples, staleness, ahead, answered)
