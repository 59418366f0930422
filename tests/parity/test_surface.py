"""The rest of the base class: groups in the middle of training, hooks, copies, the handle, third-party classes."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import farstep
from farstep import Remote, Sync, errors, optim
from tests.parity import twins
from tests.parity.third_party import Counting

Make = Callable[..., Remote]


def _sides(remote: Remote, name: str = "Adam", **options: Any) -> list[tuple[nn.Module, Any]]:
    model = twins.small_model()
    other = twins.twin(model)
    return [
        (model, getattr(torch.optim, name)(model.parameters(), **options)),
        (other, getattr(optim, name)(other.parameters(), remote=remote, **options)),
    ]


def _step_both(sides: list[tuple[nn.Module, Any]], numbers: range) -> None:
    for number in numbers:
        for model, optimizer in sides:
            twins.take_step(model, optimizer, number, needs_closure=False, calls=[])
        twins.assert_same_parameters(sides[0][0].parameters(), sides[1][0].parameters(), f"step {number}")


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_add_param_group(name: str, before: int, remote: Make) -> None:
    sides = _sides(remote(), name)
    _step_both(sides, range(before))
    for model, optimizer in sides:
        torch.manual_seed(5)
        model.extra = nn.Linear(3, 2)
        optimizer.add_param_group({"params": model.extra.parameters(), "lr": 0.5})
    for number in range(6):
        for model, optimizer in sides:
            optimizer.zero_grad()
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * number + index)
            optimizer.step()
        twins.assert_same_parameters(sides[0][0].parameters(), sides[1][0].parameters(), f"step {number}")
    twins.assert_same_state(sides[1][1], sides[0][1], "state_dict()")


def test_a_group_that_is_refused_leaves_things_as_they_were(remote: Make) -> None:
    sides = _sides(remote())
    parameter = sides[1][1].param_groups[0]["params"][0]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        sides[1][1].add_param_group({"params": [parameter]})
    assert len(sides[1][1].param_groups) == 1
    _step_both(sides, range(2))


def test_edits_of_param_groups(remote: Make) -> None:
    sides = _sides(remote(), lr=torch.tensor(0.01))
    for number in range(6):
        for _, optimizer in sides:
            group = optimizer.param_groups[0]
            if number == 1:
                group["lr"].mul_(0.5)
            if number == 2:
                group["betas"] = (0.5, 0.9)
            if number == 3:
                group["weight_decay"] = 0.1
                group["mine"] = {"a": [1, (2.0, None)]}
            if number == 4:
                del group["mine"]
                group["lr"] = 0.02
            if number == 5:
                group["amsgrad"] = False
        _step_both(sides, range(number, number + 1))
    assert "mine" not in sides[1][1].remote.describe().groups[0]
    twins.assert_same_state(sides[1][1], sides[0][1], "state_dict()")


def test_an_option_that_cannot_travel_stays_here(remote: Make) -> None:
    sides = _sides(remote())
    for _, optimizer in sides:
        optimizer.param_groups[0]["callback"] = print
    _step_both(sides, range(2))
    sides[1][1].param_groups[0]["lr"] = object()
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\] is a object, which cannot travel"):
        sides[1][1].step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool, remote: Make) -> None:
    sides = _sides(remote(), "SGD", momentum=0.9, weight_decay=0.1)
    _step_both(sides, range(1))
    for model, optimizer in sides:
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        optimizer.step()
    twins.assert_same_parameters(sides[0][0].parameters(), sides[1][0].parameters(), "a step without gradients")


def test_hooks_fire_as_in_torch(remote: Make) -> None:
    told: list[list[str]] = []
    for model, optimizer in _sides(remote()):
        said: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, s=said: s.append("global pre")),
            register_optimizer_step_post_hook(lambda *_, s=said: s.append("global post")),
            optimizer.register_step_pre_hook(lambda *_, s=said: s.append("pre")),
            optimizer.register_step_post_hook(lambda *_, s=said: s.append("post")),
            optimizer.register_state_dict_pre_hook(lambda _, s=said: s.append("state_dict pre")),
            optimizer.register_state_dict_post_hook(
                lambda _, d, s=said: s.append(f"state_dict post {len(d['state'])}")
            ),
            optimizer.register_load_state_dict_pre_hook(lambda _, d, s=said: s.append("load pre")),
            optimizer.register_load_state_dict_post_hook(lambda _, s=said: s.append("load post")),
        ]
        twins.take_step(model, optimizer, 0, needs_closure=False, calls=[])
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        twins.take_step(model, optimizer, 1, needs_closure=False, calls=[])
        told.append(said)
    assert told[0] == told[1]
    assert len(told[0]) == 8


def test_step_returns_what_the_closure_returned(remote: Make) -> None:
    optimizer = _sides(remote())[1][1]
    assert optimizer.step() is None
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss.item() == 3.0
    assert inspect.signature(type(optimizer)).parameters["remote"].kind is inspect.Parameter.KEYWORD_ONLY
    assert isinstance(optimizer, torch.optim.Adam)


def test_averaged_models(remote: Make) -> None:
    averages = []
    for model, optimizer in _sides(remote()):
        average = torch.optim.swa_utils.AveragedModel(model)
        for number in range(5):
            twins.take_step(model, optimizer, number, needs_closure=False, calls=[])
            average.update_parameters(model)
        averages.append(average)
    twins.assert_same_parameters(averages[0].parameters(), averages[1].parameters(), "averages")


def test_the_handle(remote: Make) -> None:
    (_, local), (model, optimizer) = sides = _sides(remote())
    _step_both(sides, range(3))
    handle = optimizer.remote
    assert (handle.version, handle.incarnation, handle.worker) == (3, 1, "0")
    parameter = optimizer.param_groups[0]["params"][1]
    assert twins.same_bits(
        handle.state(parameter)["exp_avg"], local.state[local.param_groups[0]["params"][1]]["exp_avg"]
    )
    with pytest.raises(LookupError, match="in no param group"):
        handle.state(torch.zeros(2))
    expected = parameter.detach().clone()
    with torch.no_grad():
        parameter.zero_()
    assert handle.pull() == 3
    assert torch.equal(parameter, expected)
    assert handle.skip() is False
    assert handle.version == 3
    description = handle.describe(parameters=True)
    assert description.version == 3
    assert [row.key for row in description.parameters] == [f"0.{i}" for i in range(len(list(model.parameters())))]
    assert description.parameters[1].norm == pytest.approx(float(expected.norm()))


def test_local_state_is_small(remote: Make) -> None:
    sides = _sides(remote())
    _step_both(sides, range(3))
    entries = sides[1][1].state
    assert len(entries) == len(list(sides[1][0].parameters()))
    assert all(set(state) == {"step"} for state in entries.values())


def test_copies_attach_for_themselves(remote: Make) -> None:
    sides = _sides(remote())
    _step_both(sides, range(2))
    model, optimizer = sides[1]
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other_model, other = duplicate((model, optimizer))
        twins.take_step(sides[0][0], sides[0][1], 7, needs_closure=False, calls=[])
        twins.take_step(other_model, other, 7, needs_closure=False, calls=[])
        twins.assert_same_parameters(sides[0][0].parameters(), other_model.parameters(), "a copy's step")
        assert other.remote.lineage == optimizer._farstep.link.standing.lineage
        model, optimizer = other_model, other


def test_a_forked_child_does_not_disturb_its_parent(remote: Make) -> None:
    sides = _sides(remote())
    _step_both(sides, range(2))
    pid = os.fork()
    if pid == 0:
        os._exit(0 if len(sides[1][1].param_groups) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    _step_both(sides, range(2, 4))


def test_a_third_party_class(remote: Make) -> None:
    hosted_class = farstep.remote_optimizer(Counting)
    model = twins.small_model()
    other = twins.twin(model)
    sides = [(model, Counting(model.parameters())), (other, hosted_class(other.parameters(), remote=remote()))]
    _step_both(sides, range(4))
    group = sides[1][1].param_groups[0]
    assert (group["k"], group["lr"]) == (4, sides[0][1].param_groups[0]["lr"])
    twins.assert_same_state(sides[1][1], sides[0][1], "state_dict()")


def test_a_step_that_raises_midway_changes_nothing(remote: Make) -> None:
    model = twins.small_model()
    optimizer = farstep.remote_optimizer(Counting)(model.parameters(), fail_at=3, remote=remote())
    for number in range(2):
        twins.take_step(model, optimizer, number, needs_closure=False, calls=[])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="told to fail at step 3") as raised:
        twins.take_step(model, optimizer, 2, needs_closure=False, calls=[])
    assert "the step was not applied" in "".join(raised.value.__notes__)
    assert isinstance(raised.value.__cause__, errors.StepFailedError)
    optimizer.remote.pull()
    twins.assert_same_parameters(before, model.parameters(), "after the failure")
    twins.assert_same_tree(optimizer.state_dict(), state, "state_dict()")
    optimizer.param_groups[0]["fail_at"] = -1
    twins.take_step(model, optimizer, 2, needs_closure=False, calls=[])
    assert optimizer.remote.version == 3


def test_an_unregistered_class_is_refused_by_name(remote: Make) -> None:
    class Unheard(Counting):
        pass

    with pytest.raises(errors.UnknownOptimizerError, match=r"no optimizer 'Unheard'"):
        farstep.remote_optimizer(Unheard)([nn.Parameter(torch.zeros(2))], remote=remote())


def test_an_overflow_on_one_worker_makes_it_abstain(remote: Make) -> None:
    name = remote().name
    models = [twins.small_model() for _ in range(2)]
    scales: list[list[float]] = [[], []]

    def work(rank: int) -> int:
        model = models[rank]
        hosted = optim.SGD(model.parameters(), lr=0.1, remote=remote(name=name, worker=rank, policy=Sync(2)))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(6):
            hosted.zero_grad()
            loss = model(twins.batch(model, number * 2 + rank)).square().mean()
            loss = loss * float("inf") if number == 2 and rank == 1 else loss
            scaler.scale(loss).backward()
            scaler.step(hosted)
            scaler.update()
            scales[rank].append(scaler.get_scale())
        version = hosted.remote.version
        hosted.remote.close()
        return int(version)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [6, 6]
    assert scales[0] == [1024.0] * 6
    assert scales[1] == [1024.0] * 2 + [512.0] * 4
    twins.assert_same_parameters(models[0].parameters(), models[1].parameters(), "the two workers")
