"""Who may join a hosted optimizer: whoever has the same class, layout, policy and options."""

from __future__ import annotations

from farstep_server.core.engine import Engine
from farstep_server.core.events import AddGroup, Join
from farstep_server.core.identity import Identity
from farstep_server.core.membership import Membership
from farstep_server.core.pipeline import Pipeline
from farstep_wire.errors import (
    Applied,
    FarstepError,
    FencedError,
    InvalidRequestError,
    LayoutMismatchError,
    MismatchError,
    RollbackError,
)
from farstep_wire.plain import same_value


def check_same(identity: Identity, engine: Engine, members: Membership, event: Join) -> None:
    """MismatchError or LayoutMismatchError names what differs, and both sides.

    A worker that comes back may not know yet of a group that was added by its own last act.
    """
    name = identity.name
    if event.optimizer != identity.optimizer:
        raise MismatchError(f"{name!r} hosts {identity.optimizer}; worker {event.worker} has {event.optimizer}")
    problem = engine.layout.difference(event.layout)
    back = bool(event.lineage) and members.knows(event.worker, event.instance)
    if problem is not None and not (back and engine.layout.begins_with(event.layout)):
        raise LayoutMismatchError(f"{name!r}, worker {event.worker}: {problem}")
    if event.policy != identity.policy:
        raise MismatchError(f"{name!r} has the policy {identity.policy}; worker {event.worker} asks for {event.policy}")


def check_options(identity: Identity, pipeline: Pipeline, event: Join) -> None:
    """MismatchError names the option or setting in which a worker differs from the others, and both values."""
    if event.settings is not None and event.settings != pipeline.settings:
        own, theirs = pipeline.settings.as_dict(), event.settings.as_dict()
        key = next(key for key in own if own[key] != theirs[key])
        raise MismatchError(
            f"{identity.name!r}: settings.{key} is {own[key]!r} on the server; worker {event.worker} has {theirs[key]!r}. "
            f"Give each worker the same settings, or none"
        )
    mine = pipeline.options_of_creation()
    for number, (group, theirs) in enumerate(zip(mine, event.options, strict=True)):
        for key in sorted(group.keys() | theirs.keys()):
            if not same_value(group.get(key), theirs.get(key)):
                raise MismatchError(
                    f"{identity.name!r}: param_groups[{number}][{key!r}] is {group.get(key)!r} on the server; "
                    f"worker {event.worker} has {theirs.get(key)!r}. Give each worker the same options"
                )


def check_group(engine: Engine, event: AddGroup) -> None:
    """InvalidRequestError: the group cannot follow those that there are."""
    try:
        engine.layout.extended(event.layout)
    except ValueError as error:
        raise InvalidRequestError(f"add_param_group: {error}", applied=Applied.NO) from None


def check_reconnect(identity: Identity, members: Membership, event: Join) -> None:
    """RollbackError: the name stands for another optimizer now. FencedError: another process is this worker now."""
    if event.lineage != identity.lineage:
        raise RollbackError(
            f"{identity.name!r} was created anew since worker {event.worker} attached: its lineage was "
            f"{event.lineage}, now it is {identity.lineage}. Build the optimizer again to go on with the new one"
        )
    for record in members:
        if record.worker == event.worker and record.instance != event.instance:
            raise FencedError(
                f"worker {event.worker}: another process has attached as the same worker; give each worker its own id",
                applied=Applied.NO,
            )


class Misfits:
    """Who was refused, and which members have been told: each hears once of each refusal, since both sides may be wrong."""

    def __init__(self) -> None:
        self._refused: dict[str, tuple[FarstepError, set[str]]] = {}

    def refused(self, worker: str, error: FarstepError) -> None:
        """Note that a worker was refused."""
        self._refused[worker] = (type(error)(str(error), applied=Applied.NO), {worker})

    def joined(self, worker: str) -> None:
        """Note that a worker fits now."""
        self._refused.pop(worker, None)

    def untold(self, member: str) -> FarstepError | None:
        """Return a refusal that a member has not heard of; it has now."""
        for error, told in self._refused.values():
            if member not in told:
                told.add(member)
                return error
        return None
