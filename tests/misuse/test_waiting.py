"""Who waits in vain is told so in time, and for what."""

from __future__ import annotations

import time

import pytest
import torch

from farstep import Remote, Sync, Timeouts, optim
from farstep_wire.errors import Applied, DeadlineError, UnavailableError
from tests.support.servers import Servers


def test_a_server_that_stays_away_is_given_up_after_the_reconnect_timeout(servers: Servers, name: str) -> None:
    server = servers()
    parameter = torch.nn.Parameter(torch.zeros(3))
    timeouts = Timeouts(connect=20, step=100, reconnect=1)
    optimizer = optim.SGD([parameter], lr=0.1, remote=Remote(server.address, name=name, timeouts=timeouts))
    parameter.grad = torch.ones(3)
    optimizer.step()
    server.kill()
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(UnavailableError) as raised:
            optimizer.step()
        assert time.monotonic() - begun < 10
        assert raised.value.applied is Applied.UNKNOWN
    optimizer.remote.close()


def test_a_round_without_its_second_worker_says_how_to_see_which_one_is_missing(servers: Servers, name: str) -> None:
    server = servers()
    parameter = torch.nn.Parameter(torch.zeros(3))
    remote = Remote(server.address, name=name, policy=Sync(2), timeouts=Timeouts(connect=20, step=1, reconnect=20))
    optimizer = optim.SGD([parameter], lr=0.1, remote=remote)
    parameter.grad = torch.ones(3)
    with pytest.raises(DeadlineError) as raised:
        optimizer.step()
    assert raised.value.applied is Applied.UNKNOWN
    for part in ("timeouts.step is 1 s", "farstep show", f"--server {server.address}"):
        assert part in str(raised.value)
    optimizer.remote.close()
