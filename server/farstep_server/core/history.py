"""What the last rounds were: who took part in each, how stale they were, and how it ended.

Kept in memory, in this life of the server, and bounded: the oldest go first.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import NamedTuple

KEPT_PARTS = 20_000
"""Workers' parts that are remembered, over all rounds; a round without any counts as one."""


class RoundKind(Enum):
    """What a round was."""

    STEP = "step"
    LOAD_STATE = "load_state_dict"
    ADD_PARAM_GROUP = "add_param_group"
    RESTORE = "restore"


class RoundOutcome(Enum):
    """How a round ended."""

    COMMITTED = "committed"
    SKIPPED = "skipped"
    ROLLED_BACK = "rolled back"
    REFUSED = "refused"


class Part(NamedTuple):
    """A worker's part in a round.

    ``staleness``: versions committed since the one its gradients were taken at. ``ahead``: steps that it was ahead of the
    slowest live worker when the round began. ``evaluations``: how many it answered.
    """

    worker: str
    sequence: int
    abstained: bool = False
    num_samples: float | None = None
    staleness: int = 0
    ahead: int = 0
    evaluations: int = 0


class Round(NamedTuple):
    """One round. ``number`` counts all of them from 1, ``version`` is that after it."""

    number: int
    version: int
    incarnation: int
    kind: RoundKind
    outcome: RoundOutcome
    parts: tuple[Part, ...]
    evaluations: int
    seconds: float
    reason: str


class History:
    """The last rounds, oldest first."""

    def __init__(self) -> None:
        self._rounds: deque[Round] = deque()
        self._parts = 0
        self._number = 0

    def add(
        self,
        version: int,
        incarnation: int,
        kind: RoundKind,
        outcome: RoundOutcome,
        parts: tuple[Part, ...],
        *,
        evaluations: int = 0,
        seconds: float = 0.0,
        reason: str = "",
    ) -> None:
        """Remember a round."""
        self._number += 1
        self._rounds.append(
            Round(self._number, version, incarnation, kind, outcome, parts, evaluations, seconds, reason)
        )
        self._parts += max(1, len(parts))
        while self._parts > KEPT_PARTS and len(self._rounds) > 1:
            self._parts -= max(1, len(self._rounds.popleft().parts))

    def after(self, number: int) -> list[Round]:
        """Return the rounds after that number, as far as they are remembered."""
        missing = number + 1 - (self._rounds[0].number if self._rounds else 0)
        return list(self._rounds)[max(0, missing) :]
