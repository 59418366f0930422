"""What workers say to a hosted optimizer and what they are answered, as plain data: the words that the model understands.

A ticket is a number; each event that awaits an answer has one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Gradients = list[Tensor | None]

# Events.


@dataclass(frozen=True)
class Join:
    """A process attaches as a worker; ``again``: it was attached before and goes on."""

    ticket: int
    worker: str
    instance: str
    again: bool = False


@dataclass(frozen=True)
class Act:
    """What is decided once, however often it is said; (worker, instance, sequence) names it."""

    ticket: int
    worker: str
    epoch: int
    sequence: int


@dataclass(frozen=True)
class Push(Act):
    """A contribution, or where there are no gradients an abstention. ``lr``: a learning rate that was set on the worker."""

    version: int
    incarnation: int
    gradients: Gradients | None
    lr: float | None = None
    samples: float | None = None
    accumulated: int = 0


@dataclass(frozen=True)
class Accumulate(Act):
    """Gradients to be added to the worker's next contribution."""

    gradients: Gradients


@dataclass(frozen=True)
class Load(Act):
    """load_state_dict: a collective act."""

    state: dict[int, dict[str, Any]]
    options: dict[str, Any]


@dataclass(frozen=True)
class ZeroGrad:
    """The worker takes back what waits and what it has accumulated."""

    ticket: int
    worker: str
    epoch: int


@dataclass(frozen=True)
class Leave:
    """The worker says goodbye."""

    ticket: int
    worker: str
    epoch: int


@dataclass(frozen=True)
class Touch:
    """A heartbeat."""

    worker: str
    epoch: int


@dataclass(frozen=True)
class Configure:
    """Changes settings."""

    changes: dict[str, float | None]


@dataclass(frozen=True)
class Restore:
    """Rolls back to the saved state of that number."""

    ticket: int
    saved: int


@dataclass(frozen=True)
class Stop:
    """The server drains: the last event of its life."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Join | Act | ZeroGrad | Leave | Touch | Configure | Restore | Stop | Tick

# Answers.


@dataclass(frozen=True)
class Joined:
    """``settled``: the last act of this instance that is decided. ``lr``: None where the worker's own is right."""

    resumed: bool
    version: int
    incarnation: int
    epoch: int
    settled: int
    lr: float | None


@dataclass(frozen=True)
class Stepped:
    """What became of a contribution, and where things stand when that is told; ``bits`` are those of all parameters.

    ``lr``: in the model's word the learning rate as it stands, in the server's the one that the worker is told, if any.
    """

    outcome: str
    version: int
    incarnation: int
    contributions: int
    staleness: int
    bits: bytes = field(repr=False)
    lr: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Done:
    """It was carried out."""

    version: int
    incarnation: int


@dataclass(frozen=True)
class Refused:
    """It was not carried out. ``applied``: whether the step in question took effect."""

    error: str
    applied: str


Answer = Joined | Stepped | Done | Refused


@dataclass(frozen=True)
class Part:
    """A worker's part in a round."""

    worker: str
    sequence: int
    abstained: bool = False
    samples: float | None = None
    staleness: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class Round:
    """A line of the history: ``version`` and ``incarnation`` are those after the round."""

    kind: str
    outcome: str
    version: int
    incarnation: int
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Row:
    """A worker in a description."""

    worker: str
    standing: str
    epoch: int
    version: int
    contributions: int
    abstentions: int
    stale: int
    staleness: int
    lease_seconds: float


def bits_of(tensors: list[Tensor]) -> bytes:
    """Return the bytes of all elements."""
    return b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
