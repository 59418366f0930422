"""The directory: every hosted optimizer of a server by name, how one comes to be, and how it goes.

A name is reserved by the session that will create it until its parameters have arrived and the optimizer has been built;
only then do others see it. Where several workers attach to a new name at once, the first in worker order creates it, so
that the parameters everybody starts from do not depend on who was fastest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from farstep_server.core.engine import Engine
from farstep_server.core.hosted import HostedOptimizer
from farstep_server.core.identity import Identity
from farstep_server.core.records import Dump
from farstep_server.core.registry import OptimizerEntry, Registry
from farstep_server.hosting.owner import Owner
from farstep_server.logs import log_event
from farstep_wire.errors import (
    AlreadyExistsError,
    DrainingError,
    FarstepError,
    NotFoundError,
    RemovedError,
    ResourceExhaustedError,
    StorageError,
    UnknownOptimizerError,
    WaitError,
)
from farstep_wire.layout import Layout, dtype_from_name
from farstep_wire.policy import Policy, Sync, worker_order
from farstep_wire.settings import Settings

_LOGGER = logging.getLogger(__name__)
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Blueprint:
    """What a client asks to be hosted, all but the parameters' contents."""

    name: str
    optimizer: str
    arguments: dict[str, Any]
    layout: Layout
    options: list[dict[str, Any]]
    policy: Policy
    ephemeral: bool
    scalar_dtype: str = "float32"
    settings: Settings | None = None


@dataclass
class _Reservation:
    """A name whose hosted optimizer is on its way, and the workers that wait for it."""

    waiting: set[str] = field(default_factory=set)
    creator: str | None = None


class Directory:
    """All hosted optimizers. Its methods may be called from any thread."""

    def __init__(self, registry: Registry, device: torch.device, lease_seconds: float, limit_bytes: int) -> None:
        self.registry = registry
        self.device = device
        self.lease_seconds = lease_seconds
        self.limit_bytes = limit_bytes
        self.draining = False
        self.listening: list[str] = []
        """The addresses at which the server listens, ports that were chosen included."""
        self.serves_groups = False
        """Whether workers may have process groups made."""
        self._owners: dict[str, Owner] = {}
        self._reservations: dict[str, _Reservation] = {}
        self._withheld: dict[str, str] = {}
        self._ending: list[Callable[[Owner], None]] = []
        self._sessions = 0
        self._changed = threading.Condition()

    # Reading.

    def find(self, name: str) -> Owner:
        """Return the owner of that name; NotFoundError lists what there is."""
        with self._changed:
            owner = self._owners.get(name)
            self._refuse_withheld(name)
            if owner is None:
                known = ", ".join(repr(other) for other in sorted(self._owners)) or "none"
                raise NotFoundError(f"there is no hosted optimizer {name!r}; hosted here: {known}")
            return owner

    def get(self, name: str) -> Owner | None:
        """Return the owner of that name, or None."""
        with self._changed:
            return self._owners.get(name)

    def owners(self) -> list[Owner]:
        """Return all owners by name."""
        with self._changed:
            return [self._owners[name] for name in sorted(self._owners)]

    def used_bytes(self) -> int:
        """Return the bytes of all hosted parameters."""
        return sum(owner.hosted.engine.layout.arena.nbytes for owner in self.owners())

    def entry(self, optimizer: str) -> OptimizerEntry:
        """Return the registered class; UnknownOptimizerError lists the names there are."""
        entry = self.registry.get(optimizer)
        if entry is None:
            raise UnknownOptimizerError(
                f"this server has no optimizer {optimizer!r}; it has {', '.join(self.registry.names())}. "
                f"A third-party class is registered with farstep-server --optimizer package:Class"
            )
        return entry

    def find_again(self, name: str) -> Owner:
        """Return the owner of that name for a client that was attached to it before."""
        with self._changed:
            self._refuse_when_draining()
            self._refuse_withheld(name)
            owner = self._owners.get(name)
        if owner is None:
            raise RemovedError(
                f"{name!r} is not hosted here any more: it was removed, its last worker's lease ran out, or the server was "
                f"started again without its data directory. Build the optimizer again to start anew"
            )
        return owner

    # Creating.

    def find_or_reserve(
        self, blueprint: Blueprint, worker: str, on_existing: str, wait_seconds: float, is_active: Callable[[], bool]
    ) -> Owner | None:
        """Return the owner of that name, or None where the caller is to create it.

        Waits while another worker creates it, and, where several workers must attach first, for the first in order.
        WaitError: that took longer than ``wait_seconds``.
        """
        if on_existing == "replace":
            self._replace(blueprint.name, worker)
        deadline = time.monotonic() + wait_seconds
        with self._changed:
            while True:
                self._refuse_when_draining()
                self._refuse_withheld(blueprint.name)
                owner = self._owners.get(blueprint.name)
                if owner is not None:
                    self._leave_queue(blueprint.name, worker)
                    if on_existing == "error":
                        raise AlreadyExistsError(f"{blueprint.name!r} is hosted already, and on_existing is 'error'")
                    return owner
                if self._may_create(blueprint, worker):
                    return None
                self._changed.wait(max(0.0, min(1.0, deadline - time.monotonic())))
                if time.monotonic() >= deadline or not is_active():
                    raise self._waited_in_vain(blueprint, worker, wait_seconds)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise DrainingError("the server is shutting down; attach again when it is back")

    def withhold(self, name: str, reason: str) -> None:
        """Refuse whoever asks for the name, with a StorageError that gives the reason; none: do so no more.

        So nobody starts anew under the name of what could not be restored, and thereby loses it.
        """
        with self._changed:
            self._withheld.pop(name, None)
            if reason:
                self._withheld[name] = reason

    def _refuse_withheld(self, name: str) -> None:
        if name in self._withheld:
            raise StorageError(self._withheld[name])

    def _may_create(self, blueprint: Blueprint, worker: str) -> bool:
        reservation = self._reservations.setdefault(blueprint.name, _Reservation())
        if worker not in reservation.waiting:
            reservation.waiting.add(worker)
            self._changed.notify_all()
        expected = blueprint.policy.workers if isinstance(blueprint.policy, Sync) else 1
        first = min(reservation.waiting, key=worker_order)
        everyone = len(reservation.waiting) >= expected or first == "0"
        if reservation.creator is None and everyone and first == worker:
            self._check_room(blueprint)
            reservation.creator = worker
            return True
        return False

    def _waited_in_vain(self, blueprint: Blueprint, worker: str, wait_seconds: float) -> WaitError:
        reservation = self._reservations.get(blueprint.name)
        here = sorted(reservation.waiting if reservation else {worker}, key=worker_order)
        self._leave_queue(blueprint.name, worker)
        return WaitError(
            f"{blueprint.name!r} was not created within {wait_seconds:g} s: {blueprint.policy} waits for its workers, and "
            f"only {', '.join(here)} came. Start the others, or check the policy's number of workers"
        )

    def _leave_queue(self, name: str, worker: str) -> None:
        reservation = self._reservations.get(name)
        if reservation is None:
            return
        reservation.waiting.discard(worker)
        if reservation.creator == worker:
            reservation.creator = None
        if not reservation.waiting:
            del self._reservations[name]
        self._changed.notify_all()

    def _check_room(self, blueprint: Blueprint) -> None:
        asked = blueprint.layout.arena.nbytes
        used = sum(owner.hosted.engine.layout.arena.nbytes for owner in self._owners.values())
        if used + asked > self.limit_bytes:
            raise ResourceExhaustedError(
                f"{blueprint.name!r} asks for {asked} bytes of parameters; {max(0, self.limit_bytes - used)} of the "
                f"server's {self.limit_bytes} are left"
            )

    def create(self, blueprint: Blueprint, worker: str, contents: Tensor) -> Owner:
        """Build the hosted optimizer that the worker has reserved."""
        try:
            engine = self._engine(blueprint, contents)
            identity = self._identity(blueprint, uuid4().hex)
            hosted = HostedOptimizer(identity, engine, time.monotonic, blueprint.settings)
        except BaseException:
            self.release(blueprint.name, worker)
            raise
        return self._publish(hosted, worker)

    def release(self, name: str, worker: str) -> None:
        """Give up a reservation."""
        with self._changed:
            self._leave_queue(name, worker)

    def adopt(self, dump: Dump) -> Owner:
        """Host what a dump holds, as the same lineage and incarnation.

        AlreadyExistsError: the name is hosted, or about to be. ResourceExhaustedError: there is no room for it.
        """
        blueprint = Blueprint(
            dump.name,
            dump.optimizer,
            dump.arguments,
            dump.layout,
            dump.options,
            dump.policy,
            dump.ephemeral,
            dump.scalar_dtype,
        )
        with self._changed:
            self._check_free(dump.name)
            self._check_room(blueprint)
        hosted = HostedOptimizer(
            self._identity(blueprint, dump.lineage), self._engine(blueprint, dump.contents), time.monotonic
        )
        hosted.resume_from(dump, time.monotonic())
        return self._publish(hosted, "")

    def _identity(self, blueprint: Blueprint, lineage: str) -> Identity:
        return Identity(
            blueprint.name, blueprint.optimizer, blueprint.arguments, blueprint.policy, blueprint.ephemeral, lineage,
            self.lease_seconds,
        )  # fmt: skip

    def _engine(self, blueprint: Blueprint, contents: Tensor) -> Engine:
        entry = self.entry(blueprint.optimizer)
        dtype = dtype_from_name(blueprint.scalar_dtype)
        return Engine(entry, blueprint.arguments, blueprint.layout, blueprint.options, contents, self.device, dtype)

    def _publish(self, hosted: HostedOptimizer, worker: str) -> Owner:
        name = hosted.identity.name
        with self._changed:
            if not worker:
                self._check_free(name)
            elif self.draining:
                self._leave_queue(name, worker)
                self._refuse_when_draining()
            owner = Owner(hosted, self._on_end)
            self._owners[name] = owner
            self._leave_queue(name, worker)
            self._changed.notify_all()
        log_event(
            _LOGGER, logging.INFO, "hosted", name=name, optimizer=hosted.identity.optimizer,
            parameters=len(hosted.engine.layout.parameters), bytes=hosted.engine.layout.arena.nbytes,
            version=hosted.version, policy=hosted.identity.policy,
        )  # fmt: skip
        return owner

    def _check_free(self, name: str) -> None:
        reservation = self._reservations.get(name)
        if name in self._owners or (reservation is not None and reservation.creator is not None):
            raise AlreadyExistsError(f"{name!r} is hosted already, or being created by a worker")

    # Removing.

    def remove(self, name: str) -> int:
        """Stop hosting; return the version it had."""
        owner = self.find(name)
        error: FarstepError = RemovedError(
            f"{name!r} was removed from the server; build the optimizer again to start anew"
        )
        owner.stop(error, _STOP_SECONDS)
        return owner.hosted.version

    def _replace(self, name: str, worker: str) -> None:
        # Several workers of one run all say "replace": the first removes the old one, and the rest must not remove the new.
        with self._changed:
            owner = self._owners.get(name)
        if owner is None:
            return
        live = {record.worker for record in owner.hosted.members.live()}
        if not live or worker in live:
            self.remove(name)

    def when_ending(self, action: Callable[[Owner], None]) -> None:
        """Have an action taken when a hosted optimizer ends, on its thread and before its name is free again."""
        self._ending.append(action)

    def _on_end(self, owner: Owner) -> None:
        for action in self._ending:
            try:
                action(owner)
            except Exception as error:  # noqa: BLE001 - the name must become free whatever happens
                log_event(_LOGGER, logging.ERROR, "end_not_noted", name=owner.name, exc_info=error)
        with self._changed:
            if self._owners.get(owner.name) is owner:
                del self._owners[owner.name]
            self._changed.notify_all()
        log_event(_LOGGER, logging.INFO, "unhosted", name=owner.name, version=owner.hosted.version)

    def drain(self) -> None:
        """Take no new sessions."""
        with self._changed:
            self.draining = True
            self._changed.notify_all()

    def session_opened(self) -> None:
        """Count a session in."""
        with self._changed:
            self._sessions += 1

    def session_closed(self) -> None:
        """Count a session out."""
        with self._changed:
            self._sessions -= 1
            self._changed.notify_all()

    def wait_until_left(self, timeout_seconds: float) -> bool:
        """Wait until no session is open; return whether that came to be."""
        with self._changed:
            return self._changed.wait_for(lambda: self._sessions == 0, timeout_seconds)

    def stop_all(self, error: FarstepError) -> None:
        """End every owner; all that waits is refused with the error."""
        for owner in self.owners():
            owner.stop(error, _STOP_SECONDS)


def summary_fields(owner: Owner) -> Mapping[str, Any]:
    """Return what a line about a hosted optimizer says."""
    hosted = owner.hosted
    layout = hosted.engine.layout
    return {
        "name": owner.name,
        "optimizer": hosted.identity.optimizer,
        "version": hosted.version,
        "live_workers": hosted.live_workers(),
        "parameters": len(layout.parameters),
        "elements": sum(spec.numel for spec in layout.specs),
        "parameter_bytes": layout.arena.nbytes,
        "ephemeral": hosted.identity.ephemeral,
        "device": str(hosted.engine.store.device),
        "lineage": hosted.identity.lineage,
        "incarnation": hosted.incarnation,
    }
