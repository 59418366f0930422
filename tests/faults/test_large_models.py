"""Many parameters and large ones: they work, and no message is larger than gRPC's own limit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch.nn import Parameter

from farstep import Remote, Timeouts, optim
from farstep.transports import grpc as transport
from farstep_wire import frames
from farstep_wire.limits import MESSAGE_BYTES
from tests.faults.models import same_bits
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess, Servers

GIB = 2**30


def test_a_model_of_600_parameters(server: ServerProcess, name: str) -> None:
    def build() -> list[Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [Parameter(torch.randn(1 + n % 7, 1 + n, generator=generator)) for n in range(600)]

    def step(optimizer: torch.optim.Optimizer, params: list[Parameter], number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    local, params = build(), build()
    torchs = torch.optim.AdamW(local, lr=0.01)
    with Proxy(server.address, measure=True) as proxy:
        optimizer = optim.AdamW(params, lr=0.01, remote=Remote(proxy.address, name=name, transport="grpc"))
        for number in range(3):
            step(torchs, local, number)
            step(optimizer, params, number)
        state = optimizer.state_dict()["state"]
        optimizer.remote.close()
    assert same_bits(params, local)
    assert same_bits([s["exp_avg"] for s in state.values()], [torchs.state[p]["exp_avg"] for p in local])
    total = sum(p.nbytes for p in params)
    # Up: the upload and three times gradients; down: three times parameters, and the state.
    assert sum(proxy.sizes) > 9 * total
    assert max(proxy.sizes) <= MESSAGE_BYTES


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all gRPC messages that this process sends and receives, noted where the transport makes and reads them."""
    sizes: list[int] = []

    def encode(*arguments: Any) -> Iterator[bytes]:
        for data in frames.encode(*arguments):
            sizes.append(len(data))
            yield data

    def decode(kind: Any, data: bytes) -> Any:
        sizes.append(len(data))
        return frames.decode(kind, data)

    monkeypatch.setattr(transport, "encode", encode)
    monkeypatch.setattr(transport, "decode", decode)
    return sizes


@pytest.mark.timeout(180)
def test_a_tensor_of_1_gib(servers: Servers, name: str, messages: list[int]) -> None:
    if psutil.virtual_memory().available < 9 * GIB:
        pytest.skip("needs 9 GiB of free memory")
    server = servers()
    parameter = Parameter(torch.zeros(GIB // 4))
    parameter.grad = torch.ones_like(parameter)
    remote = Remote(server.address, name=name, transport="grpc", timeouts=Timeouts(connect=60, step=60))
    begun = time.monotonic()
    optimizer = optim.SGD([parameter], lr=0.5, remote=remote)
    for _ in range(2):
        optimizer.step()
    assert time.monotonic() - begun < 60
    optimizer.remote.close()
    assert bool((parameter == -1).all())
    # The upload, and twice gradients there and parameters back.
    assert sum(messages) > 5 * GIB
    assert max(messages) <= MESSAGE_BYTES
