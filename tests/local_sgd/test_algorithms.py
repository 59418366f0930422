"""LocalSGD is, bit for bit, what a plain loop in one process does: DiLoCo by default, averaging with SGD(lr=1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from farstep import Async, LocalSGD, Sync, optim
from farstep_wire.errors import DeadlineError
from tests.faults.models import parameters, same_bits, set_gradients
from tests.local_sgd.models import Simulation, Worker, crew, remote, together
from tests.support.servers import ServerProcess

DILOCO = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
AVERAGE = partial(torch.optim.SGD, lr=1.0)
ADAM = partial(torch.optim.Adam, lr=0.1)
OUTER: dict[str, tuple[Any, dict[str, Any]]] = {
    "diloco": (DILOCO, {}),
    "average": (AVERAGE, {"outer": partial(optim.SGD, lr=1.0)}),
    "adam": (ADAM, {"outer": partial(optim.Adam, lr=0.1)}),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", OUTER)
def test_equals_a_plain_loop(server: ServerProcess, name: str, count: int, kind: str) -> None:
    torchs, options = OUTER[kind]
    simulation = Simulation(count, torchs)
    with ExitStack() as stack:
        workers = crew(stack, server.address, name, count, sync_every=4, **options)
        for steps in (range(4), range(4, 8)):
            simulation.steps(steps)
            simulation.sync()
            together([lambda w=w, steps=steps: w.steps(steps) for w in workers])
            assert all(same_bits(w.params, simulation.theta) for w in workers)
        # Between syncs everybody goes its own way; one asked for early is like any other.
        simulation.steps(range(8, 10))
        together([lambda w=w: w.steps(range(8, 10)) for w in workers])
        for worker, params in zip(workers, simulation.params, strict=True):
            assert same_bits(worker.params, params)
            assert worker.optimizer.remote.version == 2
        simulation.sync()
        together([w.optimizer.sync for w in workers])
        for worker in workers:
            assert same_bits(worker.params, simulation.theta)
            assert worker.optimizer.remote.version == 3


def test_averaging_averages(server: ServerProcess, name: str) -> None:
    with ExitStack() as stack:
        workers = crew(stack, server.address, name, 2, sync_every=3, outer=partial(optim.SGD, lr=1.0))
        together([lambda w=w: w.steps(range(2)) for w in workers])
        means = [(a + b).detach() / 2 for a, b in zip(workers[0].params, workers[1].params, strict=True)]
        together([w.optimizer.sync for w in workers])
        for mean, mine in zip(means, workers[0].params, strict=True):
            torch.testing.assert_close(mine.detach(), mean)


def test_samples_weigh_the_mean(server: ServerProcess, name: str) -> None:
    simulation = Simulation(2, DILOCO)
    simulation.steps(range(2))
    simulation.sync([2 * 3.0, 2 * 1.0])
    with ExitStack() as stack:
        workers = crew(stack, server.address, name, 2, sync_every=2)
        together([lambda w=w: w.steps(range(2), num_samples=(3, 1)[w.number]) for w in workers])
        assert all(same_bits(w.params, simulation.theta) for w in workers)


def test_samples_are_given_in_all_steps_or_in_none(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=4)
    worker.steps(range(1), num_samples=8)
    before = [p.detach().clone() for p in worker.params]
    with pytest.raises(ValueError, match="not given now and was in earlier steps"):
        worker.steps(range(1, 2))
    with pytest.raises(ValueError, match=r"num_samples must be positive, not -1"):
        worker.steps(range(1, 2), num_samples=-1)
    assert same_bits(worker.params, before)
    worker.optimizer.close()


def test_async_waits_for_nobody(server: ServerProcess, name: str) -> None:
    """Each sync is a round of its own: the distance from where that worker began, applied to where the others have got."""
    first, second = (Worker(remote(server.address, name, n, Async()), sync_every=2) for n in range(2))
    theta = [nn.Parameter(p.detach().clone()) for p in parameters()]
    outer = DILOCO(theta)
    start = [p.detach().clone() for p in theta]
    for worker in (first, second):
        own = parameters()
        inner = torch.optim.AdamW(own, lr=0.05)
        for number in range(2):
            set_gradients(own, number, worker.number)
            inner.step()
        for t, s, p in zip(theta, start, own, strict=True):
            t.grad = s - p.detach()
        outer.step()
        worker.steps(range(2))
        assert same_bits(worker.params, theta)
    assert second.optimizer.remote.version == 2
    for worker in (first, second):
        worker.optimizer.close()


def test_a_sync_that_fails_is_made_up_for(server: ServerProcess, name: str) -> None:
    """The other worker comes too late for the first try; what was learnt counts once, whichever try it is that counts."""
    simulation = Simulation(2, DILOCO)
    impatient = remote(server.address, name, 0, Sync(2), patience=1)
    first, second = together(
        [
            lambda: Worker(impatient, sync_every=2),
            lambda: Worker(remote(server.address, name, 1, Sync(2)), sync_every=2),
        ]
    )
    simulation.steps(range(2))
    with pytest.raises(DeadlineError):
        first.steps(range(2))
    assert same_bits(first.params, simulation.params[0]), "the model stands as it did"
    simulation.sync()
    with ThreadPoolExecutor(1) as pool:
        handed_in = pool.submit(second.steps, range(2))
        for _ in range(20):
            with suppress(DeadlineError):
                first.optimizer.sync()
                break
        handed_in.result()
    assert same_bits(first.params, simulation.theta)
    assert same_bits(second.params, simulation.theta)
    for worker in (first, second):
        assert worker.optimizer.remote.version == 1
        worker.optimizer.close()


def test_frozen_parameters_cost_nothing_and_sparse_gradients_are_the_inner_optimizers_affair(
    server: ServerProcess, name: str
) -> None:
    torch.manual_seed(0)
    frozen = nn.Parameter(torch.randn(50_000), requires_grad=False)
    table = nn.Embedding(10, 3, sparse=True)
    inner = torch.optim.SGD([frozen, table.weight], lr=0.1)
    before, kept = table.weight.detach().clone(), frozen.detach().clone()
    optimizer = LocalSGD(inner, remote(server.address, name), sync_every=2, outer=partial(optim.SGD, lr=1.0))
    sent = optimizer.remote.traffic.sent
    for _ in range(2):
        optimizer.zero_grad()
        table(torch.tensor([1, 4])).sum().backward()
        optimizer.step()
    assert 0 < optimizer.remote.traffic.sent - sent < 2_000
    expected = before.clone()
    expected[[1, 4]] -= 0.2
    torch.testing.assert_close(table.weight.detach(), expected)
    assert same_bits([frozen], [kept])
    optimizer.close()
