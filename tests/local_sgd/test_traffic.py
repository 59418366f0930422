"""``opt.remote.traffic``: the bytes of all messages, and how few of them LocalSGD needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from farstep import LocalSGD, optim
from tests.local_sgd.models import remote
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess

NUMBERS = 20_000
BYTES = 4 * NUMBERS


def _sgd(parameter: Parameter, address: str, name: str) -> Any:
    return optim.SGD([parameter], lr=0.1, remote=remote(address, name))  # type: ignore[operator]


def _step(optimizer: Any, parameter: Parameter) -> None:
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_a_step_costs_its_gradients_and_parameters(server: ServerProcess, name: str) -> None:
    parameter = Parameter(torch.zeros(NUMBERS))
    optimizer = _sgd(parameter, server.address, name)
    before = optimizer.remote.traffic
    assert BYTES <= before.sent <= BYTES + 2_000
    assert 0 < before.received < 2_000
    for _ in range(3):
        _step(optimizer, parameter)
        after = optimizer.remote.traffic
        assert BYTES <= after.sent - before.sent <= BYTES + 200
        assert BYTES <= after.received - before.received <= BYTES + 200
        before = after
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.sent = 0
    optimizer.remote.close()


def test_it_is_what_a_wire_in_between_has_seen(server: ServerProcess, name: str) -> None:
    parameter = Parameter(torch.zeros(NUMBERS))
    with Proxy(server.address, measure=True) as proxy:
        optimizer = _sgd(parameter, proxy.address, name)
        _step(optimizer, parameter)
        handle = optimizer.remote
        handle.close()
        _step(optimizer, parameter)
        handle.close()
        traffic = handle.traffic
        assert traffic.sent + traffic.received == sum(proxy.sizes)
        assert proxy.connections == 2


def test_reconnects_are_counted_too(server: ServerProcess, name: str) -> None:
    parameter = Parameter(torch.zeros(NUMBERS))
    with Proxy(server.address) as proxy:
        optimizer = _sgd(parameter, proxy.address, name)
        _step(optimizer, parameter)
        before = optimizer.remote.traffic
        proxy.arm("drop reply")
        _step(optimizer, parameter)
        after = optimizer.remote.traffic
        assert proxy.fired["drop reply"] == 1
        assert after.sent - before.sent > BYTES
        assert after.received - before.received > BYTES
        assert optimizer.remote.version == 2
        optimizer.remote.close()
        assert optimizer.remote.traffic.sent > after.sent


def test_local_sgd_moves_a_fraction(server: ServerProcess, name: str) -> None:
    parameter = Parameter(torch.zeros(NUMBERS))
    inner = torch.optim.SGD([parameter], lr=0.1)
    optimizer = LocalSGD(inner, remote(server.address, name), sync_every=10)
    start = optimizer.remote.traffic
    for _ in range(19):
        _step(optimizer, parameter)
    middle = optimizer.remote.traffic
    assert BYTES <= middle.sent - start.sent <= BYTES + 400
    assert BYTES <= middle.received - start.received <= BYTES + 400
    _step(optimizer, parameter)
    assert BYTES <= optimizer.remote.traffic.sent - middle.sent <= BYTES + 400
    optimizer.close()
