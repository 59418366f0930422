"""Connections that break, requests and replies that get lost: every step counts once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from farstep import Async, Retry, Sync, Timeouts
from farstep.optim.proxy import RemoteOptimizer
from tests.faults.models import local_run, parameters, remote_optimizer, same_bits, set_gradients, take_steps
from tests.support.proxy import Fault, Proxy
from tests.support.servers import ServerProcess

FAULTS: tuple[Fault, ...] = ("drop request", "drop reply", "cut request", "cut reply")
PATIENT = Timeouts(connect=20, step=30, reconnect=20)
STEPS = 200


@pytest.mark.parametrize("policy", [Sync(1), Async()], ids=lambda policy: type(policy).__name__)
def test_200_steps_through_faults_leave_the_bits_of_200_steps(server: ServerProcess, name: str, policy: Any) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
    planned = itertools.cycle([*((fault,) for fault in FAULTS), ("drop reply", "drop request"), ("cut reply",) * 2])
    expected = 0
    with Proxy(server.address) as proxy:
        params = parameters()
        optimizer = remote_optimizer(
            params, proxy.address, name, policy=policy, timeouts=PATIENT, retry=Retry(0.005, 0.05), options=options
        )
        for step in range(STEPS):
            if step % 7 == 3:
                faults = next(planned)
                proxy.arm(*faults)
                expected += len(faults)
            set_gradients(params, step)
            optimizer.step()
            assert optimizer.remote.version == step + 1
        assert sum(proxy.fired.values()) == expected
        assert set(proxy.fired) == set(FAULTS)
        assert proxy.connections >= expected
        optimizer.remote.close()
    assert same_bits(params, local_run(STEPS, lr=0.1, **options))


def test_state_and_groups_through_faults(server: ServerProcess, name: str) -> None:
    """Acts that are no contributions are done once as well."""
    local, extra_local = parameters(), parameters(9)
    torchs = torch.optim.Adam(local, lr=0.1)
    with Proxy(server.address) as proxy:
        params, extra = parameters(), parameters(9)
        optimizer = remote_optimizer(params, proxy.address, name, "Adam", timeouts=PATIENT, retry=Retry(0.005, 0.05))
        for each, own in ((optimizer, params), (torchs, local)):
            take_steps(each, own, range(3))
        proxy.arm("drop reply")
        saved = optimizer.state_dict()
        proxy.arm("drop reply")
        optimizer.add_param_group({"params": extra, "lr": 0.01})
        torchs.add_param_group({"params": extra_local, "lr": 0.01})
        for each, own in ((optimizer, params + extra), (torchs, local + extra_local)):
            take_steps(each, own, range(3, 5))
        saved = optimizer.state_dict()
        for each, own in ((optimizer, params + extra), (torchs, local + extra_local)):
            take_steps(each, own, range(5, 7))
        proxy.arm("drop request")
        optimizer.load_state_dict(saved)
        proxy.arm("cut reply")
        assert optimizer.remote.pull() == optimizer.remote.version
        assert sum(proxy.fired.values()) == 4
        assert same_bits(params + extra, local + extra_local)
        assert optimizer.remote.incarnation == 2
        optimizer.remote.close()


@pytest.mark.parametrize("act", ["add_param_group", "load_state_dict", "accumulate", "zero_grad"])
def test_an_act_that_arrives_twice_is_done_once(server: ServerProcess, name: str, act: str) -> None:
    """The first copy is carried out, its reply never comes, and the client asks again."""

    def acts(optimizer: Any, own: list[Any], extra: list[Any], between: Callable[[], None]) -> list[Any]:
        take_steps(optimizer, own, range(2))
        saved = copy.deepcopy(optimizer.state_dict())  # torch's own goes on with the step
        take_steps(optimizer, own, range(2, 4))
        set_gradients(own, 4)
        if act == "zero_grad" and isinstance(optimizer, RemoteOptimizer):
            optimizer.remote.accumulate()
        between()
        match act:
            case "add_param_group":
                optimizer.add_param_group({"params": extra, "lr": 0.01})
                own = [*own, *extra]
            case "load_state_dict":
                optimizer.load_state_dict(saved)
            case "accumulate" if isinstance(optimizer, RemoteOptimizer):
                optimizer.remote.accumulate()
            case "zero_grad":
                optimizer.zero_grad()
        if act == "accumulate":
            optimizer.step()
        take_steps(optimizer, own, range(5, 7))
        return own

    expected = acts(torch.optim.Adam(local := parameters(), lr=0.1), local, parameters(9), lambda: None)
    with Proxy(server.address) as proxy:
        params = parameters()
        # Before it asks again there is time for the server to have done it.
        optimizer = remote_optimizer(params, proxy.address, name, "Adam", timeouts=PATIENT, retry=Retry(0.2, 0.5))
        assert same_bits(acts(optimizer, params, parameters(9), lambda: proxy.arm("repeat request")), expected)
        assert proxy.fired == {"repeat request": 1}
        assert proxy.connections == 2
        optimizer.remote.close()


def test_a_closure_goes_on_after_a_cut(server: ServerProcess, name: str) -> None:
    def closure_over(optimizer: Any, params: Any, between: Any = None) -> Any:
        calls = 0

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            if between is not None:
                between(calls)
            optimizer.zero_grad()
            loss = sum(((p - 1) ** 4).sum() for p in params)
            loss.backward()
            return loss

        return closure

    local = parameters()
    torchs = torch.optim.LBFGS(local, lr=0.1, max_iter=8)
    with Proxy(server.address) as proxy:
        params = parameters()
        optimizer = remote_optimizer(params, proxy.address, name, "LBFGS", timeouts=PATIENT, options={"max_iter": 8})
        plan = {2: "drop request", 4: "drop reply", 6: "cut reply"}
        closure = closure_over(optimizer, params, lambda n: proxy.arm(plan[n]) if n in plan else None)
        for _ in range(2):
            optimizer.step(closure)
            torchs.step(closure_over(torchs, local))
        assert sum(proxy.fired.values()) == 3
        optimizer.remote.close()
    assert same_bits(params, local)
