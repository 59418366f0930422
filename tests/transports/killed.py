"""A worker that steps by some transport until it is killed. Run by the nursery."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

import torch
from torch.nn import Parameter

from farstep import Async, Remote, Timeouts, optim
from farstep_wire.process_group import Group
from tests.support.nursery import Talk

NUMBERS = 50_000


def train(talk: Talk, address: str, name: str, worker: int, transport: Literal["shm", "pg"] = "shm") -> None:
    """Step for ever; say that the first step was made, and by which transport."""
    optimizer = _begin(address, name, worker, transport)
    optimizer.step()
    talk.say(optimizer.remote.transport)
    while True:
        optimizer.step()


def stand_still(talk: Talk, address: str, name: str, kind: str) -> None:
    """Step by a process group, and stop: in the middle of a transfer, or "between" two steps.

    Once awake, step again, and say the version and the transport.
    """
    optimizer = _begin(address, name, 0, "pg")
    optimizer.step()
    if kind == "between":
        _stop(talk)
    post = Group._post
    left = 2

    def posting(group: Group, name: str, tensor: torch.Tensor, number: int) -> Any:
        nonlocal left
        left -= name == kind
        if left == 0 and name == kind:
            _stop(talk)
        return post(group, name, tensor, number)

    Group._post = posting  # type: ignore[method-assign]
    for _ in range(2):
        optimizer.step()
    talk.say([optimizer.remote.version, optimizer.remote.transport])
    optimizer.remote.close()


def _stop(talk: Talk) -> None:
    talk.say("stops")
    os.kill(os.getpid(), signal.SIGSTOP)


def _begin(address: str, name: str, worker: int, transport: Literal["shm", "pg"]) -> Any:
    torch.set_num_threads(1)
    params = [Parameter(torch.zeros(NUMBERS)) for _ in range(4)]
    timeouts = Timeouts(30, 30, 30)
    remote = Remote(address, name=name, worker=worker, policy=Async(), transport=transport, timeouts=timeouts)
    optimizer = optim.SGD(params, lr=0.01, remote=remote)
    optimizer.zero_grad()
    torch.stack([parameter.sum() for parameter in params]).sum().backward()
    return optimizer
