"""State dicts cross between farstep and torch, and schedulers and scalers drive both alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from farstep import Remote, optim
from farstep_wire.algorithms import ConjugateGradient
from tests.parity import twins

CLOSURES = {"LBFGS", "ConjugateGradient"}
LOCAL: dict[str, type[Optimizer]] = {
    **{
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    },
    "ConjugateGradient": ConjugateGradient,
}


# Fewer evaluations per step than by default; as many cross.
OPTIONS: dict[str, dict[str, Any]] = {"LBFGS": {"max_iter": 5}, "ConjugateGradient": {"max_iter": 5}}


def _local(name: str, model: torch.nn.Module) -> Optimizer:
    return LOCAL[name](model.parameters(), **OPTIONS.get(name, {}))  # type: ignore[call-arg]


def _hosted(name: str, model: torch.nn.Module, remote: Remote) -> Any:
    return getattr(optim, name)(model.parameters(), remote=remote, **OPTIONS.get(name, {}))


def _through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _train(name: str, model: torch.nn.Module, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        if name == "SparseAdam":
            twins.closure_for(model, optimizer, number, [])()
            twins.sparsify(model)
            optimizer.step()
        else:
            twins.take_step(model, optimizer, number, needs_closure=name in CLOSURES, calls=[])


@pytest.mark.parametrize("local_steps", [0, 6])
@pytest.mark.parametrize("name", sorted(LOCAL))
def test_state_crosses_from_remote_to_local_to_remote(
    name: str, local_steps: int, remote: Callable[..., Remote], tally: Callable[..., None]
) -> None:
    straight_model = twins.model_for(name)
    crossing_model = twins.twin(straight_model)
    straight = _local(name, straight_model)
    _train(name, straight_model, straight, range(20))

    first = _hosted(name, crossing_model, remote())
    _train(name, crossing_model, first, range(10))
    local = _local(name, crossing_model)
    local.load_state_dict(_through_file(first.state_dict()))
    _train(name, crossing_model, local, range(10, 10 + local_steps))
    second = _hosted(name, crossing_model, remote())
    second.load_state_dict(_through_file(local.state_dict()))
    _train(name, crossing_model, second, range(10 + local_steps, 20))

    twins.assert_same_parameters(straight_model.parameters(), crossing_model.parameters(), "after 20 steps")
    twins.assert_same_state(second, straight, "state_dict()")
    tally(name, "crossings")


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_loaded_optimizer_goes_on_at_step_ten(name: str, remote: Callable[..., Remote]) -> None:
    straight_model = twins.model_for(name)
    resumed_model = twins.twin(straight_model)
    straight = _local(name, straight_model)
    _train(name, straight_model, straight, range(20))
    hosted = _hosted(name, resumed_model, remote())
    _train(name, resumed_model, hosted, range(10))
    saved = _through_file({"model": resumed_model.state_dict(), "optimizer": hosted.state_dict()})
    _train(name, resumed_model, hosted, range(50, 53))
    resumed_model.load_state_dict(saved["model"])
    hosted.load_state_dict(saved["optimizer"])
    assert hosted.remote.incarnation == 2
    _train(name, resumed_model, hosted, range(10, 20))
    twins.assert_same_parameters(straight_model.parameters(), resumed_model.parameters(), "after 20 steps")
    twins.assert_same_state(hosted, straight, "state_dict()")


def test_loading_back_what_was_fetched_changes_nothing(remote: Callable[..., Remote]) -> None:
    model = twins.small_model()
    hosted = optim.Adam(model.parameters(), remote=remote())
    _train("Adam", model, hosted, range(3))
    fetched = hosted.state_dict()
    hosted.load_state_dict(fetched)
    assert hosted.remote.incarnation == 1
    fetched["state"][0]["exp_avg"].mul_(2)
    hosted.load_state_dict(fetched)
    assert hosted.remote.incarnation == 2
    assert torch.equal(hosted.state_dict()["state"][0]["exp_avg"], fetched["state"][0]["exp_avg"])


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("problem", ["rosenbrock", "network"])
def test_lbfgs_takes_the_local_steps_with_as_many_closure_calls(
    line_search: str | None, problem: str, remote: Callable[..., Remote]
) -> None:
    options = {"line_search_fn": line_search, "max_iter": 8, "lr": 1.0 if line_search else 0.001}
    _compare_driven("LBFGS", options, problem, remote())


@pytest.mark.parametrize("problem", ["rosenbrock", "network"])
def test_conjugate_gradient_takes_the_local_steps_with_as_many_closure_calls(
    problem: str, remote: Callable[..., Remote]
) -> None:
    _compare_driven("ConjugateGradient", {}, problem, remote())


class Rosenbrock(torch.nn.Module):
    """The Rosenbrock function as a model whose output is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.point = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def forward(self, _: torch.Tensor | None = None) -> torch.Tensor:
        x, y = self.point
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _compare_driven(name: str, options: dict[str, Any], problem: str, remote: Remote) -> None:
    local_model = Rosenbrock() if problem == "rosenbrock" else twins.model_for("LBFGS")
    remote_model = twins.twin(local_model)
    local = LOCAL[name](local_model.parameters(), **options)  # type: ignore[call-arg]
    hosted = getattr(optim, name)(remote_model.parameters(), remote=remote, **options)
    counts: tuple[list[int], list[int]] = ([], [])
    for number in range(10):
        losses = []
        for model, optimizer, calls in ((local_model, local, counts[0]), (remote_model, hosted, counts[1])):
            losses.append(optimizer.step(_driven_closure(model, optimizer, number, calls)))
        assert twins.same_bits(losses[0], losses[1])
        assert len(counts[0]) == len(counts[1])
        twins.assert_same_parameters(local_model.parameters(), remote_model.parameters(), f"step {number}")
    assert len(counts[0]) > 10
    twins.assert_same_state(hosted, local, "state_dict()")


def _driven_closure(model: Any, optimizer: Any, number: int, calls: list[int]) -> Callable[[], torch.Tensor]:
    if not isinstance(model, Rosenbrock):
        return twins.closure_for(model, optimizer, number % 2, calls)

    def closure() -> torch.Tensor:
        calls.append(number)
        optimizer.zero_grad()
        loss: torch.Tensor = model()
        loss.backward()
        return loss

    return closure


def test_conjugate_gradient_agrees_with_scipy(remote: Callable[..., Remote]) -> None:
    from scipy.optimize import minimize, rosen, rosen_der

    model = Rosenbrock()
    hosted = optim.ConjugateGradient(model.parameters(), max_iter=200, tolerance_grad=1e-9, remote=remote())
    for number in range(5):
        hosted.step(_driven_closure(model, hosted, number, []))
    expected = minimize(rosen, [-1.2, 1.0], jac=rosen_der, method="CG", options={"gtol": 1e-9}).x
    assert model.point.detach().numpy() == pytest.approx(expected, abs=1e-5)
