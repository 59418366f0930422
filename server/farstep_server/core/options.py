"""Options of param groups: what changed, and whether workers agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from farstep_wire.errors import Applied, MismatchError
from farstep_wire.plain import frozen_value, same_value

GroupEdits = dict[int, tuple[dict[str, Any], tuple[str, ...]]]
"""By group: what is set, and which options are gone."""

_GONE = object()
_SHOWN_ELEMENTS = 8


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def frozen_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return copies of all groups' options that later changes do not reach."""
    return [{key: frozen_value(value) for key, value in options_of(group).items()} for group in optimizer.param_groups]


def edited_options(optimizer: Optimizer, edits: GroupEdits) -> list[dict[str, Any]]:
    """Return copies of all groups' options as they will be with edits."""
    options = frozen_options(optimizer)
    _edit(options, edits)
    return options


def apply_edits(optimizer: Optimizer, edits: GroupEdits) -> None:
    """Set and remove options."""
    _edit(optimizer.param_groups, edits)


def _edit(groups: Sequence[dict[str, Any]], edits: GroupEdits) -> None:
    for number, (changed, removed) in edits.items():
        group = groups[number]
        for key in removed:
            group.pop(key, None)
        for key, value in changed.items():
            current = group.get(key)
            if isinstance(current, Tensor) and isinstance(value, Tensor):
                value = value.to(current.device)
            group[key] = value


def difference(before: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> GroupEdits:
    """Return the edits that turn the options ``before`` into those of ``groups``."""
    edits: GroupEdits = {}
    for number, (old, group) in enumerate(zip(before, groups, strict=True)):
        changed = {
            key: frozen_value(value)
            for key, value in group.items()
            if key != "params" and not same_value(old.get(key, _GONE), value)
        }
        removed = tuple(key for key in old if key not in group)
        if changed or removed:
            edits[number] = (changed, removed)
    return edits


class _Change(NamedTuple):
    """``number`` counts changes; ``version`` is that after it; ``authors`` are the workers who made it."""

    number: int
    version: int
    authors: frozenset[str]


class OptionLog:
    """When each option was changed last, and by whom; and who has been told: what a worker still has to be told.

    A worker has to be told of what was changed since it was told last, and, where it may have given up waiting for that
    answer, since the version that it holds.
    """

    def __init__(self) -> None:
        self._changes: dict[tuple[int, str], _Change] = {}
        self._number = 0
        self._told: dict[str, int] = {}

    def note(self, edits: GroupEdits, version: int, authors: Iterable[str] = ()) -> None:
        """Remember what was changed; the server's own changes have no authors."""
        if edits:
            self._number += 1
            change = _Change(self._number, version, frozenset(authors))
            for number, (changed, removed) in edits.items():
                self._changes.update(((number, key), change) for key in (*changed, *removed))

    def told(self, worker: str) -> None:
        """Note that a worker knows all options as they stand."""
        self._told[worker] = self._number

    def untold(self, worker: str, version: int, optimizer: Optimizer) -> GroupEdits:
        """Return what others have changed and the worker, which holds a version, has not been told, as it stands."""
        told = self._told.get(worker, 0)
        edits: GroupEdits = {}
        for (number, key), change in self._changes.items():
            known = worker in change.authors or (change.number <= told and change.version <= version)
            if known or number >= len(optimizer.param_groups):
                continue
            group = optimizer.param_groups[number]
            values, gone = edits.get(number, ({}, ()))
            if key in group:
                edits[number] = ({**values, key: frozen_value(group[key])}, gone)
            else:
                edits[number] = (values, (*gone, key))
        return edits


def merged(edits: Sequence[GroupEdits]) -> GroupEdits:
    """Return edits as one, the later ones over the earlier."""
    return _merge({str(number): own for number, own in enumerate(edits)})


def agreed_edits(optimizer: Optimizer, edits: Mapping[str, GroupEdits]) -> GroupEdits:
    """Return the edits that all workers of a round make; MismatchError names the option and two workers' values.

    A worker that sends no edit of an option has the value that the server has.
    """
    if len(edits) == 1:
        return next(iter(edits.values()))
    touched = {
        (number, key)
        for own in edits.values()
        for number, (changed, removed) in own.items()
        for key in (*changed, *removed)
    }
    for number, key in sorted(touched):
        current = optimizer.param_groups[number].get(key, _GONE)
        values = {worker: _effective(own, number, key, current) for worker, own in edits.items()}
        (first, value), *others = values.items()
        for worker, other in others:
            if not same_value(value, other):
                raise MismatchError(
                    f"workers disagree on param_groups[{number}][{key!r}]: worker {first} has {_show(value)}, "
                    f"worker {worker} has {_show(other)}. Set the same value on each worker and step again",
                    applied=Applied.NO,
                )
    return _merge(edits)


def check_same_value(call: str, name: str, values: Mapping[str, object]) -> None:
    """MismatchError where workers bring different values along with a call that they make together; names two of them.

    ``values``: by worker. Dicts are compared entry by entry, and the first that differs is named.
    """
    (first, value), *others = values.items()
    for worker, other in others:
        if same_value(value, other):
            continue
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            for key in dict.fromkeys((*value, *other)):
                entries = {first: value.get(key, _GONE), worker: other.get(key, _GONE)}
                check_same_value(call, f"{name}[{key!r}]", entries)
        else:
            raise MismatchError(
                f"workers disagree in {call} on {name}: worker {first} has {_show(value)}, worker {worker} has "
                f"{_show(other)}. Give each worker the same and call it again",
                applied=Applied.NO,
            )


def _merge(edits: Mapping[str, GroupEdits]) -> GroupEdits:
    merged: GroupEdits = {}
    for own in edits.values():
        for number, (changed, removed) in own.items():
            values, gone = merged.get(number, ({}, ()))
            merged[number] = ({**values, **changed}, tuple(dict.fromkeys((*gone, *removed))))
    return merged


def _effective(edits: GroupEdits, number: int, key: str, current: object) -> object:
    changed, removed = edits.get(number, ({}, ()))
    if key in removed:
        return _GONE
    return changed.get(key, current)


def _show(value: object) -> str:
    if isinstance(value, Tensor) and value.numel() > _SHOWN_ELEMENTS:
        norm = float(torch.linalg.vector_norm(value.detach().double().abs()))
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} and norm {norm:.17g}"
    return "no such option" if value is _GONE else repr(value)
