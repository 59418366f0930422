"""Several workers: the bits of a mean in worker order, whoever comes first; deaths, disagreements, distributed closures."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep import Sync, Timeouts
from farstep_wire.errors import Applied, ClosureError, LayoutMismatchError, MismatchError
from tests.faults.models import await_standing, parameters, remote_optimizer, same_bits, set_gradients, take_steps
from tests.support.servers import ServerProcess, Servers, clean_environment


class Worker:
    """One worker: its own parameters and optimizer, used on a thread of its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=f"worker-{number}")
        self.params = parameters()
        self.optimizer: Any = None

    def build(self, address: str, name: str, cls: str, policy: Sync, **options: Any) -> Future[Any]:
        def build() -> None:
            self.optimizer = remote_optimizer(
                self.params, address, name, cls, worker=self.number, policy=policy, options=options
            )

        return self.pool.submit(build)

    def step(self, number: int, **how: Any) -> Future[Any]:
        def step() -> Any:
            set_gradients(self.params, number, self.number)
            return self.optimizer.step(**how)

        return self.pool.submit(step)


@contextmanager
def crew(
    address: str, name: str, count: int, cls: str = "SGD", policy: Sync | None = None, **options: Any
) -> Iterator[list[Worker]]:
    """Run that many workers, all attached."""
    workers = [Worker(number) for number in range(count)]
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.pool)
        building = [w.build(address, name, cls, policy or Sync(count), **options) for w in reversed(workers)]
        for future in building:
            future.result()
        yield workers
        for worker in workers:
            worker.optimizer.remote.close()


def averaged(count: int, step: int, weights: Sequence[float] | None = None) -> Callable[[Sequence[Tensor]], None]:
    """Return what gives parameters the mean of all workers' gradients: the sum in worker order, then one division."""

    def give(params: Sequence[Tensor]) -> None:
        total: list[Tensor] = []
        for worker in range(count):
            set_gradients(params, step, worker)
            gradients = [p.grad for p in params if p.grad is not None]
            if worker == 0:
                total = [g.clone() if weights is None else g * weights[0] for g in gradients]
            else:
                alpha = 1.0 if weights is None else weights[worker]
                total = [t.add_(g, alpha=alpha) for t, g in zip(total, gradients, strict=True)]
        for parameter, gradient in zip(params, total, strict=True):
            parameter.grad = gradient.div_(count if weights is None else sum(weights))

    return give


CLASSES: list[tuple[str, int, dict[str, Any]]] = [
    ("SGD", 2, {"momentum": 0.9}),
    ("SGD", 3, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("AdamW", 4, {"amsgrad": True}),
    ("Adagrad", 2, {"lr_decay": 0.1}),
    ("RMSprop", 3, {"centered": True}),
]


@pytest.mark.parametrize(
    ("cls", "count", "options"), CLASSES, ids=lambda value: str(value) if not isinstance(value, dict) else ""
)
def test_workers_equal_one_process_that_averages_in_worker_order(
    server: ServerProcess, name: str, cls: str, count: int, options: dict[str, Any]
) -> None:
    shuffle = random.Random(0)
    local = parameters()
    torchs = getattr(torch.optim, cls)(local, lr=0.1, **options)
    with crew(server.address, name, count, cls, **options) as workers:
        for step in range(6):
            order = shuffle.sample(range(count), count)
            standings = ["computing"] * count
            pending = []
            for worker in order:
                pending.append(workers[worker].step(step))
                standings[worker] = "waiting"
                if worker != order[-1]:
                    await_standing(server.address, name, standings)
            for future in pending:
                future.result()
            averaged(count, step)(local)
            torchs.step()
            assert all(same_bits(worker.params, local) for worker in workers), f"step {step}, arrival {order}"
            assert {worker.optimizer.remote.version for worker in workers} == {step + 1}


def test_weights_and_abstentions(server: ServerProcess, name: str) -> None:
    local = parameters()
    torchs = torch.optim.SGD(local, lr=0.1, momentum=0.9)
    weights = [3.0, 1.0, 12.0]
    with crew(server.address, name, 3, momentum=0.9) as workers:
        for future in [w.step(0, num_samples=weights[w.number]) for w in workers]:
            future.result()
        averaged(3, 0, weights)(local)
        torchs.step()
        assert all(same_bits(worker.params, local) for worker in workers)
        # The third has none this time: the mean is that of the two.
        pending = [workers[0].step(1), workers[1].step(1), workers[2].pool.submit(workers[2].optimizer.remote.skip)]
        assert [future.result() for future in pending] == [None, None, True]
        averaged(2, 1)(local)
        torchs.step()
        assert all(same_bits(worker.params, local) for worker in workers)
        # Nobody has: no step.
        skipped = [w.pool.submit(w.optimizer.remote.skip) for w in workers]
        assert [future.result() for future in skipped] == [False] * 3
        assert {worker.optimizer.remote.version for worker in workers} == {2}
        assert all(same_bits(worker.params, local) for worker in workers)


def test_a_closure_driven_over_two_workers(server: ServerProcess, name: str) -> None:
    """L-BFGS on the mean of two workers' losses, each over its own data."""

    def loss_of(params: Sequence[Tensor], worker: int) -> Tensor:
        return sum((((p - worker) ** 2) * (1 + worker)).sum() for p in params)  # type: ignore[return-value]

    def closure(optimizer: Any, params: Sequence[Tensor], worker: int, calls: list[int]) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            calls.append(worker)
            optimizer.zero_grad()
            loss = loss_of(params, worker)
            loss.backward()
            return loss

        return evaluate

    local = parameters()
    torchs = torch.optim.LBFGS(local, lr=0.1, max_iter=10, line_search_fn="strong_wolfe")
    evaluations = 0

    def both() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        parts, losses = [], []
        for worker in range(2):
            torchs.zero_grad()
            loss = loss_of(local, worker)
            loss.backward()
            losses.append(loss.detach())
            parts.append([p.grad.clone() for p in local])
        for parameter, first, second in zip(local, *parts, strict=True):
            parameter.grad = first.add_(second).div_(2)
        return (losses[0] + losses[1]) / 2

    options = {"max_iter": 10, "line_search_fn": "strong_wolfe"}
    calls: list[int] = []
    with crew(server.address, name, 2, "LBFGS", **options) as workers:
        for _ in range(3):
            pending = [
                w.pool.submit(w.optimizer.step, closure(w.optimizer, w.params, w.number, calls)) for w in workers
            ]
            results = [future.result() for future in pending]
            expected = torchs.step(both)
            assert all(float(result) == float(expected) for result in results)
            assert all(same_bits(worker.params, local) for worker in workers)
    assert calls.count(0) == calls.count(1) == evaluations


@pytest.mark.parametrize("late", [False, True], ids=["at once", "others still evaluate"])
def test_a_closure_that_raises_rolls_the_step_back_everywhere(server: ServerProcess, name: str, late: bool) -> None:
    told = threading.Event()

    def closure(worker: Worker, *, fail: bool) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            if fail and worker.number == 1:
                raise ZeroDivisionError("no data left")
            if fail and late:
                assert told.wait(20)
            worker.optimizer.zero_grad()
            loss: Tensor = sum((p**2).sum() for p in worker.params)  # type: ignore[assignment]
            loss.backward()
            return loss

        return evaluate

    with crew(server.address, name, 2, "LBFGS", max_iter=3) as workers:
        first, second = (w.pool.submit(w.optimizer.step, closure(w, fail=True)) for w in workers)
        with pytest.raises(ZeroDivisionError, match="no data left"):
            second.result()
        told.set()
        with pytest.raises(ClosureError, match=r"worker 1.*no data left.*rolled back") as raised:
            first.result()
        assert raised.value.applied is Applied.NO
        assert all(same_bits(worker.params, parameters()) for worker in workers)
        for future in [w.pool.submit(w.optimizer.step, closure(w, fail=False)) for w in workers]:
            future.result()
        assert {worker.optimizer.remote.version for worker in workers} == {1}


# Disagreements.


def _each_refused(pending: Sequence[Future[Any]], kind: type[Exception], *texts: str) -> None:
    for future in pending:
        with pytest.raises(kind) as raised:
            future.result()
        assert [text for text in texts if text not in str(raised.value)] == [], str(raised.value)
        assert raised.value.applied is Applied.NO  # type: ignore[attr-defined]


def test_hyperparameters_that_disagree_are_told_to_all_and_the_next_round_works(
    server: ServerProcess, name: str
) -> None:
    local = parameters()
    torchs = torch.optim.SGD(local, lr=0.1)
    with crew(server.address, name, 3) as workers:
        workers[1].optimizer.param_groups[0]["lr"] = 0.25
        _each_refused(
            [w.step(0) for w in workers], MismatchError, "param_groups[0]['lr']", "0.1", "0.25", "worker 0", "worker 1"
        )
        assert all(same_bits(worker.params, local) for worker in workers)
        assert {worker.optimizer.remote.version for worker in workers} == {0}
        for worker in workers:
            worker.optimizer.param_groups[0]["lr"] = 0.25
        for future in [w.step(1) for w in workers]:
            future.result()
        torchs.param_groups[0]["lr"] = 0.25
        averaged(3, 1)(local)
        torchs.step()
        assert all(same_bits(worker.params, local) for worker in workers)


def test_calls_that_disagree_are_told_to_all(server: ServerProcess, name: str) -> None:
    with crew(server.address, name, 2) as workers:
        group = {"params": parameters(5)}
        adding = workers[0].pool.submit(workers[0].optimizer.add_param_group, group)
        _each_refused([adding, workers[1].step(0)], MismatchError, "add_param_group", "step", "worker 0", "worker 1")
        adding = [
            w.pool.submit(w.optimizer.add_param_group, {"params": [torch.nn.Parameter(torch.zeros(2 + w.number))]})
            for w in workers
        ]
        _each_refused(adding, LayoutMismatchError, "worker 1", "float32[2]", "float32[3]")
        assert [len(worker.optimizer.param_groups) for worker in workers] == [1, 1]
        for future in [w.step(1) for w in workers]:
            future.result()
        assert {worker.optimizer.remote.version for worker in workers} == {1}


def test_sparse_gradients_that_do_not_fit_together(server: ServerProcess, name: str) -> None:
    with crew(server.address, name, 2) as workers:

        def step(worker: Worker) -> None:
            set_gradients(worker.params, 0)
            first = worker.params[0]
            dense = torch.eye(*first.shape)
            first.grad = dense.to_sparse(1 + worker.number)
            worker.optimizer.step()

        _each_refused([w.pool.submit(step, w) for w in workers], MismatchError, "parameter 0", "cannot be added")
        for future in [w.step(1) for w in workers]:
            future.result()
        assert {worker.optimizer.remote.version for worker in workers} == {1}


# Deaths.

_DYING_WORKER = """
import sys
from farstep import Sync
from tests.faults.models import parameters, remote_optimizer, take_steps
params = parameters()
optimizer = remote_optimizer(params, sys.argv[1], sys.argv[2], worker=1, policy=Sync(2))
print("attached", flush=True)
take_steps(optimizer, params, range(2), worker=1)
print("stepped", flush=True)
sys.stdin.read()
"""


@contextmanager
def _process(address: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = clean_environment()
    process = subprocess.Popen(
        [sys.executable, "-c", _DYING_WORKER, address, name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_round_goes_on_when_a_dead_workers_lease_has_run_out(servers: Servers, name: str) -> None:
    server = servers("--lease", "1s")
    local = parameters()
    torchs = torch.optim.SGD(local, lr=0.1)
    params = parameters()
    optimizer = remote_optimizer(params, server.address, name, worker=0, policy=Sync(2), timeouts=Timeouts(step=60))
    with _process(server.address, name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"attached\n"
        for step in range(2):
            take_steps(optimizer, params, range(step, step + 1))
            averaged(2, step)(local)
            torchs.step()
        assert process.stdout.readline() == b"stepped\n"
        assert same_bits(params, local)
        # Longer than the lease without a step: heartbeats keep both in.
        time.sleep(1.5)
        await_standing(server.address, name, ["computing", "computing"])
        process.kill()
        process.wait()
        begun = time.monotonic()
        take_steps(optimizer, params, range(2, 3))
        assert time.monotonic() - begun < 3
        await_standing(server.address, name, ["computing", "expired"])
    take_steps(torchs, local, range(2, 3))
    take_steps(optimizer, params, range(3, 5))
    take_steps(torchs, local, range(3, 5))
    assert same_bits(params, local)
    assert optimizer.remote.version == 5
    optimizer.remote.close()
