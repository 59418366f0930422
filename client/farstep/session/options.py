"""What changed in ``param_groups`` since the server last heard of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from farstep_wire.plain import frozen_value, same_value
from farstep_wire.values import to_value

LOCAL_KEYS = frozenset({"params", "param_names"})
"""What a group holds besides options."""

_ABSENT = object()

Edits = dict[int, tuple[dict[str, Any], list[str]]]


def sendable(group: Mapping[str, Any], required: frozenset[str], number: int) -> dict[str, Any]:
    """Return the options of a group that can travel.

    One that cannot, such as a user's own object, stays on this side; TypeError where the optimizer itself needs it.
    """
    result = {}
    for key, value in group.items():
        if key in LOCAL_KEYS:
            continue
        try:
            to_value(value, f"param_groups[{number}][{key!r}]")
        except TypeError:
            if key in required:
                raise
            continue
        result[key] = value
    return result


class OptionTracker:
    """The options as the server knows them."""

    def __init__(self, required: frozenset[str]) -> None:
        self._required = required
        self._known: list[dict[str, Any]] = []

    def acknowledge(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The server has the groups as they stand."""
        self._known = [
            {key: frozen_value(value) for key, value in sendable(group, self._required, number).items()}
            for number, group in enumerate(groups)
        ]

    def acknowledge_group(self, groups: Sequence[Mapping[str, Any]], number: int) -> None:
        """The server has that group, which it did not have before."""
        options = sendable(groups[number], self._required, number)
        self._known.append({key: frozen_value(value) for key, value in options.items()})

    def edits(self, groups: Sequence[Mapping[str, Any]]) -> Edits:
        """Return what changed since; a group that is not known yet is left out."""
        edits: Edits = {}
        for number, (group, known) in enumerate(zip(groups, self._known, strict=False)):
            changed = {
                key: value
                for key, value in group.items()
                # Most options are the very object that they were; a tensor never is, since a copy of it is kept.
                if (old := known.get(key, _ABSENT)) is not value
                and key not in LOCAL_KEYS
                and not same_value(old, value)
            }
            if changed:
                changed = sendable(changed, self._required, number)
            removed = [] if known.keys() <= group.keys() else [key for key in known if key not in group]
            if changed or removed:
                edits[number] = (changed, removed)
        return edits

    def acknowledge_edits(self, edits: Edits) -> None:
        """The server has taken these edits."""
        for number, (changed, removed) in edits.items():
            known = self._known[number]
            for key in removed:
                known.pop(key, None)
            known.update({key: frozen_value(value) for key, value in changed.items()})
