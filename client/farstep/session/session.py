"""One proxy optimizer's session: what its methods mean to the server. Its lower layers are ``attachment`` and ``holdings``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from farstep.inspection import Server
from farstep.session.binding import Load
from farstep.session.calls import call_done
from farstep.session.evaluations import Closure, Evaluations
from farstep.session.groups import Groups
from farstep.session.holdings import Holdings
from farstep.session.link import Link, internal
from farstep.session.steering import ask_again
from farstep_wire.convert import edits_from_proto, edits_to_proto, forms_to_proto
from farstep_wire.errors import ConfigurationError, FarstepError, RefusedError
from farstep_wire.frames import EMPTY, BytesSource
from farstep_wire.layout import SparseForm
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.v1.steering_pb2 import DeclareScheduleRequest, ScheduleState
from farstep_wire.values import from_map, from_value, to_value

_LOGGER = logging.getLogger("farstep")
Result = TypeVar("Result")
_ON_EXISTING = {
    "attach": pb.ON_EXISTING_ATTACH,
    "error": pb.ON_EXISTING_ERROR,
    "replace": pb.ON_EXISTING_REPLACE,
}


@dataclass(frozen=True)
class StepResult:
    """What came of a step. ``applied`` is False where the contribution was not used or nobody had gradients.

    ``accumulated``: sets of gradients that had waited on the server for it.
    """

    applied: bool
    version: int
    loss: object
    accumulated: int


def _used(stepped: pb.Stepped) -> bool:
    return stepped.outcome == pb.Stepped.OUTCOME_COMMITTED


class Session(Holdings):
    """The client's side of one hosted optimizer. Not thread-safe, as optimizers are not."""

    # Steps.

    def step(self, groups: Groups, *, num_samples: float | None = None, abstain: bool = False) -> StepResult:
        """Contribute the gradients as they stand, or abstain, and take over the new parameters."""
        with self.binding.undisturbed():
            return self._step(groups, num_samples, abstain=abstain)

    def _step(self, groups: Groups, num_samples: float | None, *, abstain: bool) -> StepResult:
        self._groups = groups
        edits = self._options.edits(groups)
        edited: list[int] = []
        load = Load()
        if not abstain:
            self._check_standing()
            edited = self.binding.edited()
            load = self.binding.load(edited)
        message = self._contribution(num_samples)
        message.abstain = abstain
        message.forms.extend(forms_to_proto(load.forms))
        message.edits.extend(edits_to_proto(edits))
        message.edited_parameters.extend(edited)
        result = self._after_step(self._contribute(message, load, self._receive_step), edits, abstain=abstain)
        if self._overlap is not None:
            self._overlap.await_needed()
        return result

    def accumulate(self, groups: Groups) -> None:
        """Add the gradients as they stand to those that wait on the server for the next contribution."""
        if self.subject.drives_closure:
            raise ConfigurationError(
                f"{self.subject.optimizer} asks its closure for gradients; there is nothing to accumulate: "
                f"let the closure go through all of the batch"
            )
        self._check_standing()
        self._groups = groups
        load = self.binding.load()
        standing = self.link.standing
        standing.sequence += 1
        message = pb.Accumulate(sequence=standing.sequence, forms=forms_to_proto(load.forms))

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            message.epoch = standing.epoch
            message.shared, body = load.through(self.link.lane)
            return pb.ClientFrame(accumulate=message), body

        unsettled, self._unsettled = self._unsettled, True
        if self._feedback is None:
            call_done(self.link, make)
        else:
            self._feedback.follow(message.sequence, lambda: call_done(self.link, make), lambda _: True)
        self._unsettled = unsettled
        self.accumulated += 1

    def driven_step(self, groups: Groups, closure: Closure, *, num_samples: float | None = None) -> StepResult:
        """Have the server drive the closure through one step."""
        self._check_standing()
        self._groups = groups
        edits = self._options.edits(groups)
        edited = self.binding.edited()
        message = self._contribution(num_samples)
        message.closure = True
        message.edits.extend(edits_to_proto(edits))
        message.edited_parameters.extend(edited)
        load = Load(rest=self.binding.edited_contents(edited))
        evaluations = Evaluations(closure)
        before = [tensor.detach().clone() for tensor in self.binding.tensors]

        def handle(link: Link, deadline: float) -> pb.Stepped:
            while True:
                frame = link.receive(self._sink_for, deadline)
                if frame.WhichOneof("body") != "evaluate":
                    return self._stepped(frame)
                self._take(frame.evaluate.changes)
                link.send(*self._evaluate(evaluations, frame.evaluate.number, message.sequence))

        self._driving = True
        try:
            result = self._after_step(self._contribute(message, load, handle), edits)
        except BaseException as error:
            # The parameters hold the last trial. A server that has refused the step has those to go on from.
            if not (isinstance(error, RefusedError) and self._pulled()):
                self._give_back(before, edited)
            if isinstance(error, FarstepError) and evaluations.error is not None:
                raise evaluations.error from None
            raise
        finally:
            self._driving = False
        return replace(result, loss=evaluations.same_as_first(result.loss))

    def _give_back(self, before: Sequence[Tensor], edited: Sequence[int]) -> None:
        if self._adopts:
            self._torn = True  # those are the server's to give back
        else:
            self.binding.restore(before, edited)
            self._torn = False

    def _pulled(self) -> bool:
        try:
            self._pull()
        except FarstepError:
            return False
        return True

    def _contribution(self, num_samples: float | None) -> pb.Contribution:
        standing = self.link.standing
        standing.sequence += 1
        return pb.Contribution(
            sequence=standing.sequence,
            version=standing.version,
            incarnation=standing.incarnation,
            num_samples=num_samples or 0.0,
            accumulated=self.accumulated,
        )

    def _contribute(
        self, message: pb.Contribution, load: Load, handle: Callable[[Link, float], pb.Stepped]
    ) -> pb.Stepped:
        self._unsettled = True

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            message.epoch = self.link.standing.epoch
            self._takes_changes = message.takes_changes = self._asks_for_changes(message, load)
            message.leaves_parameters = self.link.lane is not None
            if self.link.standing.settled >= message.sequence:
                # Applied before the connection broke: only the recorded answer is wanted.
                known = pb.Contribution(epoch=message.epoch, sequence=message.sequence, abstain=True)
                return pb.ClientFrame(contribution=known), EMPTY
            message.staged = self._overlap is not None and self._overlap.complete(self.link, load)
            if message.staged:
                return pb.ClientFrame(contribution=message), load.rest
            message.shared, body = load.through(self.link.lane)
            return pb.ClientFrame(contribution=message), body

        before = self.link.traffic
        if self._feedback is None or load.whole is None:
            stepped = self.link.call(make, handle)
        else:
            stepped = self._feedback.follow(message.sequence, lambda: self.link.call(make, handle), _used)
        self._unsettled = False
        if self._overlap is not None:
            self._overlap.settled()
        self.step_traffic = self.link.traffic - before
        return stepped

    def _asks_for_changes(self, message: pb.Contribution, load: Load) -> bool:
        if message.abstain or message.closure or not self._knows_all(message.edited_parameters):
            return False
        # What comes late is of no hurry: then only rows are worth that step waits for them.
        sparse = any(isinstance(form, SparseForm) for form in load.forms.values())
        return sparse or self._overlap is None or not self._overlap.late

    def _receive_step(self, link: Link, deadline: float) -> pb.Stepped:
        overlap = self._overlap
        if overlap is None or not overlap.late or not self.binding.may_come_late:
            return self._stepped(link.receive(self._sink_for, deadline))
        frame, rest = link.receive_first(self._sink_for, deadline)
        if rest is None:
            return self._stepped(frame)
        if frame.WhichOneof("body") != "stepped":
            raise internal(f"{frame.WhichOneof('body')} where stepped is due")
        if frame.stepped.HasField("changed"):
            link.receive_rest(rest)
            return self._stepped(frame)
        overlap.begin(link, rest)
        self._holds_average = False
        return frame.stepped

    def _stepped(self, frame: pb.ServerFrame) -> pb.Stepped:
        if frame.WhichOneof("body") != "stepped":
            raise internal(f"{frame.WhichOneof('body')} where stepped is due")
        if frame.stepped.HasField("changed"):
            self.binding.received_changed()
            self._torn = False
        elif frame.stepped.parameters:
            self._take(frame.stepped.changes)
        if frame.stepped.parameters:
            self._holds_average = False
        return frame.stepped

    def _after_step(self, stepped: pb.Stepped, edits: dict[int, Any], *, abstain: bool = False) -> StepResult:
        standing = self.link.standing
        standing.version, standing.incarnation = stepped.version, stepped.incarnation
        if stepped.parameters and not self._torn:
            self._holds_standing()
        used = stepped.outcome in {pb.Stepped.OUTCOME_COMMITTED, pb.Stepped.OUTCOME_SKIPPED}
        if used:
            self._options.acknowledge_edits(edits)
        accumulated = self.accumulated
        if not (abstain and used):
            self.accumulated = 0
        changed = edits_from_proto(stepped.edits, len(self._groups)) if stepped.edits else {}
        rolled_back = stepped.outcome == pb.Stepped.OUTCOME_ROLLED_BACK
        if used or rolled_back:
            self._take_options(changed)
        if not used:
            reason = "the hosted optimizer was rolled back" if rolled_back else "its round was over"
            _LOGGER.warning(
                "farstep: a contribution of worker %s to %r was not used: %s; going on from version %d",
                self.worker, self.name, reason, stepped.version,
            )  # fmt: skip
        if stepped.notice:
            _LOGGER.warning("farstep: %r at version %d: %s", self.name, stepped.version, stepped.notice)
        applied = _used(stepped)
        loss = from_value(stepped.loss, "loss") if stepped.HasField("loss") else None
        self.staleness = stepped.staleness
        if self._torn:
            self._pull()
        return StepResult(applied, stepped.version, loss, accumulated)

    def _take_options(self, changed: Mapping[int, tuple[dict[str, Any], Sequence[str]]]) -> None:
        for number, (values, removed) in changed.items():
            group = self._groups[number]
            for key in removed:
                group.pop(key, None)
            group.update(values)
        if changed:
            self._options.acknowledge(self._groups)

    def _evaluate(self, evaluations: Evaluations, number: int, sequence: int) -> tuple[pb.ClientFrame, BytesSource]:
        message = pb.Evaluation(epoch=self.link.standing.epoch, sequence=sequence, number=number)
        body: BytesSource = EMPTY
        if evaluations.run(number):
            try:
                body = self._put_result(message, evaluations.loss)
            except Exception as error:  # noqa: BLE001 - like the closure's own: the server must not wait for it
                evaluations.error = error
        if evaluations.error is not None:
            message.error = repr(evaluations.error)
        return pb.ClientFrame(evaluation=message), body

    def _put_result(self, message: pb.Evaluation, loss: object) -> BytesSource:
        plain = to_value(loss.detach() if isinstance(loss, Tensor) else loss, "the closure's loss")
        load = self.binding.load()
        message.loss.CopyFrom(plain)
        message.forms.extend(forms_to_proto(load.forms))
        message.shared, body = load.through(self.link.lane)
        return body

    # Steering.

    def attach(self, groups: Groups) -> None:
        """Create the hosted optimizer or join it, with the schedules that were declared for an earlier one."""
        super().attach(groups)
        for request in self.schedules:
            self._take_schedule(request)

    def ask_server(self, act: Callable[[Server], Result]) -> Result:
        """Ask the server something beside the session; see ``ask_again``."""
        return ask_again(self.address, self.remote, act)

    def declare_schedule(
        self, groups: Groups, scheduler: str, arguments: dict[str, Any], parts: Sequence[int], every: int
    ) -> ScheduleState:
        """Put a learning-rate schedule on the server, and take over what it makes of the options."""
        self._groups = groups
        edits = edits_to_proto(self._options.edits(groups))
        state = self._take_schedule(self.schedules.new(scheduler, arguments, parts, every), edits)
        self.schedules.confirm()
        return state

    def _take_schedule(self, request: DeclareScheduleRequest, edits: Sequence[pb.GroupEdit] = ()) -> ScheduleState:
        request.name, request.lineage = self.name, self.link.standing.lineage
        del request.edits[:]
        request.edits.extend(edits)
        state: ScheduleState = self.ask_server(lambda server: server.declare_schedule(request))
        for group, message in zip(self._groups, state.groups, strict=False):
            group.update(from_map(message, "param_groups"))
        self._options.acknowledge(self._groups)
        return state
