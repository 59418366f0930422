"""ConjugateGradient: agreement with SciPy, limits on its work, resumption to the bit."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

from farstep_wire.algorithms import ConjugateGradient
from tests.algorithms.problems import Calls, Objective, build, doubles, network, network_closure, quadratic, rosenbrock


@pytest.mark.parametrize("start", [doubles(-1.2, 1.0), doubles(*[0.5, 1.5] * 5)], ids=["2d", "10d"])
def test_agrees_with_scipy_on_rosenbrock(start: Tensor) -> None:
    def value_and_grad(array: Any) -> tuple[float, Any]:
        x = torch.tensor(array, requires_grad=True)
        loss = rosenbrock(x)
        (grad,) = torch.autograd.grad(loss, x)
        return loss.item(), grad.numpy()

    expected = scipy.optimize.minimize(value_and_grad, start.numpy(), jac=True, method="CG", options={"gtol": 1e-8})
    optimizer, closure, (x,) = build(rosenbrock, start, max_iter=500, tolerance_grad=1e-8, tolerance_change=0.0)
    optimizer.step(closure)
    assert expected.success
    torch.testing.assert_close(x.detach(), torch.tensor(expected.x), rtol=0.0, atol=1e-5)
    assert len(closure.losses) < 2 * expected.nfev


def test_short_steps_reach_the_same_minimum() -> None:
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0))
    for _ in range(10):
        optimizer.step(closure)
    torch.testing.assert_close(x.detach(), doubles(1.0, 1.0), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_quadratic_takes_about_n_iterations_with_exact_line_searches(n: int) -> None:
    objective, minimiser = quadratic(n)
    options = {"tolerance_grad": 1e-6, "tolerance_change": 0.0, "max_iter": 100, "c1": 1e-6, "c2": 1e-5}
    optimizer, closure, (x,) = build(objective, torch.zeros(n, dtype=torch.float64), **options)
    optimizer.step(closure)
    torch.testing.assert_close(x.detach(), minimiser, rtol=0.0, atol=1e-5)
    assert optimizer.state[x]["n_iter"] <= n + 2
    assert optimizer.state[x]["func_evals"] == len(closure.losses)


@pytest.mark.parametrize("max_eval", [2, 3, 7, 20])
def test_max_eval_is_never_exceeded(max_eval: int) -> None:
    optimizer, closure, _ = build(rosenbrock, doubles(-1.2, 1.0), max_eval=max_eval, max_iter=100, tolerance_change=0.0)
    for _ in range(3):
        before = len(closure.losses)
        optimizer.step(closure)
        assert len(closure.losses) - before == max_eval


def test_default_max_eval_lets_a_long_line_search_finish() -> None:
    """A first trial that is far too short takes many extrapolations, and still ends at a Wolfe point."""
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0), max_iter=1, lr=1e-12)
    optimizer.step(closure)
    assert 10 < len(closure.losses) <= 30
    assert "direction" in optimizer.state[x]


def test_loss_of_a_network_never_increases() -> None:
    model, x, y = network()
    optimizer = ConjugateGradient(model.parameters(), max_iter=3)
    closure = network_closure(model, x, y, optimizer)
    losses = [torch.as_tensor(optimizer.step(closure)).item() for _ in range(40)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("start", [-1.2, 0.3])
def test_steps_of_one_iteration_are_one_step_of_many(start: float) -> None:
    one, closure_one, (x_one,) = build(rosenbrock, doubles(start, 1.0), max_iter=15, tolerance_change=0.0)
    many, closure_many, (x_many,) = build(rosenbrock, doubles(start, 1.0), max_iter=1, tolerance_change=0.0)
    one.step(closure_one)
    for _ in range(15):
        many.step(closure_many)
    assert torch.equal(x_one, x_many)
    assert torch.equal(one.state[x_one]["direction"], many.state[x_many]["direction"])


def test_same_closure_gives_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        model, x, y = network()
        optimizer = ConjugateGradient(model.parameters())
        optimizer.step(network_closure(model, x, y, optimizer))
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def mixed_objective(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Over a half, a double, a complex and a 0-dim float parameter."""
    real = (a.double() - 1.0).pow(4).sum() + (b * a.double().mean() - 2.0).pow(2).sum()
    return real + (c * c - (1 + 2j)).abs().pow(2).sum() + (d - 3.0) ** 2 * (1.0 + b[0] ** 2)


def mixed_values() -> list[Tensor]:
    return [
        torch.tensor([0.5, -0.25], dtype=torch.bfloat16),
        doubles(0.1, 0.2, 0.3),
        torch.tensor([[1 + 1j], [0.5 - 1j]], dtype=torch.complex64),
        torch.tensor(1.0),
    ]


@pytest.mark.parametrize("interrupt_at", [1, 4])
@pytest.mark.parametrize(
    ("objective", "values"), [(rosenbrock, [doubles(-1.2, 1.0)]), (mixed_objective, mixed_values())], ids=["ros", "mix"]
)
def test_state_dict_round_trip_resumes_to_the_bit(
    objective: Objective, values: list[Tensor], interrupt_at: int
) -> None:
    straight, straight_closure, straight_params = build(objective, *values, max_iter=2)
    first, first_closure, first_params = build(objective, *values, max_iter=2)
    for _ in range(8):
        straight.step(straight_closure)
    for _ in range(interrupt_at):
        first.step(first_closure)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed, resumed_closure, resumed_params = build(objective, *[p.detach() for p in first_params])
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(8 - interrupt_at):
        resumed.step(resumed_closure)
    assert first_closure.losses + resumed_closure.losses == straight_closure.losses
    assert len(set(straight_closure.losses)) > 10
    for a, b in zip(straight_params, resumed_params, strict=True):
        assert torch.equal(a, b)


def test_state_dict_holds_plain_values_in_the_shape_and_dtype_of_each_parameter() -> None:
    optimizer, closure, params = build(mixed_objective, *mixed_values(), max_iter=2)
    optimizer.step(closure)
    assert set(optimizer.state) == set(params)
    for p in params:
        for key in ("direction", "prev_grad"):
            value = optimizer.state[p].get(key)
            assert (value.shape, value.dtype) == (p.shape, p.dtype)
    rest = {k: v for k, v in optimizer.state[params[0]].items() if k not in ("direction", "prev_grad")}
    assert set(rest) == {"n_iter", "func_evals", "slope", "step_size", "since_restart"}
    assert {type(v) for v in rest.values()} == {int, float}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(duplicate: Callable[[ConjugateGradient], ConjugateGradient]) -> None:
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0), max_iter=3)
    optimizer.step(closure)
    twin = duplicate(optimizer)
    (twin_x,) = twin.param_groups[0]["params"]
    assert twin_x is not x
    before = x.detach().clone()
    twin.step(Calls(twin, rosenbrock))
    assert torch.equal(x, before)
    optimizer.step(closure)
    assert torch.equal(x, twin_x)


def test_returns_what_the_first_call_returned() -> None:
    optimizer, closure, _ = build(rosenbrock, doubles(-1.2, 1.0))
    returned = []

    def recording() -> Tensor:
        returned.append(closure())
        return returned[-1]

    assert optimizer.step(recording) is returned[0]
    assert len(returned) > 1


def test_closure_runs_with_gradients_enabled_and_may_return_a_float() -> None:
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0))
    modes = []

    def plain() -> float:
        modes.append(torch.is_grad_enabled())
        return closure().item()

    with torch.no_grad():
        loss = optimizer.step(plain)
    assert loss == pytest.approx(24.2)
    assert set(modes) == {True}
    assert rosenbrock(x) < 1.0
