"""Distributed L-BFGS and conjugate gradients over split data take the steps of one worker on the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.data_parallel.crew import Crew, Worker, crew
from tests.data_parallel.problems import local_class
from tests.support.servers import ServerProcess

STEPS = 8
WHOLE = 240
OPTIONS: dict[str, dict[str, Any]] = {
    "LBFGS": {"lr": 1.0, "max_iter": 5, "history_size": 10, "line_search_fn": "strong_wolfe"},
    "ConjugateGradient": {"max_iter": 5},
}
EVEN = [60, 60, 60, 60]
UNEVEN = [100, 80, 40, 20]

# The mean of four means is the mean of the whole but for rounding: a few units in the last place of each loss and gradient.
# The line search carries that on, so that the parameters of the last step may differ by some hundred of them.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-3}


def _data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(WHOLE, 10, generator=generator, dtype=torch.float64)
    labels = torch.tanh(inputs @ torch.randn(10, 4, generator=generator, dtype=torch.float64))
    labels += 0.1 * torch.randn(WHOLE, 4, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), labels.argmax(1)


def _parameters(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = [(10, 8), (8,), (8, 4), (4,)]
    return [
        nn.Parameter(0.3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def _closure(
    optimizer: Any, params: list[Tensor], data: tuple[Tensor, Tensor], losses: list[float]
) -> Callable[[], Tensor]:
    """Return a closure as torch's documentation writes it; it notes each loss, and so counts its calls."""
    first, first_bias, second, second_bias = params
    inputs, labels = data

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = torch.tanh(inputs @ first + first_bias) @ second + second_bias
        penalty = torch.stack([p.square().sum() for p in params]).sum()
        loss = nn.functional.cross_entropy(outputs, labels) + 1e-3 * penalty
        loss.backward()
        losses.append(loss.item())
        return loss

    return closure


def _whole(cls: str, dtype: torch.dtype) -> tuple[list[list[Tensor]], list[int], list[float]]:
    """Return the parameters after each step of one worker on all the data, its evaluations so far, and its losses."""
    params = _parameters(dtype)
    optimizer = local_class(cls)(params, **OPTIONS[cls])
    losses: list[float] = []
    trace, evaluations = [], []
    for _ in range(STEPS):
        optimizer.step(_closure(optimizer, params, _data(dtype), losses))
        trace.append([p.detach().clone() for p in params])
        evaluations.append(len(losses))
    return trace, evaluations, losses


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cls", sorted(OPTIONS))
def test_four_workers_on_split_data_take_the_steps_of_one_on_the_whole(
    server: ServerProcess, name: str, cls: str, dtype: torch.dtype, sizes: list[int]
) -> None:
    """In float64 with the very same evaluations; in float32 rounding may make the line search stop earlier or later."""
    trace, evaluations, whole = _whole(cls, dtype)
    assert whole[-1] < 0.5 * whole[0], "it is a problem that they solve"
    inputs, labels = (part.split(sizes) for part in _data(dtype))
    losses: list[list[float]] = [[] for _ in sizes]
    weighted = sizes is UNEVEN

    def act(worker: Worker) -> Any:
        number = worker.number
        closure = _closure(worker.optimizer, worker.params, (inputs[number], labels[number]), losses[number])
        return worker.optimizer.step(closure, num_samples=sizes[number] if weighted else None)

    def compare(own: Crew, step: int) -> float:
        apart = [
            float((theirs - ours).detach().abs().max() / theirs.abs().max())
            for worker in own.workers
            for theirs, ours in zip(trace[step], worker.params, strict=True)
        ]
        return max(apart)

    with crew(server.address, name, 4, lambda: _parameters(dtype), cls, OPTIONS[cls]) as own:
        furthest = 0.0
        for step in range(STEPS):
            own.together(act)
            counts = {len(calls) for calls in losses}
            assert len(counts) == 1, f"step {step}: the workers evaluated {[len(calls) for calls in losses]} times"
            furthest = max(furthest, compare(own, step))
            if dtype is torch.float64:
                assert counts == {evaluations[step]}, "as often as the one worker"
        assert own.versions == {STEPS}
    print(f"{cls}, {dtype}: {len(losses[0])} evaluations, {len(whole)} on the whole, at most {furthest:.1e} apart")
    assert furthest <= TOLERANCE[dtype]
