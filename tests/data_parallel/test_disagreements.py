"""Workers that disagree: all are told in what, nothing is applied, and the next round is as if nothing had been."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep import Remote, Sync, Timeouts, optim
from farstep_wire.errors import Applied, LayoutMismatchError, MismatchError
from tests.data_parallel import problems
from tests.data_parallel.crew import Crew, Worker, crew, mean
from tests.parity import twins
from tests.support.servers import ServerProcess

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99)}
Act = Callable[[Worker], Any]


def _step(number: int, **how: Any) -> Act:
    def act(worker: Worker) -> Any:
        worker.give(problems.dense(worker.params, number, worker.number))
        return worker.optimizer.step(**how)

    return act


class Training:
    """Two workers and the one process that they must equal."""

    def __init__(self, own: Crew) -> None:
        self.own = own
        self.local_params = problems.parameters()
        self.local = torch.optim.AdamW(self.local_params, lr=0.1, betas=(0.9, 0.99))
        self.version = 0

    def step(self) -> None:
        """Have all step together, and compare."""
        self.own.together(_step(self.version))
        gradients = [problems.dense(self.local_params, self.version, worker) for worker in range(len(self.own))]
        for parameter, gradient in zip(self.local_params, mean(gradients), strict=True):
            parameter.grad = gradient
        self.local.step()
        self.version += 1
        self.compare()

    def compare(self) -> None:
        """All are where the one process is."""
        assert self.own.versions == {self.version}
        for worker in self.own.workers:
            twins.assert_same_parameters(worker.params, self.local_params, f"worker {worker.number}")
            twins.assert_same_state(worker.optimizer, self.local, f"worker {worker.number}")

    def refused(self, *acts: Act, texts: tuple[str, ...]) -> None:
        """Each worker's act is refused with an error that says all of the texts, and leaves everything as it was."""
        for worker, error in enumerate(self.own.failures(*acts)):
            assert isinstance(error, MismatchError), f"worker {worker}: {error!r}"
            assert error.applied is Applied.NO
            missing = [text for text in texts if text not in str(error)]
            assert not missing, f"worker {worker} is not told {missing}: {error}"


@pytest.fixture
def training(server: ServerProcess, name: str) -> Any:
    with crew(server.address, name, 2, problems.parameters, "AdamW", OPTIONS) as own:
        yield Training(own)


def _edited(number: int, key: str, value: Any) -> Act:
    def act(worker: Worker) -> Any:
        worker.optimizer.param_groups[0][key] = value
        return _step(number)(worker)

    return act


def _abstaining(key: str, value: Any) -> Act:
    def act(worker: Worker) -> Any:
        worker.optimizer.param_groups[0][key] = value
        return worker.optimizer.remote.skip()

    return act


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("lr", 0.1, 0.25),
        ("lr", 0.1, torch.tensor(0.25)),
        ("betas", (0.9, 0.99), (0.8, 0.99)),
        ("maximize", False, True),
        ("lr_scale", "no such option", 0.5),
    ],
    ids=["lr", "tensor lr", "betas", "maximize", "only one has it"],
)
@pytest.mark.parametrize("abstains", [False, True], ids=["contributes", "abstains"])
def test_an_option_that_one_worker_changes(training: Training, key: str, old: Any, new: Any, abstains: bool) -> None:
    training.step()
    differing = _abstaining(key, new) if abstains else _edited(1, key, new)
    texts = (f"param_groups[0][{key!r}]", "worker 0", str(old), "worker 1", "0.25" if key == "lr" else str(new))
    training.refused(_step(1), differing, texts=texts)
    changed = training.own.workers[1].optimizer.param_groups[0]
    if old == "no such option":
        del changed[key]
    else:
        changed[key] = old
    training.step()
    # All agree on the change now.
    for optimizer in (training.local, *(worker.optimizer for worker in training.own.workers)):
        optimizer.param_groups[0][key] = copy.deepcopy(new)
    training.step()


def test_a_schedule_that_one_worker_is_ahead_in(training: Training) -> None:
    training.step()
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for optimizer in (*(worker.optimizer for worker in training.own.workers), training.local)
    ]
    schedules[0].optimizer._opt_called = True  # type: ignore[attr-defined]
    schedules[0].step()
    training.refused(_step(1), _step(1), texts=("param_groups[0]['lr']", "worker 0 has 0.05", "worker 1 has 0.1"))
    for schedule in schedules[1:]:
        schedule.optimizer._opt_called = True  # type: ignore[attr-defined]
        schedule.step()
    training.step()


def test_num_samples_that_one_worker_gives(training: Training) -> None:
    training.step()
    texts = ("num_samples", "worker 0 gives 32", "worker 1 gives none")
    training.refused(_step(1, num_samples=32), _step(1), texts=texts)
    training.step()


def test_num_samples_that_one_worker_gives_to_a_step_that_drives_the_closure(server: ServerProcess, name: str) -> None:
    def act(worker: Worker, *given: float | None) -> Any:
        return worker.optimizer.step(
            lambda: problems.evaluated(worker.params, worker.number), num_samples=given[worker.number]
        )

    with crew(server.address, name, 2, problems.parameters, "LBFGS", {"lr": 0.1}) as own:
        training = Training(own)
        texts = ("num_samples", "worker 0 gives none", "worker 1 gives 32")
        training.refused(*[lambda worker: act(worker, None, 32)] * 2, texts=texts)
        assert own.versions == {0}
        own.together(act, 16, 32)
        assert own.versions == {1}


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_num_samples_that_are_none_are_refused_before_anything_happens(training: Training, value: float) -> None:
    training.step()
    future = training.own.workers[0].do(_step(1, num_samples=value))
    with pytest.raises(ValueError, match=f"num_samples must be positive and finite, not {value}"):
        future.result()
    training.step()


def test_load_state_dict_on_one_worker_while_the_other_steps(training: Training) -> None:
    training.step()
    loaded = copy.deepcopy(training.local.state_dict())
    loaded["param_groups"][0]["lr"] = 0.5
    training.step()
    texts = ("worker 0", "load_state_dict", "worker 1", "step")
    training.refused(lambda worker: worker.optimizer.load_state_dict(loaded), _step(2), texts=texts)
    assert [worker.optimizer.param_groups[0]["lr"] for worker in training.own.workers] == [0.1, 0.1]
    training.step()


def test_add_param_group_on_one_worker_while_the_other_abstains(training: Training) -> None:
    training.step()
    group = {"params": [torch.nn.Parameter(torch.zeros(2))]}
    texts = ("worker 0", "add_param_group", "worker 1", "step")
    training.refused(
        lambda worker: worker.optimizer.add_param_group(group),
        lambda worker: worker.optimizer.remote.skip(),
        texts=texts,
    )
    training.step()


def _loading(**changes: Any) -> Act:
    """Load the state of this version again, with another learning rate or with other averages."""

    def act(worker: Worker) -> Any:
        loaded = copy.deepcopy(worker.optimizer.state_dict())
        loaded["param_groups"][0]["lr"] = changes.get("lr", 0.1)
        loaded["state"][1]["exp_avg"] += changes.get("shift", 0.0)
        del loaded["farstep"]
        worker.optimizer.load_state_dict(loaded)

    return act


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"lr": 0.5}, ("param_groups[0]['lr']", "worker 0 has 0.1", "worker 1 has 0.5")),
        ({"shift": 1.0}, ("state[1]['exp_avg']", "worker 0 has a torch.float32 tensor", "worker 1 has")),
    ],
    ids=["option", "state"],
)
def test_workers_that_load_different_states(
    training: Training, changes: dict[str, Any], texts: tuple[str, ...]
) -> None:
    training.step()
    training.refused(_loading(), _loading(**changes), texts=("load_state_dict", *texts))
    training.step()
    training.own.together(_loading())
    training.step()


def test_workers_that_load_one_state_with_nan(training: Training) -> None:
    training.step()
    training.own.together(_loading(shift=float("nan")))
    assert {worker.optimizer.remote.incarnation for worker in training.own.workers} == {2}


def test_groups_that_are_added_with_different_options(training: Training) -> None:
    training.step()

    def adding(lr: float) -> Act:
        added = {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr}
        return lambda worker: worker.optimizer.add_param_group(added)

    texts = ("add_param_group", "param_groups[1]['lr']", "worker 0 has 0.1", "worker 1 has 0.2")
    training.refused(adding(0.1), adding(0.2), texts=texts)
    assert [len(worker.optimizer.param_groups) for worker in training.own.workers] == [1, 1]
    training.step()


# Joining.


def _build(address: str, name: str, worker: int, params: list[Tensor], cls: str = "SGD", **options: Any) -> Any:
    remote = Remote(address, name=name, worker=worker, policy=Sync(2), timeouts=Timeouts(connect=20, step=20))
    return getattr(optim, cls)(params, remote=remote, **options)


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ({"lr": 0.25}, ("param_groups[0]['lr'] is 0.1", "worker 1 has 0.25")),
        ({"lr": 0.1, "momentum": 0.5}, ("param_groups[0]['momentum'] is 0", "worker 1 has 0.5")),
        ({"cls": "Adam", "lr": 0.1}, ("hosts SGD", "worker 1 has Adam")),
        (
            {"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.1},
            ("'0.0'", "float32[9, 6]", "float32[3]", "worker 1"),
        ),
    ],
    ids=["lr", "momentum", "class", "layout"],
)
@pytest.mark.parametrize("waits", [True, False], ids=["a worker waits", "a worker comes later"])
def test_who_joins_with_something_else_is_refused_and_so_is_who_waits_for_it(
    server: ServerProcess, name: str, how: dict[str, Any], texts: tuple[str, ...], waits: bool
) -> None:
    first, second = (Worker(number, problems.parameters()) for number in range(2))
    first.optimizer = _build(server.address, name, 0, first.params, lr=0.1)
    with first.pool, second.pool:
        pending = first.do(_step(0)) if waits else None
        if pending is not None:
            _await_waiting(first)
        with pytest.raises((MismatchError, LayoutMismatchError)) as joined:
            _build(server.address, name, 1, **{"params": problems.parameters(), **how})
        with pytest.raises((MismatchError, LayoutMismatchError)) as stepped:
            (pending or first.do(_step(0))).result(30)
        assert stepped.value.applied is Applied.NO
        for error in (str(joined.value), str(stepped.value)):
            assert [text for text in texts if text not in error] == [], error
        # Each refusal is told once; now the round waits for whoever fits.
        again = first.do(_step(0))
        _await_waiting(first)
        assert [row.id for row in first.optimizer.remote.describe().workers] == ["0"], "who was refused is no member"
        second.optimizer = _build(server.address, name, 1, second.params, lr=0.1)
        second.do(_step(0)).result(30)
        again.result(30)
        local = problems.parameters()
        for parameter, gradient in zip(local, mean([problems.dense(local, 0, w) for w in (0, 1)]), strict=True):
            parameter.grad = gradient
        torch.optim.SGD(local, lr=0.1).step()
        for worker in (first, second):
            twins.assert_same_parameters(worker.params, local, f"worker {worker.number}")
            assert worker.optimizer.remote.version == 1
            worker.optimizer.remote.close()


def _await_waiting(worker: Worker) -> None:
    deadline = time.monotonic() + 20
    while worker.optimizer.remote.describe().workers[0].standing != "waiting":
        assert time.monotonic() < deadline, "the contribution does not wait in the round"
        time.sleep(0.01)
