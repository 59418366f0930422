"""64 workers' streams hold a Sync barrier, and nothing grows: neither memory nor descriptors nor threads."""

from __future__ import annotations

import os

import pytest

from tests.data_parallel.herd import footprint, herd, local_digest
from tests.support.servers import Servers

WORKERS, PROCESSES = 64, 4
BIG = os.environ.get("FARSTEP_SOAK") == "big"
ROUNDS = 1000 if BIG else 40
SAMPLES = 10

# The server remembers the last 20,000 parts in its rounds' history, which 64 workers fill in 313 rounds.
WARM_ROUNDS = 400 if BIG else 8
# What the allocators of Python and gRPC may still gather after that. In the big run that is 55 bytes per contribution.
GROWTH_BYTES = 2 * 1024 * 1024


@pytest.mark.soak
def test_many_workers_hold_the_barrier_and_nothing_grows(servers: Servers, name: str) -> None:
    server = servers()
    pauses = range(ROUNDS // SAMPLES, ROUNDS + 1, ROUNDS // SAMPLES)
    samples: dict[int, list[tuple[int, int, int]]] = {}
    with herd(server.address, name, WORKERS, PROCESSES, ROUNDS, pauses) as own:
        own.go_on_all()
        for reached in pauses:
            assert own.read() == reached
            for pid in (server.pid, *own.pids):
                samples.setdefault(pid, []).append(footprint(pid))
            own.go_on()
        results = own.read_all()
        own.go_on_all()
    assert [version for result in results for version in result["versions"]] == [ROUNDS] * WORKERS
    digests = {found for result in results for found in result["digests"]}
    assert digests == {local_digest(WORKERS, ROUNDS)}, "all hold the bits of the one process that averages"
    warm = WARM_ROUNDS * SAMPLES // ROUNDS - 1
    for pid, found in samples.items():
        who = "the server" if pid == server.pid else "a client process"
        rss, files, threads = zip(*found, strict=True)
        print(f"{who}: {[f'{size / 2**20:.1f}' for size in rss]} MiB, {files} descriptors, {threads} threads")
        assert max(rss[warm:]) - rss[warm] <= GROWTH_BYTES, f"the memory of {who} grows: {rss}"
        assert max(files[warm:]) <= files[warm], f"the descriptors of {who} become more: {files}"
        assert max(threads[warm:]) <= threads[warm] + 2, f"the threads of {who} become more: {threads}"
