"""A server's end, in the middle of what its clients do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from farstep import Remote, Timeouts, optim
from tests.support.servers import Servers


@pytest.mark.parametrize("transport", ["grpc", "shm", "pg"])
def test_it_ends_in_good_order_under_a_connected_client(servers: Servers, name: str, transport: str) -> None:
    """Its threads come back from native code while it ends; three times, since that is a race."""
    for number in range(3):
        server = servers("--drain-grace", "0")
        params = [Parameter(torch.zeros(256_000)) for _ in range(20)]
        remote = Remote(server.address, name=f"{name}-{number}", transport=transport, timeouts=Timeouts(20, 5, 1))  # type: ignore[arg-type]
        optimizer = optim.Adam(params, remote=remote)
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(4):
            optimizer.step()
        assert server.terminate() == 0
        assert "terminate called" not in server.said()
