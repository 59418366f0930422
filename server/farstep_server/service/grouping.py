"""A session's process group: how it is made, and the bytes of requests and replies that pass through it.

The client leads: it says what its end has written to the common store, and is answered with what the server's end has. Neither
waits on the other for longer than a moment; the ends connect in threads of their own. What fails later ends the session, so
that the client attaches again and makes another group: no request is half in one group and half in another.

A worker that stands still says nothing, and its connections stay open. Where no request is half done nothing waits for it, but
its group has threads and ports. So a group has its worker's lease behind it: it is given up when the membership has ended.
"""

from __future__ import annotations

import ipaddress
import secrets
import threading
from collections.abc import Callable, Sequence
from urllib.parse import unquote

from torch import Tensor

from farstep_server.core import events as ev
from farstep_server.core.parameters import ParameterReader
from farstep_wire.errors import ConfigurationError, InvalidRequestError, UnavailableError
from farstep_wire.layout import Layout
from farstep_wire.process_group import (
    TOKEN_BYTES,
    Group,
    GroupError,
    Making,
    Unsupported,
    blocks,
    local_address,
    places,
)
from farstep_wire.v1 import optimizer_pb2 as pb

_MAKING_SECONDS = 20.0
_MOMENT_SECONDS = 0.5
_RANK = 0
_BACKEND = "gloo"
_LOCAL_HOST = "127.0.0.1"
_ANY_PORT = 9


class Grouping:
    """The process group of one session, from the client's wish to the session's end.

    ``served``: whether this server makes any. ``peer``: the client, as gRPC calls it. ``stall_seconds``: how long a block may
    take.
    """

    def __init__(self, *, served: bool, peer: str, stall_seconds: float) -> None:
        self._served = served
        self._peer = peer
        self._stall_seconds = stall_seconds
        self._generation = 0
        self._token = b""
        self._worker_host = ""
        self._making: Making | None = None
        self._layout: Layout | None = None
        self._sizes: list[int] = []
        self._ended = False
        self._why_none = "this session has no process group"

    @property
    def group(self) -> Group | None:
        """The group, once both ends have shown their tokens."""
        return None if self._making is None else self._making.group

    def meet(self, request: pb.Group) -> pb.Grouped:
        """Take what the client's end has written; return what this end has, and how far the group has come.

        ConfigurationError: there is none to be had here. UnavailableError: it could not be made this time.
        """
        if not self._served:
            raise ConfigurationError(
                "this server makes no process groups: gloo checks nobody who connects, so they are for trusted networks alone. "
                "Start farstep-server with --pg if this is one, or use transport='grpc'"
            )
        making = self._making
        if making is None or request.generation != self._generation:
            making = self._begin(request)
        making.put({entry.key: entry.value for entry in request.entries})
        entries = making.take(_MOMENT_SECONDS)
        if making.error:
            kind = ConfigurationError if making.hopeless else UnavailableError
            self.withdraw()
            raise kind(f"the server cannot make its end of a process group: {making.error}")
        return pb.Grouped(
            ready=making.group is not None,
            token=self._token,
            worker_host=self._worker_host,
            entries=[pb.GroupEntry(key=key, value=value) for key, value in entries.items()],
        )

    def _begin(self, request: pb.Group) -> Making:
        self.withdraw()
        if request.backend != _BACKEND or len(request.token) != TOKEN_BYTES or not request.generation:
            raise InvalidRequestError(
                f"group {request.generation}: backend {request.backend!r} with a token of {len(request.token)} bytes; "
                f"{_BACKEND!r} and {TOKEN_BYTES} are due"
            )
        self._generation, self._token = request.generation, secrets.token_bytes(TOKEN_BYTES)
        self._worker_host = _host_of(self._peer)
        try:
            own_host = local_address(self._worker_host, _ANY_PORT)
            making = self._making = Making(_RANK, own_host, self._token, request.token, _MAKING_SECONDS)
        except (OSError, Unsupported) as error:
            raise ConfigurationError(f"the server cannot make a process group: {error}") from None
        if self._ended:
            self.withdraw()
        return making

    def withdraw(self) -> None:
        """Give the group up; may be called from any thread."""
        making, self._making = self._making, None
        if making is not None:
            making.give_up()

    def end(self) -> None:
        """Give the group up for good."""
        self._ended = True
        self.withdraw()

    def deliver(self, reply: ev.Reply) -> None:
        """As the ticket of the session's membership: that has ended, and the group with it."""
        if not isinstance(reply, ev.Refusal):
            return
        self._why_none = f"the process group was given up: {reply.error}"
        self._ended = True
        if self._making is not None:
            # gloo's threads are waited for, for which the owner has no time.
            threading.Thread(target=self.withdraw, name="farstep-group", daemon=True).start()

    # Bytes.

    def receive(self, sizes: Sequence[int], buffer: Tensor, total: int, show_life: Callable[[], None]) -> None:
        """Receive a request's bytes into its buffer; GroupError where they do not come, ValueError where sizes are wrong."""
        tensors = [buffer[start:stop] for start, stop in places(sizes, total)]
        for _ in self._whole().receive(tensors, self._stall_seconds):
            show_life()

    def announce(self, frame: pb.ServerFrame, reader: ParameterReader) -> bool:
        """Say in a reply's frame that the parameters come through the group; False: they go with the frames."""
        layout = reader.layout
        if self.group is None or not reader.nbytes or reader.nbytes != layout.arena.nbytes:
            return False
        if layout is not self._layout:
            self._layout, self._sizes = layout, [stop - start for start, stop in _blocks_of(layout)]
        frame.total_bytes = reader.nbytes
        frame.blocks.extend(self._sizes)
        return True

    def send(self, frame: pb.ServerFrame, reader: ParameterReader) -> None:
        """Send the parameters that were announced; GroupError where they do not go through."""
        content = reader.hold()
        tensors = (content[start:stop] for start, stop in places(frame.blocks, frame.total_bytes))
        self._whole().send(tensors, self._stall_seconds)

    def _whole(self) -> Group:
        group = self.group
        if group is None:
            raise GroupError(self._why_none)
        return group


def _blocks_of(layout: Layout) -> list[tuple[int, int]]:
    if any(parameter.storage for parameter in layout.parameters):
        return blocks([(0, layout.arena.nbytes)])
    starts = zip(layout.arena.offsets, layout.specs, strict=True)
    return blocks(sorted((start, start + spec.nbytes) for start, spec in starts if spec.nbytes))


def _host_of(peer: str) -> str:
    """Return the address in what gRPC calls a peer: ``ipv4:1.2.3.4:5``, ``ipv6:%5B::1%5D:5`` or ``unix:``."""
    kind, _, place = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return _LOCAL_HOST
    address = ipaddress.ip_address(place.rpartition(":")[0].strip("[]"))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
