"""One model trained twice: by plain torch, and by farstep with the server doing what torch's user does by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from farstep import Remote, Timeouts, optim
from tests.support.servers import ServerProcess


def model() -> nn.Sequential:
    """Return the same small model each time."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(module: nn.Module, number: int) -> Tensor:
    """Return the loss on the batch of that number; large, so that clipping has something to do."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    return (module(5 * inputs) - 3).square().sum()


def hosted(module: nn.Module, server: ServerProcess, name: str, cls: str = "AdamW", **remote: Any) -> Any:
    """Return a farstep optimizer over a module."""
    timeouts = Timeouts(connect=30, step=30, reconnect=10)
    options = remote.pop("options", {"lr": 0.05})
    where = Remote(server.address, name=name, timeouts=timeouts, **remote)
    return getattr(optim, cls)(module.parameters(), remote=where, **options)


def step(module: nn.Module, optimizer: Any, number: int, before: Callable[[], Any] | None = None) -> None:
    """Take one step on the batch of that number; ``before``: what is done between backward and step."""
    optimizer.zero_grad()
    loss_of(module, number).backward()
    if before is not None:
        before()
    optimizer.step()


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules have the same parameters, bit for bit."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(a.detach().numpy().tobytes() == b.detach().numpy().tobytes() for a, b in pairs)
