"""A hosted optimizer: one state machine that turns events into replies. Only its owner calls it, one event after another.

The rules, in the order in which an act (a contribution, load_state_dict, add_param_group) meets them:

1. An act of a fenced session is refused; one that is settled gets the recorded answer.
2. A contribution of another incarnation or of an older version (under Sync) is not used; its sender gets the parameters.
3. Under Sync it waits in the round until the round is ready; under Async it is a round of its own.
4. What a round does commits whole, raises the version where it stepped, and is settled for every worker in it; or it is
   refused to every worker in it and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from farstep_server.core import describe
from farstep_server.core import events as ev
from farstep_server.core.admission import check_options, check_reconnect, check_same
from farstep_server.core.driven import DrivenStep
from farstep_server.core.engine import Engine
from farstep_server.core.gradients import Gradients, materialize, reduce_gradients
from farstep_server.core.identity import Identity
from farstep_server.core.membership import Membership, Settled, WorkerRecord
from farstep_server.core.options import GroupEdits, agreed_edits, frozen_options
from farstep_server.core.records import Dump, Outcome
from farstep_server.core.rounds import check_alike, rounds_for, weights
from farstep_wire.errors import (
    Applied,
    ClosureError,
    FarstepError,
    FencedError,
    InternalError,
    InvalidRequestError,
    LayoutMismatchError,
    LeaseError,
    MismatchError,
    RollbackError,
)


class HostedOptimizer:
    """The state machine. ``clock`` only measures how long a step takes."""

    def __init__(self, identity: Identity, engine: Engine, clock: Callable[[], float]) -> None:
        self.identity = identity
        self.engine = engine
        self.version = 0
        self.incarnation = 1
        self._clock = clock
        self.members = Membership(identity.lease_seconds)
        self._rounds = rounds_for(identity.policy)
        self.started = False
        self.decided = 0
        """Acts that were decided, by whatever outcome: what makes two dumps of one version differ."""
        self._driven: DrivenStep | None = None
        self._aborted: FarstepError | None = None
        self._deferred: list[ev.Act | ev.ReadParameters | ev.TakeDump] = []
        self.stale = 0
        self.last_step_seconds = 0.0
        self._had_workers = False
        self._replies: ev.Replies = []
        self.defect: Exception | None = None
        """What was raised that no rule foresees, in the last event; for the owner to tell."""

    # Events in, replies out.

    def handle(self, event: ev.Event, now: float) -> ev.Replies:
        """Take one event at a time; return the replies that it caused, its own among them if it is ready."""
        self._replies = []
        self.defect = None
        ticket = getattr(event, "ticket", None)
        try:
            self._expire(now)
            self._dispatch(event, now)
            self._advance(now)
        except FarstepError as error:
            if ticket is not None:
                self._reply(ticket, ev.Refusal(error))
        except Exception as error:  # noqa: BLE001 - the owner tells it; nobody may wait for a reply that never comes
            self.defect = error
            if ticket is not None and all(ticket is not answered for answered, _ in self._replies):
                self._reply(ticket, ev.Refusal(_defect(error)))
        return self._replies

    def next_deadline(self) -> float | None:
        """Return when a Tick is due: a lease runs out, or a round's timeout passes."""
        deadlines = (self.members.next_deadline(), self._rounds.deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    @property
    def abandoned(self) -> bool:
        """Whether it is ephemeral and its last worker has left."""
        return self.identity.ephemeral and self._had_workers and not self.members.live()

    def live_workers(self) -> int:
        """Return how many workers are live."""
        return len(self.members.live())

    def _dispatch(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.Contribution() | ev.LoadState() | ev.AddGroup():
                self._on_act(event, now)
            case ev.Evaluation():
                self._on_evaluation(event, now)
            case ev.Touch():
                self.members.touch(event.worker, event.epoch, now)
            case ev.Join():
                self._on_join(event, now)
            case ev.Leave():
                self._on_leave(event)
            case ev.ZeroGrad():
                self._on_zero_grad(event, now)
            case ev.ReadParameters():
                self._on_read_parameters(event)
            case ev.ReadState():
                self._on_read_state(event)
            case ev.ReadDescription():
                self._reply(event.ticket, describe.description(self, self._waiting(), now, parameters=event.parameters))
            case ev.TakeDump():
                self._on_take_dump(event)
            case ev.Restore():
                self._on_restore(event, now)
            case ev.Stop():
                self._refuse_all(event.error)
                self._reply(event.ticket, ev.DumpReply(describe.dump(self)) if event.dump else self._done())
            case ev.Tick():
                pass

    def _reply(self, ticket: ev.Ticket, reply: ev.Reply) -> None:
        self._replies.append((ticket, reply))

    def _done(self) -> ev.DoneReply:
        return ev.DoneReply(self.version, self.incarnation)

    # Reading. In a closure-driven step the parameters are trial ones: what reads them waits for its end, or is refused where
    # the step may be waiting for the reader.

    def _on_read_parameters(self, event: ev.ReadParameters) -> None:
        if self._driven is not None and event.worker not in self._driven.contributions:
            self._deferred.append(event)
            return
        self._refuse_in_driven_step()
        self._reply(event.ticket, ev.ParametersReply(self.version, self.incarnation, self.engine.store.reader()))

    def _on_read_state(self, event: ev.ReadState) -> None:
        self._refuse_in_driven_step()
        state = self.engine.read_state(event.indices)
        self._reply(event.ticket, ev.StateReply(self.version, self.incarnation, state))

    def _on_take_dump(self, event: ev.TakeDump) -> None:
        if self._driven is not None:
            self._deferred.append(event)
        else:
            self._reply(event.ticket, ev.DumpReply(describe.dump(self)))

    def _refuse_in_driven_step(self) -> None:
        if self._driven is not None:
            raise MismatchError("a closure-driven step is under way; ask again when it has ended", applied=Applied.NO)

    # Membership.

    def _on_join(self, event: ev.Join, now: float) -> None:
        check_same(self.identity, self.engine, event)
        if event.lineage:
            check_reconnect(self.identity, self.members, event)
        previous = self._rounds.drop(event.worker)
        record, resumed = self.members.join(event.worker, event.instance, now)
        if previous is not None and not resumed:
            self._fence(previous.ticket, event.worker)
        elif previous is not None:
            self._rounds.put(previous, now)
        if not resumed:
            record.version = self.version
            record.first_round = self.version + 1 if self.started and self._rounds.gathering else self.version
            self._leave_driven_step(event.worker)
        self._had_workers = True
        options = frozen_options(self.engine.optimizer) if self.version or event.lineage else []
        if not options and not resumed:
            check_options(self.identity, self.engine, event)
        policy, device = self.identity.policy, str(self.engine.store.device)
        self._reply(
            event.ticket,
            ev.JoinReply(
                resumed, self.identity.lineage, self.incarnation, self.version, record.epoch, record.settled_sequence,
                policy, device, options, len(self.engine.layout.parameters), self.identity.lease_seconds,
            ),
        )  # fmt: skip

    def _fence(self, ticket: ev.Ticket, worker: str) -> None:
        error = FencedError(f"worker {worker}: another process has attached as the same worker", applied=Applied.NO)
        self._reply(ticket, ev.Refusal(error))

    def _on_leave(self, event: ev.Leave) -> None:
        if self.members.leave(event.worker, event.epoch):
            self._forget(event.worker)
        if event.ticket is not None:
            self._reply(event.ticket, self._done())

    def _expire(self, now: float) -> None:
        for worker in self.members.expire(now):
            self._forget(worker)

    def _forget(self, worker: str) -> None:
        act = self._rounds.drop(worker)
        if act is not None:
            error = LeaseError(
                f"worker {worker} is no member any more; its contribution was dropped", applied=Applied.NO
            )
            self._reply(act.ticket, ev.Refusal(error))
        self._leave_driven_step(worker)

    def _leave_driven_step(self, worker: str) -> None:
        if self._driven is None or worker not in self._driven.contributions:
            return
        self._driven.drop(worker)
        if not self._driven.contributions:
            self._abort_driven(ClosureError(f"worker {worker} left in an evaluation", applied=Applied.NO))

    # Acts.

    def _on_act(self, act: ev.Act, now: float) -> None:
        record = self.members.check(act.worker, act.epoch, now)
        if act.sequence <= record.settled_sequence:
            self._reply(act.ticket, self._recorded(record, act))
        elif self._driven is not None:
            self._on_act_during_driven(self._driven, act, now)
        elif self._is_current(act, record):
            self._rounds.put(act, now)

    def _recorded(self, record: WorkerRecord, act: ev.Act) -> ev.Reply:
        if not isinstance(act, ev.Contribution):
            return self._done()
        settled = record.settled or Settled(version=self.version)
        options = self._all_options()
        return ev.StepReply(
            settled.outcome, self.version, self.incarnation, settled.contributions, options, settled.loss,
            self.engine.store.reader(),
        )  # fmt: skip

    def _all_options(self) -> GroupEdits:
        return {number: (group, ()) for number, group in enumerate(frozen_options(self.engine.optimizer))}

    def _is_current(self, act: ev.Act, record: WorkerRecord) -> bool:
        if not isinstance(act, ev.Contribution):
            return True
        if act.incarnation != self.incarnation:
            self._not_used(act, record, Outcome.ROLLED_BACK)
            return False
        if act.version > self.version:
            raise RollbackError(
                f"{self.identity.name!r} is at version {self.version}; worker {act.worker} holds version {act.version}",
                applied=Applied.NO,
            )
        if act.version < self.version and self._rounds.refuses_older:
            record.stale += 1
            self.stale += 1
            self._not_used(act, record, Outcome.STALE)
            return False
        return True

    def _not_used(self, act: ev.Contribution, record: WorkerRecord, outcome: Outcome) -> None:
        record.version = self.version
        options = self._all_options()
        self._reply(
            act.ticket,
            ev.StepReply(
                outcome, self.version, self.incarnation, 0, options, None, self.engine.store.reader(),
                self.version - min(act.version, self.version),
            ),
        )  # fmt: skip

    def _on_zero_grad(self, event: ev.ZeroGrad, now: float) -> None:
        self.members.check(event.worker, event.epoch, now)
        self._rounds.drop(event.worker)
        self._reply(event.ticket, self._done())

    # Rounds.

    def _advance(self, now: float) -> None:
        while True:
            if self._driven is not None:
                if not self._driven.complete:
                    return
                self._advance_driven(self._driven)
            elif self._deferred:
                self._resume_deferred(now)
            elif acts := self._rounds.take_ready(self.members, self.version, started=self.started, now=now):
                self._commit(acts)
            else:
                return

    def _resume_deferred(self, now: float) -> None:
        """Take up what came in during a closure-driven step."""
        deferred, self._deferred = self._deferred, []
        for event in deferred:
            try:
                if isinstance(event, ev.Act):
                    self._on_act(event, now)
                else:
                    self._dispatch(event, now)
            except FarstepError as error:
                self._reply(event.ticket, ev.Refusal(error))

    def _commit(self, acts: Sequence[ev.Act]) -> None:
        try:
            check_alike(acts)
            match acts[0]:
                case ev.LoadState() as load:
                    self._load(load, acts)
                case ev.AddGroup() as group:
                    self._add_group(group, acts)
                case _:
                    self._commit_contributions([act for act in acts if isinstance(act, ev.Contribution)])
        except FarstepError as error:
            self._refuse(acts, error)
        except Exception as error:
            self._refuse(acts, _defect(error))
            raise

    def _refuse(self, acts: Sequence[ev.Act], error: FarstepError) -> None:
        answered = {id(ticket) for ticket, _ in self._replies}
        for act in acts:
            if id(act.ticket) not in answered:
                self._reply(act.ticket, ev.Refusal(error))

    def _commit_contributions(self, acts: list[ev.Contribution]) -> None:
        edits = agreed_edits(self.engine.optimizer, {act.worker: act.edits for act in acts})
        contributors = [act for act in acts if not act.abstain]
        if not contributors:
            self.engine.edit_options(edits)
            self._settle(acts, Outcome.SKIPPED, {}, None)
        elif any(act.closure for act in contributors):
            self._start_driven(acts, contributors, edits)
        else:
            self._step(acts, contributors, edits)

    def _step(self, acts: list[ev.Contribution], contributors: list[ev.Contribution], edits: GroupEdits) -> None:
        begun = self._clock()
        gradients: list[Gradients] = []
        edited: dict[int, Tensor] = {}
        for act in contributors:
            assert act.staged is not None, "a contribution without closure has gradients"
            own, changed = materialize(act.staged, self.engine.layout, self.engine.store.device)
            gradients.append(own)
            edited = {**changed, **edited}
        reduced = reduce_gradients(gradients, weights(contributors))
        changed_options = self.engine.step(reduced, edits, edited)
        self.last_step_seconds = self._clock() - begun
        self._committed(acts, changed_options, None)

    def _committed(self, acts: list[ev.Contribution], changed: GroupEdits, loss: object) -> None:
        self.version += 1
        self.started = True
        self._settle(acts, Outcome.COMMITTED, changed, loss)

    def _settle(self, acts: list[ev.Contribution], outcome: Outcome, changed: GroupEdits, loss: object) -> None:
        used = sum(not act.abstain for act in acts)
        for act in acts:
            record = self._record(act)
            record.settled = Settled(outcome, self.version, used, loss)
            record.version = self.version
            record.abstentions += act.abstain
            record.contributions += not act.abstain
            record.steps += 1
            reader = None if act.omit_parameters else self.engine.store.reader()
            staleness = max(0, self.version - 1 - act.version)
            self._reply(
                act.ticket,
                ev.StepReply(outcome, self.version, self.incarnation, used, changed, loss, reader, staleness),
            )

    def _record(self, act: ev.Act) -> WorkerRecord:
        record = self.members[act.worker]
        record.settled_sequence = act.sequence
        self.decided += 1
        return record

    def _load(self, load: ev.LoadState, acts: Sequence[ev.Act]) -> None:
        self.engine.load_state(load.state, load.groups)
        self.incarnation += 1
        self._settle_collective(acts)

    def _add_group(self, group: ev.AddGroup, acts: Sequence[ev.Act]) -> None:
        for act in acts[1:]:
            assert isinstance(act, ev.AddGroup), "checked to be alike"
            problem = group.layout.difference(act.layout)
            if problem is not None:
                raise LayoutMismatchError(f"add_param_group on worker {act.worker}: {problem}", applied=Applied.NO)
        self.engine.add_group(group.layout, group.options, group.contents)
        self._settle_collective(acts)

    def _settle_collective(self, acts: Sequence[ev.Act]) -> None:
        for act in acts:
            self._record(act)
            self._reply(act.ticket, self._done())

    # Closure-driven steps.

    def _start_driven(
        self, acts: list[ev.Contribution], contributors: list[ev.Contribution], edits: GroupEdits
    ) -> None:
        if not self.engine.entry.drives_closure or not all(act.closure for act in contributors):
            raise InvalidRequestError(
                f"{self.identity.optimizer} and the contributions disagree on whether the closure drives the step",
                applied=Applied.NO,
            )
        driven = DrivenStep(self.engine, acts, edits)
        driven.start()
        self._driven, self._aborted = driven, None
        self._after_driven(driven)

    def _on_act_during_driven(self, driven: DrivenStep, act: ev.Act, now: float) -> None:
        if driven.given_up_by(act):
            self._abort_driven(
                ClosureError(
                    f"worker {act.worker} gave the step up in the middle of an evaluation; it was rolled back",
                    applied=Applied.NO,
                )
            )
            self._on_act(act, now)
            return
        answers = driven.asked_again(act)
        if answers is None:
            self._deferred.append(act)
        else:
            self._replies += answers

    def _on_evaluation(self, event: ev.Evaluation, now: float) -> None:
        self.members.check(event.worker, event.epoch, now)
        driven = self._driven
        if driven is None or not driven.takes(event):
            reason = f": {self._aborted}" if self._aborted is not None else ""
            raise ClosureError(
                f"the step that this evaluation belongs to has ended; it was rolled back{reason}", applied=Applied.NO
            )
        try:
            driven.put(event)
        except ClosureError as error:
            self._abort_driven(error)

    def _advance_driven(self, driven: DrivenStep) -> None:
        try:
            driven.advance()
        except MismatchError as error:
            self._abort_driven(error)
        except FarstepError as error:
            self._driven, self._aborted = None, error
            self._replies += driven.refusals(error)
        except Exception as error:
            self._abort_driven(_defect(error))
            raise
        else:
            self._after_driven(driven)

    def _after_driven(self, driven: DrivenStep) -> None:
        if driven.finished is None:
            self._replies += driven.enquiries()
            return
        self._driven = None
        self._committed(driven.settled(), driven.changed, driven.finished.value)

    def _abort_driven(self, error: FarstepError) -> None:
        driven, self._driven = self._driven, None
        if driven is not None:
            self._aborted = error
            driven.roll_back()
            self._replies += driven.refusals(error)

    # Whole-state acts.

    def _waiting(self) -> set[str]:
        return {act.worker for act in self._rounds.acts()}

    def resume_from(self, dump: Dump, now: float) -> None:
        """Take over a dump after a restart: the same lineage and incarnation go on."""
        self._take_over(dump)
        self.incarnation = dump.incarnation
        self.started = dump.started
        self.members.restore(dump.members, now)
        self._had_workers = bool(dump.members)

    def _on_restore(self, event: ev.Restore, now: float) -> None:
        problem = self.engine.layout.difference(event.dump.layout)
        if problem is not None:
            raise LayoutMismatchError(f"the snapshot does not fit {self.identity.name!r}: {problem}")
        self._abort_driven(ClosureError("the hosted optimizer was rolled back", applied=Applied.NO))
        self._take_over(event.dump)
        self.incarnation += 1
        for act in self._rounds.take_all():
            if isinstance(act, ev.Contribution):
                record = self._record(act)
                record.settled = Settled(Outcome.ROLLED_BACK, self.version)
                self._not_used(act, record, Outcome.ROLLED_BACK)
            else:
                error = RollbackError("the hosted optimizer was rolled back", applied=Applied.NO)
                self._reply(act.ticket, ev.Refusal(error))
        self._reply(event.ticket, self._done())

    def _take_over(self, dump: Dump) -> None:
        self.engine.restore_state([(key, entries) for key, entries in dump.state], dump.options)
        self.engine.store.write(dump.contents)
        self.version = dump.version

    def _refuse_all(self, error: FarstepError) -> None:
        self._abort_driven(error)
        for waiting in (*self._rounds.take_all(), *self._deferred):
            self._reply(waiting.ticket, ev.Refusal(error))
        self._deferred.clear()


def _defect(error: Exception) -> FarstepError:
    return InternalError(f"{type(error).__name__}: {error}", applied=Applied.UNKNOWN)
