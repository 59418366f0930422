"""Fit a physics-informed network with L-BFGS and with Adam, given the same number of function evaluations.

The problem is the nonlinear boundary value problem

    -u''(x) + u(x)^3 = f(x)  on (0, 1),    u(0) = u(1) = 0,

with f chosen so that u(x) = sin(3 pi x) solves it. A small tanh network N(x) in float64 is trained so that
u(x) = x (1 - x) N(x), which meets the boundary conditions by construction, has a small mean squared residual on a grid
of points. Such losses are badly conditioned: a method that uses curvature wins by orders of magnitude.

    python lbfgs_fit.py
    FARSTEP_REMOTE=gpu-box:50051 python lbfgs_fit.py      (a server of your own)
    torchrun --nproc-per-node 2 lbfgs_fit.py              (each worker evaluates its own slice of the points)

Expect a loss thousands of times smaller than Adam's: 5.8e-06 beside 1.0e-01 after 2,405 evaluations in one process (8 s
on two cores with torch 2.13's own classes), 4.4e-05 beside 1.0e-01 after 2,387 with two workers. The curvature that
L-BFGS finds so late in the fit depends on rounding, and so do these figures.

L-BFGS calls its closure as often as its line search asks for. With farstep the server drives it: it sends trial
parameters, every worker answers with the loss and gradients on its own points, and all see the same number of
evaluations. So the same script is also distributed L-BFGS.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farstep import optim

WAVES = 3
POINTS = 128
LBFGS_STEPS_PER_REPORT = 10
ADAM_STEPS_PER_REPORT = 240


@dataclass(frozen=True)
class Fit:
    """How a fit ended: mean squared residual and largest error in u over all points, closure calls, seconds."""

    loss: float
    error: float
    evaluations: int
    seconds: float


class Solution(nn.Module):
    """u(x) = x (1 - x) N(x) for x of shape (P, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return u at each x."""
        network: Tensor = self.network(x)
        return x * (1 - x) * network


def exact(x: Tensor) -> Tensor:
    return torch.sin(WAVES * math.pi * x)


def source(x: Tensor) -> Tensor:
    """The right-hand side f for which `exact` solves the problem."""
    return (WAVES * math.pi) ** 2 * exact(x) + exact(x) ** 3


def mean_squared_residual(model: nn.Module, x: Tensor) -> Tensor:
    """The loss, a scalar: the mean over x, shape (P, 1), of the squared residual of the differential equation."""
    x = x.detach().requires_grad_()
    u: Tensor = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    residual: Tensor = -curvature + u**3 - source(x)
    return residual.square().mean()


def build_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Solution(width=24).double()


class Training:
    """A model, all points, this worker's slice of them, and a count of how often the closure was called."""

    def __init__(self, seed: int, rank: int, world: int) -> None:
        self.model = build_model(seed)
        self.points = torch.linspace(0, 1, POINTS, dtype=torch.float64).unsqueeze(1)
        self.mine = self.points[rank::world]
        self.rank = rank
        self.evaluations = 0
        self.start = time.perf_counter()

    def closure_for(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        """Return the closure for `optimizer`: gradients on this worker's points, and their loss."""

        def closure() -> Tensor:
            self.evaluations += 1
            optimizer.zero_grad()
            loss = mean_squared_residual(self.model, self.mine)
            loss.backward()
            return loss

        return closure

    def report(self, name: str) -> None:
        """Print the loss over all points, on rank 0."""
        if self.rank == 0:
            loss = mean_squared_residual(self.model, self.points).item()
            print(f"{name:6} {self.evaluations:5d} evaluations  loss {loss:.3e}", flush=True)

    def finish(self) -> Fit:
        """Measure how the fit ended, over all points."""
        loss = mean_squared_residual(self.model, self.points).item()
        with torch.no_grad():
            error = (self.model(self.points) - exact(self.points)).abs().max().item()
        return Fit(loss, error, self.evaluations, time.perf_counter() - self.start)


def fit_lbfgs(training: Training, steps: int) -> Fit:
    optimizer = optim.LBFGS(
        training.model.parameters(), max_iter=20, history_size=50, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    closure = training.closure_for(optimizer)
    for step in range(1, steps + 1):
        optimizer.step(closure)
        if step % LBFGS_STEPS_PER_REPORT == 0:
            training.report("L-BFGS")
    return training.finish()


def fit_adam(training: Training, steps: int, lr: float) -> Fit:
    """Take one evaluation per step; the learning rate falls to zero along a cosine, which helps Adam here."""
    optimizer = optim.Adam(training.model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    closure = training.closure_for(optimizer)
    for step in range(1, steps + 1):
        optimizer.step(closure)
        scheduler.step()
        if step % ADAM_STEPS_PER_REPORT == 0:
            training.report("Adam")
    return training.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a physics-informed network with L-BFGS and with Adam.")
    parser.add_argument("--steps", type=int, default=100, help="L-BFGS steps of up to 20 iterations (default: 100)")
    parser.add_argument("--adam-lr", type=float, default=5e-2, help="peak learning rate of Adam (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    options = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if POINTS % world:
        sys.exit(f"{POINTS} points cannot be shared equally by {world} workers")

    lbfgs = fit_lbfgs(Training(options.seed, rank, world), options.steps)
    adam = fit_adam(Training(options.seed, rank, world), lbfgs.evaluations, options.adam_lr)
    if rank == 0:
        for name, fit in (("L-BFGS", lbfgs), ("Adam", adam)):
            print(
                f"final {name:6} loss {fit.loss:.6e}  largest error in u {fit.error:.2e}  "
                f"({fit.evaluations} evaluations, {fit.seconds:.1f} s)"
            )
        print(f"with as many evaluations the loss of L-BFGS is {adam.loss / lbfgs.loss:,.0f} times smaller")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(130)
