"""Learning-rate schedules on the server: torch's own bits, one schedule for all workers, and what ends one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from farstep import Async, lr_scheduler
from farstep_wire.errors import ArgumentsError, ConfigurationError, MismatchError
from tests.data_parallel.crew import Worker, crew
from tests.steering.twins import hosted, model, same_bits, step
from tests.support.servers import ServerProcess, Servers

# Each is called with the module to take its classes from, torch's or farstep's, and an optimizer.
SCHEDULES: dict[str, Callable[[Any, Any], Any]] = {
    "StepLR": lambda kind, opt: kind.StepLR(opt, step_size=3, gamma=0.5),
    "MultiStepLR": lambda kind, opt: kind.MultiStepLR(opt, [2, 5], gamma=0.3),
    "ConstantLR": lambda kind, opt: kind.ConstantLR(opt, factor=0.25, total_iters=4),
    "LinearLR": lambda kind, opt: kind.LinearLR(opt, start_factor=0.1, total_iters=5),
    "ExponentialLR": lambda kind, opt: kind.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda kind, opt: kind.PolynomialLR(opt, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda kind, opt: kind.CosineAnnealingLR(opt, T_max=6, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda kind, opt: kind.CosineAnnealingWarmRestarts(opt, T_0=3, T_mult=2),
    "CyclicLR": lambda kind, opt: kind.CyclicLR(opt, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.99),
    "OneCycleLR": lambda kind, opt: kind.OneCycleLR(opt, max_lr=0.2, total_steps=20),
    "SequentialLR": lambda kind, opt: kind.SequentialLR(
        opt, [kind.LinearLR(opt, 0.1, total_iters=3), kind.MultiStepLR(opt, [2, 4])], milestones=[4]
    ),
    "ChainedScheduler": lambda kind, opt: kind.ChainedScheduler(
        [kind.ConstantLR(opt, factor=0.5, total_iters=3), kind.ExponentialLR(opt, 0.9)]
    ),
}


def test_every_schedule_is_tried() -> None:
    assert set(SCHEDULES) == set(lr_scheduler.__all__)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_bits_are_torchs(server: ServerProcess, name: str, kind: str) -> None:
    ours, torchs = model(), model()
    options = {"lr": 0.1, "momentum": 0.9}
    local = torch.optim.SGD(torchs.parameters(), **options)
    remote = hosted(ours, server, name, "SGD", options=options)
    torch_schedule, own = SCHEDULES[kind](torch.optim.lr_scheduler, local), SCHEDULES[kind](lr_scheduler, remote)
    assert isinstance(own, getattr(torch.optim.lr_scheduler, kind))
    for number in range(10):
        assert own.get_last_lr() == torch_schedule.get_last_lr() == [group["lr"] for group in remote.param_groups]
        step(torchs, local, number)
        step(ours, remote, number)
        torch_schedule.step()
        own.step()
    assert same_bits(ours, torchs)
    assert {k: v for k, v in remote.param_groups[0].items() if k != "params"} == {
        k: v for k, v in local.param_groups[0].items() if k != "params"
    }
    assert getattr(own, "last_epoch", None) == getattr(torch_schedule, "last_epoch", None)
    assert remote.remote.describe().schedules[-1].last_epoch == 10
    theirs = torch_schedule.state_dict()
    mine = own.state_dict()
    assert {key: mine[key] for key in mine if key != "_schedulers"} == {
        key: theirs[key] for key in mine if key != "_schedulers"
    }
    remote.remote.close()


def test_versions_per_step(server: ServerProcess, name: str) -> None:
    ours = model()
    remote = hosted(ours, server, name, options={"lr": 1.0})
    schedule: Any = lr_scheduler.ExponentialLR(remote, 0.5, every=3)  # type: ignore[attr-defined]
    rates = []
    for number in range(7):
        step(ours, remote, number)
        schedule.step()
        rates += schedule.get_last_lr()
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match="every must be an int of at least 1, not 0"):
        lr_scheduler.ExponentialLR(remote, 0.5, every=0)  # type: ignore[attr-defined]
    remote.remote.close()


@pytest.mark.parametrize("policy", [None, Async()], ids=["Sync", "Async"])
def test_one_schedule_for_all_workers(server: ServerProcess, name: str, policy: Any) -> None:
    with crew(
        server.address, name, 3, lambda: list(model().parameters()), options={"lr": 1.0}, policy=policy
    ) as workers:

        def declare(worker: Worker) -> Any:
            return lr_scheduler.ExponentialLR(worker.optimizer, 0.5)  # type: ignore[attr-defined]

        workers.together(declare)

        def take(worker: Worker) -> float:
            worker.give([torch.ones_like(parameter) for parameter in worker.params])
            worker.optimizer.step()
            return float(worker.optimizer.param_groups[0]["lr"])

        for _ in range(2):
            workers.together(take)
        # One after another, so that under Async each sees what the others have caused.
        final = [worker.do(lambda one: one.optimizer.remote.skip() or one.optimizer.param_groups[0]["lr"]) for worker in
                 workers.workers]  # fmt: skip
        commits = 2 if policy is None else 6
        assert {future.result(60) for future in final} == {0.5**commits}
        [info] = workers.workers[0].optimizer.remote.describe().schedules
        assert (info.scheduler, info.last_epoch, info.ended) == ("ExponentialLR", commits, None)


def test_workers_with_different_schedules(server: ServerProcess, name: str) -> None:
    with crew(server.address, name, 2, lambda: list(model().parameters()), options={"lr": 1.0}) as workers:
        first, second = (worker.optimizer for worker in workers.workers)
        lr_scheduler.StepLR(first, step_size=3)  # type: ignore[attr-defined]
        for other in (
            lambda: lr_scheduler.StepLR(second, step_size=4),  # type: ignore[attr-defined]
            lambda: lr_scheduler.ExponentialLR(second, 0.5),  # type: ignore[attr-defined]
            lambda: lr_scheduler.StepLR(second, step_size=3, every=2),  # type: ignore[attr-defined]
        ):
            with pytest.raises(MismatchError, match="schedule 0 on the server is StepLR with"):
                other()
        lr_scheduler.StepLR(second, step_size=3)  # type: ignore[attr-defined]

        def take(worker: Worker) -> None:
            worker.give([torch.ones_like(parameter) for parameter in worker.params])
            worker.optimizer.step()

        workers.together(take)
        assert workers.versions == {1}


def test_a_worker_that_joins_before_the_first_step_is_compared_with_what_was_created(
    server: ServerProcess, name: str
) -> None:
    first = hosted(model(), server, name, "SGD", policy=Async(), options={"lr": 0.1})
    lr_scheduler.LinearLR(first, 0.1)  # type: ignore[attr-defined]
    assert first.param_groups[0]["lr"] == pytest.approx(0.01)
    with pytest.raises(MismatchError, match=r"param_groups\[0\]\['lr'\] is 0\.1 on the server; worker 1 has 0\.2"):
        hosted(model(), server, name, "SGD", policy=Async(), worker=1, options={"lr": 0.2})
    second = hosted(model(), server, name, "SGD", policy=Async(), worker=1, options={"lr": 0.1})
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    second.remote.close()
    first.remote.close()


def test_an_edit_that_was_not_sent_yet_goes_before_the_schedule(server: ServerProcess, name: str) -> None:
    ours = model()
    remote = hosted(ours, server, name, options={"lr": 1.0})
    remote.param_groups[0]["lr"] = 0.4
    lr_scheduler.ExponentialLR(remote, 0.5)  # type: ignore[attr-defined]
    step(ours, remote, 0)
    assert remote.param_groups[0]["lr"] == 0.2
    assert remote.param_groups[0]["initial_lr"] == 0.4
    remote.remote.close()


def test_a_schedule_that_ends(server: ServerProcess, name: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = model()
    remote = hosted(ours, server, name, options={"lr": 0.1})
    schedule: Any = lr_scheduler.OneCycleLR(remote, max_lr=0.1, total_steps=3)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "farstep"):
        for number in range(5):
            step(ours, remote, number)
    assert caplog.text.count("OneCycleLR has ended, and the options stay as they are: ValueError") == 1
    assert remote.remote.version == 5
    [info] = remote.remote.describe().schedules
    assert "ValueError: Tried to step 4 times" in (info.ended or "")
    assert schedule.get_last_lr() == [remote.param_groups[0]["lr"]]
    remote.remote.close()


def test_state_goes_out_and_in(server: ServerProcess, name: str) -> None:
    ours = model()
    remote = hosted(ours, server, name, options={"lr": 0.1})
    schedule = SCHEDULES["SequentialLR"](lr_scheduler, remote)
    for number in range(6):
        step(ours, remote, number)
    state, rate = schedule.state_dict(), remote.param_groups[0]["lr"]
    for number in range(3):
        step(ours, remote, number)
    schedule.load_state_dict(state)
    assert schedule.last_epoch == state["last_epoch"] == 6
    for group in remote.param_groups:
        group["lr"] = rate
    step(ours, remote, 0)
    twin = model()
    local = torch.optim.SGD(twin.parameters(), lr=0.1)
    other = SCHEDULES["SequentialLR"](torch.optim.lr_scheduler, local)
    for _ in range(7):
        local.step()
        other.step()
    assert remote.param_groups[0]["lr"] == local.param_groups[0]["lr"]
    remote.remote.close()


@pytest.mark.parametrize("kind", ["SequentialLR", "OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts"])
def test_a_schedule_survives_a_restart(servers: Servers, name: str, tmp_path: Any, kind: str) -> None:
    server = servers("--data-dir", str(tmp_path))
    ours, torchs = model(), model()
    options = {"lr": 0.1, "momentum": 0.9}
    local = torch.optim.SGD(torchs.parameters(), **options)
    remote = hosted(ours, server, name, "SGD", options=options)
    torch_schedule, _ = SCHEDULES[kind](torch.optim.lr_scheduler, local), SCHEDULES[kind](lr_scheduler, remote)
    for number in range(10):
        step(torchs, local, number)
        torch_schedule.step()
        step(ours, remote, number)
        if number == 5:
            server.terminate()
            server.start()
    assert same_bits(ours, torchs)
    remote.remote.close()


def test_an_ephemeral_one_that_is_made_anew_gets_its_schedules_again(server: ServerProcess, name: str) -> None:
    ours = model()
    remote = hosted(ours, server, name, options={"lr": 1.0})
    lr_scheduler.ExponentialLR(remote, 0.5)  # type: ignore[attr-defined]
    step(ours, remote, 0)
    remote.remote.close()
    from farstep import inspection
    from farstep_wire.address import parse_address
    from farstep_wire.v1 import inspection_pb2

    with inspection.connect(parse_address(server.address), 20) as view:
        view._inspection.Remove(inspection_pb2.RemoveRequest(name=name), timeout=20)
    step(ours, remote, 1)
    [info] = remote.remote.describe().schedules
    assert (info.scheduler, info.last_epoch) == ("ExponentialLR", 1)
    assert remote.param_groups[0]["lr"] == 0.25
    remote.remote.close()


def test_what_cannot_be_a_schedule(server: ServerProcess, name: str) -> None:
    remote = hosted(model(), server, name, options={"lr": 0.1})
    local = torch.optim.SGD(model().parameters(), lr=0.1)
    kinds: Any = lr_scheduler
    with pytest.raises(ConfigurationError, match=r"for SGD use torch\.optim\.lr_scheduler\.StepLR"):
        kinds.StepLR(local, 3)
    with pytest.raises(ConfigurationError, match=r"StepLR of torch\.optim\.lr_scheduler is none"):
        kinds.ChainedScheduler([torch.optim.lr_scheduler.StepLR(local, 3)])
    with pytest.raises(TypeError, match="missing a required argument: 'step_size'"):
        kinds.StepLR(remote)
    with pytest.raises(ArgumentsError, match=r"OneCycleLR could not be built on the server: .*total_steps"):
        kinds.OneCycleLR(remote, max_lr=0.1)
    with pytest.raises(ConfigurationError, match=r"CyclicLR: .*scale_fn"):
        kinds.CyclicLR(remote, 0.1, 0.2, scale_fn=lambda x: x)
    assert "initial_lr" not in remote.remote.describe().groups[0], "a schedule that failed has left nothing"
    assert remote.remote.describe().schedules == ()
    remote.remote.close()
