"""Sync with N workers holds, bit for bit, what one process holds that averages the same N gradients in worker order."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data_parallel import problems
from tests.data_parallel.crew import Crew, Gradients, Worker, crew, mean
from tests.parity import twins
from tests.support.servers import ServerProcess

COUNTS = [1, 2, 3, 8]
Rule = Callable[[list[Tensor], int, int], Gradients]


class Local:
    """The one process: torch's own class on the mean of all workers' gradients."""

    def __init__(self, cls: str, params: list[Tensor]) -> None:
        self.params = params
        self.optimizer = problems.local_class(cls)(params, **problems.OPTIONS.get(cls, {}))

    def step(self, gradients: Sequence[Gradients], weights: Sequence[float] | None = None) -> None:
        for parameter, gradient in zip(self.params, mean(gradients, weights), strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def equals(self, own: Crew, where: str) -> None:
        for worker in own.workers:
            twins.assert_same_parameters(worker.params, self.params, f"{where}, worker {worker.number}")


def _pair(server: ServerProcess, name: str, cls: str, count: int, **how: Any) -> tuple[Local, Any]:
    def make() -> list[Tensor]:
        return problems.parameters(cls, **how)

    options = copy.deepcopy(problems.OPTIONS.get(cls, {}))
    return Local(cls, make()), crew(server.address, name, count, make, cls, options)


def _contribution(rule: Rule, step: int, weights: Sequence[float] | None = None) -> Callable[[Worker], None]:
    def act(worker: Worker) -> None:
        worker.give(rule(worker.params, step, worker.number))
        worker.optimizer.step(num_samples=None if weights is None else weights[worker.number])

    return act


def _shuffled(count: int, seed: int) -> Callable[[], list[int]]:
    shuffle = random.Random(seed)
    return lambda: shuffle.sample(range(count), count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("cls", [name for name in problems.classes() if name not in problems.DRIVEN])
def test_every_class(server: ServerProcess, name: str, cls: str, count: int) -> None:
    rule = problems.sparse if cls in problems.SPARSE_ONLY else problems.dense
    order = _shuffled(count, seed=count)
    local, workers = _pair(server, name, cls, count)
    with workers as own:
        for step in range(3):
            arrival = order()
            own.arrive(arrival, _contribution(rule, step))
            local.step([rule(local.params, step, worker) for worker in range(count)])
            local.equals(own, f"step {step}, arrival {arrival}")
        for optimizer in (local.optimizer, *(worker.optimizer for worker in own.workers)):
            optimizer.param_groups[0]["lr"] *= 0.5
        for step in range(3, 6):
            # All at once: whoever comes first.
            own.together(_contribution(rule, step))
            local.step([rule(local.params, step, worker) for worker in range(count)])
            local.equals(own, f"step {step}")
        assert own.versions == {6}
        for worker in own.workers:
            twins.assert_same_state(worker.optimizer, local.optimizer, f"worker {worker.number}")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("rule", "cls", "count"),
    [
        (problems.dense, "AdamW", 3),
        (problems.gaps, "Adam", 3),
        (problems.gaps, "SGD", 2),
        (problems.sparse, "SparseAdam", 3),
        (problems.sparse, "Adagrad", 2),
        (problems.mixed, "Adagrad", 4),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradients_of_every_kind(
    server: ServerProcess, name: str, rule: Rule, cls: str, count: int, weighted: bool
) -> None:
    local, workers = _pair(server, name, cls, count, tables=rule in {problems.sparse, problems.mixed})
    order = _shuffled(count, seed=1)
    weigh = random.Random(2)
    with workers as own:
        for step in range(6):
            weights = [weigh.choice([0.5, 1.0, 3.0, 17.0, 1e-3]) for _ in range(count)] if weighted else None
            arrival = order()
            own.arrive(arrival, _contribution(rule, step, weights))
            local.step([rule(local.params, step, worker) for worker in range(count)], weights)
            local.equals(own, f"step {step}, arrival {arrival}, weights {weights}")
        assert own.versions == {6}
        for worker in own.workers:
            twins.assert_same_state(worker.optimizer, local.optimizer, f"worker {worker.number}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes(server: ServerProcess, name: str, dtype: torch.dtype) -> None:
    local, workers = _pair(server, name, "SGD", 3, dtype=dtype)
    with workers as own:
        for step in range(6):
            weights = None if step % 2 else [1.5, 0.25, 3.0]
            own.together(_contribution(problems.dense, step, weights))
            local.step([problems.dense(local.params, step, worker) for worker in range(3)], weights)
            local.equals(own, f"step {step}")


def test_the_order_of_the_sum_shows_in_the_bits() -> None:
    """Else the tests above would prove nothing about it."""
    params = problems.parameters()
    parts = [problems.dense(params, 0, worker) for worker in range(8)]
    for left, right in zip(mean(parts), mean(parts[::-1]), strict=True):
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left, right)
    assert not all(map(torch.equal, mean(parts), mean(parts[::-1])))  # type: ignore[arg-type]


def test_workers_that_abstain_count_for_nothing(server: ServerProcess, name: str) -> None:
    local, workers = _pair(server, name, "AdamW", 3)
    absent = [{2}, {0}, {0, 1}, {0, 1, 2}, set(), {1}]
    order = _shuffled(3, seed=3)
    with workers as own:
        for step, skipping in enumerate(absent):

            def act(worker: Worker, step: int = step, skipping: set[int] = skipping) -> Any:
                if worker.number in skipping:
                    return worker.optimizer.remote.skip()
                return _contribution(problems.dense, step, [2.0, 1.0, 5.0] if step % 2 else None)(worker)

            results = own.arrive(order(), act)
            present = [worker for worker in range(3) if worker not in skipping]
            assert results == [bool(present) if worker in skipping else None for worker in range(3)]
            if present:
                weights = [[2.0, 1.0, 5.0][worker] for worker in present] if step % 2 else None
                local.step([problems.dense(local.params, step, worker) for worker in present], weights)
            local.equals(own, f"step {step}, without {skipping}")
        assert own.versions == {5}, "the round in which all abstained is no version"
        rows = own.workers[0].optimizer.remote.describe().workers
        assert [(row.contributions, row.abstentions) for row in rows] == [(3, 3), (3, 3), (4, 2)]


class Turnstile:
    """Lets the workers' results of one evaluation out in an order of its own for each."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._changed = threading.Condition()
        self._passed: dict[int, int] = {}

    def pass_through(self, evaluation: int, worker: int) -> None:
        """Wait until those before this worker have gone."""
        order = random.Random(evaluation).sample(range(self._count), self._count)
        with self._changed:
            ready = self._changed.wait_for(lambda: self._passed.get(evaluation, 0) == order.index(worker), 60)
            assert ready, f"evaluation {evaluation}: worker {worker} waits for one before it"
            self._passed[evaluation] = self._passed.get(evaluation, 0) + 1
            self._changed.notify_all()


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.5, 2.0, 1.0, 1.0, 3.0, 7.0]], ids=["plain", "weighted"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("cls", problems.DRIVEN)
def test_classes_that_drive_their_closure(
    server: ServerProcess, name: str, cls: str, count: int, weights: list[float] | None
) -> None:
    weights = None if weights is None else weights[:count]
    local, workers = _pair(server, name, cls, count)
    expected: list[int] = []
    closure = problems.averaging_closure(local.params, count, expected, weights)
    calls: list[list[int]] = [[] for _ in range(count)]
    turnstile = Turnstile(count)
    order = _shuffled(count, seed=4)

    def act(worker: Worker) -> Any:
        def own_closure() -> Tensor:
            own_calls = calls[worker.number]
            own_calls.append(len(own_calls))
            value = problems.evaluated(worker.params, worker.number)
            turnstile.pass_through(own_calls[-1], worker.number)
            return value

        return worker.optimizer.step(own_closure, num_samples=None if weights is None else weights[worker.number])

    with workers as own:
        for step in range(4):
            arrival = order()
            losses = own.arrive(arrival, act)
            torchs = local.optimizer.step(closure)
            assert [float(value) for value in losses] == [float(torchs)] * count
            local.equals(own, f"step {step}, arrival {arrival}")
            assert calls == [expected] * count, "every worker evaluates as often as the one process"
        assert own.versions == {4}
        for worker in own.workers:
            twins.assert_same_state(worker.optimizer, local.optimizer, f"worker {worker.number}")
    assert len(expected) > 8, "more than one evaluation a step"
