"""A server that dies, hangs, is not there yet or is none at all: a typed error within its deadline, then on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from farstep import Remote, Sync, Timeouts
from farstep_wire.errors import Applied, ConfigurationError, DeadlineError, UnavailableError
from tests.faults.models import (
    await_standing,
    local_run,
    parameters,
    remote_optimizer,
    same_bits,
    set_gradients,
    take_steps,
)
from tests.support.servers import ServerProcess, Servers, clean_environment

QUICK = Timeouts(connect=20, step=4, reconnect=0.5)


def test_a_kill_in_the_middle_of_a_step_is_told_within_the_deadline(servers: Servers, name: str) -> None:
    server = servers()
    params = parameters()
    # A round of two with one worker there: the step is under way until another comes, which none does.
    optimizer = remote_optimizer(params, server.address, name, timeouts=QUICK, policy=Sync(2), worker=0)
    set_gradients(params, 0)
    waiting = threading.Thread(target=_kill_when_waiting, args=(server, name))
    waiting.start()
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="applied is unknown") as raised:
        optimizer.step()
    took = time.monotonic() - begun
    waiting.join()
    assert raised.value.applied is Applied.UNKNOWN
    assert server.address in str(raised.value)
    assert took < 4 + 1
    assert same_bits(params, parameters()), "a step of which nothing is known must not move the parameters"
    optimizer.remote.close()


def _kill_when_waiting(server: ServerProcess, name: str) -> None:
    await_standing(server.address, name, ["waiting"])
    server.kill()


def test_a_server_that_hangs_is_told_by_the_deadline_and_the_step_counts_once(servers: Servers, name: str) -> None:
    server = servers()
    params = parameters()
    optimizer = remote_optimizer(params, server.address, name, timeouts=Timeouts(connect=20, step=1.5, reconnect=5))
    take_steps(optimizer, params, range(3))
    server.pause()
    set_gradients(params, 3)
    begun = time.monotonic()
    with pytest.raises(DeadlineError) as raised:
        optimizer.step()
    assert 1.4 < time.monotonic() - begun < 2.5
    assert raised.value.applied is Applied.UNKNOWN
    server.resume()
    # The same gradients again: whichever of the two the server took, it took one.
    optimizer.step()
    assert optimizer.remote.version == 4
    take_steps(optimizer, params, range(4, 8))
    assert optimizer.remote.version == 8
    assert same_bits(params, local_run(8, lr=0.1))
    optimizer.remote.close()


def test_a_worker_without_a_server_waits_and_says_what_to_check(tmp_path: Path, name: str) -> None:
    address = f"unix:{tmp_path}/nobody"[:100]
    begun = time.monotonic()
    with pytest.raises(UnavailableError) as raised:
        remote_optimizer(parameters(), address, name, timeouts=Timeouts(connect=1))
    assert 0.9 < time.monotonic() - begun < 2
    text = str(raised.value)
    assert address in text
    assert "within 1 s" in text
    assert "Check that farstep-server runs there" in text
    assert f"farstep doctor --server {address}" in text


def test_a_worker_started_before_its_server_works_once_that_is_up(servers: Servers, name: str) -> None:
    params = parameters()
    server = servers(start=False)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(
            remote_optimizer, params, server.address, name, timeouts=Timeouts(connect=60, step=20, reconnect=5)
        )
        server.start()
        optimizer = building.result()
    take_steps(optimizer, params, range(2))
    assert same_bits(params, local_run(2, lr=0.1))
    optimizer.remote.close()


_WAITING_WORKER = """
import sys, torch
from farstep import Remote, Sync, Timeouts, optim
p = torch.nn.Parameter(torch.zeros(3))
remote = Remote(sys.argv[1], name=sys.argv[2], policy=Sync(2), worker=0, timeouts=Timeouts(connect=30, step=300))
o = optim.SGD([p], lr=0.1, remote=remote)
p.grad = torch.ones(3)
print("stepping", flush=True)
o.step()
"""


def test_ctrl_c_ends_a_waiting_step_at_once(server: ServerProcess, name: str) -> None:
    # A round of two of which the other never comes.
    with _worker(server.address, name) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"stepping\n"
        await_standing(server.address, name, ["waiting"])
        worker.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, text = worker.communicate(timeout=10)
        assert time.monotonic() - begun < 5
        assert worker.returncode in (-signal.SIGINT, 130, 1)
        assert b"KeyboardInterrupt" in text
        assert b"Exception ignored" not in text


@contextmanager
def _worker(address: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _WAITING_WORKER, address, name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# Wrong places.


@contextmanager
def _listener(answer: bytes) -> Iterator[str]:
    """Listen on a loopback port and answer whatever comes with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in held:
                connection.close()


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", os.urandom(256), b""],
    ids=["http", "garbage", "silent"],
)
def test_a_port_where_something_else_listens(answer: bytes, name: str) -> None:
    with _listener(answer) as address:
        begun = time.monotonic()
        with pytest.raises(UnavailableError) as raised:
            remote_optimizer(parameters(), address, name, timeouts=Timeouts(connect=1))
        assert time.monotonic() - begun < 2
        assert address in str(raised.value)
        assert "Check that farstep-server runs there" in str(raised.value)


@pytest.mark.parametrize("address", ["no-such-host.invalid:50051", "127.0.0.1:1"])
def test_a_host_that_is_not_there(address: str, name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="Check that farstep-server runs there") as raised:
        remote_optimizer(parameters(), address, name, timeouts=Timeouts(connect=1))
    assert time.monotonic() - begun < 2.5
    assert address in str(raised.value)


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("gpu-box", "is not host:port"),
        ("gpu-box:99999", "is not host:port"),
        ("http://gpu-box:80", "scheme 'http'"),
        ("unix:", "has no path"),
        ("gpu-box:50051/", "no name behind it"),
        ("unix:" + "x" * 200, "at most 100 bytes"),
    ],
)
def test_an_address_that_is_none(address: str, part: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        remote_optimizer(parameters(), address, "x")
    assert part in str(raised.value)
    assert address[:20] in str(raised.value)


@pytest.mark.parametrize("value", ["", " x", "a\nb", "n" * 256, "\ud800"], ids=ascii)
def test_a_name_that_is_none(value: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 255 bytes of printable text"):
        Remote("127.0.0.1:1", name=value)


@pytest.mark.parametrize("value", ["", "a\tb", "w" * 65, "\ud800"], ids=ascii)
def test_a_worker_that_is_none(value: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 64 bytes of printable text"):
        Remote("127.0.0.1:1", worker=value)
