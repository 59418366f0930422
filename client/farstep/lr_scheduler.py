"""Learning-rate schedules that live on the server and follow the committed version.

``farstep.lr_scheduler.X(optimizer, ...)`` takes the arguments of ``torch.optim.lr_scheduler.X`` and has the server build that
very class over the hosted optimizer, where each committed step steps it. So one schedule holds for all workers, whoever
contributed, which is what ``farstep.Async`` needs: there a worker's own scheduler would count that worker's steps alone. The
rates come back with each step. ``scheduler.step()`` does nothing, so that a training script may keep its call.

Each worker declares the same schedules in the same order; the first to come puts them on the server, the others find them
there. Schedules are part of snapshots. One that ends (``OneCycleLR`` past its last step) leaves the options as they are, and
the log says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from farstep.optim.proxy import RemoteOptimizer
from farstep_wire.errors import ConfigurationError
from farstep_wire.schedules import UNSERVED, served_schedulers
from farstep_wire.v1.steering_pb2 import ScheduleState
from farstep_wire.values import from_map


class RemoteScheduler:
    """What every schedule on a server has in common; mixed in before torch's class."""

    _farstep_torch_class: type[LRScheduler]
    _farstep_number: int
    optimizer: RemoteOptimizer

    def __init__(self, *args: Any, every: int = 1, **kwargs: Any) -> None:
        name = self._farstep_torch_class.__name__
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"{name}: every must be an int of at least 1, not {every!r}")
        bound = inspect.signature(self._farstep_torch_class).bind(*args, **kwargs)
        arguments = {key: value for key, value in bound.arguments.items() if key != "kwargs"}
        parts = _parts(name, arguments.pop("schedulers", ()))
        optimizer = arguments.pop("optimizer", None) or (parts[0].optimizer if parts else None)
        self.optimizer = _checked(name, optimizer, parts)
        self.every = every
        session = self.optimizer._farstep_session()
        try:
            state = session.declare_schedule(
                self.optimizer.param_groups, name, arguments, [part._farstep_number for part in parts], every
            )
        except TypeError as error:
            raise ConfigurationError(f"{name}: {error}; use torch.optim.lr_scheduler.{name}") from None
        self._farstep_number = len(session.schedules) - 1
        self._schedulers = parts
        self._farstep_take(state)

    def _farstep_take(self, state: ScheduleState) -> dict[str, Any]:
        values = from_map(state.state, "state")
        # What changes on the server is asked for there.
        moving = {"last_epoch", "_last_lr", "_schedulers"}
        self.__dict__.update({key: value for key, value in values.items() if key not in moving})
        return values

    def _farstep_fetch(self) -> dict[str, Any]:
        session, number = self.optimizer._farstep_session(), self._farstep_number
        return self._farstep_take(session.ask_server(lambda server: server.schedule_state(session.name, number)))

    @property
    def last_epoch(self) -> int:
        """The steps that the schedule has taken, fetched from the server. AttributeError for ChainedScheduler, as in torch."""
        state = self._farstep_fetch()
        if "last_epoch" not in state:
            raise AttributeError(f"{type(self).__name__} has no last_epoch of its own")
        return int(state["last_epoch"])

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the server steps the schedule with each committed step."""

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group, as of the last step of this worker."""
        return [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group, as of the last step of this worker."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict of the schedule, fetched from the server."""
        return self._farstep_fetch()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the schedule's state on the server; every worker may do so, with the same state."""
        session, number = self.optimizer._farstep_session(), self._farstep_number
        self._farstep_take(
            session.ask_server(lambda server: server.load_schedule(session.name, number, dict(state_dict)))
        )


def _parts(name: str, schedulers: Any) -> list[RemoteScheduler]:
    for part in schedulers:
        if not isinstance(part, RemoteScheduler):
            raise ConfigurationError(
                f"{name} is made of schedules on the server; {type(part).__name__} of {type(part).__module__} is none: build "
                f"it from farstep.lr_scheduler"
            )
    return list(schedulers)


def _checked(name: str, optimizer: Any, parts: list[RemoteScheduler]) -> RemoteOptimizer:
    if not isinstance(optimizer, RemoteOptimizer):
        raise ConfigurationError(
            f"{name} lives with a hosted optimizer; for {type(optimizer).__name__} use torch.optim.lr_scheduler.{name}"
        )
    for part in parts:
        if part.optimizer is not optimizer:
            raise ConfigurationError(f"{name}: all its schedulers must be of the same optimizer")
    return optimizer


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _scheduler_class(cls: type[LRScheduler]) -> type[LRScheduler]:
    signature = inspect.signature(cls)
    every = inspect.Parameter("every", inspect.Parameter.KEYWORD_ONLY, default=1, annotation="int")
    namespace = {
        "__doc__": f"{cls.__doc__}\n\nLives on the server; ``every``: committed versions per step of the schedule.",
        "__module__": __name__,
        "__qualname__": cls.__name__,
        "__signature__": signature.replace(parameters=[*signature.parameters.values(), every]),
        "_farstep_torch_class": cls,
    }
    return cast(type[LRScheduler], type(cls.__name__, (RemoteScheduler, cls), namespace))


def _unserved_class(name: str, reason: str) -> type:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConfigurationError(
            f"{name} cannot live on a server: {reason}. Use torch.optim.lr_scheduler.{name} on each worker: what it changes "
            f"travels with the next step"
        )

    return type(name, (), {"__module__": __name__, "__doc__": f"Not served: {reason}.", "__init__": refuse})


_classes = {name: _scheduler_class(cls) for name, cls in served_schedulers().items()}
_refused = {name: _unserved_class(name, reason) for name, reason in UNSERVED.items()}
globals().update(_classes, **_refused)

__all__ = list(_classes)


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"module 'farstep.lr_scheduler' has no scheduler {name!r}; it has {', '.join(sorted(_classes))}"
    )
