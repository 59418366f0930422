"""``param_groups`` assigned outright or edited: more groups are taken over as torch takes them, other parameters refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from farstep import Remote, optim
from farstep.optim.proxy import RemoteOptimizer
from farstep_wire.errors import ConfigurationError
from tests.parity.twins import assert_same_parameters, assert_same_state, matrix_model, take_step, twin

Make = Callable[..., Remote]


def _pair(remote: Make) -> list[tuple[nn.Module, Any]]:
    model = matrix_model()
    other = twin(model)
    local = torch.optim.Adam(list(model.parameters())[:1], lr=0.01)
    hosted = optim.Adam(list(other.parameters())[:1], lr=0.01, remote=remote())
    return [(model, local), (other, hosted)]


def _more(model: nn.Module, optimizer: Any, rate: float) -> list[dict[str, Any]]:
    [group] = optimizer.param_groups
    return [group, {**group, "params": list(model.parameters())[1:], "lr": rate}]


@pytest.mark.parametrize("how", ["assigned", "appended"])
@pytest.mark.parametrize("then", ["step", "state_dict", "load_state_dict", "add_param_group", "handle"])
def test_more_groups(then: str, how: str, remote: Make) -> None:
    sides = _pair(remote)
    extra = [nn.Parameter(torch.ones(2, 2)) for _ in sides]
    for (model, optimizer), parameter in zip(sides, extra, strict=True):
        take_step(model, optimizer, 0, needs_closure=False, calls=[])
        groups = _more(model, optimizer, 0.002)
        if how == "assigned":
            optimizer.param_groups = groups
        else:
            optimizer.param_groups.append(groups[1])
        match then:
            case "state_dict":
                assert len(optimizer.state_dict()["param_groups"]) == 2
            case "load_state_dict":
                fresh = torch.optim.Adam(list(twin(model).parameters())[:1], lr=0.03)
                fresh.param_groups = _more(model, fresh, 0.04)
                optimizer.load_state_dict(fresh.state_dict())
            case "add_param_group":
                optimizer.add_param_group({"params": [parameter], "lr": 0.5})
                parameter.grad = torch.ones(2, 2)
            case "handle" if isinstance(optimizer, RemoteOptimizer):
                assert optimizer.remote.state(optimizer.param_groups[1]["params"][0]) == {}
                assert not optimizer.remote.skip(), "a round of one worker, which has no gradients"
        for number in range(1, 4):
            take_step(model, optimizer, number, needs_closure=False, calls=[])
    assert_same_parameters(sides[0][0].parameters(), sides[1][0].parameters(), then)
    assert_same_parameters(extra[:1], extra[1:], then)
    assert_same_state(sides[1][1], sides[0][1], then)


def _exchange_all(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"] = [nn.Parameter(parameter.detach().clone()) for parameter in groups[0]["params"]]


def _exchange_one(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"][0] = nn.Parameter(groups[0]["params"][0].detach().clone())


def _remove_one(groups: list[dict[str, Any]]) -> None:
    del groups[0]["params"][1]


def _append_one(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"].append(nn.Parameter(torch.ones(2)))


def _reorder(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"].reverse()


def _split(groups: list[dict[str, Any]]) -> None:
    groups.append({**groups[0], "params": [groups[0]["params"].pop()]})


def _clear(groups: list[dict[str, Any]]) -> None:
    groups.clear()


@pytest.mark.parametrize("edit", [_exchange_all, _exchange_one, _remove_one, _append_one, _reorder, _split, _clear])
def test_other_parameters_are_refused_and_nothing_happens(
    edit: Callable[[list[dict[str, Any]]], None], remote: Make
) -> None:
    model = matrix_model()
    before = twin(model)
    optimizer: Any = optim.SGD(model.parameters(), lr=0.1, remote=remote())
    kept = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    edit(optimizer.param_groups)
    model(torch.ones(1, 50)).sum().backward()
    handle = optimizer.remote
    for act in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({}), handle.skip):
        with pytest.raises(ConfigurationError, match=r"hold other parameters \(groups of .*build a new optimizer"):
            act()
    assert_same_parameters(model.parameters(), before.parameters(), "after the refusals")
    assert optimizer.remote.version == 0
    optimizer.param_groups = kept
    optimizer.step()
    assert optimizer.remote.version == 1
