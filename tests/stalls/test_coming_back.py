"""What a worker finds that asks again after a wait in vain: a server that stood still for long, or its own late messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from farstep import Remote, Retry, Sync, Timeouts, optim
from farstep_wire.errors import Applied, DeadlineError, FencedError, UnavailableError
from tests.faults import stalling
from tests.faults.models import await_standing, local_run, parameters, remote_optimizer, same_bits, set_gradients
from tests.faults.models import take_steps as take
from tests.support.proxy import Proxy
from tests.support.raw import RawSession, attach_message, layout_bytes
from tests.support.servers import ServerProcess, Servers

LEASE_SECONDS = 2.0
PATIENT = Timeouts(connect=30, step=30, reconnect=30)
SHORT = Timeouts(connect=1.5, step=1.5, reconnect=1.5)
# A second past the deadline, and what two busy cores may add before a thread runs at all.
ALLOWED_SECONDS = 1.0 + 1.0


def set_timeouts(optimizer: Any, timeouts: Timeouts) -> None:
    """Give an optimizer other timeouts, those of its link too."""
    session = optimizer._farstep
    session.remote = session.link._remote = replace(session.remote, timeouts=timeouts)


def in_vain(
    act: Callable[[], Any], seconds: float, error: type[UnavailableError] = UnavailableError
) -> UnavailableError:
    """Have an act wait for a server that stands still; return its error, which must be there in time."""
    begun = time.monotonic()
    with pytest.raises(error) as raised:
        act()
    assert time.monotonic() - begun < seconds + ALLOWED_SECONDS
    return raised.value


@pytest.fixture(scope="module")
def stopping(module_servers: Servers) -> ServerProcess:
    """A server that these tests may stop, whose workers' leases run out meanwhile."""
    return module_servers("--lease", f"{LEASE_SECONDS}s")


def test_two_calls_in_vain_and_leases_that_ran_out_in_between(stopping: ServerProcess, name: str) -> None:
    """The second call has to attach again, which is in vain as well; the server reads all of it when it goes on."""
    params = parameters()
    optimizer = remote_optimizer(params, stopping.address, name, timeouts=PATIENT, retry=Retry(0.01, 0.1))
    take(optimizer, params, range(3))
    set_gradients(params, 3)
    stopping.pause()
    set_timeouts(optimizer, SHORT)
    for _ in range(2):
        assert in_vain(optimizer.step, 1.5).applied is Applied.UNKNOWN
    stopping.resume()
    set_timeouts(optimizer, PATIENT)
    optimizer.step()
    assert optimizer.remote.version == 4
    take(optimizer, params, range(4, 6))
    assert same_bits(params, local_run(6, lr=0.1))
    optimizer.remote.close()


def test_workers_that_wait_in_a_round_while_the_server_stands_still(stopping: ServerProcess, name: str) -> None:
    """One contribution is there when the server stops, the other on its way; all leases have run out when it goes on."""
    workers = [parameters(), parameters()]
    with ThreadPoolExecutor(2) as pool:

        def build(number: int) -> Any:
            return remote_optimizer(
                workers[number], stopping.address, name, worker=number, policy=Sync(2), timeouts=PATIENT,
                retry=Retry(0.01, 0.1), options=stalling.OPTIONS,
            )  # fmt: skip

        optimizers = list(pool.map(build, range(2)))

        def step(number: int, step: int) -> None:
            set_gradients(workers[number], step, number)
            optimizers[number].step()

        list(pool.map(step, range(2), (1, 1)))
        first = pool.submit(step, 0, 2)
        await_standing(stopping.address, name, ["waiting", "computing"])
        stopping.pause()
        second = pool.submit(step, 1, 2)
        time.sleep(LEASE_SECONDS + 0.5)
        assert not first.done()
        assert not second.done()
        stopping.resume()
        first.result()
        second.result()
        list(pool.map(step, range(2), (3, 3)))
    # Whichever of the two contributions came too late, nothing was used twice, and all have what was.
    rounds = optimizers[0].remote.history()
    stalling.check_rounds(rounds, {0: 1, 1: 1})
    assert [part.sequence for part in rounds[-1].parts] == [3, 3]
    expected = stalling.replay(rounds)
    assert all(same_bits(params, expected) for params in workers)
    for optimizer in optimizers:
        optimizer.remote.close()


def test_a_driven_step_in_vain_leaves_the_parameters_as_they_were(stopping: ServerProcess, name: str) -> None:
    params, local = [Parameter(torch.ones(4))], [Parameter(torch.ones(4))]
    remote = Remote(stopping.address, name=name, timeouts=PATIENT)
    optimizer: Any = optim.LBFGS(params, lr=0.5, max_iter=4, remote=remote)  # type: ignore[attr-defined]
    twin = torch.optim.LBFGS(local, lr=0.5, max_iter=4)
    calls = 0

    def closure_over(own: list[Parameter], each: Any) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                stopping.pause()
            each.zero_grad()
            loss = ((own[0] - torch.arange(4)) ** 4).sum()
            loss.backward()
            return loss

        return closure

    deadline = 3.0
    set_timeouts(optimizer, Timeouts(connect=deadline, step=deadline, reconnect=deadline))
    error = in_vain(lambda: optimizer.step(closure_over(params, optimizer)), deadline - 0.5, DeadlineError)
    assert error.applied is Applied.UNKNOWN
    assert calls == 3, "the first evaluations were answered, so that the parameters were those of a trial"
    assert same_bits(params, [torch.ones(4)])
    stopping.resume()
    set_timeouts(optimizer, PATIENT)
    for _ in range(2):
        optimizer.step(closure_over(params, optimizer))
        twin.step(closure_over(local, twin))
    assert optimizer.remote.version == 2
    assert same_bits(params, local)
    optimizer.remote.close()


def test_a_worker_that_could_not_pull_when_it_joined_is_none_yet(server: ServerProcess, name: str) -> None:
    first = parameters()
    optimizer = remote_optimizer(first, server.address, name)
    take(optimizer, first, range(3))
    with Proxy(server.address, measure=True) as proxy:
        # A copy attaches when it is first used: the server says that it is joined, and then nothing more comes through.
        late = remote_optimizer(parameters(), proxy.address, f"{name}-other", timeouts=SHORT)
        params = late.param_groups[0]["params"]
        late.remote.close()
        late._farstep.name = name
        proxy.blackhole_at_reply(2)
        set_gradients(params, 3)
        in_vain(late.step, 3.0)
        assert "not attached" in repr(late.remote)
        proxy.heal()
        set_timeouts_of_session(late, PATIENT)
        set_gradients(params, 3)
        late.step()
        assert late.remote.version == 4
        late.remote.close()
    assert same_bits(params, local_run(4, lr=0.1))


def set_timeouts_of_session(optimizer: Any, timeouts: Timeouts) -> None:
    optimizer._farstep.remote = replace(optimizer._farstep.remote, timeouts=timeouts)


def _attach_as(server: ServerProcess, name: str, optimizer: Any, instance: str) -> RawSession:
    standing = optimizer._farstep.link.standing
    session = RawSession(server.address)
    message = attach_message(
        name, instance=instance, lineage=standing.lineage if instance == standing.instance else "",
        incarnation=standing.incarnation, version=standing.version,
    )  # fmt: skip
    session.attach(message, layout_bytes(optimizer._farstep.binding.layout), b"")
    return session


def test_an_attach_of_ones_own_that_comes_late_fences_nobody(server: ServerProcess, name: str) -> None:
    params = parameters()
    optimizer = remote_optimizer(params, server.address, name)
    for step in range(4):
        take(optimizer, params, range(step, step + 1))
        # As if an attach that this client had given up came out of the network only now.
        _attach_as(server, name, optimizer, optimizer._farstep.link.standing.instance).close()
    take(optimizer, params, range(4, 6))
    assert optimizer.remote.version == 6
    assert [row.stale for row in optimizer.remote.describe().workers] == [0]
    assert same_bits(params, local_run(6, lr=0.1))
    optimizer.remote.close()


def test_another_process_that_takes_the_worker_over_fences_it_for_good(server: ServerProcess, name: str) -> None:
    params = parameters()
    optimizer = remote_optimizer(params, server.address, name)
    take(optimizer, params, range(2))
    with _attach_as(server, name, optimizer, "another"):
        for _ in range(3):
            set_gradients(params, 2)
            with pytest.raises(FencedError, match="another process has attached as the same worker") as raised:
                optimizer.step()
            assert raised.value.applied is Applied.NO
    optimizer.remote.close()
    assert same_bits(params, local_run(2, lr=0.1))
