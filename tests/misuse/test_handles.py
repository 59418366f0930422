"""``opt.remote`` kept longer than expected: past ``close``, past its optimizer, past a load."""

from __future__ import annotations

import gc
from typing import Any

import torch

from farstep import optim
from tests.support.servers import ServerProcess, Servers


def _build(server: ServerProcess, name: str) -> Any:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    return optim.SGD([parameter], lr=0.1, remote=f"{server.address}#{name}")


def test_a_handle_keeps_its_optimizer(server: ServerProcess, name: str) -> None:
    handle = _build(server, name).remote
    gc.collect()
    assert (handle.version, handle.pull()) == (0, 0)
    handle.close()


def test_a_closed_handle_attaches_again_when_it_is_used(server: ServerProcess, name: str) -> None:
    optimizer = _build(server, name)
    optimizer.step()
    handle = optimizer.remote
    handle.close()
    assert "not attached" in repr(handle)
    assert handle.version == 1
    assert "version 1" in repr(handle)
    handle.close()


def test_closing_twice_asks_nobody(servers: Servers, name: str) -> None:
    server = servers()
    optimizer = _build(server, name)
    optimizer.remote.close()
    server.kill()
    optimizer.remote.close()
    assert "not attached" in repr(optimizer.remote)


def test_a_handle_follows_its_optimizer_through_a_load(server: ServerProcess, name: str) -> None:
    optimizer = _build(server, name)
    handle = optimizer.remote
    state = optimizer.state_dict()
    optimizer.step()
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.5
    handle.skip()
    assert handle.describe().groups[0]["lr"] == 0.5
    handle.close()
