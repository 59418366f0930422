"""A distributed L-BFGS fit, and a worker of it that stands still in an evaluation for whoever kills it."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch import Tensor

from farstep import Remote, Sync, Timeouts, optim
from tests.support.nursery import Talk

WORKERS = 4


def quadratic(address: str, name: str, worker: int) -> tuple[torch.nn.Parameter, Any]:
    """Return the parameter and the optimizer of a worker."""
    parameter = torch.nn.Parameter(torch.ones(4))
    remote = Remote(address, name=name, worker=worker, policy=Sync(WORKERS), timeouts=Timeouts(60, 60, 60))
    return parameter, optim.LBFGS([parameter], lr=0.5, max_iter=8, remote=remote)  # type: ignore[attr-defined]


def loss_at(optimizer: Any, parameter: Tensor, worker: int) -> Tensor:
    """Return the loss of a worker, whose minimum is at its own place, with the gradient set."""
    optimizer.zero_grad()
    loss = ((parameter - worker) ** 4).sum()
    loss.backward()
    return loss


def stands_still(talk: Talk, address: str, name: str, worker: int, evaluation: int) -> None:
    """Take part in one step up to the evaluation of that number, say so, and answer it never."""
    torch.set_num_threads(1)
    parameter, optimizer = quadratic(address, name, worker)
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        if count > evaluation:
            talk.say("in the evaluation")
            signal.pause()
        return loss_at(optimizer, parameter, worker)

    optimizer.step(closure)
