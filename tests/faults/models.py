"""Small problems whose every bit is known: the same seed gives the same parameters and the same gradients."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from farstep import Remote, Timeouts, inspection, optim
from farstep_wire.address import parse_address

SHAPES = ((5, 3), (7,), ())


def parameters(seed: int = 0) -> list[Parameter]:
    """Return the parameters of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: Sequence[Tensor], step: int, worker: int = 0) -> None:
    """Give each parameter the gradient that belongs to this step of this worker."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_steps(optimizer: Optimizer, params: Sequence[Tensor], steps: range, worker: int = 0) -> None:
    """Step through a range of numbered steps."""
    for step in steps:
        set_gradients(params, step, worker)
        optimizer.step()


def local_run(steps: int, cls: str = "SGD", **options: Any) -> list[Parameter]:
    """Return the parameters after that many steps of torch's own class."""
    params = parameters()
    take_steps(getattr(torch.optim, cls)(params, **options), params, range(steps))
    return params


def remote_optimizer(
    params: Sequence[Tensor], address: str, name: str, cls: str = "SGD", *, lr: float = 0.1, **remote: Any
) -> Any:
    """Return an optimizer that gives up early, unless told otherwise."""
    timeouts = remote.pop("timeouts", Timeouts(connect=20, step=20, reconnect=10))
    options = remote.pop("options", {})
    where = Remote(address, name=name, timeouts=timeouts, **remote)
    return getattr(optim, cls)(params, lr=lr, remote=where, **options)


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors have the same bits."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
        for a, b in zip(left, right, strict=True)
    )


def await_standing(address: str, name: str, standings: Sequence[str]) -> None:
    """Wait until the workers of a hosted optimizer, in worker order, stand as given (computing, waiting, left, expired)."""
    deadline = time.monotonic() + 20
    found: list[str] = []
    with inspection.connect(parse_address(address), 20) as server:
        while time.monotonic() < deadline:
            found = [worker.standing for worker in server.describe(name).workers]
            if found == list(standings):
                return
            time.sleep(0.02)
    raise AssertionError(f"the workers of {name!r} stand {found}, not {list(standings)}")
