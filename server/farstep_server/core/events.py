"""What a hosted optimizer is told, and what it answers. Each event that awaits an answer carries a ticket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from farstep_server.core.gradients import Staged
from farstep_server.core.history import Round
from farstep_server.core.options import GroupEdits
from farstep_server.core.parameters import Onlooker, Parameters, SharedArena
from farstep_server.core.records import Description, Dump, Outcome
from farstep_server.core.schedules import ScheduleSpec
from farstep_wire.errors import FarstepError
from farstep_wire.layout import Layout
from farstep_wire.policy import Policy
from farstep_wire.settings import Settings


class Ticket(Protocol):
    """Whom to answer."""

    def deliver(self, reply: Reply) -> None:
        """Take the answer; called by the owner, must not block."""


@dataclass(frozen=True)
class Join:
    """A worker attaches. ``instance`` is the same on a reconnect.

    ``session``: told, once, where the membership ends without the worker's word: its lease runs out, or it attaches anew.
    """

    ticket: Ticket
    worker: str
    instance: str
    policy: Policy
    layout: Layout
    options: list[dict[str, Any]]
    optimizer: str
    lineage: str
    settings: Settings | None = None
    session: Ticket | None = None


@dataclass(frozen=True)
class Act:
    """Something that every live worker must do before it takes effect: the base of contributions and collective acts."""

    ticket: Ticket
    worker: str
    epoch: int
    sequence: int


@dataclass(frozen=True)
class Contribution(Act):
    """Gradients for a round, or the word that there are none.

    ``staged`` is None for an abstention and for a closure-driven step without edited parameters. ``shared``: the worker takes
    the parameters from shared memory. ``takes_changes``: it holds the version whole, and takes what has changed since.
    """

    version: int
    incarnation: int
    staged: Staged | None
    edits: GroupEdits = field(default_factory=dict)
    abstain: bool = False
    closure: bool = False
    num_samples: float | None = None
    omit_parameters: bool = False
    accumulated: int = 0
    shared: bool = False
    takes_changes: bool = False


@dataclass(frozen=True)
class Accumulate(Act):
    """Gradients that wait for the worker's next contribution. Settled at once."""

    staged: Staged


@dataclass(frozen=True)
class LoadState(Act):
    """Replaces optimizer state and options."""

    state: list[tuple[Any, Any]]
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class AddGroup(Act):
    """Adds a param group with its parameters' contents."""

    layout: Layout
    options: dict[str, Any]
    contents: Tensor


@dataclass(frozen=True)
class Evaluation:
    """A closure's result: the answer to EvaluateReply."""

    ticket: Ticket
    worker: str
    epoch: int
    sequence: int
    number: int
    loss: object
    staged: Staged | None
    error: str = ""
    shared: bool = False


@dataclass(frozen=True)
class ZeroGrad:
    """Drops what the worker has staged."""

    ticket: Ticket
    worker: str
    epoch: int


@dataclass(frozen=True)
class Leave:
    """Ends a membership. ``epoch`` guards against a late word of an old session."""

    ticket: Ticket | None
    worker: str
    epoch: int


@dataclass(frozen=True)
class Touch:
    """A sign of life. ``round_trip_seconds``: what the worker has measured, 0 where it says nothing."""

    worker: str
    epoch: int
    round_trip_seconds: float = 0.0


@dataclass(frozen=True)
class ReadParameters:
    """Asks for the parameters, or for their ``average``: "ema"."""

    ticket: Ticket
    worker: str = ""
    average: str = ""
    shared: bool = False


@dataclass(frozen=True)
class ShareParameters:
    """Asks that the parameters lie in memory that workers see. ``make`` is given their size in bytes.

    ``onlooker``: who would have its own parameters lie there.
    """

    ticket: Ticket
    make: Callable[[int], SharedArena]
    onlooker: Onlooker | None = None


@dataclass(frozen=True)
class ReadState:
    """Asks for optimizer state; no indices: all of it."""

    ticket: Ticket
    indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class ReadDescription:
    """Asks for a description."""

    ticket: Ticket
    parameters: bool = False


@dataclass(frozen=True)
class ReadHistory:
    """Asks for the rounds after a number."""

    ticket: Ticket
    after: int = 0


@dataclass(frozen=True)
class Configure:
    """Changes settings, by name."""

    ticket: Ticket
    changes: dict[str, Any]


@dataclass(frozen=True)
class DeclareSchedule:
    """Puts a learning-rate schedule here, or finds the same one; ``edits`` go with a new one."""

    ticket: Ticket
    lineage: str
    number: int
    spec: ScheduleSpec
    edits: GroupEdits


@dataclass(frozen=True)
class ReadSchedule:
    """Asks for a schedule's state."""

    ticket: Ticket
    number: int


@dataclass(frozen=True)
class LoadSchedule:
    """Replaces a schedule's state."""

    ticket: Ticket
    number: int
    state: dict[str, Any]


Steering = Configure | DeclareSchedule | ReadSchedule | LoadSchedule


@dataclass(frozen=True)
class TakeDump:
    """Asks for everything that a snapshot holds."""

    ticket: Ticket


@dataclass(frozen=True)
class Restore:
    """Rolls back to a dump."""

    ticket: Ticket
    dump: Dump


@dataclass(frozen=True)
class Stop:
    """Refuses all that waits, with the error; nothing is taken afterwards.

    ``dump``: answer with a dump, which then holds everything that was ever acknowledged.
    """

    ticket: Ticket
    error: FarstepError
    dump: bool = False


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = (
    Join | Contribution | Accumulate | LoadState | AddGroup | Evaluation | ZeroGrad | Leave | Touch | ReadParameters
    | ReadState | ReadDescription | ReadHistory | Configure | DeclareSchedule | ReadSchedule | LoadSchedule | TakeDump
    | Restore | Stop | Tick | ShareParameters
)  # fmt: skip


@dataclass(frozen=True)
class JoinReply:
    """The worker is a member. ``options``: the groups as they stand, where they are to replace the worker's."""

    resumed: bool
    lineage: str
    incarnation: int
    version: int
    epoch: int
    settled: int
    policy: Policy
    device: str
    options: list[dict[str, Any]]
    parameters: int
    lease_seconds: float


@dataclass(frozen=True)
class StepReply:
    """What became of a contribution, with the parameters that the worker should now hold."""

    outcome: Outcome
    version: int
    incarnation: int
    contributions: int
    edits: GroupEdits
    loss: object
    parameters: Parameters | None
    staleness: int = 0
    notice: str = ""


@dataclass(frozen=True)
class EvaluateReply:
    """Asks for an evaluation at trial parameters."""

    number: int
    parameters: Parameters


@dataclass(frozen=True)
class ParametersReply:
    """The parameters."""

    version: int
    incarnation: int
    parameters: Parameters


@dataclass(frozen=True)
class SharedReply:
    """The memory where the parameters lie from now on, and the layout that they have there; whether who asked looks on."""

    memory: SharedArena
    layout: Layout
    looks_on: bool


@dataclass(frozen=True)
class StateReply:
    """Optimizer state as [[parameter index or other key, entries], ...], copied to the CPU."""

    version: int
    incarnation: int
    state: list[list[Any]]


@dataclass(frozen=True)
class DoneReply:
    """It was carried out."""

    version: int
    incarnation: int


@dataclass(frozen=True)
class HistoryReply:
    """Rounds, oldest first."""

    rounds: list[Round]


@dataclass(frozen=True)
class SettingsReply:
    """The settings as they stand."""

    settings: Settings
    version: int


@dataclass(frozen=True)
class ScheduleReply:
    """A schedule as it stands, and the groups' options. ``ended``: why it has ended, empty while it runs."""

    state: dict[str, Any]
    options: list[dict[str, Any]]
    version: int
    ended: str


@dataclass(frozen=True)
class Refusal:
    """It was not carried out."""

    error: FarstepError


@dataclass(frozen=True)
class DumpReply:
    """A dump."""

    dump: Dump


Reply = (
    JoinReply | StepReply | EvaluateReply | ParametersReply | StateReply | DoneReply | HistoryReply | SettingsReply
    | ScheduleReply | Refusal | Description | DumpReply | SharedReply
)  # fmt: skip

Replies = list[tuple[Ticket, Reply]]
"""Whom to answer, and what."""
