"""What the senders of acts are answered: once it is decided, again when it is asked for again, or later when they run ahead."""

from __future__ import annotations

from dataclasses import dataclass

from farstep_server.core import events as ev
from farstep_server.core.engine import Engine
from farstep_server.core.membership import Membership, Settled
from farstep_server.core.options import GroupEdits, OptionLog, frozen_options
from farstep_server.core.parameters import Parameters
from farstep_server.core.partial import read_changed
from farstep_server.core.records import Outcome
from farstep_server.core.rounds import Rounds


@dataclass
class Standing:
    """Where a hosted optimizer stands."""

    version: int = 0
    incarnation: int = 1


@dataclass(frozen=True)
class Answer:
    """What became of a contribution; parameters, options and version are those of the moment when it is told.

    ``everything``: tell all options, not those alone that the worker cannot know of.
    """

    act: ev.Contribution
    outcome: Outcome
    contributions: int
    loss: object = None
    staleness: int = 0
    notice: str = ""
    everything: bool = False


class Answers:
    """Tells workers what became of their contributions. ``replies`` are those that wait to be delivered."""

    def __init__(self, engine: Engine, members: Membership, rounds: Rounds, standing: Standing) -> None:
        self._engine = engine
        self._members = members
        self._rounds = rounds
        self._standing = standing
        self._held: dict[str, Answer] = {}
        self.log = OptionLog()
        self.replies: ev.Replies = []

    def put(self, ticket: ev.Ticket, reply: ev.Reply) -> None:
        """Deliver a reply."""
        self.replies.append((ticket, reply))

    def done(self) -> ev.DoneReply:
        """Return the reply to what was carried out."""
        return ev.DoneReply(self._standing.version, self._standing.incarnation)

    def tell(self, answer: Answer) -> None:
        """Answer a contribution: now, or where its worker is too far ahead, when the slowest has caught up."""
        worker = answer.act.worker
        if self._rounds.holds_back(worker, self._members):
            self._held[worker] = answer
        else:
            self._tell(answer)

    def release(self, *, all_of_them: bool = False) -> None:
        """Tell what was held back and need be no longer."""
        for worker in list(self._held):
            if all_of_them or not self._rounds.holds_back(worker, self._members):
                self._tell(self._held.pop(worker))

    def take_held(self, worker: str) -> Answer | None:
        """Return what is held back for a worker, and forget it."""
        return self._held.pop(worker, None)

    def held(self) -> list[str]:
        """Return the workers that are held back."""
        return list(self._held)

    def again(self, act: ev.Act) -> None:
        """Answer an act that was decided before."""
        if not isinstance(act, ev.Contribution):
            self.put(act.ticket, self.done())
            return
        settled = self._members[act.worker].settled or Settled(version=self._standing.version)
        self.tell(Answer(act, settled.outcome, settled.contributions, settled.loss, everything=True))

    def not_used(self, act: ev.Contribution, outcome: Outcome) -> None:
        """Tell a worker that its contribution was not used, and where things stand."""
        staleness = max(0, self._standing.version - act.version)
        self._tell(Answer(act, outcome, 0, staleness=staleness, everything=True))

    def _tell(self, answer: Answer) -> None:
        act, standing = answer.act, self._standing
        self._members[act.worker].version = standing.version
        parameters = None if act.omit_parameters else self._parameters(answer)
        self.put(
            act.ticket,
            ev.StepReply(
                answer.outcome, standing.version, standing.incarnation, answer.contributions, self._options(answer),
                answer.loss, parameters, answer.staleness, answer.notice,
            ),
        )  # fmt: skip

    def _parameters(self, answer: Answer) -> Parameters:
        act, store = answer.act, self._engine.store
        # Edits of a contribution that was not used, or was before, are none of the arena's.
        knows = answer.outcome is Outcome.COMMITTED and not answer.everything
        if act.takes_changes and knows and not act.shared and act.incarnation == self._standing.incarnation:
            changed = read_changed(store, act.version)
            if changed is not None:
                return changed
        return store.read(shared=act.shared)

    def _options(self, answer: Answer) -> GroupEdits:
        act, optimizer = answer.act, self._engine.optimizer
        edits = self.log.untold(act.worker, act.version, optimizer)
        self.log.told(act.worker)
        if answer.everything:
            return {number: (group, ()) for number, group in enumerate(frozen_options(optimizer))}
        return edits
