"""The evaluations of a closure-driven step, on the side of the closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]


class Evaluations:
    """Runs the closure once per evaluation, however often the server asks for it."""

    def __init__(self, closure: Closure) -> None:
        self._closure = closure
        self._first: object = None
        self._number = -1
        self.loss: Any = None
        self.error: BaseException | None = None

    def run(self, number: int) -> bool:
        """Make ``loss`` and the gradients those of that evaluation; return whether the closure went through."""
        if number != self._number:
            try:
                with torch.enable_grad():
                    self.loss = self._closure()
            except BaseException as error:  # noqa: BLE001 - whatever ends it, a Ctrl-C too, is told to the server
                self.error = error
                return False
            if self._number < 0:
                self._first = self.loss
            self._number = number
        return self.error is None

    def same_as_first(self, loss: object) -> object:
        """Return the first evaluation's own result where the optimizer returned it, as torch's do; else what came."""
        first = self._first
        if isinstance(first, Tensor) and isinstance(loss, Tensor):
            return first if first.detach().cpu().equal(loss) else loss
        return loss
