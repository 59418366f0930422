"""Objectives, and an optimizer with a closure over one of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from farstep_wire.algorithms import ConjugateGradient

Objective = Callable[..., Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


def quadratic(n: int) -> tuple[Objective, Tensor]:
    """A strictly convex quadratic with n distinct eigenvalues from 1 to 10, and its minimiser."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    matrix = basis @ torch.diag(torch.linspace(1, 10, n, dtype=torch.float64)) @ basis.T
    minimiser = torch.randn(n, dtype=torch.float64, generator=generator)
    return lambda x: 0.5 * (x - minimiser) @ matrix @ (x - minimiser), minimiser


class Calls:
    """A closure over an objective of the optimizer's parameters that keeps every loss it returned."""

    def __init__(self, optimizer: ConjugateGradient, objective: Objective) -> None:
        self.losses: list[float] = []
        self._optimizer = optimizer
        self._objective = objective

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._objective(*self._optimizer.param_groups[0]["params"])
        loss.backward()
        self.losses.append(loss.item())
        return loss


def build(objective: Objective, *values: Tensor, **options: Any) -> tuple[ConjugateGradient, Calls, list[nn.Parameter]]:
    params = [nn.Parameter(v.clone()) for v in values]
    optimizer = ConjugateGradient(params, **options)
    return optimizer, Calls(optimizer, objective), params


def network() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(64, 5)
        y = torch.sin(x.sum(1, keepdim=True))
        model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 1))
    return model, x, y


def network_closure(model: nn.Module, x: Tensor, y: Tensor, optimizer: ConjugateGradient) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
