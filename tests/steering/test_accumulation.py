"""Gradients that wait on the server: the sum that ``backward`` would have left, once, or a clear word that it is gone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from farstep import Retry, Timeouts, inspection
from farstep_wire.address import parse_address
from farstep_wire.errors import Applied, ConfigurationError, GradientsLostError
from tests.data_parallel.crew import Worker, crew, mean
from tests.steering.twins import hosted, loss_of, model, same_bits
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess, Servers


def test_the_bits_are_those_of_backward(server: ServerProcess, name: str) -> None:
    ours, torchs = model(), model()
    local = torch.optim.AdamW(torchs.parameters(), lr=0.05)
    remote = hosted(ours, server, name)
    for number in range(3):
        local.zero_grad()
        remote.zero_grad()
        for part in range(4):
            loss_of(torchs, 10 * number + part).backward()
            loss_of(ours, 10 * number + part).backward()
            if part < 3:
                remote.remote.accumulate()
                assert all(parameter.grad is None for parameter in ours.parameters())
        local.step()
        remote.step()
        assert same_bits(ours, torchs)
    assert [remote.state[parameter]["step"] for parameter in ours.parameters()] == [3] * 4
    remote.remote.close()


def test_a_step_may_have_nothing_but_what_waits(server: ServerProcess, name: str) -> None:
    ours, torchs = model(), model()
    local = torch.optim.AdamW(torchs.parameters(), lr=0.05)
    remote = hosted(ours, server, name)
    loss_of(torchs, 0).backward()
    loss_of(ours, 0).backward()
    remote.remote.accumulate()
    local.step()
    remote.step()
    assert same_bits(ours, torchs)
    assert remote.state[next(iter(ours.parameters()))]["step"] == 1
    remote.remote.close()


def test_zero_grad_drops_it(server: ServerProcess, name: str) -> None:
    ours, torchs = model(), model()
    local = torch.optim.AdamW(torchs.parameters(), lr=0.05)
    remote = hosted(ours, server, name)
    loss_of(ours, 99).backward()
    remote.remote.accumulate()
    remote.zero_grad()
    loss_of(torchs, 0).backward()
    loss_of(ours, 0).backward()
    local.step()
    remote.step()
    assert same_bits(ours, torchs)
    remote.remote.close()


def test_absent_and_sparse_gradients(server: ServerProcess, name: str) -> None:
    def table() -> nn.Embedding:
        torch.manual_seed(1)
        return nn.Embedding(9, 3, sparse=True)

    ours, torchs = table(), table()
    local = torch.optim.SGD(torchs.parameters(), lr=0.5)
    remote = hosted(ours, server, name, "SGD", options={"lr": 0.5})
    for rows in ([1, 1, 4], [4, 8], [0]):
        torchs(torch.tensor(rows)).square().sum().backward()
        ours(torch.tensor(rows)).square().sum().backward()
        remote.remote.accumulate()
    remote.remote.accumulate()  # no gradients at all
    local.step()
    remote.step()
    assert same_bits(ours, torchs)
    remote.remote.close()


def test_each_worker_has_its_own_sum(server: ServerProcess, name: str) -> None:
    def gradients(worker: int, part: int) -> list[torch.Tensor | None]:
        return [torch.randn(5, generator=torch.Generator().manual_seed(10 * worker + part))]

    with crew(server.address, name, 3, lambda: [nn.Parameter(torch.zeros(5))], options={"lr": 1.0}) as workers:

        def take(worker: Worker) -> None:
            for part in range(worker.number):
                worker.give(gradients(worker.number, part))
                worker.optimizer.remote.accumulate()
            worker.give(gradients(worker.number, worker.number))
            worker.optimizer.step()

        workers.together(take)
        sums: list[list[torch.Tensor | None]] = []
        for worker in range(3):
            total = torch.zeros(5)
            for part in range(worker + 1):
                [gradient] = gradients(worker, part)
                assert gradient is not None
                total = gradient if part == 0 else total + gradient
            sums.append([total])
        [expected] = mean(sums)
        assert expected is not None
        assert all(torch.equal(worker.params[0], -expected) for worker in workers.workers)


def test_who_abstains_keeps_it(server: ServerProcess, name: str) -> None:
    ours, torchs = model(), model()
    local = torch.optim.AdamW(torchs.parameters(), lr=0.05)
    remote = hosted(ours, server, name)
    loss_of(ours, 0).backward()
    remote.remote.accumulate()
    assert remote.remote.skip() is False
    remote.step()
    loss_of(torchs, 0).backward()
    local.step()
    assert same_bits(ours, torchs)
    remote.remote.close()


def test_what_a_cut_connection_repeats_counts_once(server: ServerProcess, name: str) -> None:
    ours, torchs = model(), model()
    local = torch.optim.AdamW(torchs.parameters(), lr=0.05)
    with Proxy(server.address) as proxy:
        remote = _through(proxy, ours, name)
        for number in range(3):
            for part in range(2):
                loss_of(torchs, 10 * number + part).backward()
                loss_of(ours, 10 * number + part).backward()
                proxy.arm("drop reply")
                remote.remote.accumulate()
            proxy.arm("drop reply")
            local.step()
            remote.step()
            local.zero_grad()
            remote.zero_grad()
        assert proxy.fired["drop reply"] == 9
        assert same_bits(ours, torchs)
        remote.remote.close()


def _through(proxy: Proxy, module: nn.Module, name: str) -> Any:
    from farstep import Remote, optim

    remote = Remote(proxy.address, name=name, timeouts=Timeouts(30, 30, 20), retry=Retry(0.01, 0.05))
    return optim.AdamW(module.parameters(), lr=0.05, remote=remote)


def test_what_is_lost_with_the_lease_is_told(servers: Servers, name: str) -> None:
    server = servers("--lease", "1")
    ours, before = model(), model()
    with Proxy(server.address) as proxy:
        remote = _through(proxy, ours, name)
        loss_of(ours, 0).backward()
        remote.remote.accumulate()
        remote._farstep.link._stream.keep_alive(1e9)  # no heartbeats: as if the process had stood still
        with inspection.connect(parse_address(server.address), 20) as view:
            deadline = time.monotonic() + 20
            while view.describe(name).workers[0].standing != "expired" and time.monotonic() < deadline:
                time.sleep(0.05)
        loss_of(ours, 1).backward()
        with pytest.raises(
            GradientsLostError, match="has accumulated gradients 1 times on the server, which holds 0"
        ) as lost:
            remote.step()
        assert lost.value.applied is Applied.NO
        assert same_bits(ours, before)
        remote.zero_grad()
        loss_of(ours, 1).backward()
        remote.step()
        assert remote.remote.version == 1
        remote.remote.close()


def test_gradients_of_a_scaler_must_be_unscaled_first(server: ServerProcess, name: str) -> None:
    from farstep import Sync

    ours = model()
    remote = hosted(ours, server, name, policy=Sync(2, min_workers=1, timeout=0.05))
    other = hosted(model(), server, name, policy=Sync(2, min_workers=1, timeout=0.05), worker=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(ours, 0)).backward()
    remote.remote.accumulate()
    scaler.scale(loss_of(ours, 1)).backward()
    with pytest.raises(ConfigurationError, match=r"call scaler\.unscale_\(optimizer\) before each"):
        scaler.step(remote)
    other.remote.close()
    remote.remote.close()


def test_a_closure_driven_class_has_nothing_to_accumulate(server: ServerProcess, name: str) -> None:
    remote = hosted(model(), server, name, "LBFGS", options={})
    with pytest.raises(ConfigurationError, match="LBFGS asks its closure for gradients"):
        remote.remote.accumulate()
    remote.remote.close()
