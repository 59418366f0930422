"""One proxy optimizer's session: what its methods mean to the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from farstep.config import Remote
from farstep.inspection import Server, connect
from farstep.session.binding import Binding, layout_of
from farstep.session.calls import call_done, call_get_state, call_pull
from farstep.session.evaluations import Closure, Evaluations
from farstep.session.groups import Groups, check_only_added, group_body, group_layout, hold
from farstep.session.link import Link, internal
from farstep.session.options import OptionTracker, sendable
from farstep.session.placement import locate, policy_of, worker_of
from farstep.session.replicas import replica_rank
from farstep.session.snapshot import FetchedState, state_digest
from farstep.transports.base import Traffic
from farstep_wire.bundle import BundleBody
from farstep_wire.convert import edits_from_proto, edits_to_proto, forms_to_proto, layout_to_proto, policy_to_proto
from farstep_wire.errors import ConfigurationError, DeadlineError, FarstepError, UnavailableError
from farstep_wire.frames import EMPTY, Body, BytesSource, NullSink, Sink
from farstep_wire.layout import GradientForm, dtype_name
from farstep_wire.policy import Async, Sync
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.v1.steering_pb2 import DeclareScheduleRequest, ScheduleState
from farstep_wire.values import from_map, from_value, to_map, to_value

_LOGGER = logging.getLogger("farstep")
Result = TypeVar("Result")
_ON_EXISTING = {
    "attach": pb.ON_EXISTING_ATTACH,
    "error": pb.ON_EXISTING_ERROR,
    "replace": pb.ON_EXISTING_REPLACE,
}


@dataclass(frozen=True)
class Subject:
    """What is to be hosted: the registered name of the class, its arguments, and the options that it cannot do without."""

    optimizer: str
    arguments: dict[str, Any]
    required: frozenset[str]
    drives_closure: bool


@dataclass(frozen=True)
class StepResult:
    """What came of a step. ``applied`` is False where the contribution was not used or nobody had gradients.

    ``accumulated``: sets of gradients that had waited on the server for it.
    """

    applied: bool
    version: int
    loss: object
    accumulated: int


class Session:
    """The client's side of one hosted optimizer. Not thread-safe, as optimizers are not."""

    def __init__(self, remote: Remote, subject: Subject) -> None:
        self.remote = remote
        self.subject = subject
        self.policy = policy_of(remote)
        self.worker = worker_of(remote)
        self.address, self.name, self.ephemeral = locate(remote)
        self._options = OptionTracker(subject.required)
        self._link: Link | None = None
        self._binding: Binding | None = None
        self._groups: Groups = []
        self._unsettled = False
        self._holds_average = False
        self._replica_known = False
        self._replica: int | None = None
        self._schedules: list[DeclareScheduleRequest] = []
        self.accumulated = 0
        """Sets of gradients that wait on the server for this worker's next contribution."""
        self.staleness = 0
        """Versions that were committed between the parameters that the last gradients were taken at and their use."""
        self.fetched: FetchedState | None = None
        self.kept = 0
        """How many parameters the proxy keeps a step count of."""
        self._ended_traffic = Traffic()

    @property
    def traffic(self) -> Traffic:
        """What has gone between this session and the server, since it was made."""
        return self._ended_traffic if self._link is None else self._ended_traffic + self._link.traffic

    @property
    def expects_several_workers(self) -> bool:
        """Whether rounds have more than one worker's contributions."""
        return isinstance(self.policy, Sync) and self.policy.workers > 1

    def only_takes(self, groups: Groups) -> bool:
        """Whether this worker's gradients are another one's already, so that it takes the parameters and gives nothing.

        Found out once, at the first step. ConfigurationError: replicas cannot go through ``Async`` and stay in step.
        """
        if not self._replica_known:
            self._replica_known = True
            self._replica = replica_rank([tensor for group in groups for tensor in group["params"]])
            if self._replica is not None:
                self._tell_replica()
        return bool(self._replica) and self.expects_several_workers

    def _tell_replica(self) -> None:
        if isinstance(self.policy, Async):
            self._replica_known = False
            raise ConfigurationError(
                "the model is wrapped in DistributedDataParallel, whose replicas step together: use farstep.Sync, or drop "
                "the wrapper to have each worker step on its own under farstep.Async"
            )
        if self.expects_several_workers:
            _LOGGER.warning(
                "farstep: the model is wrapped in DistributedDataParallel, which has averaged the gradients already: rank 0 "
                "contributes them, the other ranks take the parameters over (this is rank %s)", self._replica,
            )  # fmt: skip

    # Attaching.

    @property
    def attached(self) -> bool:
        """Whether there is a hosted optimizer behind it yet."""
        return self._link is not None

    def attach(self, groups: Groups) -> None:
        """Create the hosted optimizer or join it; afterwards parameters and options are those of the server."""
        self._bind(groups)
        link = Link(self.address, self.remote, self._attach_message)
        attached = link.attach(self.binding.contents)
        self._link = link
        self.accumulated = 0
        if attached.outcome == pb.Attached.OUTCOME_CREATED:
            self.binding.remember()
        else:
            self._pull()
            for group, message in zip(groups, attached.groups, strict=False):
                group.update(from_map(message, "param_groups"))
        self._options.acknowledge(groups)
        for request in self._schedules:
            self._declare(request)
        what = "created" if attached.outcome == pb.Attached.OUTCOME_CREATED else "joined"
        _LOGGER.info(
            "farstep: %s %r at %s as worker %s: version %d on %s", what, self.name, self.address, self.worker,
            attached.version, attached.device,
        )  # fmt: skip

    def ensure(self, groups: Groups) -> None:
        """Attach where that has not been done: after a copy or an unpickling."""
        if self._link is None:
            self.attach(groups)

    def _bind(self, groups: Groups) -> None:
        self._groups = groups
        tensors = [tensor for group in groups for tensor in group["params"]]
        self._binding = Binding(tensors, layout_of(groups), detect_edits=self.remote.detect_edits)

    @property
    def binding(self) -> Binding:
        """The parameters as they are bound."""
        assert self._binding is not None, "bound by attach"
        return self._binding

    @property
    def link(self) -> Link:
        """The link, once attached."""
        assert self._link is not None, "attached"
        return self._link

    def _attach_message(self) -> tuple[pb.Attach, BytesSource]:
        options = [sendable(group, self.subject.required, number) for number, group in enumerate(self._groups)]
        layout = layout_to_proto(self.binding.layout, options).SerializeToString()
        attach = pb.Attach(
            name=self.name,
            optimizer=self.subject.optimizer,
            arguments=to_map(self.subject.arguments, "arguments"),
            policy=policy_to_proto(self.policy),
            worker=self.worker,
            on_existing=_ON_EXISTING[self.remote.on_existing],
            ephemeral=self.ephemeral,
            default_dtype=dtype_name(torch.get_default_dtype()),
        )
        if self.remote.settings is not None:
            attach.settings.CopyFrom(to_map(self.remote.settings.as_dict(), "settings"))
        return attach, Body([layout])

    # Steps.

    def step(self, groups: Groups, *, num_samples: float | None = None, abstain: bool = False) -> StepResult:
        """Contribute the gradients as they stand, or abstain, and take over the new parameters."""
        self._groups = groups
        edits = self._options.edits(groups)
        forms: dict[int, GradientForm] = {}
        edited: list[int] = []
        body: BytesSource = EMPTY
        if not abstain:
            self._refuse_average()
            edited = self.binding.edited()
            forms, body = self.binding.gradients(edited)
        message = self._contribution(num_samples)
        message.abstain = abstain
        message.forms.extend(forms_to_proto(forms))
        message.edits.extend(edits_to_proto(edits))
        message.edited_parameters.extend(edited)
        result = self._contribute(message, body, self._receive_step)
        return self._after_step(result, edits, abstain=abstain)

    def accumulate(self, groups: Groups) -> None:
        """Add the gradients as they stand to those that wait on the server for the next contribution."""
        if self.subject.drives_closure:
            raise ConfigurationError(
                f"{self.subject.optimizer} asks its closure for gradients; there is nothing to accumulate: "
                f"let the closure go through all of the batch"
            )
        self._refuse_average()
        self._groups = groups
        forms, body = self.binding.gradients()
        standing = self.link.standing
        standing.sequence += 1
        message = pb.Accumulate(sequence=standing.sequence, forms=forms_to_proto(forms))

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            message.epoch = standing.epoch
            return pb.ClientFrame(accumulate=message), body

        call_done(self.link, make)
        self.accumulated += 1

    def driven_step(self, groups: Groups, closure: Closure, *, num_samples: float | None = None) -> StepResult:
        """Have the server drive the closure through one step."""
        self._refuse_average()
        self._groups = groups
        edits = self._options.edits(groups)
        edited = self.binding.edited()
        message = self._contribution(num_samples)
        message.closure = True
        message.edits.extend(edits_to_proto(edits))
        message.edited_parameters.extend(edited)
        body = self.binding.edited_contents(edited)
        evaluations = Evaluations(closure)

        def handle(link: Link, deadline: float) -> pb.Stepped:
            while True:
                frame = link.receive(self._sink_for, deadline)
                if frame.WhichOneof("body") != "evaluate":
                    return self._stepped(frame)
                self.binding.received()
                link.send(*self._evaluate(evaluations, frame.evaluate.number, message.sequence))

        try:
            result = self._after_step(self._contribute(message, body, handle), edits)
        except FarstepError:
            self._restore_after_refusal()
            if evaluations.error is not None:
                raise evaluations.error from None
            raise
        return replace(result, loss=evaluations.same_as_first(result.loss))

    def _restore_after_refusal(self) -> None:
        # The parameters hold the last trial; the server's are those of before the step.
        try:
            self._pull()
        except FarstepError:
            _LOGGER.warning("farstep: the parameters are those of a trial; call opt.remote.pull()")

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
        self, message: pb.Contribution, body: BytesSource, handle: Callable[[Link, float], pb.Stepped]
    ) -> pb.Stepped:
        self._unsettled = True

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            message.epoch = self.link.standing.epoch
            if self.link.standing.settled >= message.sequence:
                # Applied before the connection broke: only the recorded answer is wanted.
                known = pb.Contribution(epoch=message.epoch, sequence=message.sequence, abstain=True)
                return pb.ClientFrame(contribution=known), EMPTY
            return pb.ClientFrame(contribution=message), body

        stepped = self.link.call(make, handle)
        self._unsettled = False
        return stepped

    def _receive_step(self, link: Link, deadline: float) -> pb.Stepped:
        return self._stepped(link.receive(self._sink_for, deadline))

    def _sink_for(self, frame: pb.ServerFrame) -> Sink:
        kind = frame.WhichOneof("body")
        if kind in {"stepped", "evaluate", "parameters"} and frame.total_bytes:
            return self.binding.sink()
        return NullSink()

    def _stepped(self, frame: pb.ServerFrame) -> pb.Stepped:
        if frame.WhichOneof("body") != "stepped":
            raise internal(f"{frame.WhichOneof('body')} where stepped is due")
        if frame.stepped.parameters:
            self.binding.received()
            self._holds_average = False
        return frame.stepped

    def _after_step(self, stepped: pb.Stepped, edits: dict[int, Any], *, abstain: bool = False) -> StepResult:
        standing = self.link.standing
        standing.version, standing.incarnation = stepped.version, stepped.incarnation
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
        applied = stepped.outcome == pb.Stepped.OUTCOME_COMMITTED
        loss = from_value(stepped.loss, "loss") if stepped.HasField("loss") else None
        self.staleness = stepped.staleness
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
        forms, body = self.binding.gradients()
        message.loss.CopyFrom(plain)
        message.forms.extend(forms_to_proto(forms))
        return body

    def zero_grad(self) -> None:
        """Have the server drop what this worker has staged; no round trip where nothing can be."""
        if self._link is None or not (self._unsettled or self.accumulated):
            return

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            return pb.ClientFrame(zero_grad=pb.ZeroGrad(epoch=self.link.standing.epoch)), EMPTY

        self._call_done(make)
        self._unsettled, self.accumulated = False, 0

    # Parameters and state.

    def pull(self, average: str | None = None) -> int:
        """Take over the server's parameters, or an average of them; return their version."""
        if average is None:
            self._pull()
            return self.link.standing.version
        parameters = call_pull(self.link, self._sink_for, average)
        self.binding.received()
        self._holds_average = True
        return parameters.version

    def _refuse_average(self) -> None:
        if self._holds_average:
            raise ConfigurationError(
                "the parameters here are an average, taken by opt.remote.pull(average=...); gradients at it are none of the "
                "model's. Call opt.remote.pull() before training goes on"
            )

    def _pull(self) -> None:
        parameters = call_pull(self.link, self._sink_for)
        self.binding.received()
        standing = self.link.standing
        standing.version, standing.incarnation = parameters.version, parameters.incarnation
        self._holds_average = False

    def get_state(self, indices: Sequence[int] = ()) -> tuple[list[tuple[Any, Any]], pb.State]:
        """Return [(parameter index or other key, entries), ...] with CPU tensors, and the version they belong to."""
        return call_get_state(self.link, indices)

    def is_current(self, state: Sequence[tuple[Any, Any]], stamp: object) -> bool:
        """Whether the state was fetched from the server at the version that this worker holds, and nothing was changed in it.

        ``stamp``: what the state dict says of its origin; without the one of that version it is taken for another state.
        Workers load together and must come to one answer, also where one of them fetched the state and handed it to the
        others; so it depends on the dict alone, and one that did not fetch it itself asks the server.
        """
        fetched, standing = self.fetched, self.link.standing
        if stamp != {"lineage": standing.lineage, "incarnation": standing.incarnation, "version": standing.version}:
            return False
        if fetched is None or (fetched.incarnation, fetched.version) != (standing.incarnation, standing.version):
            pairs, info = self.get_state()
            fetched = self.fetched = FetchedState.of(pairs, info.incarnation, info.version)
        return state_digest(state) == fetched.digest

    def load_state(self, state: Sequence[tuple[Any, Any]], groups: Groups) -> None:
        """Replace state and options on the server; under Sync, one act of all workers."""
        options = [sendable(group, self.subject.required, number) for number, group in enumerate(groups)]
        body = BundleBody({"state": [list(pair) for pair in state], "groups": options}, "load_state_dict")
        standing = self.link.standing
        standing.sequence += 1
        message = pb.LoadState(sequence=standing.sequence, header_bytes=body.header_bytes)

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            message.epoch = standing.epoch
            return pb.ClientFrame(load_state=message), body

        self._call_done(make)
        self._groups = groups
        self._options.acknowledge(groups)

    def follow(self, groups: Groups) -> None:
        """Tell the server of groups that came by assignment to ``param_groups``; under Sync, an act of all workers each.

        ConfigurationError: the groups hold other parameters than those bound.
        """
        if hold(groups, self.binding.tensors, self.binding.layout):
            return
        check_only_added(groups, self.binding.tensors, self.binding.layout)
        for count in range(len(self.binding.layout.group_sizes), len(groups)):
            self._add_group(groups[: count + 1])
        self._groups = groups

    def _add_group(self, groups: Groups) -> None:
        number = len(groups) - 1
        new = groups[number]["params"]
        known, old = self.binding.tensors, self.binding.layout
        own = group_layout(groups, known)
        layout_bytes, body = group_body(new, own, sendable(groups[number], self.subject.required, number))
        standing = self.link.standing
        standing.sequence += 1
        message = pb.AddParamGroup(sequence=standing.sequence, layout_bytes=layout_bytes)

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            message.epoch = standing.epoch
            return pb.ClientFrame(add_param_group=message), body

        edited = self.binding.edited()
        self._call_done(make)
        self._groups = groups
        self._binding = Binding([*known, *new], old.extended(own), detect_edits=self.remote.detect_edits)
        self.binding.remember(but=edited)
        self._options.acknowledge_group(groups, number)

    def _call_done(self, make: Callable[[], tuple[pb.ClientFrame, BytesSource]]) -> None:
        done = call_done(self.link, make)
        standing = self.link.standing
        standing.version, standing.incarnation = done.version, done.incarnation

    # Steering.

    def declare_schedule(
        self, groups: Groups, scheduler: str, arguments: dict[str, Any], parts: Sequence[int], every: int
    ) -> ScheduleState:
        """Put a learning-rate schedule on the server, and take over what it makes of the options."""
        self._groups = groups
        request = DeclareScheduleRequest(
            number=len(self._schedules),
            scheduler=scheduler,
            arguments=to_map(arguments, scheduler),
            parts=parts,
            every=every,
            edits=edits_to_proto(self._options.edits(groups)),
        )
        state = self._declare(request)
        del request.edits[:]
        self._schedules.append(request)
        return state

    @property
    def schedules(self) -> int:
        """How many schedules were declared here."""
        return len(self._schedules)

    def _declare(self, request: DeclareScheduleRequest) -> ScheduleState:
        request.name, request.lineage = self.name, self.link.standing.lineage
        state: ScheduleState = self.ask_server(lambda server: server.declare_schedule(request))
        for group, message in zip(self._groups, state.groups, strict=False):
            group.update(from_map(message, "param_groups"))
        self._options.acknowledge(self._groups)
        return state

    def ask_server(self, act: Callable[[Server], Result]) -> Result:
        """Ask the server something beside the session; again where the connection breaks, until it should be back.

        Only for what may be asked twice.
        """
        timeouts, pause = self.remote.timeouts, self.remote.retry.first
        deadline = time.monotonic() + timeouts.seconds("reconnect")
        while True:
            try:
                with connect(self.address, timeouts.seconds("step")) as server:
                    return act(server)
            except UnavailableError as error:
                if isinstance(error, DeadlineError) or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, self.remote.retry.longest)

    # Ending and copying.

    def close(self) -> None:
        """Leave the hosted optimizer; the next use attaches again."""
        link, self._link = self._link, None
        if link is not None:
            link.close()
            self._ended_traffic += link.traffic

    def __getstate__(self) -> dict[str, Any]:
        # A copy attaches for itself, when it is first used. A token never travels.
        address = replace(self.address, name=self.name)
        return {"remote": replace(self.remote, token=None, address=str(address), name=None), "subject": self.subject,
                "policy": self.policy, "worker": self.worker, "ephemeral": self.ephemeral}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["remote"], state["subject"])  # type: ignore[misc]
        self.policy, self.worker, self.ephemeral = state["policy"], state["worker"], state["ephemeral"]
