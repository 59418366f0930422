"""Learning-rate schedules that live with a hosted optimizer: real ``torch.optim.lr_scheduler`` objects, stepped by commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from farstep_server.core.options import frozen_options
from farstep_wire.errors import ArgumentsError, InvalidRequestError, MismatchError, NotFoundError
from farstep_wire.plain import same_value
from farstep_wire.schedules import NESTED, served_schedulers


@dataclass(frozen=True)
class ScheduleSpec:
    """What a worker declares. ``parts``: the schedules that it is made of, by number; ``every``: versions per step."""

    scheduler: str
    arguments: dict[str, Any]
    parts: tuple[int, ...] = ()
    every: int = 1


@dataclass(frozen=True)
class ScheduleDump:
    """What a dump keeps of a schedule."""

    spec: ScheduleSpec
    state: dict[str, Any]
    commits: int
    ended: str


@dataclass(frozen=True)
class ScheduleRow:
    """A schedule in a description."""

    spec: ScheduleSpec
    last_epoch: int
    part: bool
    ended: str


@dataclass
class _Entry:
    spec: ScheduleSpec
    scheduler: LRScheduler
    part: bool = False
    commits: int = 0
    ended: str = ""


class Schedules:
    """The schedules of one hosted optimizer, in the order of their declaration."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._entries: list[_Entry] = []
        self.options_before: list[dict[str, Any]] = []
        """The groups' options as they were before the first schedule: what workers are built with."""

    def __len__(self) -> int:
        return len(self._entries)

    def declare(self, number: int, spec: ScheduleSpec, edit: Callable[[], None]) -> None:
        """Put a schedule here, after ``edit`` has brought the options up to date; one that is here already may stay.

        MismatchError: another one has that number. ArgumentsError: torch does not take the arguments. NotFoundError or
        InvalidRequestError: there is no such class or part, or an earlier schedule is missing.
        """
        if number < len(self._entries):
            self._check_same(number, spec)
            return
        if number > len(self._entries):
            raise InvalidRequestError(f"schedule {number} before schedule {len(self._entries)}")
        if not self._entries:
            self.options_before = frozen_options(self._optimizer)
        edit()
        before = frozen_options(self._optimizer)
        try:
            self._append(spec)
        except (InvalidRequestError, NotFoundError):
            raise
        except Exception as error:
            _set_options(self._optimizer, before)
            raise ArgumentsError(f"{spec.scheduler} could not be built on the server: {error}") from error

    def _check_same(self, number: int, spec: ScheduleSpec) -> None:
        own = self._entries[number].spec
        for name in ("scheduler", "arguments", "parts", "every"):
            mine, theirs = getattr(own, name), getattr(spec, name)
            if not same_value(mine, theirs):
                raise MismatchError(
                    f"schedule {number} on the server is {own.scheduler} with {name} = {mine!r}; this worker declares "
                    f"{spec.scheduler} with {name} = {theirs!r}. Give each worker the same schedules in the same order"
                )

    def _append(self, spec: ScheduleSpec) -> None:
        cls = served_schedulers().get(spec.scheduler)
        if cls is None:
            raise NotFoundError(f"no scheduler {spec.scheduler!r}; there are {', '.join(served_schedulers())}")
        for part in spec.parts:
            if part >= len(self._entries) or self._entries[part].part:
                raise InvalidRequestError(f"{spec.scheduler}: schedule {part} is not there, or is a part already")
        make: Callable[..., LRScheduler] = cls
        if spec.scheduler in NESTED:
            parts = [self._entries[part].scheduler for part in spec.parts]
            scheduler = make(optimizer=self._optimizer, schedulers=parts, **spec.arguments)
        else:
            scheduler = make(self._optimizer, **spec.arguments)
        for part in spec.parts:
            self._entries[part].part = True
        self._entries.append(_Entry(spec, scheduler))

    def follow(self) -> list[str]:
        """Take note of a committed step; return what the workers should be told of schedules that have ended by it."""
        told = []
        # torch's schedulers warn where the optimizer has not stepped before; here it always has.
        vars(self._optimizer)["_opt_called"] = True
        for entry in self._entries:
            entry.commits += 1
            if entry.part or entry.ended or entry.commits % entry.spec.every:
                continue
            try:
                entry.scheduler.step()
            except Exception as error:  # noqa: BLE001 - the step is committed; torch's own, such as a schedule at its end
                entry.ended = f"{type(error).__name__}: {error}"
                told.append(f"{entry.spec.scheduler} has ended, and the options stay as they are: {entry.ended}")
        return told

    def state(self, number: int) -> tuple[dict[str, Any], str]:
        """Return torch's state dict of a schedule, as plain values, and why it has ended, if it has."""
        entry = self._find(number)
        return _plain(entry.scheduler.state_dict()), entry.ended

    def load(self, number: int, state: Mapping[str, Any]) -> None:
        """Replace a schedule's state."""
        entry = self._find(number)
        _load(entry.scheduler, state)
        entry.ended = ""

    def _find(self, number: int) -> _Entry:
        if not 0 <= number < len(self._entries):
            raise NotFoundError(f"there is no schedule {number}; there are {len(self._entries)}")
        return self._entries[number]

    def rows(self) -> list[ScheduleRow]:
        """Return the schedules for a description."""
        return [ScheduleRow(entry.spec, _last_epoch(entry), entry.part, entry.ended) for entry in self._entries]

    def dump(self) -> list[ScheduleDump]:
        """Return what a dump keeps."""
        return [
            ScheduleDump(entry.spec, _plain(entry.scheduler.state_dict()), entry.commits, entry.ended)
            for entry in self._entries
        ]

    def restore(self, dumps: Sequence[ScheduleDump]) -> None:
        """Replace all by those of a dump. The options are those of the dump before and afterwards."""
        before = frozen_options(self._optimizer)
        self._entries.clear()
        for dump in dumps:
            self._append(dump.spec)
        for entry, dump in zip(self._entries, dumps, strict=True):
            entry.commits, entry.ended = dump.commits, dump.ended
            _load(entry.scheduler, dump.state)
        _set_options(self._optimizer, before)


def _last_epoch(entry: _Entry) -> int:
    # torch's ChainedScheduler keeps no count of its own.
    return int(getattr(entry.scheduler, "last_epoch", entry.commits // entry.spec.every))


def _set_options(optimizer: Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
    for group, own in zip(optimizer.param_groups, options, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(params=parameters, **own)


def _plain(value: Any) -> Any:
    """Return a state dict as values that can travel; what cannot (functions) is left out, as torch leaves it out."""
    if isinstance(value, dict):
        items = {key: _plain(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _plain}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    return _plain


def _load(scheduler: Any, state: Mapping[str, Any]) -> None:
    own = vars(scheduler)
    rest = dict(state)
    for part, nested in zip(own.get("_schedulers", ()), rest.pop("_schedulers", ()), strict=False):
        _load(part, nested)
    with torch.no_grad():
        own.update({key: Counter(value) if isinstance(own.get(key), Counter) else value for key, value in rest.items()})
