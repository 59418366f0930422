"""GradScalers of several workers: who overflows abstains, the others step, and every scaler goes on as torch's would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.data_parallel.crew import Worker, crew, mean
from tests.support.servers import ServerProcess

STEPS = 8
COUNT = 3
OVERFLOWS = {(0, 2), (1, 2), (2, 2), (1, 4), (2, 5), (0, 5)}
"""Worker and step; at step 2 all overflow."""
OPTIONS = {"lr": 0.1, "momentum": 0.9}


def parameters() -> list[Tensor]:
    return [nn.Parameter(torch.full((4,), 0.5))]


def weight(worker: int, step: int) -> Tensor:
    """Return what makes the gradient of a worker's step: infinite where it is to overflow."""
    plain = torch.randn(4, generator=torch.Generator().manual_seed(100 * worker + step))
    return plain * torch.inf if (worker, step) in OVERFLOWS else plain


def new_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)


def scaled_step(params: list[Tensor], optimizer: Any, scaler: torch.amp.GradScaler, worker: int, step: int) -> float:
    """Take one step as torch's examples do; return the scale that it leaves."""
    optimizer.zero_grad()
    loss = (params[0] * weight(worker, step)).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return float(scaler.get_scale())


def test_scalers_and_parameters(server: ServerProcess, name: str) -> None:
    with crew(server.address, name, COUNT, parameters, "SGD", OPTIONS) as workers:

        def train(worker: Worker) -> list[float]:
            scaler = new_scaler()
            return [scaled_step(worker.params, worker.optimizer, scaler, worker.number, step) for step in range(STEPS)]

        scales = workers.together(train)
        described = workers.workers[0].optimizer.remote.describe()
        final = [worker.params[0].detach().clone() for worker in workers.workers]
    for worker in range(COUNT):
        params, scaler = parameters(), new_scaler()
        local = torch.optim.SGD(params, **OPTIONS)  # type: ignore[arg-type]
        assert scales[worker] == [scaled_step(params, local, scaler, worker, step) for step in range(STEPS)]
    params = parameters()
    local = torch.optim.SGD(params, **OPTIONS)  # type: ignore[arg-type]
    for step in range(STEPS):
        whole: list[list[Tensor | None]] = [
            [weight(worker, step)] for worker in range(COUNT) if (worker, step) not in OVERFLOWS
        ]
        if whole:
            [params[0].grad] = mean(whole)
            local.step()
    assert all(torch.equal(own, params[0]) for own in final)
    assert described.version == STEPS - 1, "the step at which all overflowed is none"
    abstentions = {row.id: row.abstentions for row in described.workers}
    assert abstentions == {str(worker): sum(w == worker for w, _ in OVERFLOWS) for worker in range(COUNT)}
