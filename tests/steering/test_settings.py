"""What the server does around each step: clipping, the non-finite guard, the moving average; at creation and live."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from farstep import Remote, Settings, Sync
from farstep_wire.errors import (
    Applied,
    ConfigurationError,
    InvalidRequestError,
    MismatchError,
    NonFiniteError,
    NotFoundError,
)
from tests.data_parallel.crew import Worker, crew
from tests.steering.twins import hosted, loss_of, model, same_bits, step
from tests.support.servers import ServerProcess, Servers

CLIPPINGS: list[tuple[Settings, Any]] = [
    (Settings(clip_grad_norm=0.5), lambda p: clip_grad_norm_(p, 0.5)),
    (Settings(clip_grad_norm=0.3, norm_type=math.inf), lambda p: clip_grad_norm_(p, 0.3, math.inf)),
    (Settings(clip_grad_norm=2.0, norm_type=1), lambda p: clip_grad_norm_(p, 2.0, 1)),
    (Settings(clip_grad_value=0.01), lambda p: clip_grad_value_(p, 0.01)),
    (
        Settings(clip_grad_norm=0.5, clip_grad_value=0.1),
        lambda p: (clip_grad_norm_(p, 0.5), clip_grad_value_(p, 0.1)),
    ),
]


@pytest.mark.parametrize(("settings", "clip"), CLIPPINGS, ids=lambda value: str(value) if value is Settings else None)
@pytest.mark.parametrize("live", [False, True], ids=["at creation", "live"])
def test_clipping_is_torchs(server: ServerProcess, name: str, settings: Settings, clip: Any, live: bool) -> None:
    ours, torchs = model(), model()
    local = torch.optim.SGD(torchs.parameters(), lr=0.05, momentum=0.9)
    remote = hosted(
        ours, server, name, "SGD", settings=None if live else settings, options={"lr": 0.05, "momentum": 0.9}
    )
    if live:
        changes = {key: value for key, value in settings.as_dict().items() if value != Settings().as_dict()[key]}
        assert remote.remote.set(**changes) == settings
    assert remote.remote.settings == settings
    for number in range(5):
        step(torchs, local, number, lambda: clip(list(torchs.parameters())))
        step(ours, remote, number)
        assert same_bits(ours, torchs)
    unclipped = model()
    other = torch.optim.SGD(unclipped.parameters(), lr=0.05, momentum=0.9)
    for number in range(5):
        step(unclipped, other, number)
    assert not same_bits(unclipped, torchs), "the clipping had nothing to do"
    remote.remote.close()


def test_it_is_the_mean_that_is_clipped(server: ServerProcess, name: str) -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([-3.0, 8.0])]
    with crew(server.address, name, 2, lambda: [torch.nn.Parameter(torch.zeros(2))], options={"lr": 1.0}) as workers:
        workers.workers[0].optimizer.remote.set(clip_grad_norm=1.0)

        def take(worker: Worker) -> None:
            worker.give([gradients[worker.number].clone()])
            worker.optimizer.step()

        workers.together(take)
        expected = torch.nn.Parameter(torch.zeros(2))
        expected.grad = (gradients[0] + gradients[1]) / 2
        clip_grad_norm_([expected], 1.0)
        assert expected.grad is not None
        for worker in workers.workers:
            assert torch.equal(worker.params[0], -expected.grad)


def test_clipping_in_a_closure_driven_step(server: ServerProcess, name: str) -> None:
    ours, torchs = model(), model()
    options = {"lr": 0.1, "max_iter": 4}
    local = torch.optim.LBFGS(torchs.parameters(), **options)  # type: ignore[arg-type]
    remote = hosted(ours, server, name, "LBFGS", settings=Settings(clip_grad_norm=0.5), options=options)

    def closure(module: torch.nn.Module, optimizer: Any, *, clip: bool) -> Any:
        def evaluate() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(module, 0)
            loss.backward()
            if clip:
                clip_grad_norm_(module.parameters(), 0.5)
            return loss

        return evaluate

    for _ in range(3):
        local.step(closure(torchs, local, clip=True))
        remote.step(closure(ours, remote, clip=False))
        assert same_bits(ours, torchs)
    remote.remote.close()


# The non-finite guard.


def _spoil(params: list[Any], bad: float) -> None:
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    params[2].grad[0, 1] = bad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_guard_raises_and_names_whom_to_blame(server: ServerProcess, name: str, bad: float) -> None:
    ours, before = model(), model()
    remote = hosted(ours, server, name, settings=Settings(non_finite="raise"))
    params = list(ours.parameters())
    _spoil(params, bad)
    with pytest.raises(NonFiniteError, match=r"worker 0: '0\.2'") as raised:
        remote.step()
    assert isinstance(raised.value, ArithmeticError)
    assert raised.value.applied is Applied.NO
    assert same_bits(ours, before)
    [record] = remote.remote.history()
    assert (record.outcome, record.version) == ("refused", 0)
    step(ours, remote, 0)
    assert remote.remote.version == 1
    remote.remote.close()


def test_the_guard_skips_and_says_so(server: ServerProcess, name: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, torchs = model(), model()
    local = torch.optim.AdamW(torchs.parameters(), lr=0.05)
    remote = hosted(ours, server, name, settings=Settings(non_finite="skip"))
    with caplog.at_level(logging.WARNING, "farstep"):
        for number in range(4):
            if number == 2:
                _spoil(list(ours.parameters()), math.nan)
                remote.step()
            else:
                step(ours, remote, number)
                step(torchs, local, number)
    assert same_bits(ours, torchs)
    assert remote.remote.version == 3
    assert [record.outcome for record in remote.remote.history()] == ["committed", "committed", "skipped", "committed"]
    assert "worker 0: '0.2'" in remote.remote.history()[2].reason
    assert "worker 0: '0.2'" in caplog.text
    remote.remote.close()


def test_torchs_way_is_the_default(server: ServerProcess, name: str) -> None:
    ours = model()
    remote = hosted(ours, server, name)
    _spoil(list(ours.parameters()), math.nan)
    remote.step()
    assert remote.remote.version == 1
    assert math.isnan(list(ours.parameters())[2][0, 1].item())
    remote.remote.close()


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_all_workers_are_told_whom_to_blame(server: ServerProcess, name: str, mode: str) -> None:
    with crew(server.address, name, 3, lambda: list(model().parameters()), options={"lr": 1.0}) as workers:
        workers.workers[0].optimizer.remote.set(non_finite=mode)

        def take(worker: Worker) -> Any:
            worker.give([torch.ones_like(parameter) for parameter in worker.params])
            if worker.number == 1:
                _spoil(worker.params, math.inf)
            return worker.optimizer.step()

        if mode == "raise":
            for error in workers.failures(take, take, take):
                assert isinstance(error, NonFiniteError)
                assert "To blame: worker 1: '0.2'" in str(error)
                assert "worker 0" not in str(error)
        else:
            workers.together(take)
        assert workers.versions == {0}
        assert "To blame: worker 1: '0.2'" in workers.workers[0].optimizer.remote.history()[0].reason


def test_a_mean_that_overflows_is_blamed_on_the_sum(server: ServerProcess, name: str) -> None:
    with crew(server.address, name, 2, lambda: [torch.nn.Parameter(torch.zeros(2))], options={"lr": 1.0}) as workers:
        workers.workers[0].optimizer.remote.set(non_finite="raise")

        def take(worker: Worker) -> Any:
            worker.give([torch.full((2,), 3e38)])
            return worker.optimizer.step()

        for error in workers.failures(take, take):
            assert "the sum over the workers overflows: '0.0'" in str(error)


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_the_guard_of_a_closure_driven_step(server: ServerProcess, name: str, mode: Any) -> None:
    ours, before = model(), model()
    remote = hosted(ours, server, name, "LBFGS", settings=Settings(non_finite=mode), options={"lr": 0.1})

    def closure() -> torch.Tensor:
        _spoil(list(ours.parameters()), math.nan)
        return torch.tensor(1.0)

    if mode == "raise":
        with pytest.raises(NonFiniteError, match=r"worker 0: '0\.2'"):
            remote.step(closure)
    else:
        remote.step(closure)
    assert same_bits(ours, before)
    [record] = remote.remote.history()
    assert record.outcome == ("rolled_back" if mode == "raise" else "skipped")
    assert record.evaluations == 1
    remote.remote.close()


# The moving average.


@pytest.mark.parametrize("live", [False, True], ids=["at creation", "live"])
def test_the_average_is_torchs(server: ServerProcess, name: str, live: bool) -> None:
    ours, torchs = model(), model()
    local = torch.optim.AdamW(torchs.parameters(), lr=0.05)
    remote = hosted(ours, server, name, settings=None if live else Settings(ema_decay=0.8))
    if live:
        step(torchs, local, 100)
        step(ours, remote, 100)
        remote.remote.set(ema_decay=0.8)
    average = AveragedModel(torchs, multi_avg_fn=get_ema_multi_avg_fn(0.8))  # type: ignore[no-untyped-call]
    for number in range(6):
        step(torchs, local, number)
        average.update_parameters(torchs)
        step(ours, remote, number)
    version = remote.remote.version
    assert remote.remote.pull(average="ema") == version
    assert same_bits(ours, average.module)
    assert not same_bits(ours, torchs)
    with pytest.raises(ConfigurationError, match=r"opt\.remote\.pull\(\)"):
        remote.step()
    assert remote.remote.pull() == version
    assert same_bits(ours, torchs)
    step(torchs, local, 50)
    step(ours, remote, 50)
    assert same_bits(ours, torchs), "the average was taken for an edit"
    assert remote.remote.describe().averaged == 7
    remote.remote.close()


def test_no_average_is_told_so(server: ServerProcess, name: str) -> None:
    ours = model()
    remote = hosted(ours, server, name)
    with pytest.raises(NotFoundError, match="set ema_decay"):
        remote.remote.pull(average="ema")
    remote.remote.set(ema_decay=0.5)
    with pytest.raises(NotFoundError, match="begins with the next step"):
        remote.remote.pull(average="ema")
    with pytest.raises(InvalidRequestError, match="no average 'swa'; there is 'ema'"):
        remote.remote.pull(average="swa")
    step(ours, remote, 0)
    remote.remote.pull(average="ema")
    remote.remote.close()


def test_a_group_that_is_added_joins_the_average(server: ServerProcess, name: str) -> None:
    ours = model()
    remote = hosted(ours, server, name, settings=Settings(ema_decay=0.5))
    step(ours, remote, 0)
    extra = torch.nn.Parameter(torch.ones(3))
    remote.add_param_group({"params": [extra]})
    step(ours, remote, 1)
    trained = extra.detach().clone()
    remote.remote.pull(average="ema")
    assert torch.equal(extra, trained), "it has had no gradient"
    remote.remote.close()


def test_settings_average_and_all_survive_a_restart(servers: Servers, name: str, tmp_path: Any) -> None:
    server = servers("--data-dir", str(tmp_path))
    ours = model()
    settings = Settings(clip_grad_norm=0.5, non_finite="skip", ema_decay=0.9)
    remote = hosted(ours, server, name, settings=settings)
    for number in range(3):
        step(ours, remote, number)
    remote.remote.pull(average="ema")
    average = [parameter.detach().clone() for parameter in ours.parameters()]
    server.terminate()
    server.start()
    remote.remote.pull(average="ema")
    assert all(torch.equal(own, kept) for own, kept in zip(ours.parameters(), average, strict=True))
    assert remote.remote.settings == settings
    assert remote.remote.describe().averaged == 3
    remote.remote.close()


# Bad input.


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be None or a positive number, not -1.0"),
        ({"clip_grad_norm": "1"}, "clip_grad_norm must be None or a positive number, not '1'"),
        ({"clip_grad_value": math.nan}, "clip_grad_value must be None or a positive number, not nan"),
        ({"clip_grad_value": math.inf}, "clip_grad_value must be None or a positive number, not inf"),
        ({"norm_type": 0}, "norm_type must be a positive number or inf, not 0"),
        ({"non_finite": "ignore"}, "non_finite must be one of allow, raise, skip, not 'ignore'"),
        ({"ema_decay": 1.5}, "ema_decay must be None or between 0 and 1, not 1.5"),
    ],
    ids=str,
)
def test_bad_settings(server: ServerProcess, name: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        Settings(**changes)
    remote = hosted(model(), server, name)
    with pytest.raises(InvalidRequestError, match=text):
        remote.remote.set(**changes)
    assert remote.remote.settings == Settings()
    remote.remote.close()


def test_settings_that_there_are_not(server: ServerProcess, name: str) -> None:
    remote = hosted(model(), server, name)
    with pytest.raises(InvalidRequestError, match="no setting 'clip'; there are clip_grad_norm"):
        remote.remote.set(clip=1.0)
    with pytest.raises(ConfigurationError, match=r"settings must be farstep\.Settings"):
        Remote(settings={"clip_grad_norm": 1.0})  # type: ignore[arg-type]
    remote.remote.close()


def test_workers_that_disagree_on_settings(server: ServerProcess, name: str) -> None:
    first = hosted(model(), server, name, policy=Sync(1), settings=Settings(clip_grad_norm=1.0))
    with pytest.raises(MismatchError, match=r"settings\.clip_grad_norm is 1\.0 on the server; worker 7 has 2\.0"):
        hosted(model(), server, name, policy=Sync(1), worker=7, settings=Settings(clip_grad_norm=2.0))
    silent = hosted(model(), server, name, policy=Sync(1), worker=8)
    assert silent.remote.settings.clip_grad_norm == 1.0
    silent.remote.close()
    first.remote.close()
