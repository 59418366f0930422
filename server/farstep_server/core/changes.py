"""What steps have changed of the parameters, as far as that is known for certain: rows, whole parameters, or nothing.

Every write to the arena is counted. A step of one of torch's own classes leaves a note of what it changed between two counts;
any other write leaves none, so that no way of notes leads past it, and who holds an older version gets everything. That there
is no word of a step that changed all parameters costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from farstep_server.core.gradients import Gradients
from farstep_server.core.means import Means
from farstep_wire.changes import comes_in_rows
from farstep_wire.layout import Layout

Changes = Mapping[int, Tensor | None]
"""By parameter, the rows that changed (1-D int64, ascending), or None where all may have. Others did not change."""

_VERSIONS = 64
"""How far back it is known what has changed."""
_MOST_PARAMETERS = 50_000
"""Of how many a reply says what has changed, for its header's sake."""


@dataclass(frozen=True)
class _Note:
    until: int
    changes: Changes
    nbytes: int


class Journal:
    """The notes of one arena. ``limit_bytes``: what the numbers of rows in them may take, but for the last note's."""

    def __init__(self, limit_bytes: int) -> None:
        self.writes = 0
        """How many writes to the arena have begun."""
        self._limit_bytes = limit_bytes
        self._notes: OrderedDict[int, _Note] = OrderedDict()
        self._versions: OrderedDict[int, int] = OrderedDict()

    def is_version(self, version: int) -> None:
        """Those who get the parameters from now on, until the next write, hold that version."""
        self._versions[version] = self.writes
        if len(self._versions) > _VERSIONS:
            self._versions.popitem(last=False)

    def note(self, since: int, changes: Changes) -> None:
        """Between that count of writes and now no more was changed than this."""
        nbytes = sum(rows.nbytes for rows in changes.values() if rows is not None)
        self._notes[since] = _Note(self.writes, changes, nbytes)
        total = sum(note.nbytes for note in self._notes.values())
        while len(self._notes) > 1 and (len(self._notes) > _VERSIONS or total > self._limit_bytes):
            total -= self._notes.popitem(last=False)[1].nbytes

    def since(self, version: int) -> Changes | None:
        """Return what has changed since a version; None where that is not known."""
        at = self._versions.get(version)
        steps: list[Changes] = []
        while at is not None and at != self.writes:
            note = self._notes.get(at)
            if note is None:
                return None
            steps.append(note.changes)
            at = note.until
        return None if at is None else _union(steps)


def _union(steps: Sequence[Changes]) -> Changes | None:
    if len(steps) == 1:
        return steps[0] if len(steps[0]) <= _MOST_PARAMETERS else None
    found: dict[int, list[Tensor] | None] = {}
    for changes in steps:
        for number, rows in changes.items():
            known = found.setdefault(number, [])
            if rows is None or known is None:
                found[number] = None
            else:
                known.append(rows)
    if len(found) > _MOST_PARAMETERS:
        return None
    return {number: None if rows is None else torch.unique(torch.cat(rows)) for number, rows in found.items()}


def changed_by(
    optimizer: Optimizer, layout: Layout, gradients: Gradients | Means, edited: Collection[int]
) -> Changes | None:
    """Return what a step of one of torch's own classes has changed; None where that is all.

    Parameters without a gradient do not change. Of one with a sparse gradient its rows alone change in SparseAdam, in Adagrad
    and in SGD without momentum; weight decay reaches all rows, and so does momentum those of earlier steps.
    """
    changes: dict[int, Tensor | None] = dict.fromkeys(edited)
    for number, parameter in enumerate(layout.parameters):
        if isinstance(gradients, Means):
            if not gradients.absent(number) or parameter.storage:
                changes[number] = None
            continue
        gradient = gradients[number]
        if gradient is None and not parameter.storage:
            continue
        group = optimizer.param_groups[parameter.group]
        in_rows = (
            gradient is not None
            and number not in edited
            and gradient.is_sparse
            and gradient.is_cpu
            and gradient.sparse_dim() == 1
            and _touches_rows(optimizer, group)
            and comes_in_rows(layout, number)
        )
        rows = torch.unique(gradient._indices()[0]) if in_rows and gradient is not None else None
        if rows is None or rows.numel():
            changes[number] = rows
    return changes if len(changes) < len(layout.parameters) or any(v is not None for v in changes.values()) else None


def _touches_rows(optimizer: Optimizer, group: Mapping[str, object]) -> bool:
    kind = type(optimizer)
    if kind is SGD:
        return not group["momentum"] and not group["weight_decay"]
    if kind is Adagrad:
        return not group["weight_decay"]
    return kind is SparseAdam
