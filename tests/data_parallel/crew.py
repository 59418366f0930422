"""Several workers in one process, each on a thread of its own with its own copy of the parameters, and their local equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from farstep import Remote, Sync, Timeouts, inspection, optim
from farstep_wire.address import parse_address

_SECONDS = 60
Gradients = list[Tensor | None]


class Worker:
    """One worker: its own parameters and optimizer, used on a thread of its own."""

    def __init__(self, number: int, params: list[Tensor]) -> None:
        self.number = number
        self.params = params
        self.optimizer: Any = None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=f"worker-{number}")

    def do(self, act: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have the worker's thread call ``act(worker, ...)``."""
        return self.pool.submit(act, self, *arguments)

    def give(self, gradients: Gradients) -> None:
        """Set the gradients; the tensors are this worker's own from here on."""
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad = gradient


class Crew:
    """The workers of one hosted optimizer, all attached."""

    def __init__(self, name: str, workers: Sequence[Worker], server: inspection.Server) -> None:
        self.name = name
        self.workers = list(workers)
        self._server = server

    def __len__(self) -> int:
        return len(self.workers)

    def arrive(self, order: Sequence[int], act: Callable[[Worker], Any]) -> list[Any]:
        """Have each worker do its act, none before the server holds that of the one before; return results by worker."""
        futures: dict[int, Future[Any]] = {}
        for place, number in enumerate(order):
            futures[number] = self.workers[number].do(act)
            if place + 1 < len(order):
                self.await_waiting(order[: place + 1])
        return [futures[number].result(_SECONDS) for number in sorted(futures)]

    def together(self, act: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Have all workers do the act, whoever comes first; return results by worker."""
        futures = [worker.do(act, *arguments) for worker in self.workers]
        return [future.result(_SECONDS) for future in futures]

    def failures(self, *acts: Callable[[Worker], Any]) -> list[Exception]:
        """Have each worker do its own act, each of which must fail; return the errors by worker."""
        futures = [worker.do(act) for worker, act in zip(self.workers, acts, strict=True)]
        errors = [future.exception(_SECONDS) for future in futures]
        assert all(isinstance(error, Exception) for error in errors), f"each worker must be refused: {errors}"
        return [error for error in errors if isinstance(error, Exception)]

    def await_waiting(self, numbers: Sequence[int]) -> None:
        """Wait until exactly these workers' acts wait in the round."""
        wanted = {str(number) for number in numbers}
        found: set[str] = set()
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            found = {row.id for row in self._server.describe(self.name).workers if row.standing == "waiting"}
            if found == wanted:
                return
            time.sleep(0.002)
        raise AssertionError(f"workers {sorted(found)} wait in the round, not {sorted(wanted)}")

    @property
    def versions(self) -> set[int]:
        """The versions that the workers hold."""
        return {worker.optimizer.remote.version for worker in self.workers}


@contextmanager
def crew(
    address: str,
    name: str,
    count: int,
    make: Callable[[], list[Tensor]],
    cls: str = "SGD",
    options: dict[str, Any] | None = None,
    policy: Sync | None = None,
    **how: Any,
) -> Iterator[Crew]:
    """Run that many workers of one hosted optimizer; ``how`` goes to each worker's Remote."""
    workers = [Worker(number, make()) for number in range(count)]

    def attach(worker: Worker) -> None:
        timeouts = Timeouts(connect=_SECONDS, step=_SECONDS, reconnect=10)
        remote = Remote(
            address, name=name, worker=worker.number, policy=policy or Sync(count), timeouts=timeouts, **how
        )
        worker.optimizer = getattr(optim, cls)(worker.params, remote=remote, **(options or {}))

    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.pool)
        own = Crew(name, workers, stack.enter_context(inspection.connect(parse_address(address), _SECONDS)))
        own.together(attach)
        yield own
        own.together(lambda worker: worker.optimizer.remote.close())


def mean(contributions: Sequence[Gradients], weights: Sequence[float] | None = None) -> Gradients:
    """Return what one process that has all workers' gradients would step with.

    The (weighted) sum in worker order and then one division, by the number of the workers (the sum of the weights), also for
    a parameter for which some of them have no gradient.
    """
    total: Gradients = []
    for parts in zip(*contributions, strict=True):
        accumulated: Tensor | None = None
        for number, part in enumerate(parts):
            if part is not None:
                accumulated = _plus(accumulated, part, None if weights is None else weights[number])
        total.append(accumulated)
    divisor = len(contributions) if weights is None else sum(weights)
    return [None if gradient is None else gradient / divisor for gradient in total]


def _plus(total: Tensor | None, part: Tensor, weight: float | None) -> Tensor:
    if total is None:
        return part if weight is None else part * weight
    if total.is_sparse and not part.is_sparse:
        # torch adds sparse to dense only.
        return (part if weight is None else part * weight) + total
    return total + part if weight is None else torch.add(total, part, alpha=weight)
