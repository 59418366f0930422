"""What scripts do to parameters and state without telling the optimizer: it follows, or says what to do instead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import Remote, optim
from tests.parity import twins

Make = Callable[..., Remote]


def _sides(remote: Remote, name: str, make: Callable[[], list[nn.Parameter]], **options: Any) -> list[Any]:
    sides = []
    for cls, extra in ((getattr(torch.optim, name), {}), (getattr(optim, name), {"remote": remote})):
        torch.manual_seed(0)
        parameters = make()
        sides.append((parameters, cls(parameters, **options, **extra)))
    return sides


def _step_both(sides: list[Any], number: int) -> None:
    for parameters, optimizer in sides:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    twins.assert_same_parameters(sides[0][0], sides[1][0], f"step {number}")


def _two() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(5))]


# State.


def _clear(optimizer: Any) -> None:
    optimizer.state.clear()


def _rebind(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def _drop_one(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


@pytest.mark.parametrize("reset", [_clear, _rebind, _drop_one])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_state_that_is_dropped_here_begins_afresh_there(name: str, reset: Callable[[Any], None], remote: Make) -> None:
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {}
    sides = _sides(remote(), name, _two, **options)
    for number in range(8):
        if number in {3, 6}:
            for _, optimizer in sides:
                reset(optimizer)
            if number == 6:
                twins.assert_same_state(sides[1][1], sides[0][1], "state_dict() after the reset")
        _step_both(sides, number)
    twins.assert_same_state(sides[1][1], sides[0][1], "state_dict()")


def test_lbfgs_begins_afresh_too(remote: Make) -> None:
    ends = []
    for cls, extra in ((torch.optim.LBFGS, {}), (optim.LBFGS, {"remote": remote()})):
        model = twins.model_for("LBFGS")
        optimizer = cls(model.parameters(), max_iter=3, **extra)
        calls: list[int] = []
        for number in range(6):
            if number == 3:
                optimizer.state.clear()
            twins.take_step(model, optimizer, number, needs_closure=True, calls=calls)
        ends.append((model, optimizer, calls))
    assert ends[0][2] == ends[1][2]
    twins.assert_same_parameters(ends[0][0].parameters(), ends[1][0].parameters(), "after 6 steps")


# Parameters.


def _transpose(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.t()


def _transposed_copy(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.t().contiguous()


def _swap_storage(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.clone().mul_(0.5)


def _fill_in_place(parameter: nn.Parameter) -> None:
    torch.nn.init.orthogonal_(parameter)


def _through_numpy(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[1] = 0.25


def _back_and_forth(parameter: nn.Parameter) -> None:
    data = parameter.data
    parameter.data = torch.zeros(4, 4)
    parameter.data = data


@pytest.mark.parametrize(
    "edit", [_transpose, _transposed_copy, _swap_storage, _fill_in_place, _through_numpy, _back_and_forth]
)
def test_a_parameter_whose_data_is_changed_or_exchanged(edit: Callable[[nn.Parameter], None], remote: Make) -> None:
    sides = _sides(remote(), "Adam", _two)
    for number in range(6):
        if number in {2, 3}:
            for parameters, _ in sides:
                torch.manual_seed(number)
                edit(parameters[0])
        _step_both(sides, number)
    assert [p.stride() for p in sides[0][0]] == [p.stride() for p in sides[1][0]]
    twins.assert_same_state(sides[1][1], sides[0][1], "state_dict()")


def test_memory_formats_that_change_after_the_optimizer_was_built(remote: Make) -> None:
    formats = {1: torch.contiguous_format, 3: torch.channels_last}
    models = []
    for cls, extra in ((torch.optim.AdamW, {}), (optim.AdamW, {"remote": remote()})):
        model = twins.small_model()
        optimizer = cls(model.parameters(), **extra)
        for number in range(5):
            if number in formats:
                model.to(memory_format=formats[number])
            twins.take_step(model, optimizer, number, needs_closure=False, calls=[])
        models.append(model)
    twins.assert_same_parameters(models[0].parameters(), models[1].parameters(), "after 5 steps")
    assert [p.stride() for p in models[0].parameters()] == [p.stride() for p in models[1].parameters()]


def test_parameters_that_are_frozen_and_thawed(remote: Make) -> None:
    models = []
    for cls, extra in (
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (optim.Adam, {"weight_decay": 0.1, "remote": remote()}),
    ):
        model = twins.small_model()
        optimizer = cls(model.parameters(), **extra)
        for number in range(6):
            next(model.parameters()).requires_grad_(not 2 <= number < 4)
            twins.take_step(model, optimizer, number, needs_closure=False, calls=[])
        models.append((model, optimizer))
    twins.assert_same_parameters(models[0][0].parameters(), models[1][0].parameters(), "after 6 steps")
    twins.assert_same_state(models[1][1], models[0][1], "state_dict()")


def test_integer_parameters_are_passed_over_as_in_torch(remote: Make) -> None:
    """Quantized weights stand among ``model.parameters()`` without ever having a gradient."""

    def make() -> list[nn.Parameter]:
        weights = torch.randint(-8, 8, (3, 3), dtype=torch.int8)
        return [nn.Parameter(weights, requires_grad=False), nn.Parameter(torch.randn(5))]

    sides = _sides(remote(), "Adam", make)
    for number in range(3):
        for parameters, optimizer in sides:
            parameters[1].grad = torch.full((5,), 0.1 * number)
            optimizer.step()
        twins.assert_same_parameters(sides[0][0], sides[1][0], f"step {number}")
    twins.assert_same_state(sides[1][1], sides[0][1], "state_dict()")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_converted_afterwards_is_told_what_to_do(dtype: torch.dtype, remote: Make) -> None:
    model = twins.small_model()
    optimizer = optim.AdamW(model.parameters(), remote=remote())
    model.to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(TypeError, match=r"'0\.0' was float32.*convert the model first, then build the optimizer"):
        optimizer.step()
    model.float()
    optimizer.zero_grad()
    twins.take_step(model, optimizer, 0, needs_closure=False, calls=[])
    assert optimizer.remote.version == 1


# Closures that fail.


@pytest.mark.parametrize("fail_at", [0, 2])
@pytest.mark.parametrize("name", ["LBFGS", "ConjugateGradient"])
def test_a_closure_that_raises_leaves_parameters_and_state_as_before(name: str, fail_at: int, remote: Make) -> None:
    model = twins.model_for("LBFGS")
    optimizer = getattr(optim, name)(model.parameters(), max_iter=4, remote=remote())
    twins.take_step(model, optimizer, 0, needs_closure=True, calls=[])
    before, state = twins.twin(model), optimizer.state_dict()
    calls: list[int] = []
    closure = twins.closure_for(model, optimizer, 1, calls)

    def failing() -> Tensor:
        if len(calls) == fail_at:
            raise KeyError("out of data")
        return closure()

    with pytest.raises(KeyError, match="out of data"):
        optimizer.step(failing)
    assert len(calls) == fail_at
    twins.assert_same_parameters(before.parameters(), model.parameters(), "after the failure")
    twins.assert_same_tree(optimizer.state_dict(), state, "state_dict()")
    twins.take_step(model, optimizer, 1, needs_closure=True, calls=[])
    assert optimizer.remote.version == 2


def test_a_closure_of_an_ordinary_class_that_raises_sends_nothing(remote: Make) -> None:
    optimizer = _sides(remote(), "Adam", _two)[1][1]

    def failing() -> Tensor:
        raise KeyError("out of data")

    with pytest.raises(KeyError, match="out of data"):
        optimizer.step(failing)
    assert optimizer.remote.version == 0
    assert not optimizer.state


def test_a_closure_may_return_a_plain_number(remote: Make) -> None:
    ends = []
    for cls, extra in ((torch.optim.LBFGS, {}), (optim.LBFGS, {"remote": remote()})):
        model = twins.model_for("LBFGS")
        optimizer = cls(model.parameters(), max_iter=3, **extra)
        closure = twins.closure_for(model, optimizer, 0, [])
        ends.append((optimizer.step(lambda c=closure: c().item()), model))
    assert ends[0][0] == ends[1][0]
    assert type(ends[1][0]) is float
    twins.assert_same_parameters(ends[0][1].parameters(), ends[1][1].parameters(), "after the step")
