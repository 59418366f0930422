"""The second layer of a session: parameters, state and groups that the server holds for it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor

from farstep.session.attachment import Attachment
from farstep.session.calls import call_done, call_get_state, call_pull
from farstep.session.groups import Groups, check_only_added, group_body, group_layout, hold
from farstep.session.options import sendable
from farstep.session.snapshot import FetchedState, state_digest
from farstep_wire.bundle import BundleBody
from farstep_wire.errors import Applied, ConfigurationError, FarstepError
from farstep_wire.frames import BytesSource
from farstep_wire.v1 import optimizer_pb2 as pb


class Holdings(Attachment):
    """What is asked of the server beside steps, on the session's stream."""

    # Parameters and state.

    def pull(self, average: str | None = None) -> int:
        """Take over the server's parameters, or an average of them; return their version."""
        if average is None:
            self._pull()
            return self.link.standing.version
        if self._adopts:
            raise ConfigurationError(
                f"the parameters here are the server's own (adopt_parameters=True), and the average {average!r} would take "
                f"their place for all workers: pull it with an optimizer that does not adopt them"
            )
        parameters = call_pull(self.link, self._sink_for, average)
        self.binding.received()
        self._holds_average = True
        return parameters.version

    def _check_standing(self) -> None:
        """ConfigurationError where gradients taken now would not be the hosted optimizer's."""
        self._settle_group()
        self._check_whole()
        self._settle_feedback()
        if self._holds_average:
            raise ConfigurationError(
                "the parameters here are an average, taken by opt.remote.pull(average=...); gradients at it are none of the "
                "model's. Call opt.remote.pull() before training goes on"
            )

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

        # The version stays: it is that of the parameters here, which no such act brings along.
        standing.incarnation = call_done(self.link, make).incarnation
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
        if self._open_group is None or not _same_objects(self._open_group[1], new):
            standing.sequence += 1
            self._open_group = standing.sequence, list(new)
        # A call that is repeated since nothing was known of the first one keeps its number.
        message = pb.AddParamGroup(sequence=self._open_group[0], layout_bytes=layout_bytes)

        def make() -> tuple[pb.ClientFrame, BytesSource]:
            message.epoch = standing.epoch
            return pb.ClientFrame(add_param_group=message), body

        self._check_whole()
        edited = {number: known[number].detach().clone() for number in self.binding.edited()}
        try:
            call_done(self.link, make)
        except FarstepError as error:
            if error.applied is not Applied.UNKNOWN:
                self._open_group = None
            raise
        self._open_group = None
        self._groups = groups
        self._binding = self._bound([*known, *new], old.extended(own))
        self.binding.remember(but=list(edited))
        self._options.acknowledge_group(groups, number)
        self.link.renew_lane()
        self._adopt()
        self.binding.edited_again(edited)
        self._renew_overlap()

    def _settle_feedback(self) -> None:
        """Find out whether compressed gradients of which nothing is known were used."""
        if self._feedback is not None and self._feedback.in_doubt:
            self.link.ensure()
            self._feedback.resolve(self.link.standing.settled)

    def _settle_group(self) -> None:
        """Find out what became of a group of which nothing is known; ConfigurationError where the server has it."""
        if self._open_group is None:
            return
        self.link.ensure()
        if self.link.standing.parameters > len(self.binding.tensors):
            raise ConfigurationError(
                "the last add_param_group took effect on the server, though no answer came: call it again with the same "
                "parameters, then go on"
            )
        self._open_group = None


def _same_objects(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
