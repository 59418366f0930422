"""What is special about pipes: where they can be had, what ends them, and what is never trusted."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from farstep import Remote, Sync, Timeouts, errors, optim
from farstep_wire.pipes import OwnPipes, PipeError, PipeName, Pipes, open_pipes
from farstep_wire.v1 import optimizer_pb2 as pb
from tests.parity import twins
from tests.support.proxy import Proxy
from tests.support.raw import RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess, Servers


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(size, generator=generator)) for size in (640, 31, 1)]


def _step(params: list[Tensor], optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    torch.stack([(parameter * (number + 1)).sin().sum() for parameter in params]).sum().backward()
    optimizer.step()


def _remote(address: str, name: str, **how: Any) -> Remote:
    return Remote(address, name=name, timeouts=Timeouts(30, 30, 20), **how)


# Where there are some.


@pytest.mark.parametrize(("transport", "way"), [("auto", "pipe"), ("pipe", "pipe"), ("shm", "shm"), ("grpc", "grpc")])
def test_where_they_are_taken(server: ServerProcess, name: str, transport: Any, way: str) -> None:
    ours, torchs = _parameters(), _parameters()
    own: Any = optim.Adam(ours, remote=_remote(server.address, name, transport=transport))
    local = torch.optim.Adam(torchs)
    for number in range(5):
        _step(ours, own, number)
        _step(torchs, local, number)
        twins.assert_same_parameters(ours, torchs, f"step {number}")
    assert own.remote.transport == way
    own.remote.close()


def test_what_stands_in_between_carries_the_messages(
    server: ServerProcess, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "farstep")
    with Proxy(server.address) as proxy:
        for transport, told in (("auto", 0), ("pipe", 1)):
            own: Any = optim.SGD(
                _parameters(), lr=0.1, remote=_remote(proxy.address, f"{name}-{transport}", transport=transport)
            )
            assert own.remote.transport == "grpc"
            assert sum("no pipes" in record.message for record in caplog.records) == told
            own.remote.close()


def test_large_answers(server: ServerProcess, name: str) -> None:
    """State of many times a pipe's size, there and back."""
    params = [Parameter(torch.randn(1_000_000)) for _ in range(2)]
    own: Any = optim.Adam(params, remote=_remote(server.address, name, transport="pipe"))
    for number in range(2):
        _step(params, own, number)
    state = own.state_dict()
    _step(params, own, 2)
    own.load_state_dict(state)
    again = own.state_dict()
    for index in range(2):
        assert torch.equal(again["state"][index]["exp_avg"], state["state"][index]["exp_avg"])
    assert own.remote.transport == "pipe"
    own.remote.close()


# What ends them.


def test_a_server_that_dies_is_noticed_at_once_and_found_again(servers: Servers, name: str, tmp_path: Path) -> None:
    server = servers("--data-dir", str(tmp_path))
    ours, torchs = _parameters(), _parameters()
    own: Any = optim.Adam(ours, remote=_remote(server.address, name))
    local = torch.optim.Adam(torchs)
    for number in range(3):
        _step(ours, own, number)
        _step(torchs, local, number)
    own.remote.checkpoint()
    server.kill()
    server.start()
    for number in range(3, 6):
        _step(ours, own, number)
        _step(torchs, local, number)
    twins.assert_same_parameters(ours, torchs, "after 6 steps")
    assert own.remote.transport == "pipe"
    own.remote.close()


def test_a_server_that_stands_still_is_waited_for_so_long(server: ServerProcess, name: str) -> None:
    params = _parameters()
    own: Any = optim.SGD(params, lr=0.1, remote=Remote(server.address, name=name, timeouts=Timeouts(30, 1, 1)))
    _step(params, own, 0)
    server.pause()
    try:
        with pytest.raises(errors.DeadlineError) as caught:
            _step(params, own, 1)
        assert caught.value.applied is errors.Applied.UNKNOWN
    finally:
        server.resume()
    own.remote.pull()
    assert own.remote.version in {1, 2}
    _step(params, own, 2)
    own.remote.close()


def _pipes(process: int) -> int:
    found = 0
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += str(entry.readlink()).startswith("pipe:")
    return found


def test_nothing_is_left_of_those_that_have_gone(server: ServerProcess, name: str) -> None:
    def visit(number: int) -> None:
        params = _parameters()
        own: Any = optim.SGD(params, lr=0.1, remote=_remote(server.address, f"{name}-{number}"))
        _step(params, own, 0)
        own.remote.close()

    visit(0)
    own, servers = _pipes(os.getpid()), _pipes(server.pid)
    for number in range(1, 15):
        visit(number)
    assert _pipes(os.getpid()) == own
    deadline = time.monotonic() + 20
    while (found := _pipes(server.pid)) > servers:
        assert time.monotonic() < deadline, f"{found} ends of pipes after 15 sessions, {servers} after the first"
        time.sleep(0.05)


def test_a_worker_that_is_interrupted_goes_on(server: ServerProcess, name: str) -> None:
    """Ctrl-C while another worker is waited for: the wait ends, and the pipes with it."""
    params = _parameters()
    first, second = [
        optim.SGD(own, lr=0.1, remote=_remote(server.address, name, worker=worker, policy=Sync(2)))
        for worker, own in enumerate((params, _parameters()))
    ]
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            _step(params, first, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    for each in (first, second):
        each.remote.close()  # type: ignore[attr-defined]


# What is never trusted.


def _attached(session: RawSession, name: str) -> int:
    layout = flat_layout(16, 8)
    return int(session.attach(attach_message(name, policy=Sync(1)), layout_bytes(layout), bytes(128)).epoch)


def _opened(session: RawSession, address: str) -> Pipes:
    target = address.partition("#")[0]
    piped = session.ask(direct=pb.Direct(directly_at=target))[0].piped
    names = [PipeName(name.descriptor, name.inode) for name in (piped.requests, piped.replies)]
    pipes, proof = open_pipes(piped.process, *names)
    session.ask(direct=pb.Direct(proof=proof))
    return pipes


def _never() -> None:
    """Wait on."""


def _serves(server: ServerProcess, name: str) -> None:
    with RawSession(server.address) as session:
        _attached(session, name)


@pytest.mark.parametrize(
    "nonsense",
    [(1 << 31).to_bytes(4, "little"), b"\x05\0\0\0\xff\xff\xff\xff\xff", b"\0\0\0\0", b"\x40\0\0\0half"],
    ids=["too-long", "no-message", "empty", "cut-off"],
)
def test_nonsense_ends_the_session_alone(server: ServerProcess, name: str, nonsense: bytes) -> None:
    with RawSession(server.address) as session:
        _attached(session, name)
        pipes = _opened(session, server.address)
        os.write(pipes._outgoing, nonsense)
        pipes.close_outgoing()
        answers = []
        while (data := pipes.read(_never)) is not None:
            answers.append(pb.ServerFrame.FromString(data))
        assert all(answer.WhichOneof("body") == "failure" for answer in answers)
        pipes.close()
    _serves(server, name + "-2")


def test_who_does_not_read_holds_nobody_up(server: ServerProcess, name: str) -> None:
    """Replies of more bytes than a pipe holds, to a worker of a round that others are to make up too."""
    count = 20_000
    with RawSession(server.address) as session, RawSession(server.address) as other:
        message = attach_message(name, policy=Sync(2))
        attached = session.attach(message, layout_bytes(flat_layout(16, 8)), bytes(128))
        pipes = _opened(session, server.address)
        waits = pb.Contribution(epoch=attached.epoch, incarnation=attached.incarnation, sequence=1, abstain=True)
        zero = pb.ZeroGrad(epoch=attached.epoch)
        requests = [pb.ClientFrame(request=1, contribution=waits)]
        requests += [pb.ClientFrame(request=number + 2, zero_grad=zero) for number in range(count)]
        for request in requests:
            pipes.write(request.SerializeToString(), _never)
        message = attach_message(name, policy=Sync(2), worker="1")
        other.attach(message, layout_bytes(flat_layout(16, 8)), bytes(128))
        assert other.ask(pull=pb.Pull())[0].parameters.version == 0
        answers = [pb.ServerFrame.FromString(pipes.read(_never) or b"") for _ in range(count)]
        assert [answer.request for answer in answers] == list(range(2, count + 2))
        assert {answer.WhichOneof("body") for answer in answers} == {"done"}
        pipes.close()


def test_a_proof_that_is_none(server: ServerProcess, name: str) -> None:
    with RawSession(server.address) as session:
        _attached(session, name)
        session.send(direct=pb.Direct(proof=bytes(16)))
        assert "no pipes were offered" in str(session.refusal())
        session.ask(direct=pb.Direct(directly_at=server.address))
        session.send(direct=pb.Direct(proof=bytes(16)))
        assert "not what stands in the pipe" in str(session.refusal())
        session.ask(direct=pb.Direct(directly_at=server.address))
        session.ask(direct=pb.Direct(declined="no, thanks"))
        session.send(direct=pb.Direct(directly_at="127.0.0.1:1"))
        assert isinstance(session.refusal(), errors.ConfigurationError)
        assert session.ask(pull=pb.Pull())[0].parameters.version == 0, "the stream goes on"


def test_only_the_pipe_that_is_meant_is_opened() -> None:
    own = OwnPipes()
    strangers = OwnPipes()
    try:
        with pytest.raises(PipeError, match="is not the server's pipe"):
            open_pipes(os.getpid(), PipeName(own.requests.descriptor, strangers.requests.inode), own.replies)
        with pytest.raises(PipeError, match="cannot be opened"):
            open_pipes(os.getpid(), PipeName(9999, 1), own.replies)
        pipes, proof = open_pipes(os.getpid(), own.requests, own.replies)
        assert proof == own.proof
        pipes.close()
    finally:
        own.close()
        strangers.close()
