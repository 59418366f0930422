"""Training processes as the server meets them: what each holds, and what it makes of an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.state_machine.words import Accumulate, Act, Answer, Done, Joined, Load, Push, Refused, Stepped


@dataclass
class Process:
    """One process that acts as a worker. ``last`` is the act that it has sent last; answered, or it waits for the answer."""

    worker: str
    instance: str
    epoch: int = 0
    version: int = 0
    incarnation: int = 0
    lr: float = 0.0
    sequence: int = 0
    accumulated: int = 0
    last: Act | None = None
    answered: bool = True
    attached: bool = False
    counted: int = 0
    gradients_lost: bool = False
    behind: bool = False

    def next(self) -> int:
        """Return the sequence number of a new act."""
        self.sequence += 1
        return self.sequence

    def sends(self, act: Act) -> None:
        """Note what was sent."""
        self.last, self.answered = act, False

    def hears(self, act: Act | None, expected: Answer, told_lr: float | None, in_force: float) -> None:
        """Take an answer to an act, or to a join where there is none.

        ``told_lr``: the learning rate that came with it, if any. After a step the worker must know the one that is in force;
        who loads a state takes over its options.
        """
        if act is not None and act is self.last:
            self.answered = True
        match expected:
            case Joined():
                self.epoch, self.attached = expected.epoch, True
                if not expected.resumed:
                    self.version, self.incarnation = expected.version, expected.incarnation
            case Stepped():
                assert isinstance(act, Push)
                self._stepped(act, expected, told_lr)
            case Done() if isinstance(act, Accumulate) and act.sequence > self.counted:
                self.accumulated, self.counted = self.accumulated + 1, act.sequence
            case Done() if isinstance(act, Load):
                self.incarnation, self.lr = expected.incarnation, in_force
            case Refused(error="FencedError" | "LeaseError"):
                self.attached = False
            case Refused(error="GradientsLostError"):
                self.gradients_lost = True
            case Refused(error="RollbackError"):
                self.behind = True

    def _stepped(self, push: Push, answer: Stepped, told_lr: float | None) -> None:
        self.version, self.incarnation = answer.version, answer.incarnation
        if push.gradients is not None or answer.outcome != "skipped":
            self.accumulated = 0
        if push.lr is not None and answer.outcome in {"committed", "skipped"}:
            self.lr = push.lr
        self.lr = self.lr if told_lr is None else told_lr
        assert self.lr == answer.lr, f"worker {self.worker} believes in lr={self.lr}, in force is {answer.lr}"

    def resent(self, ticket: int) -> Act | None:
        """Return the last act under a new ticket and the epoch of now."""
        return None if self.last is None else replace(self.last, ticket=ticket, epoch=self.epoch)
