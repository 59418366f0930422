"""An optimizer that is neither torch's nor farstep's: it changes its own options and keeps state under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Counting(Optimizer):
    """Plain gradient descent whose group counts its steps and lets its learning rate decay."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1, fail_at: int = -1) -> None:
        super().__init__(params, {"lr": lr, "fail_at": fail_at, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["k"] += 1
            group["lr"] *= 0.9
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if group["k"] == group["fail_at"] and index > 0:
                    raise ValueError(f"told to fail at step {group['k']}")
                parameter.add_(parameter.grad, alpha=-group["lr"])
                self.state[parameter]["seen"] = self.state[parameter].get("seen", 0) + 1
        return loss
