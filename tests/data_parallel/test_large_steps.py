"""The gradients of a large model are averaged while the optimizer steps: the bits are those of the whole mean and one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import inspection
from farstep_wire.address import parse_address
from tests.data_parallel.crew import Crew, Gradients, Worker, crew, mean
from tests.parity import twins
from tests.support.servers import ServerProcess

# Some 27 MiB of float32: several slices, one of a single parameter, one of many; and other dtypes between them.
SHAPES: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
    ((1_500_000,), torch.float32),
    ((7,), torch.float32),
    ((4_500_000,), torch.float32),
    ((300, 1000), torch.float64),
    ((64, 64), torch.bfloat16),
    ((100_000,), torch.float32),
    ((700, 300), torch.float32),
)
WORKERS = 3


def _make(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in SHAPES[: 7 * groups]]


def _gradients(step: int, worker: int) -> Gradients:
    generator = torch.Generator().manual_seed(100 * step + worker)
    own: Gradients = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in SHAPES]
    if step == 1:
        own[1] = own[5] = None
    if step == 2 and worker != 1:
        own[2] = None
    return own


def _step_all(own: Crew, local: Any, params: list[Tensor], step: int) -> None:
    def act(worker: Worker) -> None:
        worker.give(_gradients(step, worker.number))
        worker.optimizer.step()

    own.together(act)
    for parameter, gradient in zip(params, mean([_gradients(step, worker) for worker in range(WORKERS)]), strict=True):
        parameter.grad = gradient
    local.step()
    for worker in own.workers:
        twins.assert_same_parameters(worker.params, params, f"step {step}, worker {worker.number}")


@pytest.mark.parametrize("how", ["grpc", "shm"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("Adam", {"fused": True}),
        ("AdamW", {"fused": True, "amsgrad": True}),
        ("SGD", {"fused": True, "lr": 0.1, "momentum": 0.9}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}),
        ("NAdam", {}),
        ("Adafactor", {}),
    ],
    ids=["Adam-fused", "AdamW-fused", "SGD-fused", "SGD-foreach", "NAdam", "Adafactor"],
)
def test_bits_of_the_whole_step(server: ServerProcess, name: str, how: Any, cls: str, options: dict[str, Any]) -> None:
    params = _make(1)
    local = getattr(torch.optim, cls)(params, **options)
    with crew(server.address, name, WORKERS, lambda: _make(1), cls, options, transport=how) as own:
        for step in range(4):
            _step_all(own, local, params, step)


def test_groups_with_options_of_their_own(server: ServerProcess, name: str) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:3], "lr": 0.01}, {"params": params[3:4], "fused": False}, {"params": params[4:]}]

    params = _make(1)
    local = torch.optim.Adam(groups(params), lr=0.1, fused=True)
    made: Callable[[], Any] = lambda: groups(_make(1))  # noqa: E731
    with crew(server.address, name, WORKERS, made, "Adam", {"lr": 0.1, "fused": True}, transport="shm") as own:
        for worker in own.workers:
            worker.params = [parameter for group in worker.optimizer.param_groups for parameter in group["params"]]
        for step in range(4):
            for optimizer in (local, *(worker.optimizer for worker in own.workers)):
                optimizer.param_groups[step % 3]["lr"] *= 0.5
            _step_all(own, local, params, step)


def test_the_last_gradients_can_be_looked_at(server: ServerProcess, name: str) -> None:
    params = _make(1)
    local = torch.optim.SGD(params, lr=0.1)
    with crew(server.address, name, WORKERS, lambda: _make(1), "SGD", {"lr": 0.1}, transport="grpc") as own:
        for step in range(2):
            _step_all(own, local, params, step)
        with inspection.connect(parse_address(server.address), 30) as seen:
            rows = seen.describe(name, parameters=True).parameters
    for row, parameter in zip(rows, params, strict=True):
        if parameter.grad is None:
            assert row.gradient_norm is None
        else:
            assert row.gradient_norm == pytest.approx(float(parameter.grad.float().norm()), rel=1e-4)
