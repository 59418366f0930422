"""A session's shared memory: its gradients' segment, and what is said until both sides see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from secrets import compare_digest

from torch import Tensor

from farstep_server.core import events as ev
from farstep_server.core.gradients import Staged
from farstep_server.core.parameters import Onlooker
from farstep_server.hosting.owner import Owner
from farstep_wire.errors import ConfigurationError, InvalidRequestError, ResourceExhaustedError
from farstep_wire.layout import GradientForm, GradientPlan, Layout
from farstep_wire.shared_memory import OwnSegment, SharedMemoryError
from farstep_wire.v1 import optimizer_pb2 as pb

_SHARE_SECONDS = 60.0


class Sharing:
    """The gradients' segment of one session, from the offer to the session's end."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._segment: OwnSegment | None = None
        self._layout: Layout | None = None
        self._views: list[Tensor] = []

    def offer(
        self, owner: Owner, listening: Sequence[str], directly_at: str, onlooker: Onlooker | None = None
    ) -> pb.Shared:
        """Make the segments, and say where they are, and whether the worker may look on, if it would.

        ResourceExhaustedError: there can be none. ConfigurationError: the client wants them only where it reaches this server
        directly, and this server does not listen where it says.
        """
        self.withdraw()
        if directly_at:
            check_directly(listening, directly_at)
        reply = owner.ask(
            lambda ticket: ev.ShareParameters(ticket, self._make, onlooker), ev.SharedReply, _SHARE_SECONDS
        )
        assert isinstance(reply.memory, OwnSegment), "made here"
        segment = self._make(reply.layout.gradients.nbytes)
        self._segment, self._layout = segment, reply.layout
        return pb.Shared(parameters=_located(reply.memory), gradients=_located(segment), looks_on=reply.looks_on)

    def confirm(self, proof: bytes) -> None:
        """The client sees the segments; InvalidRequestError where it does not."""
        if self._segment is None or self._layout is None:
            raise InvalidRequestError("share: a proof where no shared memory was offered")
        if not compare_digest(self._segment.proof, proof):
            self.withdraw()
            raise InvalidRequestError("share: the proof is not what stands in shared memory")
        self._segment.hide()
        pieces = zip(self._layout.specs, self._layout.gradients.offsets, strict=True)
        self._views = [spec.view(self._segment.content, offset) for spec, offset in pieces]

    def withdraw(self) -> None:
        """Give the memory up; what was staged in it keeps it until it is settled."""
        if self._segment is not None:
            self._segment.hide()
        self._segment, self._layout, self._views = None, None, []

    def staged(self, layout: Layout, forms: Mapping[int, GradientForm], plan: GradientPlan, buffer: Tensor) -> Staged:
        """Return what a contribution has there; ValueError where it can have nothing there."""
        segment, own = self._segment, self._views
        if segment is None or not own or layout is not self._layout:
            raise ValueError("the gradients are said to lie in shared memory; this session has none for the layout")
        views: list[Tensor | None] = list(own)
        for index, form in forms.items():
            if form is not None:
                raise ValueError(f"the gradient of parameter {index} is {form}; only dense ones lie in shared memory")
            views[index] = None
        return Staged(plan, buffer, views, segment.content)

    def _make(self, nbytes: int) -> OwnSegment:
        if nbytes > self._limit_bytes:
            raise ResourceExhaustedError(f"{nbytes} bytes of shared memory; the server's limit is {self._limit_bytes}")
        try:
            return OwnSegment(nbytes)
        except SharedMemoryError as error:
            raise ResourceExhaustedError(str(error)) from None


def check_directly(listening: Sequence[str], directly_at: str) -> None:
    """ConfigurationError: something stands between a client and this server, which does not listen where the client says."""
    if all(_place(directly_at) != _place(address) for address in listening):
        raise ConfigurationError(
            f"the client connects to {directly_at}, the server listens at {', '.join(listening)}: what stands between them "
            f"is to carry the tensors"
        )


def _place(address: str) -> str:
    """Return what two addresses of one listener on this host have in common: the socket's path, or the port."""
    return address if address.startswith("unix:") else address.rpartition(":")[2]


def _located(segment: OwnSegment) -> pb.Segment:
    name = segment.name
    return pb.Segment(process=name.process, descriptor=name.descriptor, content_bytes=name.nbytes, nonce=name.nonce)
