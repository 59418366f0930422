"""Many workers in a few client processes, which hold one Sync barrier round after round; both sides of it.

Run as a module it is one of the processes: it takes its orders as JSON on the command line, tells how far it is line by line
and goes on from a pause by a line from its owner.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from farstep import Remote, Sync, Timeouts, optim
from tests.data_parallel import problems
from tests.data_parallel.crew import mean
from tests.support.servers import clean_environment

OPTIONS = {"lr": 0.01, "momentum": 0.9}
# How the kernel knows the threads of the pool, which grows by one now and then while the machine is busy, up to a bound.
_GRPC_THREADS = ("event_engine", "lifeguard", "grpc_global_tim")
_TIMEOUTS = Timeouts(connect=60, step=120)


@dataclass(frozen=True)
class Orders:
    """What one process does: ``count`` workers from ``first`` on, of ``total``."""

    address: str
    name: str
    first: int
    count: int
    total: int
    rounds: int
    pauses: tuple[int, ...]
    """Rounds after which worker 0 stays away until its owner says so, and all others wait for it."""
    elements: int = 0
    """Of the one parameter; 0: a few small ones."""


def digest(params: Sequence[torch.Tensor]) -> str:
    """Return what stands for the bits of the parameters."""
    parts = b"".join(parameter.detach().numpy().tobytes() for parameter in params)
    return hashlib.sha256(parts).hexdigest()


def local_digest(total: int, rounds: int) -> str:
    """Return the digest of one process that averages the gradients of all workers."""
    params = problems.parameters()
    optimizer = torch.optim.SGD(params, **OPTIONS)
    for step in range(rounds):
        gradients = mean([problems.dense(params, step, worker) for worker in range(total)])
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return digest(params)


class Herd:
    """The owner's side."""

    def __init__(self, orders: Sequence[Orders]) -> None:
        environment = clean_environment()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, json.dumps(asdict(own))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            )
            for own in orders
        ]  # fmt: skip

    def read(self, process: int = 0) -> Any:
        """Return what a process says next."""
        stream = self._processes[process].stdout
        assert stream is not None
        line = stream.readline()
        assert line, f"client process {process} has ended"
        return json.loads(line)

    def read_all(self) -> list[Any]:
        """Return what each process says next."""
        return [self.read(number) for number in range(len(self._processes))]

    def go_on(self, process: int = 0) -> None:
        """End a pause of a process."""
        stream = self._processes[process].stdin
        assert stream is not None
        stream.write(b"\n")
        stream.flush()

    def go_on_all(self) -> None:
        """End a pause of all processes."""
        for number in range(len(self._processes)):
            self.go_on(number)

    @property
    def pids(self) -> list[int]:
        """The ids of the processes."""
        return [process.pid for process in self._processes]

    def finish(self) -> None:
        """Wait for the end of all."""
        codes = [process.wait(60) for process in self._processes]
        assert codes == [0] * len(codes), f"the client processes ended with {codes}"

    def end(self) -> None:
        """End it whatever state it is in."""
        for process in self._processes:
            process.kill()
            process.communicate()


@contextmanager
def herd(
    address: str, name: str, total: int, processes: int, rounds: int, pauses: Sequence[int] = (), elements: int = 0
) -> Iterator[Herd]:
    """Run that many workers, spread over processes; all are attached, and begin with ``go_on_all``."""
    bounds = [total * number // processes for number in range(processes + 1)]
    own = Herd(
        [
            Orders(address, name, first, end - first, total, rounds, tuple(pauses), elements)
            for first, end in itertools.pairwise(bounds)
        ]
    )
    try:
        assert own.read_all() == ["attached"] * processes
        yield own
        own.finish()
    finally:
        own.end()


def footprint(pid: int) -> tuple[int, int, int]:
    """Return a process's resident bytes, open descriptors, and threads but for those of gRPC's own pool."""
    process = psutil.Process(pid)
    names = [_thread_name(path) for path in Path(f"/proc/{pid}/task").iterdir()]
    return process.memory_info().rss, process.num_fds(), sum(name not in _GRPC_THREADS for name in names)


def _thread_name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it has ended in between
        return ""


# The process itself.


class _Member:
    def __init__(self, orders: Orders, number: int) -> None:
        self._orders = orders
        self._number = number
        self.params = [torch.nn.Parameter(torch.zeros(orders.elements))] if orders.elements else problems.parameters()
        remote = Remote(orders.address, name=orders.name, worker=number, policy=Sync(orders.total), timeouts=_TIMEOUTS)
        self.optimizer: Any = optim.SGD(self.params, remote=remote, **OPTIONS)

    def train(self, gate: threading.Barrier) -> float:
        """Take all rounds; return how many seconds they took from the second on."""
        gate.wait()
        begun = 0.0
        for step in range(self._orders.rounds):
            for parameter, gradient in zip(self.params, problems.dense(self.params, step, self._number), strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            if step == 0:
                begun = time.perf_counter()
            if self._number == 0 and step + 1 in self._orders.pauses:
                print(json.dumps(step + 1), flush=True)
                sys.stdin.readline()
        return time.perf_counter() - begun


def _main() -> None:
    given = json.loads(sys.argv[1])
    orders = Orders(**{**given, "pauses": tuple(given["pauses"])})
    torch.set_num_threads(1)
    gate = threading.Barrier(orders.count)
    with ThreadPoolExecutor(orders.count) as pool:
        numbers = range(orders.first, orders.first + orders.count)
        members = list(pool.map(lambda number: _Member(orders, number), numbers))
        print(json.dumps("attached"), flush=True)
        sys.stdin.readline()
        seconds = list(pool.map(lambda member: member.train(gate), members))
        versions = [member.optimizer.remote.version for member in members]
        digests = sorted({digest(member.params) for member in members})
        print(json.dumps({"seconds": max(seconds), "versions": versions, "digests": digests}), flush=True)
        sys.stdin.readline()
        list(pool.map(lambda member: member.optimizer.remote.close(), members))


if __name__ == "__main__":
    _main()
