"""How a client reaches its server: ``Remote`` and what it defaults to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from farstep_wire.address import Address, check_name, parse_address
from farstep_wire.errors import ConfigurationError
from farstep_wire.limits import WORKER_BYTES
from farstep_wire.policy import Async, Policy, Sync, as_timedelta
from farstep_wire.settings import Settings
from farstep_wire.wire_format import Wire, as_wire

if TYPE_CHECKING:
    import torch

OnExisting = Literal["attach", "error", "replace"]


@dataclass(frozen=True)
class Timeouts:
    """How long to wait, each as a timedelta or in seconds.

    ``connect``: for a server that is not there yet, and for the other workers of a new hosted optimizer.
    ``step``: for a step or any other request, other workers' part in it included.
    ``reconnect``: for a server that went away to come back; at most what is left of ``step``.
    """

    connect: timedelta | float = timedelta(seconds=30)
    step: timedelta | float = timedelta(minutes=10)
    reconnect: timedelta | float = timedelta(seconds=60)

    def __post_init__(self) -> None:
        for name in ("connect", "step", "reconnect"):
            try:
                object.__setattr__(self, name, as_timedelta(getattr(self, name), f"timeouts.{name}"))
            except (TypeError, ValueError) as error:
                raise ConfigurationError(str(error)) from None

    def seconds(self, name: Literal["connect", "step", "reconnect"]) -> float:
        """Return one of them in seconds."""
        value = getattr(self, name)
        assert isinstance(value, timedelta), "made so at construction"
        return value.total_seconds()


@dataclass(frozen=True)
class Retry:
    """Pauses between attempts to connect: from ``first`` doubling up to ``longest``, in seconds, with jitter."""

    first: float = 0.05
    longest: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.longest:
            raise ConfigurationError(
                f"retry: 0 < first <= longest is due, not first={self.first}, longest={self.longest}"
            )


@dataclass(frozen=True)
class Remote:
    """Where and how an optimizer is hosted.

    Args:
        address: ``"[grpc://]host:port[/name]"`` or ``"unix:PATH"``; None means ``$FARSTEP_REMOTE``, and failing that an
            embedded server.
        name: the hosted optimizer's name, here or in the address. Without one it is made up and ephemeral.
        policy: how contributions become rounds; None means ``Sync(workers=WORLD_SIZE)``, or ``Sync(1)`` outside torchrun.
        worker: this worker's stable id; None means ``$RANK``, or ``"0"`` outside torchrun.
        on_existing: what to do where the name is hosted already: ``"attach"`` goes on from its version, ``"error"`` fails,
            ``"replace"`` starts anew.
        transport: how tensors travel. ``"grpc"``: in messages over gRPC. ``"pipe"``: in messages through pipes, where worker
            and server are on one host, of one user, and nothing stands in between; else over gRPC, and the log says why.
            ``"shm"``: through memory that both sides see, on the same conditions but for tunnels and proxies; its messages take
            pipes where they can. ``"pg"``: through a process group of torch.distributed, in a trusted network; a
            ConfigurationError where there can be none. ``"auto"``: ``"shm"`` from 256 KiB of parameters on and ``"pipe"``
            below, where the server itself listens at the loopback address, with no tunnel or proxy in between; else ``"grpc"``.
        timeouts: how long to wait for what.
        retry: pauses between attempts to connect.
        detect_edits: see edits of parameters through ``p.data`` too. Those of 1 MiB and more together, to whose memory nothing
            else refers, move for that into pages of which the kernel tells which were written; others are compared bit by
            bit before each step. Without it only edits that torch itself records are seen (``p.copy_``,
            ``load_state_dict``), and others stay where a reply brings only what has changed. Parameters that lie in the
            server's pages, as over shared memory under Sync, are watched in any case.
        settings: what the server does around each step (clipping, non-finite guard, average); None leaves it as it is on the
            server, or as torch does it.
        adopt_parameters: with shared memory, have the parameters lie in the server's own memory, so that nothing is copied
            back. A change that is made to them on one worker then is one for the server and all workers at once. Sync only.
        wire_dtype: how float32 tensors are made smaller for the way: ``"bfloat16"`` or ``"float16"`` (or the torch dtype) in
            both directions, ``"int8"`` or ``"topk"`` for gradients, or a ``farstep.Wire(...)`` that says it for each direction.
            The server's own stay float32. Such tensors travel over gRPC, narrowed parameters always whole, not in rows.
            None: as they are, bit for bit.
        overlap: have gradients leave during ``backward`` and parameters come in during the next ``forward``; see
            ``opt.remote.overlap``.
        token, tls: no server of this release takes them; anything but None is a ConfigurationError.
    """

    address: str | None = None
    name: str | None = None
    policy: Policy | None = None
    worker: str | int | None = None
    token: str | None = field(default=None, repr=False)
    tls: object | None = None
    transport: Literal["auto", "grpc", "pipe", "shm", "pg"] = "auto"
    wire_dtype: Wire | str | torch.dtype | None = None
    on_existing: OnExisting = "attach"
    timeouts: Timeouts = field(default_factory=Timeouts)
    retry: Retry = field(default_factory=Retry)
    detect_edits: bool = True
    settings: Settings | None = None
    adopt_parameters: bool = False
    overlap: bool = False

    def __post_init__(self) -> None:
        for unserved in ("token", "tls"):
            if getattr(self, unserved) is not None:
                raise ConfigurationError(f"remote: {unserved} is not served by this release; leave it None")
        if self.transport not in (ways := ("auto", "grpc", "pipe", "shm", "pg")):
            raise ConfigurationError(f"remote: transport {self.transport!r} is not one of {', '.join(map(repr, ways))}")
        self._check_wire()
        if self.adopt_parameters and isinstance(self.policy, Async):
            raise ConfigurationError(
                "remote: adopt_parameters=True with Async: parameters that all workers see would change under a worker's "
                "gradients; leave it False, or use Sync"
            )
        if self.on_existing not in {"attach", "error", "replace"}:
            raise ConfigurationError(f"remote: on_existing {self.on_existing!r} is not 'attach', 'error' or 'replace'")
        if self.policy is not None and not isinstance(self.policy, (Sync, Async)):
            raise ConfigurationError(
                f"remote: policy must be farstep.Sync(...) or farstep.Async(...), not {self.policy!r}"
            )
        if self.settings is not None and not isinstance(self.settings, Settings):
            raise ConfigurationError(f"remote: settings must be farstep.Settings(...), not {self.settings!r}")
        if self.name is not None:
            check_name(self.name)
        if self.worker is not None:
            text = str(self.worker)
            if not text.isprintable() or not 0 < len(text.encode()) <= WORKER_BYTES:
                raise ConfigurationError(
                    f"remote: worker {self.worker!r} must be 1 to {WORKER_BYTES} bytes of printable text"
                )
        if self.address is not None:
            self.parsed()

    def _check_wire(self) -> None:
        try:
            wire = self.wire
        except ValueError as error:
            raise ConfigurationError(f"remote: wire_dtype: {error}") from None
        if wire.exact:
            return
        if self.transport not in {"auto", "grpc"}:
            raise ConfigurationError(
                f"remote: wire_dtype={self.wire_dtype!r} with transport={self.transport!r}, which moves tensors as they are; "
                f"use 'grpc', or leave wire_dtype None"
            )
        if self.adopt_parameters:
            raise ConfigurationError(
                f"remote: wire_dtype={self.wire_dtype!r} with adopt_parameters=True: adopted parameters do not travel; leave "
                f"one of the two out"
            )

    @property
    def wire(self) -> Wire:
        """What ``wire_dtype`` means."""
        return as_wire(self.wire_dtype)

    def parsed(self) -> Address | None:
        """Return the address with the name taken out of it; None where the embedded server is meant."""
        if self.address is None:
            return None
        address = parse_address(self.address)
        if address.tls:
            raise ConfigurationError(f"address {self.address!r}: grpcs is not served by this release; use grpc")
        if address.name and self.name and address.name != self.name:
            raise ConfigurationError(f"remote: the address names {address.name!r}, name= says {self.name!r}")
        return replace(address, name=self.name or address.name)


def resolve_remote(remote: str | Remote | None) -> Remote:
    """Return the Remote that a ``remote=`` argument means; ConfigurationError quotes one that means none."""
    if isinstance(remote, str):
        remote = Remote(address=remote)
    if remote is None:
        remote = Remote()
    if not isinstance(remote, Remote):
        raise ConfigurationError(f"remote must be an address, a farstep.Remote or None, not {remote!r}")
    if remote.address is None and (variable := os.environ.get("FARSTEP_REMOTE")):
        try:
            remote = replace(remote, address=variable)
        except ConfigurationError as error:
            raise ConfigurationError(f"$FARSTEP_REMOTE: {error}") from None
    return remote
