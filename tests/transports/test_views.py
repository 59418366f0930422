"""Parameters that lie in the server's pages, or in pages received, are each worker's own: whoever writes, whatever ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from farstep import Async, Remote, Sync, Timeouts, errors, optim
from farstep.inspection import connect
from farstep.transports import pages
from farstep_wire.address import parse_address
from farstep_wire.layout import align
from farstep_wire.shared_memory import SharedMemoryError
from tests.parity import twins
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess, Servers

_SIZES = (250_001, 3, 90_000, 0, 40)


def _parameters() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(size, generator=generator)) for size in _SIZES]


def _give_gradients(params: list[Any], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _remote(server: ServerProcess, name: str, **how: Any) -> Remote:
    how = {"timeouts": Timeouts(30, 30, 20), "transport": "shm"} | how
    return Remote(server.address, name=name, **how)


def _is_file(params: list[Any]) -> bool:
    """Whether the first parameter's memory is that of a shared file, mapped privately."""
    own = params[0].data_ptr() + params[0].nbytes // 2
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(bound, 16) for bound in line.split()[0].split("-"))
        if low <= own < high:
            return "memfd:farstep" in line and line.split()[1].endswith("p")
    raise AssertionError("memory that is mapped nowhere")


class Pair:
    """Two models, one stepped by a server and one by local torch."""

    def __init__(self, server: ServerProcess, name: str, **how: Any) -> None:
        self.both = _parameters(), _parameters()
        self.own = optim.Adam(self.both[0], lr=0.1, remote=_remote(server, name, **how))
        self.local = torch.optim.Adam(self.both[1], lr=0.1)
        self.steps = 0

    def each(self, act: Callable[[list[Any]], None]) -> None:
        """Do the same to both models."""
        for params in self.both:
            act(params)

    def step(self) -> None:
        """Step both; their parameters must have the same bits afterwards."""
        self.steps += 1
        for params, optimizer in zip(self.both, (self.own, self.local), strict=True):
            _give_gradients(params, self.steps)
            optimizer.step()
        twins.assert_same_parameters(*self.both, f"after {self.steps} steps")


def _clamp(params: list[Any]) -> None:
    params[0].data.clamp_(-0.5, 0.5)


def _move_words(params: list[Any]) -> None:
    params[2].data.copy_(torch.cat([params[2].data[2:], params[2].data[:2]]))


def _one_bit(params: list[Any]) -> None:
    params[0].data.view(torch.int32)[-1] ^= 1


def _negative_zero(params: list[Any]) -> None:
    params[1].data[1] = -0.0


def _elsewhere(params: list[Any]) -> None:
    params[0].data = params[0].data * 2
    params[4].data = params[4].data.clone()


def _nothing_new(params: list[Any]) -> None:
    for parameter in params:
        parameter.data.copy_(parameter.data.clone())


def _loaded(params: list[Any]) -> None:
    with torch.no_grad():
        for parameter in params:
            parameter.fill_(0.25)


_EDITS: list[tuple[Callable[[list[Any]], None], Sequence[int]]] = [
    (_clamp, [0]),
    (_move_words, [2]),
    (_one_bit, [0]),
    (_negative_zero, [1]),
    (_nothing_new, []),
    (_loaded, range(len(_SIZES))),
    (_elsewhere, [0]),
    (_clamp, [0]),
    (_nothing_new, []),
    (_one_bit, [0]),
]
"""Edits, and the parameters that they change."""


_WAYS = pytest.mark.parametrize("transport", ["shm", "grpc", "pg"])


@_WAYS
def test_every_edit_is_seen_and_nothing_else(servers: Servers, name: str, transport: str) -> None:
    _sees_every_edit(servers("--pg"), name, transport)


def _sees_every_edit(server: ServerProcess, name: str, transport: str) -> None:
    pair = Pair(server, name, transport=transport)
    assert _is_file(pair.both[0])
    gradients = 0 if transport == "shm" else sum(align(4 * size) for size in _SIZES)
    for edit, numbers in _EDITS:
        pair.step()
        pair.each(edit)
        sent = pair.own.remote.traffic.sent
        pair.step()
        sent = pair.own.remote.traffic.sent - sent - gradients
        edited = 4 * sum(_SIZES[number] for number in numbers)
        assert edited <= sent < edited + 1000, f"{edit.__name__}: {sent} bytes"
    pair.own.remote.close()
    twins.assert_same_parameters(*pair.both, "they stay as they are")


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_parameters_that_others_refer_to_stay_where_they_are(server: ServerProcess, name: str, transport: str) -> None:
    params = _parameters()
    kept, flat = params[0].detach(), params[2].view(-1)
    own = optim.SGD(params, lr=0.1, remote=_remote(server, name, transport=transport))
    _give_gradients(params, 1)
    own.step()
    assert not _is_file(params)
    assert own.remote.transport == transport
    assert kept.data_ptr() == params[0].data_ptr()
    assert torch.equal(flat, params[2])
    own.remote.close()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_parameters_that_other_processes_see_stay_where_they_are(
    server: ServerProcess, name: str, transport: str
) -> None:
    params = _parameters()
    for parameter in params:
        parameter.share_memory_()
    own = optim.SGD(params, lr=0.1, remote=_remote(server, name, transport=transport))
    _give_gradients(params, 1)
    own.step()
    assert all(parameter.is_shared() for parameter in params)
    own.remote.close()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_each_has_a_storage_of_its_own(server: ServerProcess, name: str, transport: str) -> None:
    pair = Pair(server, name, transport=transport)
    assert [parameter.untyped_storage().nbytes() for parameter in pair.both[0]] == [4 * size for size in _SIZES]
    addresses = [parameter.data_ptr() for parameter in pair.both[0]]
    views_of_them = [parameter.data.view(-1) for parameter in pair.both[0]]
    pair.step()
    pair.own.remote.close()
    assert [parameter.data_ptr() for parameter in pair.both[0]] == addresses
    twins.assert_same_parameters(views_of_them, pair.both[1], "seen through views")


def test_a_kernel_that_does_not_list_what_was_written(
    server: ServerProcess, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_SCAN", 0)  # as refused as an ioctl that there is not
    _sees_every_edit(server, name, "shm")


@pytest.mark.parametrize(("transport", "way"), [("auto", "shm"), ("shm", "shm"), ("grpc", "grpc")])
def test_a_kernel_that_does_not_tell_what_was_written(
    server: ServerProcess, name: str, monkeypatch: pytest.MonkeyPatch, transport: str, way: str
) -> None:
    def opened() -> int:
        raise SharedMemoryError("not to be had")

    monkeypatch.setattr(pages, "_open_pagemap", opened)
    pair = Pair(server, name, transport=transport)
    for edit in (_clamp, _one_bit, _elsewhere):
        pair.each(edit)
        pair.step()
    assert pair.own.remote.transport == way
    assert not _is_file(pair.both[0])
    pair.own.remote.close()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_kernel_that_no_longer_tells_what_was_written(
    server: ServerProcess, name: str, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """As where a process has no descriptor left: then all bytes are compared."""
    pair = Pair(server, name, transport=transport)
    pair.step()
    asked = 0

    def opened() -> int:
        nonlocal asked
        asked += 1
        raise SharedMemoryError("not to be had")

    monkeypatch.setattr(pages, "_open_pagemap", opened)
    for edit in (_clamp, _nothing_new, _one_bit):
        pair.each(edit)
        pair.step()
    assert asked
    assert _is_file(pair.both[0])
    pair.own.remote.close()
    twins.assert_same_parameters(*pair.both, "closed")


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_async_workers_have_copies(server: ServerProcess, name: str, transport: str) -> None:
    """What they see changes with their own steps alone."""
    with ThreadPoolExecutor(2) as pool:
        remotes = [_remote(server, name, worker=number, policy=Async(), transport=transport) for number in range(2)]
        params = [_parameters() for _ in remotes]
        own = list(pool.map(lambda each: optim.SGD(each[0], lr=0.1, remote=each[1]), zip(params, remotes, strict=True)))
    kept = [parameter.detach().clone() for parameter in params[1]]
    for number in range(2):
        _give_gradients(params[0], number)
        own[0].step()
    twins.assert_same_parameters(params[1], kept, "the other one has made steps")
    for optimizer in own:
        optimizer.remote.close()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_edits_before_a_group_is_added(server: ServerProcess, name: str, transport: str) -> None:
    pair = Pair(server, name, transport=transport)
    pair.step()
    added = [Parameter(torch.full((70_000,), 0.5)) for _ in range(2)]
    for params, optimizer, own in zip(pair.both, (pair.own, pair.local), added, strict=True):
        _clamp(params)
        optimizer.add_param_group({"params": [own]})
        params.append(own)
    twins.assert_same_parameters(*pair.both, "added")
    pair.step()
    pair.step()
    assert _is_file(pair.both[0])
    pair.own.remote.close()


def test_edits_and_closures_that_fail(server: ServerProcess, name: str) -> None:
    """After a closure-driven step that fails the parameters are the server's, and edits of them are seen again.

    Beside the same with parameters that stay where they are: a line search's bits depend on the threads that it is given.
    """
    params, others = _parameters(), _parameters()
    held = [parameter.detach() for parameter in others]
    own, other = (
        optim.LBFGS(mine, lr=0.1, max_iter=4, remote=_remote(server, f"{name}-{number}", transport="grpc"))
        for number, mine in enumerate((params, others))
    )

    def closure_of(mine: list[Any], optimizer: Any, fails: int) -> Callable[[], Tensor]:
        calls = iter(range(100))

        def closure() -> Tensor:
            if next(calls) == fails:
                raise ValueError("no more")
            optimizer.zero_grad()
            loss = torch.stack([(parameter * parameter).sum() for parameter in mine]).sum()
            loss.backward()
            return loss

        return closure

    own.step(closure_of(params, own, -1))
    other.step(closure_of(others, other, -1))
    twins.assert_same_parameters(params, others, "one step")
    kept = [parameter.detach().clone() for parameter in params]
    _clamp(params)
    with pytest.raises(ValueError, match="no more"):
        own.step(closure_of(params, own, 2))
    twins.assert_same_parameters(params, kept, "given back")
    for mine in (params, others):
        _clamp(mine)
    own.step(closure_of(params, own, -1))
    other.step(closure_of(others, other, -1))
    twins.assert_same_parameters(params, others, "two steps")
    assert _is_file(params)
    assert not _is_file(others)
    assert held[0].data_ptr() == others[0].data_ptr()
    own.remote.close()  # type: ignore[attr-defined]
    other.remote.close()  # type: ignore[attr-defined]


# Whoever does not wait sees no change.


def _two(server: ServerProcess, name: str, **how: Any) -> tuple[list[list[Any]], list[Any]]:
    params = [_parameters() for _ in range(2)]
    remotes = [_remote(server, name, worker=number, policy=Sync(2), **how) for number in range(2)]
    own = [optim.SGD(each, lr=0.1, remote=remote) for each, remote in zip(params, remotes, strict=True)]
    return params, own


def test_what_one_writes_the_other_does_not_see(server: ServerProcess, name: str) -> None:
    params, own = _two(server, name)
    with ThreadPoolExecutor(2) as pool:
        for number in range(3):
            with torch.no_grad():
                params[0][0][:5000] = number
            assert not params[1][0][:5000].eq(number).any()
            for each in params:
                _give_gradients(each, number)
            list(pool.map(lambda optimizer: optimizer.step(), own))
            twins.assert_same_parameters(*params, "an edit is one for all, from the step on")
    assert all(map(_is_file, params))
    for optimizer in own:
        optimizer.remote.close()


def test_who_gave_up_waiting_keeps_what_there_was(server: ServerProcess, name: str) -> None:
    params, own = _two(server, name, timeouts=Timeouts(30, 1, 20))
    kept = [parameter.detach().clone() for parameter in params[0]]
    for each in params:
        _give_gradients(each, 1)
    with pytest.raises(errors.DeadlineError) as caught:
        own[0].step()
    assert caught.value.applied is errors.Applied.UNKNOWN
    own[1].step()
    assert not torch.equal(params[1][0], kept[0])
    twins.assert_same_parameters(params[0], kept, "the step was made without this worker looking")
    params[0][2].data.fill_(9.0)
    own[0].remote.pull()
    twins.assert_same_parameters(*params, "pulled")
    for optimizer in own:
        optimizer.remote.close()


def test_who_is_cut_off_keeps_what_there_was_while_others_go_on(servers: Servers, name: str) -> None:
    server = servers("--lease", "1")
    params = [_parameters() for _ in range(2)]
    with Proxy(server.address) as proxy:
        addresses = [server.address, proxy.address]
        remotes = [
            Remote(address, name=name, worker=number, policy=Sync(2), transport="shm", timeouts=Timeouts(30, 30, 20))
            for number, address in enumerate(addresses)
        ]
        own = [optim.SGD(each, lr=0.1, remote=remote) for each, remote in zip(params, remotes, strict=True)]
        for each in params:
            _give_gradients(each, 1)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda optimizer: optimizer.step(), own))
        assert all(map(_is_file, params))
        kept = [parameter.detach().clone() for parameter in params[1]]
        proxy.blackhole()
        own[0].step()
        assert own[0].remote.version == 2
        twins.assert_same_parameters(params[1], kept, "while the other one went on")
        proxy.heal()
        own[1].remote.pull()
        twins.assert_same_parameters(*params, "pulled")
        for optimizer in own:
            optimizer.remote.close()


def test_a_restored_snapshot_comes_with_the_next_step_and_not_before(
    servers: Servers, name: str, tmp_path: Path
) -> None:
    server = servers("--data-dir", str(tmp_path))
    pair = Pair(server, name)
    pair.own.remote.checkpoint("begun")
    begun = [parameter.detach().clone() for parameter in pair.both[0]]
    pair.step()
    with connect(parse_address(server.address), 30) as remote:
        remote.restore(name, tag="begun")
    twins.assert_same_parameters(*pair.both, "nothing was asked for yet")
    pair.own.remote.pull()
    twins.assert_same_parameters(pair.both[0], begun, "pulled")
    assert _is_file(pair.both[0])
    pair.own.remote.close()


# Whatever ends.


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_they_outlive_their_server(servers: Servers, name: str, transport: str) -> None:
    server = servers()
    pair = Pair(server, name, timeouts=Timeouts(5, 5, 1), transport=transport)
    pair.step()
    pair.each(_one_bit)
    server.kill()
    _give_gradients(pair.both[0], 7)
    with pytest.raises(errors.UnavailableError):
        pair.own.step()
    twins.assert_same_parameters(*pair.both, "the server is gone")
    pair.each(_clamp)
    pair.own.remote.close()
    twins.assert_same_parameters(*pair.both, "closed")


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_forked_child_has_them_as_they_were(server: ServerProcess, name: str, transport: str) -> None:
    pair = Pair(server, name, transport=transport)
    pair.step()
    go = os.pipe()
    # Without torch, whose threads are the parent's.
    expected = bytes(memoryview(pair.both[1][0].detach().numpy()).cast("B"))
    seen = memoryview(pair.both[0][0].detach().numpy()).cast("B")
    pid = os.fork()
    if pid == 0:
        os.read(go[0], 1)
        os._exit(0 if bytes(seen) == expected else 1)
    try:
        for _ in range(2):
            pair.step()
    finally:
        os.write(go[1], b".")
        _, status = os.waitpid(pid, 0)
        for end in go:
            os.close(end)
    assert status == 0, "the child saw what came after"
    assert _is_file(pair.both[0])
    pair.own.remote.close()
