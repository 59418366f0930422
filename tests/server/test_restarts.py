"""Training goes on through a restart of its server, and ends with the bits of an undisturbed run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from farstep import Remote, Sync, Timeouts, optim
from farstep_server.store import SnapshotStore
from farstep_wire.errors import FarstepError, RollbackError
from tests.server.harness import WAIT_SECONDS, Server, serving
from tests.support.servers import ServerProcess, Servers

STEPS = 12
RESTARTS = {3, 7}
KILLS = 50 if os.environ.get("FARSTEP_SOAK") == "big" else 4

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "AdamW": {"lr": 0.01, "amsgrad": True},
    "Adafactor": {"lr": 0.01},
    "ASGD": {"lr": 0.01},
    "LBFGS": {"lr": 0.5, "max_iter": 4, "history_size": 3, "line_search_fn": "strong_wolfe"},
    "ConjugateGradient": {"max_iter": 2},
}


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    return net.to(memory_format=torch.channels_last).to(dtype)  # type: ignore[call-overload, no-any-return]


def batches(seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64), torch.randint(2, (4,), generator=generator))
        for _ in range(STEPS)
    ]


def train(
    net: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]], before: Callable[[int], None]
) -> list[Any]:
    scheduler = StepLR(optimizer, 2, 0.9)
    losses = []
    for number, (inputs, targets) in enumerate(data):
        before(number)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), targets)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        scheduler.step()
    return losses


def assert_same_parameters(left: nn.Module, right: nn.Module) -> None:
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as server:
        yield server


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restart_changes_no_bit(server: Server, name: str) -> None:
    if name == "ConjugateGradient":
        from farstep_wire.algorithms.conjugate_gradient import ConjugateGradient as Local
    else:
        Local = getattr(torch.optim, name)
    here, there = model(), model()
    expected = train(here, Local(here.parameters(), **OPTIMIZERS[name]), batches(), lambda _: None)
    remote = getattr(optim, name)(there.parameters(), **OPTIMIZERS[name], remote=server.remote())
    lineage = remote.remote.lineage

    def restart(number: int) -> None:
        if number in RESTARTS:
            server.restart()

    assert train(there, remote, batches(), restart) == expected
    assert_same_parameters(here, there)
    assert (remote.remote.version, remote.remote.lineage, remote.remote.incarnation) == (STEPS, lineage, 1)
    remote.remote.close()


def test_two_workers_train_through_a_restart(server: Server) -> None:
    calm = train_in_twos(server, "calm", lambda: None)
    # Both workers are in the middle of it; which part of a step the restart hits is up to the scheduler.
    disturbed = train_in_twos(server, "disturbed", server.restart)
    for one, other in zip(calm, disturbed, strict=True):
        assert_same_parameters(one, other)
    assert_same_parameters(*disturbed)


def train_in_twos(server: Server, name: str, disturb: Callable[[], None]) -> list[nn.Module]:
    nets, reached = [model(), model()], threading.Barrier(3)

    def work(rank: int) -> None:
        place = replace(server.remote(name), policy=Sync(workers=2), worker=rank)
        remote = optim.AdamW(nets[rank].parameters(), lr=0.01, remote=place)

        def before(number: int) -> None:
            if number == 3:
                reached.wait(WAIT_SECONDS)

        train_plain(nets[rank], remote, batches(rank), before)
        remote.remote.close()

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(work, rank) for rank in (0, 1)]
        reached.wait(WAIT_SECONDS)
        disturb()
        for future in running:
            future.result(WAIT_SECONDS)
    return nets


def train_plain(
    net: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]], before: Callable[[int], None]
) -> None:
    for number, (inputs, targets) in enumerate(data):
        before(number)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()


def test_a_client_learns_of_steps_that_are_gone(server: Server) -> None:
    net = model()
    remote = optim.SGD(net.parameters(), lr=0.1, remote=server.remote())
    data = batches()
    train_plain(net, remote, data[:2], lambda _: None)
    early = [parameter.detach().clone() for parameter in net.parameters()]
    remote.remote.checkpoint()
    train_plain(net, remote, data[2:4], lambda _: None)
    # As if it had been killed: nothing that came after the checkpoint is on disk.
    server.crash()
    net.zero_grad()
    nn.functional.cross_entropy(net(data[4][0]), data[4][1]).backward()
    with pytest.raises(RollbackError, match="back at version 2"):
        remote.step()
    assert remote.remote.pull() == 2
    assert all(torch.equal(one, other) for one, other in zip(early, net.parameters(), strict=True))
    remote.remote.close()


def test_a_running_client_goes_on_from_a_rollback(server: Server) -> None:
    net = model()
    remote = optim.SGD(net.parameters(), lr=0.1, remote=server.remote())
    data = batches()
    train_plain(net, remote, data[:2], lambda _: None)
    tagged = remote.remote.checkpoint(tag="two")
    assert (tagged.version, tagged.tag) == (2, "two")
    early = [parameter.detach().clone() for parameter in net.parameters()]
    train_plain(net, remote, data[2:4], lambda _: None)
    server.snapshots.restore("net", "two", None)
    train_plain(net, remote, data[4:5], lambda _: None)
    assert all(torch.equal(one, other) for one, other in zip(early, net.parameters(), strict=True))
    train_plain(net, remote, data[5:6], lambda _: None)
    assert (remote.remote.version, remote.remote.incarnation) == (3, 2)
    remote.remote.close()


# Processes.


def test_sigterm_in_the_middle_of_training(servers: Servers, tmp_path: Path) -> None:
    here, there = model(), model()
    train(here, torch.optim.AdamW(here.parameters(), lr=0.01), batches(), lambda _: None)
    server = servers("--data-dir", str(tmp_path))
    remote = optim.AdamW(there.parameters(), lr=0.01, remote=Remote(server.address, name="net"))

    def restart(number: int) -> None:
        if number == 5:
            assert server.terminate() == 0
            assert "snapshot name=net version=5" in server.said()
            server.start()

    train(there, remote, batches(), restart)
    remote.remote.close()
    assert server.terminate() == 0
    assert_same_parameters(here, there)


def test_a_data_directory_in_use_is_refused_with_its_holder(servers: Servers, tmp_path: Path) -> None:
    first = servers("--data-dir", str(tmp_path))
    second = servers("--data-dir", str(tmp_path), start=False).launch()
    assert second.join() == 3
    assert f"in use by process {first.pid}" in second.said()


@pytest.mark.soak
def test_a_kill_while_snapshots_are_written_costs_no_complete_one(servers: Servers, tmp_path: Path) -> None:
    server = servers("--data-dir", str(tmp_path), "--snapshot-interval", "1ms", "--log-level", "warning")
    net = nn.Linear(400, 400)
    known = 0
    for _ in range(KILLS):
        place = Remote(server.address, name="net", timeouts=Timeouts(step=1, reconnect=0.2))
        remote = optim.SGD(net.parameters(), lr=0.1, remote=place)
        # What came back is what was on disk, and nothing older than what was known to be there.
        assert remote.remote.version >= known
        known = train_until_killed(server, net, remote)
        remote.remote.close()
        server.start()
    server.terminate()
    store = SnapshotStore(tmp_path)
    assert store.load("net").info.version >= known
    store.close()


def train_until_killed(server: ServerProcess, net: nn.Module, remote: Any) -> int:
    """Step while the server writes one snapshot after another, and kill it; return a version that was known to be saved."""
    known, killer = 0, threading.Timer(0.05, server.kill)
    net(torch.ones(1, 400)).sum().backward()
    while True:
        try:
            remote.step()
            if not known:
                known = remote.remote.checkpoint().version
                killer.start()
        except FarstepError:
            killer.join()
            return known
