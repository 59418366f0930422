"""A worker that steps through shared memory until it is killed. Run by the nursery."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from farstep import Async, Remote, Timeouts, optim
from tests.support.nursery import Talk

NUMBERS = 50_000


def train(talk: Talk, address: str, name: str, worker: int) -> None:
    """Step for ever; say that the first step was made, and by which transport."""
    torch.set_num_threads(1)
    params = [Parameter(torch.zeros(NUMBERS)) for _ in range(4)]
    remote = Remote(address, name=name, worker=worker, policy=Async(), transport="shm", timeouts=Timeouts(30, 30, 30))
    optimizer = optim.SGD(params, lr=0.01, remote=remote)
    optimizer.zero_grad()
    torch.stack([parameter.sum() for parameter in params]).sum().backward()
    optimizer.step()
    talk.say(optimizer.remote.transport)
    while True:
        optimizer.step()
