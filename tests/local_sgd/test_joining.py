"""Who joins starts from the outer parameters; who does not fit is told why, by both values."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch

from farstep import Async, LocalSGD, Sync, optim
from farstep_wire.errors import MismatchError
from tests.faults.models import parameters, same_bits, set_gradients
from tests.local_sgd.models import Worker, adamw, crew, remote, together
from tests.support.servers import ServerProcess, Servers


@pytest.fixture(scope="module")
def impatient(module_servers: Servers) -> ServerProcess:
    """A server with short leases."""
    return module_servers("--lease", "2s")


@pytest.mark.parametrize("policy", [Sync(1), Async()], ids=["sync", "async"])
def test_a_joining_worker_starts_from_the_outer_parameters(server: ServerProcess, name: str, policy: Any) -> None:
    first = Worker(remote(server.address, name, 0, policy), sync_every=2)
    first.steps(range(2))
    agreed = [p.detach().clone() for p in first.params]
    first.steps(range(2, 3))
    second = Worker(remote(server.address, name, 1, policy), seed=7, sync_every=2)
    assert same_bits(second.params, agreed)
    assert second.optimizer.remote.version == 1
    if isinstance(policy, Sync):
        together([lambda: second.steps(range(2, 4)), lambda: first.steps(range(3, 4))])
        assert same_bits(first.params, second.params)
        assert first.optimizer.remote.version == 2
    for worker in (first, second):
        worker.optimizer.close()


@pytest.mark.parametrize("policy", [Sync(1), Async()], ids=["sync", "async"])
@pytest.mark.parametrize("steps", [0, 2], ids=["before the first round", "after it"])
def test_another_sync_every_is_refused(impatient: ServerProcess, name: str, policy: Any, steps: int) -> None:
    server = impatient
    first = Worker(remote(server.address, name, 0, policy), sync_every=2)
    first.steps(range(steps))
    with pytest.raises(MismatchError) as told:
        Worker(remote(server.address, name, 1, policy), sync_every=5)
    assert "sync_every" in str(told.value)
    assert {"2", "5"} <= set(str(told.value).replace("=", " ").replace(";", " ").replace(".", " ").split())
    first.steps(range(steps, steps + 2))  # nobody waits for the one that was refused
    assert first.optimizer.remote.version == steps // 2 + 1
    first.optimizer.close()


def test_what_is_not_hosted_for_it_is_refused(server: ServerProcess, name: str) -> None:
    params = parameters()
    where = remote(server.address, name)
    plain = optim.SGD(params, lr=1.0, remote=where)  # type: ignore[operator]
    set_gradients(params, 0)
    plain.step()
    with pytest.raises(MismatchError, match=r"it is not hosted for LocalSGD; worker 1 has sync_every=3"):
        Worker(remote(server.address, name, 1), sync_every=3, outer=partial(optim.SGD, lr=1.0))
    plain.remote.close()


def test_sync_every_can_be_changed_for_all_together(server: ServerProcess, name: str) -> None:
    with ExitStack() as stack:
        workers = crew(stack, server.address, name, 2, sync_every=1)
        for worker in workers:
            worker.optimizer.outer.param_groups[0]["sync_every"] = 2
        together([lambda w=w: w.steps(range(2)) for w in workers])
        assert [w.optimizer.remote.version for w in workers] == [1, 1]
        assert workers[0].optimizer.remote.describe().groups[0]["sync_every"] == 2
        workers[1].optimizer.outer.param_groups[0]["sync_every"] = 1
        together([lambda w=w: w.steps(range(2, 3)) for w in workers[:1]])
        told = together([lambda w=w: _error_of(w) for w in workers])
        assert all("sync_every" in text and "has 2" in text and "has 1" in text for text in told)
        assert [w.optimizer.remote.version for w in workers] == [1, 1]


def _error_of(worker: Worker) -> str:
    with pytest.raises(MismatchError) as told:
        worker.steps(range(3, 4))
    return str(told.value)


def test_what_it_cannot_be_built_from() -> None:
    params = parameters()
    with pytest.raises(TypeError, match=r"takes a torch.optim.Optimizer that holds the model's parameters, not \["):
        LocalSGD(params, sync_every=2)  # type: ignore[arg-type]
    for value, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"sync_every must be .* not {value}"):
            LocalSGD(adamw(params), sync_every=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"outer must return an optimizer of farstep.optim, not SGD"):
        LocalSGD(adamw(params), sync_every=2, outer=lambda groups, remote: torch.optim.SGD(groups, lr=1.0))


def test_what_its_optimizers_cannot_be(server: ServerProcess, name: str) -> None:
    where = remote(server.address, name)
    outer: Any = optim.SGD(parameters(), lr=1.0, remote=where)  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"takes a local optimizer.* SGD here is a farstep optimizer"):
        LocalSGD(outer, sync_every=2)
    outer.remote.close()
    with pytest.raises(TypeError, match="LBFGS evaluates a closure of its own"):
        LocalSGD(adamw(parameters()), remote(server.address, f"{name}-b"), sync_every=2, outer=optim.LBFGS)
    with pytest.raises(ValueError, match="outer must build its optimizer over the groups that it is given"):
        LocalSGD(
            adamw(parameters()),
            remote(server.address, f"{name}-c"),
            sync_every=2,
            outer=lambda groups, remote: optim.SGD(groups[0]["params"], lr=1.0, remote=remote),  # type: ignore[operator]
        )


def test_a_model_converted_too_late_is_refused(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=2)
    for p in worker.params:
        p.data = p.data.double()
    with pytest.raises(TypeError, match=r"was torch.float32 \[5, 3\] .* is torch.float64 \[5, 3\] now: convert"):
        worker.optimizer.sync()
    worker.optimizer.close()
