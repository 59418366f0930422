"""ConjugateGradient: what it refuses, odd parameters and gradients, values that are not finite, restarts."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep_wire.algorithms import ConjugateGradient
from tests.algorithms.problems import Calls, build, doubles, quadratic, rosenbrock


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


def test_parameters_that_share_memory_move_together() -> None:
    memory = doubles(-1.2, 1.0)
    params = [nn.Parameter(memory), nn.Parameter(memory.view(2))]
    optimizer = ConjugateGradient(params, restart_interval=2)
    optimizer.step(Calls(optimizer, lambda x, _: rosenbrock(x)))
    alone, closure, (x,) = build(rosenbrock, doubles(-1.2, 1.0))
    alone.step(closure)
    assert params[0].data_ptr() == params[1].data_ptr()
    assert torch.equal(params[0], x)


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
    assert torch.as_tensor(optimizer.step(closure)).isnan()
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
