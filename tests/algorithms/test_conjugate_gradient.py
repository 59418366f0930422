"""ConjugateGradient: agreement with SciPy, limits on its work, resumption to the bit, what odd input does."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from farstep_wire.algorithms import ConjugateGradient
from torch import Tensor, nn

Closure = Callable[[], Tensor | float]
Objective = Callable[..., Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


def quadratic(n: int) -> tuple[Objective, Tensor]:
    """A strictly convex quadratic with n distinct eigenvalues from 1 to 10, and its minimiser."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    matrix = basis @ torch.diag(torch.linspace(1, 10, n, dtype=torch.float64)) @ basis.T
    minimiser = torch.randn(n, dtype=torch.float64, generator=generator)
    return lambda x: 0.5 * (x - minimiser) @ matrix @ (x - minimiser), minimiser


class Calls:
    """A closure over an objective of the optimizer's parameters that keeps every loss it returned."""

    def __init__(self, optimizer: ConjugateGradient, objective: Objective) -> None:
        self.losses: list[float] = []
        self._optimizer = optimizer
        self._objective = objective

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._objective(*self._optimizer.param_groups[0]["params"])
        loss.backward()
        self.losses.append(loss.item())
        return loss


def build(objective: Objective, *values: Tensor, **options: Any) -> tuple[ConjugateGradient, Calls, list[nn.Parameter]]:
    params = [nn.Parameter(v.clone()) for v in values]
    optimizer = ConjugateGradient(params, **options)
    return optimizer, Calls(optimizer, objective), params


def network() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(64, 5)
        y = torch.sin(x.sum(1, keepdim=True))
        model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 1))
    return model, x, y


def network_closure(model: nn.Module, x: Tensor, y: Tensor, optimizer: ConjugateGradient) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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


@pytest.mark.parametrize("max_iter", [1, 3])
def test_default_max_eval_lets_every_line_search_finish(max_iter: int) -> None:
    """A first step that is far too short makes the first line search long, and it still ends at a Wolfe point."""
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0), max_iter=max_iter, lr=1e-12)
    optimizer.step(closure)
    assert 10 < len(closure.losses) <= 5 * max_iter + 25
    assert optimizer.state[x]["n_iter"] == max_iter
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.5}, "Invalid learning rate: -0.5"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"lr": torch.ones(2)}, r"1-element, got shape \(2,\)"),
        ({"max_iter": 0}, "Invalid max_iter: 0"),
        ({"max_iter": 2.5}, "Invalid max_iter: 2.5"),
        ({"max_iter": None}, "Invalid max_iter: None"),
        ({"max_eval": 1}, "Invalid max_eval: 1"),
        ({"tolerance_grad": -1e-3}, "Invalid tolerance_grad: -0.001"),
        ({"tolerance_change": math.nan}, "Invalid tolerance_change: nan"),
        ({"line_search_fn": "armijo"}, "Invalid line_search_fn: 'armijo'"),
        ({"line_search_fn": None}, "Invalid line_search_fn: None"),
        ({"c1": 0.0}, "Invalid c1 and c2: 0.0, 0.1"),
        ({"c1": 0.3}, "Invalid c1 and c2: 0.3, 0.1"),
        ({"c2": 1.0}, "Invalid c1 and c2: 0.0001, 1.0"),
        ({"restart_interval": 0}, "Invalid restart_interval: 0"),
        ({"restart_threshold": 0.0}, "Invalid restart_threshold: 0.0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConjugateGradient([nn.Parameter(torch.ones(2))], **options)
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0))
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert not closure.losses
    assert torch.equal(x, doubles(-1.2, 1.0))


def test_takes_one_param_group_only() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(2))]}]
    message = r"ConjugateGradient doesn't support per-parameter options \(parameter groups\)"
    with pytest.raises(ValueError, match=message):
        ConjugateGradient(groups)
    optimizer = ConjugateGradient(groups[0]["params"])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1


def test_closure_is_required() -> None:
    optimizer = ConjugateGradient([nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got None"):
        optimizer.step(None)  # type: ignore[arg-type]


def test_parameters_without_gradient_stay() -> None:
    optimizer, closure, (x, unused) = build(lambda x, _: rosenbrock(x), doubles(-1.2, 1.0), doubles(7.0, 8.0))
    alone, alone_closure, (x_alone,) = build(rosenbrock, doubles(-1.2, 1.0), restart_interval=4)
    optimizer.step(closure)
    alone.step(alone_closure)
    assert unused.grad is None
    assert torch.equal(unused, doubles(7.0, 8.0))
    assert torch.equal(x, x_alone)


def test_complex_parameters_move_as_pairs_of_reals() -> None:
    def complex_rosenbrock(z: Tensor) -> Tensor:
        return rosenbrock(torch.view_as_real(z).reshape(-1))

    values = doubles(-1.2, 1.0, 0.5, 2.0)
    real, real_closure, (x,) = build(rosenbrock, values)
    pairs, pairs_closure, (z,) = build(complex_rosenbrock, torch.view_as_complex(values.view(2, 2)))
    for _ in range(3):
        real.step(real_closure)
        pairs.step(pairs_closure)
    assert torch.equal(torch.view_as_real(z.detach()).reshape(-1), x)


def test_layouts_and_shapes_do_not_change_the_bits() -> None:
    """Channels-last, transposed, 0-dim and empty parameters give what their flat concatenation gives."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 2, 2, 2, dtype=torch.float64, generator=generator)
    matrix = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    scalar = doubles(0.5)[0]
    flat, flat_closure, (x,) = build(rosenbrock, torch.cat([image.reshape(-1), matrix.reshape(-1), scalar[None]]))
    params = [
        nn.Parameter(image.clone().to(memory_format=torch.channels_last)),
        nn.Parameter(matrix.t().contiguous().t()),
        nn.Parameter(torch.empty(0, 3, dtype=torch.float64)),
        nn.Parameter(scalar.clone()),
    ]
    strides = [p.stride() for p in params]
    optimizer = ConjugateGradient(params)
    closure = Calls(optimizer, lambda *ps: rosenbrock(torch.cat([p.reshape(-1) for p in ps])))
    for _ in range(2):
        flat.step(flat_closure)
        optimizer.step(closure)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in params]), x)
    assert [p.stride() for p in params] == strides


def test_only_empty_parameters_are_no_error() -> None:
    optimizer, closure, _ = build(lambda x: x.sum(), torch.empty(0))
    assert optimizer.step(closure) == 0.0
    assert len(closure.losses) == 1


def test_sparse_gradients() -> None:
    weights = []
    for sparse in (False, True):
        embedding = nn.Embedding.from_pretrained(torch.arange(8.0).view(4, 2), freeze=False, sparse=sparse)
        optimizer = ConjugateGradient(embedding.parameters())
        index = torch.tensor([0, 2, 2])
        closure = Calls(optimizer, lambda _, e=embedding, i=index: (e(i) ** 2).sum())
        optimizer.step(closure)
        weights.append(embedding.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert weights[0][[1, 3]].tolist() == [[2.0, 3.0], [6.0, 7.0]]


def test_nan_at_the_current_point_changes_nothing() -> None:
    optimizer, closure, (x,) = build(lambda x: (x * math.nan).sum(), doubles(1.0, 2.0))
    assert math.isnan(float(optimizer.step(closure)))
    assert torch.equal(x, doubles(1.0, 2.0))
    assert optimizer.state[x] == {"func_evals": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_backs_off_from_non_finite_trials(bad: float) -> None:
    """The minimum, 1, lies beside a region without values; a long first step lands in it."""

    def walled(x: Tensor) -> Tensor:
        return ((x - 1.0) ** 2).sum() + (bad if x.item() > 1.5 else 0.0) * x.sum()

    optimizer, closure, (x,) = build(walled, doubles(0.0), lr=1e6)
    optimizer.step(closure)
    assert not math.isfinite(closure.losses[1])
    torch.testing.assert_close(x.detach(), doubles(1.0), rtol=0.0, atol=1e-6)


def test_nan_everywhere_but_here_ends_within_max_eval() -> None:
    optimizer, closure, (x,) = build(lambda x: (x if x[0] == 1.0 else x * math.nan).sum(), doubles(1.0, 2.0))
    optimizer.step(closure)
    assert torch.equal(x, doubles(1.0, 2.0))
    assert 2 < len(closure.losses) <= 100
    assert optimizer.state[x] == {"func_evals": len(closure.losses), "n_iter": 1}


def test_unbounded_loss_ends_within_max_eval_at_a_lower_point() -> None:
    optimizer, closure, (x,) = build(lambda x: -(x**3).sum(), torch.tensor([1.0]))
    optimizer.step(closure)
    assert len(closure.losses) <= 100
    assert x.item() > 1.0
    assert math.isfinite(x.item())


def test_failed_search_tries_steepest_descent_once() -> None:
    """After two good iterations the closure reports a loss that is lowest where it is, beside gradients that differ."""
    objective, _ = quadratic(6)
    optimizer, closure, (x,) = build(objective, torch.zeros(6, dtype=torch.float64), max_iter=2)
    optimizer.step(closure)
    assert optimizer.state[x]["since_restart"] == 2
    reached = x.detach().clone()
    optimizer.param_groups[0]["max_iter"] = 20
    wrong = Calls(optimizer, lambda x: (x.detach() - reached).square().sum() + objective(x) - objective(x).detach())
    optimizer.step(wrong)
    assert torch.equal(x, reached)
    assert optimizer.state[x]["n_iter"] == 4
    assert "direction" not in optimizer.state[x]


@pytest.mark.parametrize(("options", "expected"), [({"restart_interval": 1}, {1}), ({}, {1, 2, 3, 4})])
def test_restarts_after_the_interval(options: dict[str, Any], expected: set[int]) -> None:
    objective, _ = quadratic(4)
    start = torch.zeros(4, dtype=torch.float64)
    optimizer, closure, (x,) = build(objective, start, max_iter=1, restart_threshold=None, c2=1e-3, **options)
    ages = []
    for _ in range(6):
        optimizer.step(closure)
        ages.append(optimizer.state[x]["since_restart"])
    assert set(ages) == expected


def test_powell_restart_goes_along_steepest_descent() -> None:
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0, 2.0), max_iter=1, restart_threshold=1e-12)
    for _ in range(3):
        optimizer.step(closure)
        assert torch.equal(optimizer.state[x]["direction"], -optimizer.state[x]["prev_grad"])


def test_closure_that_raises_leaves_the_state() -> None:
    optimizer, closure, _ = build(rosenbrock, doubles(-1.2, 1.0), max_iter=3)
    optimizer.step(closure)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("no data")
        return closure()

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(failing)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0.0, atol=0.0)


def test_learning_rate_scales_the_first_trial() -> None:
    objective, _ = quadratic(3)
    trials = []
    for lr in (1.0, 0.5, torch.tensor(0.5)):
        optimizer, closure, (x,) = build(objective, torch.zeros(3, dtype=torch.float64), lr=lr)
        points: list[Tensor] = []

        def recording(x: Tensor = x, closure: Calls = closure, points: list[Tensor] = points) -> Tensor:
            points.append(x.detach().clone())
            return closure()

        optimizer.step(recording)
        trials.append(points[1])
    torch.testing.assert_close(trials[1], 0.5 * trials[0])
    assert torch.equal(trials[1], trials[2])


def test_zero_learning_rate_takes_no_step() -> None:
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0), lr=0.0)
    optimizer.step(closure)
    assert len(closure.losses) == 1
    assert torch.equal(x, doubles(-1.2, 1.0))


def test_works_with_hooks_and_a_scheduler() -> None:
    optimizer, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for _ in range(10):
        optimizer.step(closure)
        scheduler.step()
    assert seen == ["pre", "post"] * 10
    torch.testing.assert_close(x.detach(), doubles(1.0, 1.0), rtol=0.0, atol=1e-6)
