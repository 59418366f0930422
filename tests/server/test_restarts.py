"""Training goes on through a restart of its server, and ends with the bits of an undisturbed run."""

from __future__ import annotations

import os
import signal
import tempfile
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
from tests.server.harness import WAIT_SECONDS, Server, ServerProcess, serving

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
    finals: list[list[list[Tensor]]] = []
    for name, disturbed in (("calm", False), ("disturbed", True)):
        # Both workers are in the middle of it; which part of a step the restart hits is up to the scheduler.
        reached = threading.Barrier(3) if disturbed else None

        def work(rank: int, name: str = name, reached: threading.Barrier | None = reached) -> list[Tensor]:
            net = model()
            place: Remote = replace(server.remote(name), policy=Sync(workers=2), worker=rank)
            remote = optim.AdamW(net.parameters(), lr=0.01, remote=place)

            def before(number: int) -> None:
                if reached is not None and number == 3:
                    reached.wait(WAIT_SECONDS)

            train_plain(net, remote, batches(rank), before)
            remote.remote.close()
            return [parameter.detach().clone() for parameter in net.parameters()]

        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(work, rank) for rank in (0, 1)]
            if reached is not None:
                reached.wait(WAIT_SECONDS)
                server.restart()
            finals.append([future.result(WAIT_SECONDS) for future in running])
    for calm, disturbed_ in zip(finals[0], finals[1], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(calm, disturbed_, strict=True))


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


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="farstep-") as text:
        yield Path(text)


def test_sigterm_in_the_middle_of_training(folder: Path) -> None:
    here, there = model(), model()
    train(here, torch.optim.AdamW(here.parameters(), lr=0.01), batches(), lambda _: None)
    address, data = f"unix:{folder}/s", str(folder / "data")
    first = ServerProcess(address, "--data-dir", data)
    remote = optim.AdamW(there.parameters(), lr=0.01, remote=Remote(address, name="net"))
    servers = [first]

    def restart(number: int) -> None:
        if number == 5:
            code, log = servers[-1].end(signal.SIGTERM)
            assert (code, "snapshot name=net version=5" in log) == (0, True), log
            servers.append(ServerProcess(address, "--data-dir", data))

    train(there, remote, batches(), restart)
    remote.remote.close()
    assert servers[-1].end()[0] == 0
    assert_same_parameters(here, there)


def test_a_data_directory_in_use_is_refused_with_its_holder(folder: Path) -> None:
    data = str(folder / "data")
    first = ServerProcess(f"unix:{folder}/a", "--data-dir", data)
    second = ServerProcess(f"unix:{folder}/b", "--data-dir", data)
    assert not second.ready
    code, log = second.wait()
    assert code == 3
    assert f"in use by process {first.pid}" in log
    assert "Traceback" not in log
    assert first.end()[0] == 0


@pytest.mark.soak
def test_a_kill_while_snapshots_are_written_costs_no_complete_one(folder: Path) -> None:
    address, data = f"unix:{folder}/s", folder / "data"
    net = nn.Linear(400, 400)
    saved = 0
    for _ in range(KILLS):
        process = ServerProcess(address, "--data-dir", str(data), "--snapshot-interval", "1ms")
        place = Remote(address, name="net", timeouts=Timeouts(step=5, reconnect=1))
        remote = optim.SGD(net.parameters(), lr=0.1, remote=place)
        # What came back is what was on disk, and no older than what was known to be complete when it was killed.
        assert remote.remote.version >= saved
        killed = threading.Timer(0.05, process.end, [signal.SIGKILL])
        for number in range(1000):
            net(torch.ones(1, 400)).sum().backward()
            if number == 3:
                saved = remote.remote.checkpoint().version
                killed.start()
            try:
                remote.step()
            except FarstepError:
                break
        killed.join()
    store = SnapshotStore(data)
    assert store.load("net").info.version >= saved
    store.close()
