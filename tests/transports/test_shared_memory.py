"""What is special about shared memory: where it cannot be had, what is left of it, and what is never trusted."""

from __future__ import annotations

import logging
import os
import random
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from farstep import Async, Remote, Settings, Sync, Timeouts, errors, optim
from farstep.transports import shm
from farstep_wire.shared_memory import OwnSegment, SegmentName, SharedMemoryError, open_segment
from farstep_wire.v1 import common_pb2 as cpb
from farstep_wire.v1 import optimizer_pb2 as pb
from tests.parity import twins
from tests.support.nursery import Nursery
from tests.support.proxy import Proxy
from tests.support.raw import RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess, Servers
from tests.transports import killed

BIG = os.environ.get("FARSTEP_SOAK") == "big"
KILLS = 200 if BIG else 20
NUMBERS = 100_000


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(NUMBERS, generator=generator)), Parameter(torch.randn(30, 7, generator=generator))]


def _backward(params: list[Tensor], number: int) -> None:
    torch.stack([(parameter * (number + index)).sin().sum() for index, parameter in enumerate(params)]).sum().backward()


def _remote(server: ServerProcess, name: str, **how: Any) -> Remote:
    return Remote(server.address, name=name, timeouts=Timeouts(30, 30, 20), **how)


def _train(server: ServerProcess, name: str, steps: int = 3, **how: Any) -> Any:
    """Train beside local torch, bit for bit; return the optimizer."""
    ours, torchs = _parameters(), _parameters()
    own = optim.Adam(ours, remote=_remote(server, name, **how))
    local = torch.optim.Adam(torchs)
    for number in range(steps):
        for params, optimizer in ((ours, own), (torchs, local)):
            optimizer.zero_grad()
            _backward(params, number)
            optimizer.step()
    twins.assert_same_parameters(ours, torchs, f"after {steps} steps")
    return own


# Where there is some, and where there is none.


def test_on_one_host_it_is_used_unasked(server: ServerProcess, name: str) -> None:
    own = _train(server, name)
    assert own.remote.transport == "shm"
    moved = own.remote.traffic
    total = sum(parameter.nbytes for group in own.param_groups for parameter in group["params"])
    assert total < moved.sent < total + 2000, "the first parameters travel in messages, and nothing else"
    assert moved.received < 2000
    own.remote.close()


def test_a_proxy_in_between_carries_the_tensors(server: ServerProcess, name: str) -> None:
    with Proxy(server.address) as proxy:
        own = optim.SGD(_parameters(), lr=0.1, remote=Remote(proxy.address, name=name))
        assert own.remote.transport == "grpc"
        own.remote.close()
        own = optim.SGD(_parameters(), lr=0.1, remote=Remote(proxy.address, name=f"{name}-asked", transport="shm"))
        assert own.remote.transport == "shm"
        own.remote.close()


def test_small_models_do_without(server: ServerProcess, name: str) -> None:
    own = optim.SGD([Parameter(torch.zeros(1000))], lr=0.1, remote=_remote(server, name))
    assert own.remote.transport == "pipe"
    own.remote.close()


def _no_room_on_the_server(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (NUMBERS, NUMBERS))
    return "File too large"


def _another_container(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    def elsewhere(name: SegmentName, **how: bool) -> Any:
        return open_segment(SegmentName(2**22 + 1, name.descriptor, name.nbytes, name.nonce), **how)

    monkeypatch.setattr(shm, "open_segment", elsewhere)
    return "in a container of its own"


def _another_server_of_that_number(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    def another(name: SegmentName, **how: bool) -> Any:
        return open_segment(SegmentName(name.process, name.descriptor, name.nbytes, bytes(16)), **how)

    monkeypatch.setattr(shm, "open_segment", another)
    return "of another server"


@pytest.mark.parametrize("asked", ["shm", "auto"])
@pytest.mark.parametrize("cause", [_no_room_on_the_server, _another_container, _another_server_of_that_number])
def test_without_it_tensors_travel_in_messages_and_the_log_says_why_once(
    servers: Servers,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cause: Callable[[ServerProcess, pytest.MonkeyPatch], str],
    asked: str,
) -> None:
    server = servers()
    reason = cause(server, monkeypatch)
    with caplog.at_level(logging.INFO, logger="farstep"):
        own = _train(server, name, transport=asked, adopt_parameters=asked == "shm")
        own.param_groups[0]["params"][0].grad = None
        own.add_param_group({"params": [Parameter(torch.zeros(3))]})
        own.step()
    assert own.remote.transport == "grpc"
    told = [record for record in caplog.records if "no shared memory" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING" if asked == "shm" else "INFO"]
    assert reason in told[0].getMessage()
    own.remote.close()


def test_adoption_and_async_exclude_each_other() -> None:
    with pytest.raises(errors.ConfigurationError, match="adopt_parameters=True with Async"):
        Remote(policy=Async(), adopt_parameters=True)
    with pytest.raises(
        errors.ConfigurationError, match="transport 'udp' is not one of 'auto', 'grpc', 'pipe', 'shm', 'pg'"
    ):
        Remote(transport="udp")  # type: ignore[arg-type]


def test_adopted_parameters_are_the_servers_own(server: ServerProcess, name: str) -> None:
    params = [_parameters() for _ in range(2)]
    how = {"policy": Sync(2), "transport": "shm", "adopt_parameters": True}
    identities = [[id(parameter) for parameter in own] for own in params]
    with ThreadPoolExecutor(2) as pool:
        own = list(pool.map(
            lambda number: optim.SGD(params[number], lr=0.1, remote=_remote(server, name, worker=number, **how)), range(2)
        ))  # fmt: skip
        with torch.no_grad():
            params[0][1].fill_(7.0)
        assert params[1][1].eq(7.0).all(), "what one worker writes all see"
        for number in range(2):
            _backward(params[number], 1)
        list(pool.map(lambda optimizer: optimizer.step(), own))
        twins.assert_same_parameters(*params, "both see the one arena")
        kept = [parameter.clone() for parameter in params[0]]
        list(pool.map(lambda optimizer: optimizer.remote.close(), own))
    twins.assert_same_parameters(params[0], kept, "they stay when it is left")
    params[0][1].data.zero_()
    assert not params[1][1].eq(0.0).all(), "and are each one's own again"
    assert [[id(parameter) for parameter in own] for own in params] == identities


def test_an_average_does_not_take_the_place_of_adopted_parameters(server: ServerProcess, name: str) -> None:
    params = _parameters()
    how = {"transport": "shm", "adopt_parameters": True, "settings": Settings(ema_decay=0.5)}
    own = optim.SGD(params, lr=0.1, remote=_remote(server, name, **how))
    for number in range(2):
        own.zero_grad()
        _backward(params, number)
        own.step()
    kept = [parameter.clone() for parameter in params]
    with pytest.raises(errors.ConfigurationError, match=r"the server's own .*the average 'ema'"):
        own.remote.pull(average="ema")
    own.remote.pull()
    twins.assert_same_parameters(params, kept, "untouched")
    own.remote.close()


def test_a_closure_that_raises_leaves_adopted_parameters_as_they_were(server: ServerProcess, name: str) -> None:
    params = _parameters()
    kept = [parameter.clone() for parameter in params]
    how = {"transport": "shm", "adopt_parameters": True}
    own = optim.LBFGS(params, lr=0.1, max_iter=4, remote=_remote(server, name, **how))
    calls = []

    def closure() -> Tensor:
        calls.append(len(calls))
        if len(calls) == 3:
            raise RuntimeError("the third time")
        own.zero_grad()
        loss = torch.stack([(parameter**2).sum() for parameter in params]).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="the third time"):
        own.step(closure)
    twins.assert_same_parameters(params, kept, "rolled back")
    own.step(closure)
    assert own.remote.version == 1
    lengths = [sum(float(parameter.detach().square().sum()) for parameter in own) for own in (params, kept)]
    assert lengths[0] < lengths[1]
    own.remote.close()


# Copies are whole.


def test_nobody_takes_over_a_mixture(server: ServerProcess, name: str) -> None:
    """Under Async the server steps while others copy: each copy is of one version, or it is made again."""
    steps, workers = 40, 3

    def train(worker: int) -> int:
        parameter = Parameter(torch.zeros(2_000_000))
        own = optim.SGD(
            [parameter], lr=1.0, remote=_remote(server, name, worker=worker, policy=Async(), transport="shm")
        )
        parameter.grad = torch.full_like(parameter, -1.0)
        for _ in range(steps):
            own.step()
            low, high = (int(bound) for bound in torch.aminmax(parameter.detach()))
            assert low == high == own.remote.version
        assert own.remote.transport == "shm"
        own.remote.close()
        return low

    with ThreadPoolExecutor(workers) as pool:
        assert max(pool.map(train, range(workers))) == steps * workers


# Nothing is left.


def _segments_of(pid: int) -> tuple[int, int]:
    """Return how many segments a process has open, and how many it has mapped."""
    files = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:farstep" in name for name in files), sum("memfd:farstep" in line for line in maps)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_nothing_is_left_of_those_that_are_killed(servers: Servers, name: str) -> None:
    before = set(Path("/dev/shm").iterdir())
    server = servers("--lease", "1")
    choose = random.Random(0)
    with Nursery([killed.__name__, "torch._dynamo"]) as nursery:
        keeper = nursery.bear(killed.train, address=server.address, name=name, worker=10_000)
        assert keeper.talk.hear() == "shm"
        own = _segments_of(server.pid)
        for worker in range(KILLS):
            child = nursery.bear(killed.train, address=server.address, name=name, worker=worker)
            assert child.talk.hear() == "shm"
            # At some moment of the steps that it makes one after another.
            child.talk.heard(choose.uniform(0.0, 0.02))
            child.kill()
            child.await_end()
        _await(lambda: _segments_of(server.pid) == own)
        server.kill()
        keeper.kill()
        keeper.await_end()
    assert set(Path("/dev/shm").iterdir()) == before


def _await(condition: Callable[[], bool]) -> None:
    process = psutil.Process()
    for _ in range(3000):
        if condition():
            return
        process.cpu_percent(0.01)
    raise AssertionError("it does not come about")


# Nothing is trusted.


@pytest.fixture
def session(server: ServerProcess, name: str) -> Any:
    with RawSession(server.address) as session:
        layout = flat_layout(4, 3)
        own = session.attach(attach_message(name), layout_bytes(layout), bytes(layout.arena.nbytes))
        session.epoch = own.epoch  # type: ignore[attr-defined]
        yield session


def _contribution(session: Any, **fields: Any) -> pb.Contribution:
    return pb.Contribution(epoch=session.epoch, sequence=1, incarnation=1, shared=True, **fields)


def test_gradients_in_memory_that_is_not_there(session: Any) -> None:
    with pytest.raises(errors.InvalidRequestError, match="this session has none"):
        session.ask(contribution=_contribution(session))
    session.ask(share=pb.Share())
    with pytest.raises(errors.InvalidRequestError, match="this session has none"):
        session.ask(contribution=_contribution(session))
    assert session.ask(pull=pb.Pull())[0].parameters.version == 0


def test_a_proof_that_is_none(session: Any) -> None:
    with pytest.raises(errors.InvalidRequestError, match="no shared memory was offered"):
        session.ask(share=pb.Share(proof=bytes(16)))
    session.ask(share=pb.Share())
    with pytest.raises(errors.InvalidRequestError, match="not what stands in shared memory"):
        session.ask(share=pb.Share(proof=b"0123456789abcdef"))


def test_forms_that_do_not_lie_there(session: Any) -> None:
    shared = session.ask(share=pb.Share())[0].shared.gradients
    name = SegmentName(shared.process, shared.descriptor, shared.content_bytes, shared.nonce)
    segment = open_segment(name, writable=True)
    session.ask(share=pb.Share(proof=segment.prove()))
    sparse = pb.GradientForm(parameter=0, sparse=pb.SparseForm(nnz=1, sparse_dims=1))
    strided = pb.GradientForm(parameter=1, strided=cpb.TensorSpec(dtype="float32", shape=[3]))
    for form in (sparse, strided):
        with pytest.raises(errors.InvalidRequestError, match="only dense ones lie in shared memory"):
            session.ask(contribution=_contribution(session, forms=[form]))
    with pytest.raises(errors.InvalidRequestError, match="28 bytes are declared, the layout takes 0"):
        session.ask(bytes(28), contribution=_contribution(session))
    segment.content.view(torch.float32)[:4] = 1.0
    absent = pb.GradientForm(parameter=1, absent=True)
    stepped = session.ask(contribution=_contribution(session, forms=[absent]))[0].stepped
    assert (stepped.version, stepped.parameters) == (1, True)
    assert stepped.changes > 0
    with pytest.raises(SharedMemoryError, match="cannot be opened"):
        open_segment(name, writable=True)


def test_a_segment_is_sealed_and_private() -> None:
    segment = OwnSegment(1000)
    path = f"/proc/{os.getpid()}/fd/{segment.name.descriptor}"
    assert Path(path).stat().st_mode & 0o777 == 0o600
    for size in (0, 10**6):
        with pytest.raises(PermissionError):
            os.truncate(path, size)
    for wrong in (SegmentName(os.getpid(), segment.name.descriptor, 999, segment.nonce),
                  SegmentName(os.getpid(), 0, 1000, segment.nonce)):  # fmt: skip
        with pytest.raises(SharedMemoryError):
            open_segment(wrong, writable=True)
    with pytest.raises(SharedMemoryError, match="are more than the"):
        OwnSegment(2**50)
