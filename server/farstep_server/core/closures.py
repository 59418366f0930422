"""Closures driven by the server: the optimizer's own ``step`` runs, and each call of its closure is answered by the workers.

``step`` is a plain blocking call, so it runs on a thread of its own in strict alternation with the owner: exactly one of the
two runs at any time, as in a coroutine. The owner calls ``resume`` with an evaluation's result and gets back the next thing
that the step wants. The thread never outlives the run: ``abort`` unwinds the step by an exception out of its closure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer


@dataclass(frozen=True)
class Wanted:
    """The step called its closure: loss and gradients at the parameters as they stand."""

    number: int


@dataclass(frozen=True)
class Returned:
    """The step returned."""

    value: object


@dataclass(frozen=True)
class Raised:
    """The step raised."""

    error: Exception


Progress = Wanted | Returned | Raised


class _Abort(BaseException):
    """Unwinds a step; no optimizer catches it, since it is no Exception."""


class ClosureRun:
    """One step under way. Its methods are called by the owner alone."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._to_step = threading.Semaphore(0)
        self._to_owner = threading.Semaphore(0)
        self._answer: Callable[[], object] = self._no_answer
        self._progress: Progress | None = None
        self._evaluations = 0
        self._thread = threading.Thread(target=self._run, name="farstep-closure", daemon=True)

    @property
    def evaluations(self) -> int:
        """How many evaluations were asked for."""
        return self._evaluations

    def start(self) -> Progress:
        """Begin the step; return what it wants first."""
        self._thread.start()
        return self._await_step()

    def resume(self, loss: object) -> Progress:
        """Give the loss of the wanted evaluation, its gradients being set already; return what the step wants next."""
        return self._continue(lambda: loss)

    def abort(self) -> None:
        """Unwind the step. Parameters and state are left as they are; the caller undoes them."""

        def unwind() -> object:
            raise _Abort

        self._continue(unwind)

    def _continue(self, answer: Callable[[], object]) -> Progress:
        self._answer = answer
        self._to_step.release()
        return self._await_step()

    def _await_step(self) -> Progress:
        self._to_owner.acquire()
        progress = self._progress
        assert progress is not None, "the step handed over without saying why"
        if not isinstance(progress, Wanted):
            self._thread.join()
        return progress

    def _closure(self) -> object:
        self._hand_over(Wanted(self._evaluations))
        self._to_step.acquire()
        return self._answer()

    def _hand_over(self, progress: Progress) -> None:
        if isinstance(progress, Wanted):
            self._evaluations += 1
        self._progress = progress
        self._to_owner.release()

    def _run(self) -> None:
        step: Any = self._optimizer.step
        try:
            with torch.enable_grad():
                result = step(self._closure)
        except _Abort:
            self._hand_over(Returned(None))
        except Exception as error:  # noqa: BLE001 - whatever an optimizer raises is the step's outcome
            self._hand_over(Raised(error))
        else:
            self._hand_over(Returned(result))

    @staticmethod
    def _no_answer() -> object:
        raise AssertionError("the closure was called before the first hand-over")
