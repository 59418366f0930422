"""Workers of a LocalSGD on numbered gradients, and the same done in one process with nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from farstep import Async, LocalSGD, Remote, Sync, Timeouts
from tests.faults.models import parameters, set_gradients

Result = TypeVar("Result")


def remote(
    address: str, name: str, worker: int = 0, policy: Sync | Async | None = None, *, patience: float = 40
) -> Remote:
    """Return where to host it; a step is given up after ``patience`` seconds."""
    timeouts = Timeouts(connect=20, step=patience, reconnect=20)
    return Remote(address, name=name, worker=worker, policy=policy or Sync(1), timeouts=timeouts)


def adamw(params: Sequence[Tensor]) -> Optimizer:
    """Return an inner optimizer with state."""
    return torch.optim.AdamW(params, lr=0.05)


class Worker:
    """A worker with parameters of its own seed, on numbered gradients."""

    def __init__(self, where: Remote, seed: int = 0, **options: Any) -> None:
        self.number = int(where.worker or 0)
        self.params = parameters(seed)
        self.optimizer = LocalSGD(adamw(self.params), where, **options)

    def steps(self, numbers: range, **how: Any) -> None:
        """Take numbered steps."""
        for number in numbers:
            set_gradients(self.params, number, self.number)
            self.optimizer.step(**how)


def together(acts: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run the acts at once, each on a thread, and return what came of them."""
    with ThreadPoolExecutor(len(acts)) as pool:
        return [future.result() for future in [pool.submit(act) for act in acts]]


def crew(stack: ExitStack, address: str, name: str, count: int, **options: Any) -> list[Worker]:
    """Return that many workers of one Sync, all attached; the stack closes them."""
    acts = [
        lambda number=number: Worker(remote(address, name, number, Sync(count)), **options) for number in range(count)
    ]
    workers: list[Worker] = together(acts)
    for worker in workers:
        stack.callback(worker.optimizer.close)
    return workers


class Simulation:
    """Local SGD as its papers have it: workers' parameters, the outer parameters, and an outer optimizer of torch's."""

    def __init__(self, count: int, outer: Callable[[Sequence[Tensor]], Optimizer]) -> None:
        self.theta = [Parameter(p.detach().clone()) for p in parameters()]
        self.outer = outer(self.theta)
        self.params = [parameters() for _ in range(count)]
        self.inner = [adamw(params) for params in self.params]

    def steps(self, numbers: range) -> None:
        """Let all workers take numbered inner steps."""
        for number in numbers:
            for worker, (params, inner) in enumerate(zip(self.params, self.inner, strict=True)):
                set_gradients(params, number, worker)
                inner.step()

    @torch.no_grad()
    def sync(self, weights: Sequence[float] | None = None) -> None:
        """Step on the mean of the pseudo-gradients, summed in worker order, and start everybody from there."""
        for theta, *own in zip(self.theta, *self.params, strict=True):
            distances = [theta - p for p in own]
            total = distances[0] if weights is None else distances[0] * weights[0]
            for number, distance in enumerate(distances[1:], start=1):
                total = total.add(distance, alpha=1.0 if weights is None else weights[number])
            if len(distances) > 1:
                total = total / (len(distances) if weights is None else sum(weights))
            theta.grad = total
        self.outer.step()
        for params in self.params:
            for p, theta in zip(params, self.theta, strict=True):
                p.copy_(theta)
