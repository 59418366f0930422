"""Round trips that workers measure, as ``farstep workers`` shows them; and history and settings of a real server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch
from torch.nn import Parameter

from farstep import Remote, optim
from farstep.cli import main
from farstep.transports import grpc as transport
from tests.support.servers import ServerProcess

DEADLINE_SECONDS = 60.0


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
    return found


@pytest.fixture
def ask(server: ServerProcess, name: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(verb: str, *words: str) -> str:
        assert main(["--server", server.address, verb, name, *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def optimizer(server: ServerProcess, name: str) -> Any:
    parameter = Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    found = optim.SGD([parameter], lr=0.1, remote=Remote(address=server.address, name=name, worker="w7"))  # type: ignore[operator]
    yield found
    found.remote.close()


def test_a_worker_reports_its_round_trip(ask, optimizer) -> None:
    def measured() -> float | None:
        (worker,) = json.loads(ask("workers", "--json"))["workers"]
        assert worker["id"] == "w7"
        return worker["round_trip_seconds"]

    # It does so though it never steps, and though its first heartbeat is due much later.
    assert 0 < until(measured) < DEADLINE_SECONDS
    optimizer.step()
    (line,) = [line for line in ask("workers").splitlines() if line.startswith("w7")]
    assert line.split()[:4] == ["w7", "computing", "1", "1"]
    assert line.rstrip().endswith("ms")


def test_history_of_a_real_server(ask, optimizer) -> None:
    for _ in range(3):
        optimizer.step()
    rounds = [json.loads(line) for line in ask("history", "--json").splitlines()]
    assert [(each["number"], each["version"], each["outcome"]) for each in rounds] == [
        (number, number, "committed") for number in (1, 2, 3)
    ]
    assert [part["worker"] for each in rounds for part in each["parts"]] == ["w7"] * 3
    later = ask("history", "--after", "2").splitlines()
    assert [line.split()[:4] for line in later[1:]] == [["3", "3", "step", "committed"]]


def test_set_steers_a_real_server(ask, optimizer) -> None:
    shown = json.loads(ask("set", "clip_grad_norm=0.5", "ema_decay=0.9", "--json"))
    assert shown["settings"]["clip_grad_norm"] == 0.5
    optimizer.step()
    (parameter,) = optimizer.param_groups[0]["params"]
    norm = torch.linalg.vector_norm(torch.ones(3) - parameter.detach()).item() / 0.1
    assert norm == pytest.approx(0.5, rel=1e-4)
    out = ask("show")
    assert "settings: clip_grad_norm=0.5, ema_decay=0.9" in out
    assert "exponential moving average over 1 step\n" in out
    ask("set", "clip_grad_norm=none", "ema_decay=none")
    assert "settings" not in ask("show")


class Ticking:
    """A round trip's ticks against a server that answers as told."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.round_trip = transport._RoundTrip(self.channel)
        self.round_trip.begin(1.0)
        self.now = time.monotonic()

    def __call__(self) -> bool:
        """Tick when the next measurement is due."""
        self.now += 2.0
        return self.round_trip.tick(self.now)

    def close(self) -> None:
        self.round_trip.close()
        self.channel.close()


def test_calls_to_a_server_that_hangs_do_not_pile_up(fake) -> None:
    fake.answers["GetServer"] = fake.hang
    tick = Ticking(fake.address)
    assert not tick()
    until(lambda: fake.requests("GetServer"))
    assert not any(tick() for _ in range(50))
    assert len(fake.requests("GetServer")) == 1
    tick.close()


def test_a_call_that_hangs_ends_by_its_deadline_and_the_next_one_tells(fake, monkeypatch) -> None:
    monkeypatch.setattr(transport, "_ROUND_TRIP_DEADLINE_SECONDS", 0.2)
    answer, fake.answers["GetServer"] = fake.answers["GetServer"], fake.hang
    tick = Ticking(fake.address)
    tick()
    until(lambda: fake.requests("GetServer"))
    until(lambda: tick.round_trip._call is None)
    assert tick.round_trip.seconds == 0.0
    fake.answers["GetServer"] = answer
    monkeypatch.setattr(transport, "_ROUND_TRIP_DEADLINE_SECONDS", DEADLINE_SECONDS)
    assert until(tick)
    assert tick.round_trip.seconds > 0.0
    tick.close()


def test_closing_cancels_the_call(fake) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    def hang(_: Any, context: grpc.ServicerContext) -> None:
        context.add_callback(cancelled.set)
        entered.set()
        fake.hang()

    fake.answers["GetServer"] = hang
    tick = Ticking(fake.address)
    tick()
    assert entered.wait(DEADLINE_SECONDS)
    tick.round_trip.close()
    assert cancelled.wait(DEADLINE_SECONDS)
    tick.channel.close()
    later = Ticking(fake.address)
    later.channel.close()
    assert not later()  # a channel that is closed is no error
