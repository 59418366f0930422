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

from farstep_server.core import describe
from farstep_server.core import events as ev
from farstep_server.core.admission import Misfits, check_group, check_options, check_reconnect, check_same
from farstep_server.core.answers import Answers, Standing
from farstep_server.core.decisions import Decisions
from farstep_server.core.driving import Driving, defect
from farstep_server.core.engine import Engine
from farstep_server.core.gradients import materialize
from farstep_server.core.history import RoundKind
from farstep_server.core.identity import Identity
from farstep_server.core.membership import Membership, Settled, WorkerRecord
from farstep_server.core.options import GroupEdits, agreed_edits, check_same_value, frozen_options
from farstep_server.core.parameters import ParameterReader
from farstep_server.core.pipeline import Pipeline
from farstep_server.core.records import Dump, Outcome
from farstep_server.core.rounds import check_alike, rounds_for
from farstep_server.core.steering import steer
from farstep_wire.errors import (
    Applied,
    ClosureError,
    FarstepError,
    FencedError,
    GradientsLostError,
    InvalidRequestError,
    LayoutMismatchError,
    LeaseError,
    MismatchError,
    NonFiniteError,
    RollbackError,
)
from farstep_wire.policy import Async, Sync
from farstep_wire.settings import Settings

Deferred = ev.Act | ev.ReadParameters | ev.TakeDump | ev.Steering
"""What waits for the end of a closure-driven step."""


class HostedOptimizer:
    """The state machine. ``clock`` only measures how long a step takes."""

    def __init__(
        self, identity: Identity, engine: Engine, clock: Callable[[], float], settings: Settings | None = None
    ) -> None:
        self.identity = identity
        self.engine = engine
        self.pipeline = Pipeline(engine, settings or Settings())
        self.members = Membership(identity.lease_seconds)
        self._misfits = Misfits()
        self._clock = clock
        self._standing = Standing()
        self.engine.store.journal.is_version(self._standing.version)
        self._rounds = rounds_for(identity.policy)
        self._answers = Answers(engine, self.members, self._rounds, self._standing)
        self.decisions = Decisions(self.pipeline, self.members, self._rounds, self._answers, self._standing)
        self._driving = Driving(identity, self.pipeline, self.decisions, self._answers, clock)
        self._deferred: list[Deferred] = []
        self._sessions: dict[str, ev.Ticket] = {}
        self.stale = 0
        self._had_workers = False
        self.defect: Exception | None = None
        """What was raised that no rule foresees, in the last event; for the owner to tell."""

    @property
    def version(self) -> int:
        """How many steps have been committed."""
        return self._standing.version

    @property
    def incarnation(self) -> int:
        """Which life of it; a rollback starts a new one."""
        return self._standing.incarnation

    # Events in, replies out.

    def handle(self, event: ev.Event, now: float) -> ev.Replies:
        """Take one event at a time; return the replies that it caused, its own among them if it is ready."""
        replies: ev.Replies = []
        self._answers.replies = replies
        self.defect = None
        ticket = getattr(event, "ticket", None)
        try:
            self._expire(now)
            try:
                self._dispatch(event, now)
            except FarstepError as error:
                if ticket is not None:
                    self._reply(ticket, ev.Refusal(error))
            self._advance(now)
        except Exception as error:  # noqa: BLE001 - the owner tells it; nobody may wait for a reply that never comes
            self.defect = error
            if ticket is not None and all(ticket is not answered for answered, _ in replies):
                self._reply(ticket, ev.Refusal(defect(error)))
        return self._answers.replies

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
            case ev.Contribution() | ev.Accumulate() | ev.LoadState() | ev.AddGroup():
                self._on_act(event, now)
            case ev.Evaluation():
                self.members.check(event.worker, event.epoch, now)
                self._driving.on_evaluation(event)
            case ev.Touch():
                self.members.touch(event.worker, event.epoch, now, event.round_trip_seconds)
            case ev.Join():
                self._on_join(event, now)
            case ev.Leave():
                self._on_leave(event)
            case ev.ZeroGrad():
                self._on_zero_grad(event, now)
            case ev.ReadParameters():
                self._on_read_parameters(event)
            case ev.Configure() | ev.DeclareSchedule() | ev.ReadSchedule() | ev.LoadSchedule():
                self._on_steering(event)
            case ev.TakeDump():
                self._on_take_dump(event)
            case ev.Restore():
                self._on_restore(event, now)
            case ev.Stop():
                self._refuse_all(event.error)
                self._reply(event.ticket, ev.DumpReply(describe.dump(self)) if event.dump else self._answers.done())
            case ev.Tick():
                pass
            case _:
                self._on_look(event, now)

    def _reply(self, ticket: ev.Ticket, reply: ev.Reply) -> None:
        self._answers.put(ticket, reply)

    # Reading. In a closure-driven step the parameters are trial ones: what reads them waits for its end, or is refused where
    # the step may be waiting for the reader.

    def _on_look(
        self, event: ev.ReadState | ev.ReadDescription | ev.ReadHistory | ev.ShareParameters, now: float
    ) -> None:
        match event:
            case ev.ShareParameters():
                memory = self.engine.store.share(event.make)
                looks_on = (
                    event.onlooker is not None and self._goes_in_step and self.engine.store.look_on(event.onlooker)
                )
                self._reply(event.ticket, ev.SharedReply(memory, self.engine.layout, looks_on))
            case ev.ReadState():
                self._refuse_in_driven_step()
                state = self.engine.read_state(event.indices)
                self._reply(event.ticket, ev.StateReply(self.version, self.incarnation, state))
            case ev.ReadDescription():
                waiting = {*(act.worker for act in self._rounds.acts()), *self._answers.held()}
                self._reply(event.ticket, describe.description(self, waiting, now, parameters=event.parameters))
            case ev.ReadHistory():
                self._reply(event.ticket, ev.HistoryReply(self.decisions.history.after(event.after)))

    def _on_read_parameters(self, event: ev.ReadParameters) -> None:
        if self._driving.under_way and not self._driving.takes_part(event.worker):
            self._deferred.append(event)
            return
        self._refuse_in_driven_step()
        average = ParameterReader(self.pipeline.average(event.average), self.engine.layout) if event.average else None
        parameters = average or self.engine.store.read(shared=event.shared)
        self._reply(event.ticket, ev.ParametersReply(self.version, self.incarnation, parameters))

    def _on_take_dump(self, event: ev.TakeDump) -> None:
        if self._driving.under_way:
            self._deferred.append(event)
        else:
            self._reply(event.ticket, ev.DumpReply(describe.dump(self)))

    def _on_steering(self, event: ev.Steering) -> None:
        if self._driving.under_way:
            self._deferred.append(event)
            return
        self.decisions.decided += not isinstance(event, ev.ReadSchedule)
        self._reply(event.ticket, steer(event, self.pipeline, self.identity, self.version))

    def _refuse_in_driven_step(self) -> None:
        if self._driving.under_way:
            raise MismatchError("a closure-driven step is under way; ask again when it has ended", applied=Applied.NO)

    # Membership.

    def _on_join(self, event: ev.Join, now: float) -> None:
        fresh = not self.version and not event.lineage
        try:
            check_same(self.identity, self.engine, self.members, event)
            if fresh and not self.members.knows(event.worker, event.instance):
                check_options(self.identity, self.pipeline, event)
        except (LayoutMismatchError, MismatchError) as error:
            self._tell_misfit(event.worker, error)
            raise
        if event.lineage:
            check_reconnect(self.identity, self.members, event)
        self._misfits.joined(event.worker)
        held = self._answers.take_held(event.worker)
        record, resumed = self.members.join(event.worker, event.instance, now)
        if not resumed:
            if held is not None:
                self._fence(held.act.ticket, event.worker, Applied.YES)
            previous = self._rounds.drop(event.worker)
            if previous is not None:
                self._fence(previous.ticket, event.worker, Applied.NO)
            record.version = self.version
            gathering = self.decisions.started and self._rounds.gathering
            record.first_round = self.version + 1 if gathering else self.version
            self._driving.drop(event.worker)
            self.pipeline.accumulated.drop(event.worker)
        self._end_session(event.worker, FencedError(f"worker {event.worker} has attached anew"))
        if event.session is not None:
            self._sessions[event.worker] = event.session
        self._had_workers = True
        self._answers.log.told(event.worker)
        self._reply(event.ticket, self._welcome(record, fresh=fresh, resumed=resumed))

    def _tell_misfit(self, worker: str, error: FarstepError) -> None:
        """Tell the members whose first round a refused worker keeps from coming about: now where they wait for it."""
        self._misfits.refused(worker, error)
        if self._incomplete:
            for act in self._rounds.acts():
                told = self._misfits.untold(act.worker)
                if told is not None:
                    self._rounds.drop(act.worker)
                    self.decisions.refused([act], told)

    @property
    def _incomplete(self) -> bool:
        """Whether the first round cannot come about yet, too few workers being there."""
        policy = self.identity.policy
        return isinstance(policy, Sync) and not self.decisions.started and self.live_workers() < policy.workers

    def _welcome(self, record: WorkerRecord, *, fresh: bool, resumed: bool) -> ev.JoinReply:
        options = [] if fresh and not len(self.pipeline.schedules) else frozen_options(self.engine.optimizer)
        return ev.JoinReply(
            resumed, self.identity.lineage, self.incarnation, self.version, record.epoch, record.settled_sequence,
            self.identity.policy, str(self.engine.store.device), options, len(self.engine.layout.parameters),
            self.identity.lease_seconds,
        )  # fmt: skip

    def _fence(self, ticket: ev.Ticket, worker: str, applied: Applied) -> None:
        error = FencedError(f"worker {worker}: another process has attached as the same worker", applied=applied)
        self._reply(ticket, ev.Refusal(error))

    def _end_session(self, worker: str, error: FarstepError) -> None:
        """Tell a worker's session that it is a member's no more."""
        session = self._sessions.pop(worker, None)
        if session is not None:
            self._reply(session, ev.Refusal(error))

    def _on_leave(self, event: ev.Leave) -> None:
        self.engine.store.look_away((event.worker, event.epoch))
        if self.members.leave(event.worker, event.epoch):
            self._sessions.pop(event.worker, None)
            self._forget(event.worker)
        if event.ticket is not None:
            self._reply(event.ticket, self._answers.done())

    def _expire(self, now: float) -> None:
        for worker in self.members.expire(now):
            self._end_session(worker, LeaseError(f"worker {worker}'s lease has run out"))
            self._forget(worker)

    def _forget(self, worker: str) -> None:
        act, held = self._rounds.drop(worker), self._answers.take_held(worker)
        if act is not None:
            text = f"worker {worker} is no member any more; its contribution was dropped"
            self._reply(act.ticket, ev.Refusal(LeaseError(text, applied=Applied.NO)))
        if held is not None:
            text = f"worker {worker} is no member any more; its step was applied"
            self._reply(held.act.ticket, ev.Refusal(LeaseError(text, applied=Applied.YES)))
        self.pipeline.accumulated.drop(worker)
        self._driving.drop(worker)

    # Acts.

    def _on_act(self, act: ev.Act, now: float) -> None:
        record = self.members.check(act.worker, act.epoch, now)
        if act.sequence <= record.settled_sequence:
            self._answers.again(act)
        elif isinstance(act, ev.Accumulate):
            self._accumulate(act)
        elif self._driving.under_way:
            if self._driving.on_act(act):
                self._deferred.append(act)
        elif self._incomplete and (misfit := self._misfits.untold(act.worker)) is not None:
            raise misfit
        elif self._is_current(act, record):
            self._rounds.put(act, now)

    def _is_current(self, act: ev.Act, record: WorkerRecord) -> bool:
        if isinstance(act, ev.AddGroup):
            check_group(self.engine, act)
        if not isinstance(act, ev.Contribution):
            return True
        if act.incarnation != self.incarnation:
            self._not_used(act, Outcome.ROLLED_BACK)
            return False
        if act.version > self.version:
            raise RollbackError(
                f"{self.identity.name!r} is at version {self.version}; worker {act.worker} holds version {act.version}",
                applied=Applied.NO,
            )
        if act.version < self.version and self._rounds.refuses_older:
            record.stale += 1
            self.stale += 1
            self._not_used(act, Outcome.STALE)
            return False
        self._check_accumulated(act)
        return True

    def _not_used(self, act: ev.Contribution, outcome: Outcome) -> None:
        self.pipeline.accumulated.drop(act.worker)
        self._answers.not_used(act, outcome)

    def _accumulate(self, act: ev.Accumulate) -> None:
        if self.engine.entry.drives_closure:
            raise InvalidRequestError(
                f"{self.identity.optimizer} asks its closure for gradients; none can be accumulated before",
                applied=Applied.NO,
            )
        own, _ = materialize(act.staged, self.engine.layout, self.engine.store.device)
        self.pipeline.accumulated.add(act.worker, own)
        self.decisions.record(act)
        self._reply(act.ticket, self._answers.done())

    def _check_accumulated(self, act: ev.Contribution) -> None:
        held = self.pipeline.accumulated.count(act.worker)
        if act.accumulated != held and not act.abstain:
            raise GradientsLostError(
                f"worker {act.worker} has accumulated gradients {act.accumulated} times on the server, which holds {held}: "
                f"its lease ran out in between, or the server was started again. The contribution was not used; call "
                f"zero_grad() and go through the batch again",
                applied=Applied.NO,
            )

    def _on_zero_grad(self, event: ev.ZeroGrad, now: float) -> None:
        self.members.check(event.worker, event.epoch, now)
        self._driving.given_up_by(event.worker)
        self._rounds.drop(event.worker)
        self.pipeline.accumulated.drop(event.worker)
        self._reply(event.ticket, self._answers.done())

    # Rounds.

    def _advance(self, now: float) -> None:
        self._answers.release()
        while True:
            if self._driving.under_way:
                if not self._driving.advance():
                    return
            elif self._deferred:
                self._resume_deferred(now)
            elif acts := self._rounds.take_ready(self.members, self.version, started=self.decisions.started, now=now):
                self._commit(acts)
            else:
                self._begin_reduction()
                return
            self._answers.release()

    def _begin_reduction(self) -> None:
        if not self.pipeline.begins_early:
            return
        leading = self._rounds.leading(self.members, self.version)
        if len(leading) > 1 and all(isinstance(act, ev.Contribution) and not act.closure for act in leading):
            self.pipeline.begin([act for act in leading if isinstance(act, ev.Contribution)])

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
            self.decisions.refused(acts, error)
        except Exception as error:
            self.decisions.refused(acts, defect(error))
            raise

    def _commit_contributions(self, acts: list[ev.Contribution]) -> None:
        edits = agreed_edits(self.engine.optimizer, {act.worker: act.edits for act in acts})
        contributors = [act for act in acts if not act.abstain]
        if not contributors:
            self.decisions.skipped(acts, edits, "")
        elif any(act.closure for act in contributors):
            self._driving.start(acts, contributors, edits)
        else:
            self._step(acts, contributors, edits)

    def _step(self, acts: list[ev.Contribution], contributors: list[ev.Contribution], edits: GroupEdits) -> None:
        begun = self._clock()
        try:
            with self.engine.store.while_waiting([(act.worker, act.epoch) for act in acts]):
                changed = self.pipeline.step(contributors, edits, self._lr_divisor(contributors))
        except NonFiniteError as error:
            if self.pipeline.settings.non_finite == "raise":
                raise
            self.decisions.skipped(acts, edits, str(error))
        else:
            self.decisions.committed(acts, edits, changed, self._clock() - begun)

    @property
    def _goes_in_step(self) -> bool:
        """Whether every worker waits whenever there is a step, as long as all are well."""
        policy = self.identity.policy
        return isinstance(policy, Sync) and policy.min_workers is None

    def _lr_divisor(self, contributors: Sequence[ev.Contribution]) -> int:
        policy = self.identity.policy
        scaled = isinstance(policy, Async) and policy.scale_lr
        return max(1, self.version - contributors[0].version) if scaled else 1

    def _load(self, load: ev.LoadState, acts: Sequence[ev.Act]) -> None:
        loads = {act.worker: act for act in acts if isinstance(act, ev.LoadState)}
        for number in range(len(load.groups)):
            groups = {worker: act.groups[number] for worker, act in loads.items()}
            check_same_value("load_state_dict", f"param_groups[{number}]", groups)
        states = {worker: dict(act.state) for worker, act in loads.items()}
        check_same_value("load_state_dict", "state", states)
        self.engine.load_state(load.state, load.groups)
        self._standing.incarnation += 1
        self._note_all_options([act.worker for act in acts])
        self.decisions.collective(acts, RoundKind.LOAD_STATE)
        self._roll_back(self._rounds.take_all())

    def _add_group(self, group: ev.AddGroup, acts: Sequence[ev.Act]) -> None:
        for act in acts[1:]:
            assert isinstance(act, ev.AddGroup), "checked to be alike"
            problem = group.layout.difference(act.layout)
            if problem is not None:
                raise LayoutMismatchError(f"add_param_group on worker {act.worker}: {problem}", applied=Applied.NO)
        options = {act.worker: act.options for act in acts if isinstance(act, ev.AddGroup)}
        check_same_value("add_param_group", f"param_groups[{len(self.engine.layout.group_sizes)}]", options)
        self.pipeline.add_group(group.layout, group.options, group.contents)
        self.decisions.collective(acts, RoundKind.ADD_PARAM_GROUP)

    # Whole-state acts.

    def _note_all_options(self, authors: Sequence[str] = ()) -> None:
        options = dict(enumerate(frozen_options(self.engine.optimizer)))
        self._answers.log.note({number: (group, ()) for number, group in options.items()}, self.version, authors)

    def resume_from(self, dump: Dump, now: float) -> None:
        """Take over a dump after a restart: the same lineage and incarnation go on."""
        self._take_over(dump)
        self._standing.incarnation = dump.incarnation
        self.decisions.started = dump.started
        self.members.restore(dump.members, now)
        self._had_workers = bool(dump.members)

    def _on_restore(self, event: ev.Restore, now: float) -> None:
        problem = self.engine.layout.difference(event.dump.layout)
        if problem is not None:
            raise LayoutMismatchError(f"the snapshot does not fit {self.identity.name!r}: {problem}")
        self._driving.abort(ClosureError("the hosted optimizer was rolled back", applied=Applied.NO))
        self._take_over(event.dump)
        self._standing.incarnation += 1
        self.members.expect_all(self.version)
        self._note_all_options()
        self.decisions.restored()
        held = [answer.act for worker in self._answers.held() if (answer := self._answers.take_held(worker))]
        self._roll_back([*held, *self._rounds.take_all()])
        self._reply(event.ticket, self._answers.done())

    def _roll_back(self, acts: Sequence[ev.Act]) -> None:
        """Settle what waits, of an incarnation that has ended."""
        for act in acts:
            if isinstance(act, ev.Contribution):
                record = self.decisions.record(act)
                record.settled = Settled(Outcome.ROLLED_BACK, self.version)
                self._not_used(act, Outcome.ROLLED_BACK)
            else:
                error = RollbackError("the hosted optimizer was rolled back", applied=Applied.NO)
                self._reply(act.ticket, ev.Refusal(error))

    def _take_over(self, dump: Dump) -> None:
        self.pipeline.take_over(dump)
        self._standing.version = dump.version

    def _refuse_all(self, error: FarstepError) -> None:
        self._driving.abort(error)
        self._answers.release(all_of_them=True)
        for waiting in (*self._rounds.take_all(), *self._deferred):
            self._reply(waiting.ticket, ev.Refusal(error))
        self._deferred.clear()
