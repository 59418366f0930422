"""No wait is unbounded: a server that stands still at any request is told by the deadline, and the next step goes on right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from farstep import Remote, Settings, Timeouts, inspection, lr_scheduler, optim
from farstep_wire.address import parse_address
from farstep_wire.errors import Applied, ConfigurationError, DeadlineError, FarstepError, UnavailableError
from tests.faults.models import local_run, parameters, same_bits, set_gradients, take_steps
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess, Servers

DEADLINE = 1.5
ALLOWED = DEADLINE + 1 + 1
"""One second past the deadline, and one that two busy cores may add before a thread runs at all."""
TIMEOUTS = Timeouts(connect=DEADLINE, step=DEADLINE, reconnect=DEADLINE)


@dataclass
class Client:
    """A worker at version 3, with what it may be asked to do."""

    server: ServerProcess
    name: str
    params: list[Any]
    optimizer: Any
    extra: torch.nn.Parameter = field(default_factory=lambda: torch.nn.Parameter(torch.ones(2)))

    def view(self, act: Callable[[inspection.Server], Any]) -> Any:
        with inspection.connect(parse_address(self.server.address), DEADLINE) as server:
            return act(server)


def _client(server: ServerProcess, name: str, cls: str = "SGD", **settings: Any) -> Client:
    params = list(parameters())
    where = Remote(server.address, name=name, timeouts=Timeouts(30, 30, 30))
    optimizer = getattr(optim, cls)(params, lr=0.1, remote=where, **settings)
    return Client(server, name, params, optimizer)


def _impatient(client: Client) -> None:
    session = client.optimizer._farstep
    session.remote = Remote(client.server.address, name=client.name, timeouts=TIMEOUTS)
    session.link._remote = session.remote


def _closure(client: Client) -> Callable[[], Any]:
    def closure() -> Any:
        client.optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in client.params)
        torch.as_tensor(loss).backward()
        return loss

    return closure


# What is asked on the session's stream and beside it while the server stands still, and what its error says of the step.
STREAM: dict[str, tuple[Callable[[Client], Any], Applied]] = {
    "step": (lambda c: c.optimizer.step(), Applied.UNKNOWN),
    "skip": (lambda c: c.optimizer.remote.skip(), Applied.UNKNOWN),
    "accumulate": (lambda c: c.optimizer.remote.accumulate(), Applied.UNKNOWN),
    "add_param_group": (lambda c: c.optimizer.add_param_group({"params": [c.extra]}), Applied.UNKNOWN),
    "pull": (lambda c: c.optimizer.remote.pull(), Applied.NONE),
    "average": (lambda c: c.optimizer.remote.pull(average="ema"), Applied.NONE),
    "state": (lambda c: c.optimizer.remote.state(c.params[0]), Applied.NONE),
    "state_dict": (lambda c: c.optimizer.state_dict(), Applied.NONE),
}
BESIDE: dict[str, tuple[Callable[[Client], Any], Applied]] = {
    "describe": (lambda c: c.optimizer.remote.describe(), Applied.NONE),
    "history": (lambda c: c.optimizer.remote.history(), Applied.NONE),
    "set": (lambda c: c.optimizer.remote.set(clip_grad_norm=1e9), Applied.NONE),
    "checkpoint": (lambda c: c.optimizer.remote.checkpoint(), Applied.NONE),
    "schedule": (lambda c: lr_scheduler.ConstantLR(c.optimizer, factor=1.0), Applied.NONE),  # type: ignore[attr-defined]
    "snapshots": (lambda c: c.view(lambda server: server.snapshots(c.name)), Applied.NONE),
    "restore": (lambda c: c.view(lambda server: server.restore(c.name, version=1000)), Applied.NONE),
}
ACTS = STREAM | BESIDE


@pytest.fixture(scope="module")
def standing(module_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    """A server that these tests may stop and let go on."""
    return module_servers("--data-dir", str(tmp_path_factory.mktemp("data")), "--lease", "60s")


def _timed_out(act: Callable[[], Any]) -> FarstepError:
    begun = time.monotonic()
    with pytest.raises(UnavailableError) as raised:
        act()
    assert time.monotonic() - begun < ALLOWED
    return raised.value


@pytest.mark.parametrize("kind", ACTS)
def test_the_deadline_holds_and_the_next_step_is_right(standing: ServerProcess, name: str, kind: str) -> None:
    client = _client(standing, name)
    client.optimizer.remote.set(ema_decay=0.5)
    take_steps(client.optimizer, client.params, range(3))
    _impatient(client)
    act, applied = ACTS[kind]
    set_gradients(client.params, 3)
    standing.pause()
    try:
        error = _timed_out(lambda: act(client))
    finally:
        standing.resume()
    assert kind in BESIDE or isinstance(error, DeadlineError)
    assert error.applied is applied
    assert client.optimizer._farstep.address.target in str(error)
    client.optimizer._farstep.link._remote = Remote(standing.address, name=name, timeouts=Timeouts(30, 30, 30))
    client.optimizer.zero_grad()
    if kind == "add_param_group":
        # Whatever became of the first call, the second makes it one group.
        act(client)
        assert len(client.optimizer.remote.describe().groups) == 2
    set_gradients(client.params, 3)
    client.optimizer.step()
    assert client.optimizer.remote.version == 4
    take_steps(client.optimizer, client.params, range(4, 6))
    assert client.optimizer.remote.version == 6
    assert same_bits(client.params, local_run(6, lr=0.1))
    assert {record.outcome for record in client.optimizer.remote.history() if record.kind == "step"} <= {
        "committed",
        "skipped",
    }
    client.optimizer.remote.close()


def test_a_group_that_the_server_took_though_no_answer_came(standing: ServerProcess, name: str) -> None:
    with Proxy(standing.address, measure=True) as proxy:
        params, extra = list(parameters()), torch.nn.Parameter(torch.ones(2))
        where = Remote(proxy.address, name=name, timeouts=TIMEOUTS)
        optimizer: Any = optim.SGD(params, lr=0.1, remote=where)  # type: ignore[attr-defined]
        take_steps(optimizer, params, range(2))
        proxy.blackhole_at_reply(proxy.replies + 1)
        error = _timed_out(lambda: optimizer.add_param_group({"params": [extra]}))
        assert error.applied is Applied.UNKNOWN
        assert len(optimizer.param_groups) == 1
        proxy.heal()
        set_gradients(params, 2)
        with pytest.raises(ConfigurationError, match="took effect on the server, though no answer came: call it again"):
            optimizer.step()
        optimizer.add_param_group({"params": [extra]})
        assert len(optimizer.remote.describe().groups) == 2
        optimizer.step()
        assert optimizer.remote.version == 3
        assert same_bits(params, local_run(3, lr=0.1))
        optimizer.remote.close()


def test_a_state_that_is_loaded(standing: ServerProcess, name: str) -> None:
    client = _client(standing, name, momentum=0.9)
    take_steps(client.optimizer, client.params, range(2))
    state = client.optimizer.state_dict()
    take_steps(client.optimizer, client.params, range(2, 3))
    _impatient(client)
    standing.pause()
    try:
        error = _timed_out(lambda: client.optimizer.load_state_dict(state))
    finally:
        standing.resume()
    assert error.applied is Applied.UNKNOWN
    client.optimizer._farstep.link._remote = Remote(standing.address, name=name, timeouts=Timeouts(30, 30, 30))
    client.optimizer.load_state_dict(state)
    set_gradients(client.params, 3)
    client.optimizer.step()
    assert client.optimizer.remote.version == 4
    client.optimizer.remote.close()


def test_a_closure_driven_step(standing: ServerProcess, name: str) -> None:
    """The server stops in the first evaluation, and the answer to it goes nowhere."""
    client, twin = _client(standing, name, "LBFGS", max_iter=3), list(parameters())
    _impatient(client)
    closure, stopped = _closure(client), False

    def stopping() -> Any:
        nonlocal stopped
        if not stopped:
            stopped = True
            standing.pause()
        return closure()

    try:
        error = _timed_out(lambda: client.optimizer.step(stopping))
    finally:
        standing.resume()
    assert error.applied is Applied.UNKNOWN
    client.optimizer._farstep.link._remote = Remote(standing.address, name=name, timeouts=Timeouts(30, 30, 30))
    client.optimizer.remote.pull()
    client.optimizer.step(closure)
    local = torch.optim.LBFGS(twin, lr=0.1, max_iter=3)
    other = Client(standing, name, twin, local)
    assert client.optimizer.remote.version == 1
    local.step(_closure(other))
    assert same_bits(client.params, twin)
    client.optimizer.remote.close()


def test_an_attach(standing: ServerProcess, name: str) -> None:
    standing.pause()
    try:
        error = _timed_out(
            lambda: optim.SGD(parameters(), lr=0.1, remote=Remote(standing.address, name=name, timeouts=TIMEOUTS))
        )
    finally:
        standing.resume()
    assert error.applied is Applied.NONE
    assert standing.address in str(error)
    client = _client(standing, name)
    take_steps(client.optimizer, client.params, range(2))
    assert same_bits(client.params, local_run(2, lr=0.1))
    client.optimizer.remote.close()


@pytest.mark.parametrize("reply", [1, 2], ids=["to the attach", "to the upload"])
def test_the_reply_that_gets_lost_as_the_network_goes(standing: ServerProcess, name: str, reply: int) -> None:
    with Proxy(standing.address, measure=True) as proxy:
        proxy.blackhole_at_reply(reply)
        error = _timed_out(
            lambda: optim.SGD(parameters(), lr=0.1, remote=Remote(proxy.address, name=name, timeouts=TIMEOUTS))
        )
        assert error.applied is Applied.NONE
    client = _client(standing, name)
    take_steps(client.optimizer, client.params, range(2))
    assert same_bits(client.params, local_run(2, lr=0.1))
    client.optimizer.remote.close()


def test_leaving(standing: ServerProcess, name: str) -> None:
    client = _client(standing, name, "AdamW")
    client.optimizer.remote.set(**Settings(clip_grad_norm=1.0).as_dict())
    standing.pause()
    try:
        begun = time.monotonic()
        client.optimizer.remote.close()
        assert time.monotonic() - begun < 2 + 1 + 1, "leaving takes two seconds at most"
    finally:
        standing.resume()
