"""A server that is restarted, in good order or not: workers go on, and the bits are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from farstep import Sync, Timeouts
from farstep_server.store import SnapshotStore
from farstep_wire.errors import RollbackError
from tests.faults.models import (
    await_standing,
    local_run,
    parameters,
    remote_optimizer,
    same_bits,
    take_steps,
)
from tests.support.servers import ServerProcess, Servers

PATIENT = Timeouts(connect=60, step=90, reconnect=60)
KILLS = 50 if os.environ.get("FARSTEP_SOAK") == "big" else 10


@contextmanager
def _restarting(server: ServerProcess) -> Iterator[Callable[[], None]]:
    """Give an act that sends SIGTERM and returns at once; the server is started again as soon as it has ended."""
    with ThreadPoolExecutor(1) as pool:
        codes = []

        def strike() -> None:
            server.process.terminate()
            codes.append(pool.submit(come_back))

        def come_back() -> int:
            code = server.join()
            server.start()
            return code

        yield strike
        assert [code.result() for code in codes] == [0] * len(codes)
        assert codes, "the server was never struck"


def test_one_worker_steps_on_through_sigterms(servers: Servers, tmp_path: Path, name: str) -> None:
    server = servers("--data-dir", str(tmp_path))
    params = parameters()
    optimizer = remote_optimizer(params, server.address, name, "Adam", timeouts=PATIENT)
    lineage = optimizer.remote.lineage
    with _restarting(server) as strike:
        for step in range(40):
            if step in (10, 25):
                strike()
            # The server drains while these steps come in.
            take_steps(optimizer, params, range(step, step + 1))
    assert server.said().count(f"worker_join name={name}") == 3
    assert (optimizer.remote.version, optimizer.remote.lineage, optimizer.remote.incarnation) == (40, lineage, 1)
    assert same_bits(params, local_run(40, "Adam", lr=0.1))
    optimizer.remote.close()


def _two_workers(address: str, name: str, before: Callable[[int, int], None]) -> list[list[Parameter]]:
    """Train with two workers for 12 steps; ``before`` is told worker and step."""

    def work(worker: int) -> list[Parameter]:
        params = parameters()
        optimizer = remote_optimizer(
            params, address, name, "Adam", timeouts=PATIENT, policy=Sync(2), worker=worker, options={"amsgrad": True}
        )
        for step in range(12):
            before(worker, step)
            take_steps(optimizer, params, range(step, step + 1), worker)
        assert optimizer.remote.version == 12
        optimizer.remote.close()
        return params

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(work, worker) for worker in range(2)]]


def test_two_workers_go_on_though_one_waits_in_a_round_at_the_sigterm(
    servers: Servers, tmp_path: Path, name: str
) -> None:
    server = servers("--data-dir", str(tmp_path))
    calm = _two_workers(server.address, f"{name}-calm", lambda worker, step: None)
    with _restarting(server) as strike:

        def before(worker: int, step: int) -> None:
            if (worker, step) in ((1, 4), (0, 8)):
                standings = ["waiting", "computing"] if worker == 1 else ["computing", "waiting"]
                await_standing(server.address, name, standings)
                strike()

        disturbed = _two_workers(server.address, name, before)
    # Both worker's sessions are made anew at each restart.
    assert server.said().count(f"worker_join name={name} ") == 6
    assert same_bits(disturbed[0], disturbed[1])
    assert same_bits(disturbed[0], calm[0])


def test_a_sigterm_between_the_evaluations_of_a_step(servers: Servers, tmp_path: Path, name: str) -> None:
    target = torch.linspace(-1, 2, 6)

    def train(params: list[Parameter], optimizer: Any, strike: Callable[[], None]) -> list[float]:
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            if evaluations == 9:
                strike()
            optimizer.zero_grad()
            loss = ((params[0] - target) ** 4).sum() + (params[0].diff() ** 2).sum()
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(6)]

    def start() -> list[Parameter]:
        return [Parameter(torch.zeros(6))]

    options = {"max_iter": 5, "line_search_fn": "strong_wolfe"}
    here, there = start(), start()
    expected = train(here, torch.optim.LBFGS(here, lr=0.1, **options), lambda: None)  # type: ignore[arg-type]
    server = servers("--data-dir", str(tmp_path))
    optimizer = remote_optimizer(there, server.address, name, "LBFGS", timeouts=PATIENT, options=options)
    with _restarting(server) as strike:
        losses = train(there, optimizer, strike)
    assert losses == expected
    assert same_bits(here, there)
    optimizer.remote.close()


@pytest.mark.soak
@pytest.mark.timeout(KILLS * 30)
def test_kills_in_the_middle_of_snapshots(servers: Servers, tmp_path: Path, name: str) -> None:
    # After every kill the newest complete snapshot is there again, and training goes on from it to the bits of a calm run.
    server = servers("--data-dir", str(tmp_path), "--snapshot-interval", "20ms")
    generator = random.Random(1)
    params = _large_parameters()
    optimizer = remote_optimizer(params, server.address, name, "Adam", timeouts=PATIENT)
    interrupted = 0
    resumed = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(KILLS):
            killing = pool.submit(_kill_while_writing, server, tmp_path, name, generator.uniform(0, 0.03))
            _step_on(optimizer, params, lambda killing=killing: killing.done())  # type: ignore[misc]
            unfinished, newest = killing.result()
            interrupted += unfinished
            hosted = [int(version) for version in re.findall(r"hosted name=\S+ .* version=(\d+)", server.news())]
            assert hosted[-1:] == [newest]
            resumed.append(newest)
    assert interrupted, "no kill fell into a snapshot"
    assert sorted(resumed) == resumed
    # What was stepped again after a rollback was stepped to the same bits.
    local = _large_parameters()
    reference = torch.optim.Adam(local, lr=0.1)
    for step in range(optimizer.remote.version):
        _set_large_gradients(local, step)
        reference.step()
    assert same_bits(params, local)
    optimizer.remote.close()


def _large_parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [Parameter(torch.randn(300_000, generator=generator))]


def _set_large_gradients(params: list[Parameter], step: int) -> None:
    params[0].grad = torch.sin(torch.arange(300_000, dtype=torch.float32) * (step + 1))


def _step_on(optimizer: Any, params: list[Parameter], over: Callable[[], bool]) -> None:
    """Step until told otherwise; after a rollback, from where the server stands."""
    while not over():
        _set_large_gradients(params, optimizer.remote.version)
        try:
            optimizer.step()
        except RollbackError:
            optimizer.remote.pull()
        time.sleep(0.002)


def _kill_while_writing(server: ServerProcess, directory: Path, name: str, delay: float) -> tuple[bool, int]:
    """Kill the server while it writes, start it again; return whether a snapshot was cut off, and the newest whole one."""
    _await_a_snapshot(directory, delay)
    server.kill()
    unfinished = any(directory.glob("*/.tmp-*"))
    store = SnapshotStore(directory)
    newest = store.list(name)[-1].version
    store.close()
    server.start()
    return unfinished, newest


def _await_a_snapshot(directory: Path, delay: float) -> None:
    known = set(directory.glob("*/[0-9]*"))
    deadline = time.monotonic() + 30
    while not set(directory.glob("*/[0-9]*")) - known:
        assert time.monotonic() < deadline, "no snapshot was written"
        time.sleep(0.005)
    threading.Event().wait(delay)
    while not any(directory.glob("*/.tmp-*")):
        assert time.monotonic() < deadline, "no snapshot is being written"
        time.sleep(0.0005)
