"""The first layer of a session: where it is attached, what is bound there, and the parameters' way in."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farstep.config import Remote
from farstep.session.binding import Binding, layout_of
from farstep.session.calls import call_done, call_pull
from farstep.session.feedback import Feedback
from farstep.session.groups import Groups
from farstep.session.lanes import Exchange, Lanes
from farstep.session.link import Link, internal
from farstep.session.options import OptionTracker, sendable
from farstep.session.overlap import Overlap, OverlapOptions
from farstep.session.placement import locate, policy_of, worker_of
from farstep.session.replicas import ReplicaGuard
from farstep.session.snapshot import FetchedState
from farstep.session.steering import Declared
from farstep.transports.base import Carrier, Lane, Traffic
from farstep.transports.views import View
from farstep_wire.convert import layout_to_proto, policy_to_proto, wire_to_proto
from farstep_wire.errors import ConfigurationError
from farstep_wire.frames import EMPTY, Body, BytesSource, NullSink, Sink
from farstep_wire.layout import Layout, dtype_name
from farstep_wire.pipes import Pipes
from farstep_wire.policy import Sync
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import from_map, to_map

_LOGGER = logging.getLogger("farstep")
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


class Attachment:
    """What a session is attached to, and what it knows of it."""

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
        self._open_group: tuple[int, list[Tensor]] | None = None
        self._driving = False
        self._holds_average = False
        self._torn = False
        self._held: tuple[int, int, int] | None = None
        self._takes_changes = False
        self._tried: View | None = None
        self._lanes = Lanes(remote, self.address)
        self._feedback = _feedback_of(remote, subject)
        self._overlaps = OverlapOptions() if remote.overlap else None
        self._overlap: Overlap | None = None
        self._replicas = ReplicaGuard(self.policy)
        self.schedules = Declared()
        self.accumulated = 0
        """Sets of gradients that wait on the server for this worker's next contribution."""
        self.staleness = 0
        """Versions that were committed between the parameters that the last gradients were taken at and their use."""
        self.fetched: FetchedState | None = None
        self.kept = 0
        """How many parameters the proxy keeps a step count of."""
        self._ended_traffic = Traffic()
        self.step_traffic = Traffic()
        """What went between this session and the server for its last step."""

    @property
    def traffic(self) -> Traffic:
        """What has gone between this session and the server, since it was made."""
        return self._ended_traffic if self._link is None else self._ended_traffic + self._link.traffic

    @property
    def expects_several_workers(self) -> bool:
        """Whether rounds have more than one worker's contributions."""
        return isinstance(self.policy, Sync) and self.policy.workers > 1

    def only_takes(self, groups: Groups) -> bool:
        """Whether this worker's gradients are another one's already, so that it takes the parameters and gives nothing."""
        return self._replicas.only_takes([tensor for group in groups for tensor in group["params"]])

    # Attaching.

    @property
    def attached(self) -> bool:
        """Whether there is a hosted optimizer behind it yet."""
        return self._link is not None

    def attach(self, groups: Groups) -> None:
        """Create the hosted optimizer or join it; afterwards parameters and options are those of the server."""
        self._bind(groups)
        link = Link(self.address, self.remote, self._attach_message, self._open_pipes, self._open_lane)
        attached = link.attach(self.binding.contents)
        self._link = link
        self.accumulated = 0
        if attached.outcome == pb.Attached.OUTCOME_CREATED:
            self._adopt()
            self.binding.remember()
            self._holds_standing()
            if self.remote.wire.parameters is not None:
                # Its creator holds them as all workers do.
                self._pull_first()
        else:
            self._pull_first()
            for group, message in zip(groups, attached.groups, strict=False):
                group.update(from_map(message, "param_groups"))
        self._options.acknowledge(groups)
        self._renew_overlap()
        what = "created" if attached.outcome == pb.Attached.OUTCOME_CREATED else "joined"
        _LOGGER.info(
            "farstep: %s %r at %s as worker %s: version %d on %s", what, self.name, self.address, self.worker,
            attached.version, attached.device,
        )  # fmt: skip

    def _pull_first(self) -> None:
        try:
            self._pull()
        except BaseException:
            # Without the parameters this is no worker yet: the next use begins anew.
            self.close()
            raise

    def ensure(self, groups: Groups) -> None:
        """Attach where that has not been done: after a copy or an unpickling."""
        if self._link is None:
            self.attach(groups)

    def _bind(self, groups: Groups) -> None:
        self._groups = groups
        tensors = [tensor for group in groups for tensor in group["params"]]
        self._binding = self._bound(tensors, layout_of(groups))

    def _bound(self, tensors: Sequence[Tensor], layout: Layout) -> Binding:
        remote = self.remote
        return Binding(tensors, layout, detect_edits=remote.detect_edits, wire=remote.wire, feedback=self._feedback)

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

    def _open_lane(self, exchange: Exchange) -> Lane | Carrier | None:
        return self._lanes.open(exchange, self.binding)

    def _open_pipes(self, exchange: Exchange, beside_lane: bool) -> Pipes | None:
        return self._lanes.open_pipes(exchange, self.binding, beside_lane=beside_lane)

    def _attach_message(self) -> tuple[pb.Attach, BytesSource]:
        known = self._groups[: len(self.binding.layout.group_sizes)]
        options = [sendable(group, self.subject.required, number) for number, group in enumerate(known)]
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
        if not self.remote.wire.exact:
            attach.wire.CopyFrom(wire_to_proto(self.remote.wire))
        return attach, Body([layout])

    def _sink_for(self, frame: pb.ServerFrame) -> Sink:
        kind = frame.WhichOneof("body")
        if kind == "stepped" and frame.stepped.HasField("changed"):
            return self._changed_sink(frame)
        if kind in {"stepped", "evaluate", "parameters"} and frame.total_bytes and not self._adopts:
            self._held = None
            return self.binding.sink()
        return NullSink()

    def _changed_sink(self, frame: pb.ServerFrame) -> Sink:
        changed = frame.stepped.changed
        if not self._takes_changes or not frame.stepped.parameters or changed.since != self.link.standing.version:
            raise internal(f"what has changed since version {changed.since}, which was not asked for")
        self._held = None
        return self.binding.changed_sink(changed, frame.total_bytes)

    def _holds_standing(self) -> None:
        """The parameters are those of the version that this worker stands at, bit for bit, but for edits of its own.

        By the stream's word: a server that was started again from a snapshot may have made another version of that number.
        """
        self._held = self.link.standing.incarnation, self.link.standing.version, self.link.streams

    def _knows_all(self, but: Sequence[int]) -> bool:
        """Whether what has changed since this worker's version is all that it needs, ``but`` being what it has edited."""
        link = self.link
        holds = not self._torn and not link.broken_arrival
        holds = holds and self._held == (link.standing.incarnation, link.standing.version, link.streams)
        return holds and link.lane is None and self.binding.takes_changes(but)

    def _pull(self) -> None:
        if self._unsettled and self.subject.drives_closure:
            # The server may still wait for an evaluation of a step that was given up here.
            self.zero_grad()
        if self.link.lane is not None and self.link.lane.left:
            self.link.renew_lane()
        parameters = call_pull(self.link, self._sink_for, shared=True)
        if not self._take(parameters.changes):
            # Others step faster than they can be copied here: in a message they come whole.
            parameters = call_pull(self.link, self._sink_for)
            self._take(0)
        standing = self.link.standing
        standing.version, standing.incarnation = parameters.version, parameters.incarnation
        self._holds_average = False
        self._holds_standing()

    def _take(self, changes: int) -> bool:
        """Take over the parameters of a reply, which have come as bytes or lie in the lane; return whether they are whole."""
        lane = self.link.lane
        self._held = None
        self._torn = bool(changes) and (lane is None or not lane.take(changes, self.binding.sink()))
        if not self._torn:
            if not changes and self.binding.view is not None:
                self.binding.view.received()
            self._adopt()
            self.binding.received()
        return not self._torn

    def _adopt(self) -> None:
        """Have the parameters, which hold what the server has, lie in its memory where the lane is for that."""
        lane, binding = self.link.lane, self.binding
        if lane is not None:
            lane.adopt()
            binding.adopted = lane.adopted
        view = None if lane is None else lane.view
        if view is not binding.view:
            binding.view = None
            if view is not None and self._tried is not view:
                self._tried = view
                binding.enter(view)
        if view is None and not binding.adopted:
            binding.mirror()

    @property
    def _adopts(self) -> bool:
        """Whether the parameters lie in the server's memory, where nothing must be written that is not meant for all."""
        lane = None if self._link is None else self._link.lane
        return lane is not None and lane.adopted

    def overlap(self, options: OverlapOptions) -> None:
        """Have transfers overlap with computation from now on, as long as the session is there.

        ConfigurationError: the server asks for gradients by evaluating a closure.
        """
        if self.subject.drives_closure:
            raise ConfigurationError(
                f"{self.subject.optimizer} asks its closure for gradients, which are awaited at once: nothing can overlap"
            )
        self._overlaps = options
        self._renew_overlap()

    def _renew_overlap(self) -> None:
        if self._overlap is not None:
            self._overlap.await_all()
            self._overlap.close()
            self._overlap = None
        if self._overlaps is not None and self.remote.wire.gradients is None:
            own = weakref.ref(self)
            self._overlap = Overlap(self.binding, _link_of(own), self._complete_arrival, self._overlaps)

    def _complete_arrival(self) -> None:
        """Take parameters anew whose last bytes have not come, while a forward may be under way that has read the first.

        They are the same bits unless the version has changed since; autograd is told of no other change.
        """
        standing = self.link.standing
        self._torn, self.link.broken_arrival = True, False
        parameters = call_pull(self.link, self._sink_for)
        if (parameters.incarnation, parameters.version) != (standing.incarnation, standing.version):
            standing.incarnation, standing.version = parameters.incarnation, parameters.version
            self.binding.announce()
        self.binding.settle()
        self._torn = False
        self._holds_standing()

    @property
    def overlapping(self) -> Overlap | None:
        """What overlaps, if anything does."""
        return self._overlap

    def _check_whole(self) -> None:
        """Pull parameters that are a mixture of versions, or that were adopted from a server that has gone since."""
        self.link.finish_arrival()
        if self.link.broken_arrival:
            self._torn, self.link.broken_arrival = True, False
        view = self.binding.view
        changed = view is not None and not view.whole
        if self._torn or changed or (self.binding.adopted and not self._adopts):
            self.binding.adopted = False
            self._pull()

    def zero_grad(self) -> None:
        """Have the server drop what this worker has staged; no round trip where nothing can be, as in a closure."""
        if self._link is None or self._driving or not (self._unsettled or self.accumulated):
            return

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            return pb.ClientFrame(zero_grad=pb.ZeroGrad(epoch=self.link.standing.epoch)), EMPTY

        call_done(self.link, make)
        self._unsettled, self.accumulated = False, 0

    # Ending and copying.

    def close(self) -> None:
        """Leave the hosted optimizer; the next use attaches again."""
        if self._overlap is not None:
            self._overlap.close()
            self._overlap = None
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


def _link_of(session: weakref.ref[Attachment]) -> Callable[[], Link | None]:
    def link() -> Link | None:
        alive = session()
        return None if alive is None else alive._link

    return link


def _feedback_of(remote: Remote, subject: Subject) -> Feedback | None:
    wire = remote.wire
    if not wire.compresses:
        return None
    if subject.drives_closure:
        raise ConfigurationError(
            f"remote: wire_dtype with gradients={wire.gradients!r}: {subject.optimizer} evaluates its closure many times, and "
            f"a line search needs the gradients as they are; use 'bfloat16' or 'float16', or leave wire_dtype None"
        )
    return Feedback(wire)
