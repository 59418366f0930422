"""What is special about process groups: who may have one, faults in the middle of a transfer, and strangers at their ports."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from farstep import Async, Remote, Timeouts, errors, optim
from farstep_wire.process_group import Group
from farstep_wire.v1 import optimizer_pb2 as pb
from tests.parity import twins
from tests.support.nursery import Nursery
from tests.support.proxy import Proxy
from tests.support.raw import EndedError, RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess, Servers
from tests.transports import killed

NUMBERS = 300_000
KILLS = 200 if os.environ.get("FARSTEP_SOAK") == "big" else 6


def _parameters() -> list[Tensor]:
    """Return parameters that travel in blocks of their own, and two that go together."""
    generator = torch.Generator().manual_seed(0)
    sizes = [NUMBERS, NUMBERS + 1, 30, 7, NUMBERS]
    return [Parameter(torch.randn(size, generator=generator)) for size in sizes]


def _backward(params: list[Tensor], number: int) -> None:
    torch.stack([(parameter * (number + index)).sin().sum() for index, parameter in enumerate(params)]).sum().backward()


def _remote(address: str, name: str, timeouts: Timeouts | None = None, **how: Any) -> Remote:
    return Remote(address, name=name, transport="pg", timeouts=timeouts or Timeouts(30, 30, 20), **how)


class Twins:
    """An optimizer by way of a process group, beside local torch."""

    def __init__(self, remote: Remote) -> None:
        self.ours, self.torchs = _parameters(), _parameters()
        self.own = optim.Adam(self.ours, remote=remote)
        self.local = torch.optim.Adam(self.torchs)
        self.steps = 0

    def backward(self) -> None:
        for params, optimizer in ((self.ours, self.own), (self.torchs, self.local)):
            optimizer.zero_grad()
            _backward(params, self.steps)
        self.steps += 1

    def step(self) -> None:
        self.backward()
        self.own.step()
        self.local.step()
        twins.assert_same_parameters(self.ours, self.torchs, f"step {self.steps}")


class Fault:
    """Something that happens before this process has a block sent or received."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fired = 0
        self._armed: tuple[str, Callable[[Group], object]] | None = None
        self._left = 0
        post = Group._post

        def posting(group: Group, kind: str, tensor: Tensor, number: int) -> Any:
            if number and self._armed is not None and self._armed[0] == kind:
                self._left -= 1
                if not self._left:
                    act, self._armed = self._armed[1], None
                    self.fired += 1
                    act(group)
            return post(group, kind, tensor, number)

        monkeypatch.setattr(Group, "_post", posting)

    def arm(self, kind: str, block: int, act: Callable[[Group], object]) -> None:
        self._armed, self._left = (kind, act), block


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch)


# What takes which way.


def test_messages_carry_no_tensors(server: ServerProcess, name: str) -> None:
    with Proxy(server.address, measure=True) as proxy:
        pair = Twins(_remote(proxy.address, name))
        up, down = proxy.pairs[0].up, proxy.pairs[0].down
        assert up is not None
        assert down is not None
        attached = len(up.sizes)
        before = pair.own.remote.traffic
        for _ in range(3):
            pair.step()
        assert len(up.sizes) > attached
        assert max(up.sizes[attached:]) < 1000
        assert max(down.sizes) < 1000
        moved, total = pair.own.remote.traffic, sum(parameter.nbytes for parameter in pair.ours)
        assert 3 * total < moved.sent - before.sent < 3 * total + 5000
        assert 3 * total < moved.received - before.received < 3 * total + 5000
        pair.own.remote.close()


def test_it_is_never_taken_unasked(servers: Servers, name: str) -> None:
    server = servers("--pg")
    own = optim.SGD(_parameters(), lr=0.1, remote=Remote(server.address, name=name))
    assert own.remote.transport == "shm"
    own.remote.close()


def test_the_scripts_own_groups_are_left_alone(server: ServerProcess, name: str) -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        pair = Twins(_remote(server.address, name))
        for _ in range(2):
            pair.step()
            dist.all_reduce(torch.ones(3))
        pair.own.remote.close()
        dist.all_reduce(torch.ones(3))
    finally:
        dist.destroy_process_group()
    pair = Twins(_remote(server.address, f"{name}-without"))
    pair.step()
    assert not dist.is_initialized()
    pair.own.remote.close()


# Who may have one.


def test_beyond_one_machine_the_server_must_be_told(servers: Servers, name: str) -> None:
    server = servers("--insecure", listen="0.0.0.0:0")
    address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
    begun = time.monotonic()
    with pytest.raises(errors.ConfigurationError, match=r"gloo checks nobody .* farstep-server with --pg"):
        optim.SGD(_parameters(), lr=0.1, remote=_remote(address, name))
    assert time.monotonic() - begun < 10
    allowed = servers("--insecure", "--pg", listen="0.0.0.0:0")
    pair = Twins(_remote(f"127.0.0.1:{allowed.address.rpartition(':')[2]}", name))
    pair.step()
    assert pair.own.remote.transport == "pg"
    pair.own.remote.close()


def test_where_gloo_cannot_listen_the_reason_is_told(
    servers: Servers, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, another = servers(environment={"GLOO_SOCKET_IFNAME": "none7"}), servers()
    with pytest.raises(errors.ConfigurationError, match=r"the server cannot .* the interface none7"):
        optim.SGD(_parameters(), lr=0.1, remote=_remote(server.address, name))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none8")
    with pytest.raises(errors.ConfigurationError, match=r"'pg'.* the interface none8"):
        optim.SGD(_parameters(), lr=0.1, remote=_remote(another.address, name))


# Faults in the middle of a transfer.


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("kind", ["send", "recv"])
def test_a_group_that_breaks_is_made_anew(
    server: ServerProcess, name: str, fault: Fault, kind: str, block: int
) -> None:
    pair = Twins(_remote(server.address, name))
    for number in range(6):
        if number % 2:
            fault.arm(kind, block, Group.close)
        pair.step()
    assert fault.fired == 3
    assert pair.own.remote.version == 6
    assert pair.own.remote.transport == "pg"
    pair.own.remote.close()


@pytest.mark.parametrize("kind", ["send", "recv"])
def test_a_server_that_is_killed_is_the_typed_error(servers: Servers, name: str, fault: Fault, kind: str) -> None:
    server = servers()
    pair = Twins(_remote(server.address, name, Timeouts(10, 10, 1)))
    pair.step()
    fault.arm(kind, 2, lambda _: server.kill())
    pair.backward()
    begun = time.monotonic()
    with pytest.raises(errors.UnavailableError) as caught:
        pair.own.step()
    assert caught.value.applied is errors.Applied.UNKNOWN
    assert time.monotonic() - begun < 10
    assert fault.fired == 1


@pytest.mark.parametrize("kind", ["send", "recv"])
def test_a_server_that_stands_still_is_the_typed_error(servers: Servers, name: str, fault: Fault, kind: str) -> None:
    server = servers()
    pair = Twins(_remote(server.address, name, Timeouts(10, 2, 1)))
    pair.step()
    fault.arm(kind, 2, lambda _: server.pause())
    pair.backward()
    begun = time.monotonic()
    try:
        with pytest.raises(errors.UnavailableError):
            pair.own.step()
        assert time.monotonic() - begun < 10
    finally:
        server.resume()
    assert fault.fired == 1
    # What had been handed to the kernel when the server stood still has reached it.
    if pair.own.remote.pull() == 2:
        pair.local.step()
    twins.assert_same_parameters(pair.ours, pair.torchs, "as the server has them")
    pair.step()
    pair.own.remote.close()


def _gloo_of(server: ServerProcess) -> tuple[int, int]:
    """Return how many of gloo's threads a server has, and at how many ports it listens."""
    names = []
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            names.append((task / "comm").read_text())
    listening = [each for each in psutil.Process(server.pid).net_connections() if each.status == psutil.CONN_LISTEN]
    return sum("gloo" in each for each in names), len(listening)


def _await(condition: Callable[[], bool]) -> None:
    process = psutil.Process()
    for _ in range(3000):
        if condition():
            return
        process.cpu_percent(0.01)
    raise AssertionError("it does not come about")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_workers_that_are_killed_leave_nothing(servers: Servers, name: str) -> None:
    server = servers("--lease", "2")
    choose = random.Random(0)
    pair = Twins(_remote(server.address, name))
    own = _gloo_of(server)
    assert own == (2, 1)
    with Nursery([killed.__name__, "torch._dynamo"]) as nursery:
        for worker in range(KILLS):
            child = nursery.bear(
                killed.train, address=server.address, name=f"{name}-killed", worker=worker, transport="pg"
            )
            assert child.talk.hear() == "pg"
            child.talk.heard(choose.uniform(0.0, 0.02))
            child.kill()
            child.await_end()
            pair.step()
        _await(lambda: _gloo_of(server) == own)
    pair.own.remote.close()
    _await(lambda: _gloo_of(server) == (0, 0))


@pytest.mark.parametrize("kind", ["send", "recv", "between"])
def test_a_worker_that_stands_still_is_left_behind_and_comes_back(servers: Servers, name: str, kind: str) -> None:
    server = servers("--lease", "1")
    with Nursery([killed.__name__, "torch._dynamo"]) as nursery:
        child = nursery.bear(killed.stand_still, address=server.address, name=name, kind=kind)
        assert child.talk.hear() == "stops"
        _await(lambda: _gloo_of(server) == (0, 0))
        child.resume()
        assert child.talk.hear() == [3, "pg"]
        child.await_end()


def test_a_worker_whose_place_is_taken_has_no_group_any_more(servers: Servers, name: str) -> None:
    server = servers()
    pair = Twins(_remote(server.address, name))
    pair.step()
    with RawSession(server.address) as other:
        layout = pair.own._farstep.binding.layout
        other.attach(attach_message(name, optimizer="Adam"), layout_bytes(layout), b"")
        _await(lambda: _gloo_of(server) == (0, 0))
        pair.backward()
        with pytest.raises(errors.FencedError):
            pair.own.step()
    pair.own.remote.close()


def test_nobody_takes_over_a_mixture(server: ServerProcess, name: str) -> None:
    """Under Async the server steps while it still sends the parameters to others: what they receive is of one version."""
    steps, workers = 20, 3

    def train(worker: int) -> int:
        parameter = Parameter(torch.zeros(2_000_000))
        own = optim.SGD([parameter], lr=1.0, remote=_remote(server.address, name, worker=worker, policy=Async()))
        parameter.grad = torch.full_like(parameter, -1.0)
        for _ in range(steps):
            own.step()
            low, high = (int(bound) for bound in torch.aminmax(parameter.detach()))
            assert low == high == own.remote.version
        own.remote.close()
        return low

    with ThreadPoolExecutor(workers) as pool:
        assert max(pool.map(train, range(workers))) == steps * workers


# Strangers.


def _ports_of(server: ServerProcess) -> list[int]:
    found = psutil.Process(server.pid).net_connections()
    return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN]


def test_strangers_at_the_port_change_nothing(servers: Servers, name: str) -> None:
    server = servers()
    pair = Twins(_remote(server.address, name))
    (port,) = _ports_of(server)
    strangers = []
    for data in (b"", b"\0" * 4, b"\0" * 8, random.Random(1).randbytes(4096)):
        stranger = socket.create_connection(("127.0.0.1", port), 5)
        stranger.sendall(data)
        strangers.append(stranger)
        pair.step()
    pair.own.remote.close()
    _await(lambda: _gloo_of(server) == (0, 0))
    for stranger in strangers:
        stranger.close()


@pytest.fixture(scope="module")
def raw_server(module_servers: Servers) -> ServerProcess:
    return module_servers()


@pytest.fixture
def session(raw_server: ServerProcess, name: str) -> Any:
    with RawSession(raw_server.address) as session:
        layout = flat_layout(4, 3)
        own = session.attach(attach_message(name), layout_bytes(layout), bytes(layout.arena.nbytes))
        session.epoch = own.epoch  # type: ignore[attr-defined]
        yield session


def _group(**fields: Any) -> pb.Group:
    return pb.Group(**{"generation": 1, "backend": "gloo", "token": bytes(16), **fields})


def test_wishes_that_cannot_be_met(session: Any) -> None:
    for wrong in ({"backend": "mpi"}, {"token": b"short"}, {"generation": 0}):
        with pytest.raises(errors.InvalidRequestError, match="'gloo' and 16 are due"):
            session.ask(group=_group(**wrong))
    session.ask(group=_group())
    entries = [pb.GroupEntry(key=str(number), value=b"x") for number in range(100)]
    with pytest.raises(errors.InvalidRequestError, match="too many or too long"):
        session.ask(group=_group(entries=entries))
    assert session.ask(pull=pb.Pull())[0].parameters.version == 0


def test_an_end_that_makes_no_sense_or_never_comes(session: Any, raw_server: ServerProcess) -> None:
    """It takes neither the server nor the session."""
    reply = session.ask(group=_group())[0].grouped
    (key,) = [entry.key for entry in reply.entries]
    other = key[:-1] + "1"
    with pytest.raises(errors.UnavailableError, match="the server cannot make its end"):
        session.ask(group=_group(entries=[pb.GroupEntry(key=other, value=bytes(170))]))
    assert not session.ask(group=_group(generation=2))[0].grouped.ready
    assert session.ask(pull=pb.Pull())[0].parameters.version == 0
    session.close()
    _await(lambda: _gloo_of(raw_server) == (0, 0))


def _contribution(session: Any) -> pb.Contribution:
    return pb.Contribution(epoch=session.epoch, sequence=1, incarnation=1)


@pytest.mark.parametrize("blocks", [[128, 0], [129], [64], [2**40], []])
def test_blocks_that_do_not_make_up_the_bytes(session: Any, blocks: list[int]) -> None:
    session.send_frame(request=9, contribution=_contribution(session), total_bytes=128, blocks=blocks or [1] * 1000)
    assert isinstance(session.refusal(), errors.InvalidRequestError)


def test_bytes_by_a_group_that_is_not_there(session: Any) -> None:
    session.send_frame(request=9, contribution=_contribution(session), total_bytes=128, blocks=[128])
    with pytest.raises(EndedError):
        session.receive()
