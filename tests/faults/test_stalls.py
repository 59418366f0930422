"""A worker that is killed, stopped or cut off keeps the others for as long as its lease lasts, and never acts late."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from farstep import Sync, inspection
from farstep.inspection import Round
from farstep_wire.address import parse_address
from tests.faults import stalling
from tests.faults.models import parameters, remote_optimizer, same_bits
from tests.support.nursery import Child, Nursery
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess, Servers

BIG = os.environ.get("FARSTEP_SOAK") == "big"
FAULTS = 200 if BIG else 20
WORKERS = 4
LEASE_SECONDS = 1.0
# What a fault may cost: the lease, and a second for the round that follows it.
BOUND_SECONDS = LEASE_SECONDS + 1.0
# On top of it, for processes that wait for a core of a busy machine.
SCHEDULING_SECONDS = 1.0
_LONGEST_SECONDS = 30.0
KINDS = ("kill", "stop", "blackhole", "stop, replaced meanwhile")


class Crew:
    """Workers in processes of their own, each behind a proxy, and the history of what they bring about."""

    def __init__(self, server: ServerProcess, name: str, nursery: Nursery, proxies: list[Proxy]) -> None:
        self.name = name
        self.proxies = proxies
        self.children: dict[int, Child] = {}
        self.births: Counter[int] = Counter()
        self.rounds: list[Round] = []
        self.times: dict[int, float] = {}
        self._nursery = nursery
        self._address = parse_address(server.address)

    def bear(self, worker: int) -> None:
        """Start a worker, in place of one that is gone or will be."""
        self.births[worker] += 1
        self.children[worker] = self._nursery.bear(
            stalling.train, address=self.proxies[worker].address, name=self.name, worker=worker, workers=WORKERS,
            seed=1000 * worker + self.births[worker],
        )  # fmt: skip

    def listen(self) -> None:
        """Take in what the workers say, and the history."""
        for child in self.children.values():
            for message in child.talk.heard():
                assert "error" not in message, message
                version = message["version"]
                self.times[version] = min(message["time"], self.times.get(version, message["time"]))
        if not self.times:
            return  # nobody is attached yet
        with inspection.connect(self._address, 20) as server:
            self.rounds += server.history(self.name, self.rounds[-1].number if self.rounds else 0)

    def await_round(self, what: str, fits: Callable[[Round], bool]) -> Round:
        """Wait for a round, of those that come from now on, that fits, and until a worker has said when it had it."""
        known = len(self.rounds)
        deadline = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < deadline:
            self.listen()
            for one in self.rounds[known:]:
                if fits(one) and any(version >= one.version for version in self.times):
                    return one
            time.sleep(0.02)
        raise AssertionError(f"no round {what} within {_LONGEST_SECONDS:g} s: {self.rounds[-3:]}")

    def await_with(self, worker: int) -> None:
        self.await_round(f"with worker {worker}", lambda one: worker in _workers(one))

    def seconds_until_without(self, worker: int, fault: float) -> float:
        """Return how long after the fault a worker had the parameters of the first round without the one struck."""
        one = self.await_round(f"without worker {worker}", lambda one: worker not in _workers(one))
        return min(self.times[version] for version in self.times if version >= one.version) - fault

    def stale(self, worker: int) -> int:
        with inspection.connect(self._address, 20) as server:
            return next(row.stale for row in server.describe(self.name).workers if row.id == str(worker))

    def finish(self) -> None:
        """Have all leave."""
        for child in self.children.values():
            child.talk.say("end")
        for child in self.children.values():
            child.await_end()
        self.listen()


def _workers(one: Round) -> set[int]:
    return {int(part.worker) for part in one.parts}


@contextmanager
def crew(server: ServerProcess, name: str) -> Iterator[Crew]:
    with ExitStack() as stack:
        nursery = stack.enter_context(Nursery([stalling.__name__, "torch._dynamo"]))
        proxies = [stack.enter_context(Proxy(server.address)) for _ in range(WORKERS)]
        own = Crew(server, name, nursery, proxies)
        for worker in range(WORKERS):
            own.bear(worker)
        yield own


def strike(own: Crew, kind: str, worker: int) -> float:
    """Strike a worker down, wait for the round that goes on without it, and let it come back; return how long that took."""
    child, proxy = own.children[worker], own.proxies[worker]
    stale = own.stale(worker)
    act: dict[str, Callable[[], Any]] = {"kill": child.kill, "blackhole": proxy.blackhole}
    fault = time.monotonic()
    act.get(kind, child.pause)()
    seconds = own.seconds_until_without(worker, fault)
    match kind:
        case "kill":
            child.await_end()
            own.bear(worker)
        case "stop":
            child.resume()
        case "blackhole":
            proxy.heal()
        case _:
            own.bear(worker)
            own.await_with(worker)
            child.resume()
            # The last word of the one that was replaced: its contribution has been fenced.
            *_, last = child.await_end()
            assert (last.get("error"), last.get("applied")) == ("FencedError", "NO"), last
    own.await_with(worker)
    if kind in {"stop", "blackhole"}:
        # What it had under way when it was struck came too late, and it was told so before it went on.
        assert own.stale(worker) > stale, f"{kind}: nothing of worker {worker} was refused"
    return seconds


@pytest.mark.soak
@pytest.mark.timeout(60 + FAULTS * 10)
def test_nobody_stalls_the_rest(servers: Servers, name: str) -> None:
    server = servers("--lease", f"{LEASE_SECONDS}s")
    chance = random.Random(4)
    kinds = [KINDS[number % len(KINDS)] for number in range(FAULTS)]
    chance.shuffle(kinds)
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with crew(server, name) as own:
        for worker in range(WORKERS):
            own.await_with(worker)
        for kind in kinds:
            worker = chance.randrange(WORKERS)
            time.sleep(chance.uniform(0, 0.1))
            own.listen()
            took[kind].append(strike(own, kind, worker))
        own.finish()
        assert sum(proxy.fired["blackhole"] for proxy in own.proxies) == kinds.count("blackhole")
        rounds, births = own.rounds, own.births
    for kind, seconds in took.items():
        print(f"{len(seconds)} x {kind}: went on after {min(seconds):.2f} to {max(seconds):.2f} s")
        assert max(seconds) < BOUND_SECONDS + SCHEDULING_SECONDS, f"{kind}: {seconds}"
    assert births.total() == WORKERS + kinds.count("kill") + kinds.count("stop, replaced meanwhile")
    stalling.check_rounds(rounds, births)
    # What the server holds is made of what its history says and of nothing else.
    params = parameters()
    observer = remote_optimizer(
        params, server.address, name, worker="observer", policy=Sync(WORKERS), options=stalling.OPTIONS
    )
    assert observer.remote.version == len(rounds)
    assert same_bits(params, stalling.replay(rounds))
    observer.remote.close()
