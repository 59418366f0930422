"""Which transport a stream's gradients and parameters take, and how the one beside the stream is agreed on."""

from __future__ import annotations

import logging
from collections.abc import Callable

from farstep.config import Remote
from farstep.session.binding import Binding
from farstep.transports.base import Carrier, Lane
from farstep.transports.pg import make_carrier
from farstep.transports.pipe import agree_on_pipes
from farstep.transports.shm import SharedMemoryLane
from farstep_wire.address import Address
from farstep_wire.errors import ConfigurationError, FarstepError, UnavailableError
from farstep_wire.pipes import PipeError, Pipes
from farstep_wire.shared_memory import SharedMemoryError
from farstep_wire.v1 import optimizer_pb2 as pb

_LOGGER = logging.getLogger("farstep")
_WORTHWHILE_BYTES = 256 * 1024
"""Parameters below this size travel as fast in messages, and each segment takes two pages at least."""

_STALL_SECONDS = 30.0
"""How long a block of a process group may take at most, as gRPC gives a silent connection."""

Exchange = Callable[[pb.ClientFrame], pb.ServerFrame]


class Lanes:
    """Opens the lane of each stream of one session. What keeps it from doing so is logged once."""

    def __init__(self, remote: Remote, address: Address) -> None:
        self._remote = remote
        self._address = address
        self._told = False
        self._generation = 0

    def open(self, exchange: Exchange, binding: Binding) -> Lane | Carrier | None:
        """Return the lane or the carrier of a newly attached stream; None where all goes through the stream.

        UnavailableError: the stream broke meanwhile, or no process group could be made this time. ConfigurationError: there can
        be none.
        """
        if self._remote.transport == "pg":
            self._generation += 1
            stall_seconds = min(_STALL_SECONDS, self._remote.timeouts.seconds("step"))
            return make_carrier(exchange, self._generation, stall_seconds)
        if not self._wanted(binding):
            return None
        try:
            return self._open_shared(exchange, binding)
        except UnavailableError:
            raise
        except (SharedMemoryError, FarstepError) as error:
            self._tell("no shared memory with %s, tensors travel over gRPC", error)
            return None

    def open_pipes(self, exchange: Exchange, binding: Binding, *, beside_lane: bool) -> Pipes | None:
        """Return pipes for a newly attached stream, where it reaches a server on this host directly; else None.

        Unasked only for small messages: where tensors go ``beside_lane``, or are small themselves.

        UnavailableError: the stream broke meanwhile.
        """
        asked = self._remote.transport == "pipe"
        small = beside_lane or binding.layout.arena.nbytes < _WORTHWHILE_BYTES
        unasked = self._remote.transport in {"auto", "shm"} and self._address.is_loopback and small
        if not self._remote.wire.exact or not (asked or unasked):
            return None
        try:
            return agree_on_pipes(exchange, self._address.target)
        except (PipeError, ConfigurationError) as error:
            if self._remote.transport == "pipe":
                self._tell("no pipes to %s, messages travel over gRPC", error)
            return None

    def _wanted(self, binding: Binding) -> bool:
        if not self._remote.wire.exact:
            return False
        if self._remote.transport == "auto":
            return self._address.is_loopback and binding.layout.arena.nbytes >= _WORTHWHILE_BYTES
        return self._remote.transport == "shm"

    def _open_shared(self, exchange: Exchange, binding: Binding) -> Lane:
        # Who connects by way of a tunnel or a proxy wants it to carry the tensors, unless they say otherwise.
        directly_at = self._address.target if self._remote.transport == "auto" else ""
        can_lie_there = binding.adoptable
        adopt = self._remote.adopt_parameters and can_lie_there
        share = pb.Share(directly_at=directly_at, looks_on=can_lie_there and not adopt)
        shared = exchange(pb.ClientFrame(share=share)).shared
        try:
            lane = SharedMemoryLane(shared, binding.tensors, binding.layout, adopt=adopt)
        except SharedMemoryError as error:
            exchange(pb.ClientFrame(share=pb.Share(declined=str(error))))
            raise
        try:
            exchange(pb.ClientFrame(share=pb.Share(proof=lane.proof)))
        except BaseException:
            lane.close(settled=True)
            raise
        return lane

    def _tell(self, what: str, reason: Exception) -> None:
        if not self._told:
            self._told = True
            level = logging.INFO if self._remote.transport == "auto" else logging.WARNING
            _LOGGER.log(level, "farstep: %s: %s", what % self._address, reason)
