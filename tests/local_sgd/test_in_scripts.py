"""What scripts and frameworks do with an optimizer, done with a LocalSGD."""

from __future__ import annotations

import copy
import io
import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

from farstep import LocalSGD, Sync, lr_scheduler, optim
from farstep.optim.handle import RemoteHandle
from farstep_wire.errors import ConfigurationError
from tests.faults.models import parameters, same_bits, set_gradients
from tests.local_sgd.models import Simulation, Worker, adamw, crew, remote, together
from tests.local_sgd.test_algorithms import DILOCO
from tests.support.servers import ServerProcess

AVERAGE = partial(optim.SGD, lr=1.0)


def test_it_is_an_optimizer_whose_groups_are_the_inner_ones(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=2)
    optimizer, inner = worker.optimizer, worker.optimizer.inner
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.defaults is inner.defaults
    worker.steps(range(1))
    assert optimizer.state is inner.state
    assert set(optimizer.state) == set(worker.params)
    assert "lr: 0.05" in repr(optimizer)
    optimizer.zero_grad()
    assert all(p.grad is None for p in worker.params)
    assert optimizer.sync_every == 2
    assert isinstance(optimizer.remote, RemoteHandle)
    optimizer.close()


def test_a_scheduler_drives_the_inner_optimizer(server: ServerProcess, name: str) -> None:
    simulation = Simulation(1, DILOCO)
    worker = Worker(remote(server.address, name), sync_every=3)
    schedulers = [OneCycleLR(o, max_lr=0.1, total_steps=9) for o in (simulation.inner[0], worker.optimizer)]
    for number in range(9):
        simulation.steps(range(number, number + 1))
        if number % 3 == 2:
            simulation.sync()
        worker.steps(range(number, number + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert same_bits(worker.params, simulation.theta)
    assert worker.optimizer.param_groups[0]["lr"] == simulation.inner[0].param_groups[0]["lr"]
    assert worker.optimizer.outer.param_groups[0]["lr"] == 0.7
    worker.optimizer.close()


def test_closures_are_the_inner_optimizers(server: ServerProcess, name: str) -> None:
    target = torch.tensor([3.0, -1.0])
    twin, own = (Parameter(torch.zeros(2)) for _ in range(2))
    local = torch.optim.LBFGS([twin], max_iter=3)
    inner = torch.optim.LBFGS([own], max_iter=3)
    optimizer = LocalSGD(inner, remote(server.address, name), sync_every=2, outer=AVERAGE)
    evaluations = 0

    def loss_of(p: Parameter, of: torch.optim.Optimizer) -> Any:
        def closure() -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            of.zero_grad()
            loss = ((p - target) ** 4).sum()
            loss.backward()
            return loss

        return closure

    for _ in range(2):
        theirs: Any = local.step(loss_of(twin, local))
        before = evaluations
        mine = optimizer.step(loss_of(own, optimizer))
        assert evaluations - before > 1
        assert mine.item() == theirs.item()
    torch.testing.assert_close(own, twin)
    assert optimizer.remote.version == 1
    optimizer.close()


def scaled_steps(optimizer: LocalSGD, weight: Parameter, inputs: list[float], scaler: torch.amp.GradScaler) -> None:
    for value in inputs:
        optimizer.zero_grad()
        scaler.scale((weight * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()


def test_an_overflow_on_one_worker_keeps_nobody_waiting(server: ServerProcess, name: str) -> None:
    """The worker that skips an inner step still takes part in the sync, with what its other steps have learnt."""

    def work(number: int) -> tuple[Parameter, int, float]:
        weight = Parameter(torch.zeros(2))
        inner = torch.optim.SGD([weight], lr=0.5)
        where = remote(server.address, name, number, Sync(2))
        optimizer = LocalSGD(inner, where, sync_every=2, outer=AVERAGE)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaled_steps(optimizer, weight, [1.0, math.inf] if number else [1.0, 1.0], scaler)
        version = optimizer.remote.version
        optimizer.close()
        return weight, version, scaler.get_scale()

    (first, *one), (second, *other) = together([lambda: work(0), lambda: work(1)])
    # Two steps of 0.5 on one side and one on the other: they meet in the middle.
    assert first.tolist() == second.tolist() == [-0.75, -0.75]
    assert one == [1, 8.0]
    assert other == [1, 4.0]


def test_a_worker_that_only_overflowed_abstains(server: ServerProcess, name: str) -> None:
    weight = Parameter(torch.ones(2))
    optimizer = LocalSGD(torch.optim.SGD([weight], lr=0.5), remote(server.address, name), sync_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_steps(optimizer, weight, [math.inf, math.inf], scaler)
    assert weight.tolist() == [1.0, 1.0]
    assert optimizer.remote.version == 0
    assert optimizer.remote.describe().workers[0].abstentions == 1
    optimizer.close()


@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled by the script"])
def test_scaled_gradients_are_unscaled_once(server: ServerProcess, name: str, unscaled: bool) -> None:
    weight = Parameter(torch.zeros(2))
    optimizer = LocalSGD(torch.optim.SGD([weight], lr=0.5), remote(server.address, name), sync_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((weight * 3.0).sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_([weight], 2.0)
    scaler.step(optimizer)
    assert weight.tolist() == ([-1.0, -1.0] if unscaled else [-1.5, -1.5])
    optimizer.close()


# State.


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_run_goes_on_from_its_state_dict_on_a_fresh_server(server: ServerProcess, name: str) -> None:
    """In the middle of an interval, with momentum on both sides: the bits are those of the run that was not interrupted."""
    whole = Worker(remote(server.address, name), sync_every=4)
    whole.steps(range(6), num_samples=2)
    saved = through_a_file({"model": [p.detach() for p in whole.params], "optimizer": whole.optimizer.state_dict()})
    whole.steps(range(6, 12), num_samples=2)

    resumed = Worker(remote(server.address, f"{name}-b"), seed=5, sync_every=4)
    with torch.no_grad():
        for p, q in zip(resumed.params, saved["model"], strict=True):
            p.copy_(q)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.steps(range(6, 12), num_samples=2)
    assert same_bits(resumed.params, whole.params)
    assert resumed.optimizer.remote.version == 2  # the syncs after step 8 and step 12
    for worker in (whole, resumed):
        worker.optimizer.close()


def test_a_worker_that_comes_back_to_its_server_changes_nothing_there(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=4)
    worker.steps(range(6))
    model = [p.detach().clone() for p in worker.params]
    state = worker.optimizer.state_dict()
    worker.optimizer.close()
    back = Worker(remote(server.address, name), seed=5, sync_every=4)
    with torch.no_grad():
        for p, q in zip(back.params, model, strict=True):
            p.copy_(q)
    back.optimizer.load_state_dict(state)
    assert (back.optimizer.remote.version, back.optimizer.remote.incarnation) == (1, 1)
    whole = Simulation(1, DILOCO)
    for steps in (range(4), range(4, 8)):
        whole.steps(steps)
        whole.sync()
    back.steps(range(6, 8))
    assert same_bits(back.params, whole.theta)
    back.optimizer.close()


def test_a_state_dict_goes_between_it_and_the_inner_class(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=4)
    worker.steps(range(2))
    params = parameters()
    plain = adamw(params)
    plain.load_state_dict(worker.optimizer.state_dict())
    assert [float(entries["step"]) for entries in plain.state.values()] == [2.0, 2.0, 2.0]
    set_gradients(params, 2)
    plain.step()
    worker.optimizer.load_state_dict(plain.state_dict())
    assert [float(entries["step"]) for entries in worker.optimizer.state.values()] == [3.0, 3.0, 3.0]
    worker.steps(range(3, 5))
    assert worker.optimizer.remote.version == 1, "the interval goes on where it was"
    worker.optimizer.close()


def test_a_state_dict_of_another_model_changes_nothing(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=4)
    worker.steps(range(1))
    state = worker.optimizer.state_dict()
    state["local_sgd"]["parameters"][1] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"shapes \[\(5, 3\), \(9,\), \(\)\]; this optimizer has"):
        worker.optimizer.load_state_dict(state)
    worker.optimizer.close()


def test_hooks(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=2)
    optimizer = worker.optimizer
    fired: list[str] = []

    def note(what: str) -> Any:
        return lambda *_: fired.append(what)

    optimizer.register_step_pre_hook(note("step pre"))
    optimizer.register_step_post_hook(note("step post"))
    optimizer.register_state_dict_pre_hook(note("save pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(note("load pre"))
    optimizer.register_load_state_dict_post_hook(note("load post"))
    worker.steps(range(2))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert fired == ["step pre", "step post"] * 2 + ["save pre", "load pre", "load post"]
    optimizer.close()


def test_a_copy_is_a_worker_of_its_own(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=3)
    worker.steps(range(2))
    params, optimizer = copy.deepcopy((worker.params, worker.optimizer))
    worker.optimizer.close()
    assert optimizer.param_groups[0]["params"][0] is params[0]
    set_gradients(params, 2)
    optimizer.step()
    simulation = Simulation(1, DILOCO)
    simulation.steps(range(3))
    simulation.sync()
    assert same_bits(params, simulation.theta)
    optimizer.close()


# Groups and parameters.


def test_groups_are_added_to_both(server: ServerProcess, name: str) -> None:
    with ExitStack() as stack:
        workers = crew(stack, server.address, name, 2, sync_every=2)
        together([lambda w=w: w.steps(range(1)) for w in workers])
        extra = [Parameter(torch.ones(4)) for _ in workers]

        def add(worker: Worker) -> None:
            worker.optimizer.add_param_group({"params": [extra[worker.number]], "lr": 0.5})
            worker.params.append(extra[worker.number])
            worker.steps(range(1, 4))

        together([lambda w=w: add(w) for w in workers])
        assert [w.optimizer.remote.version for w in workers] == [2, 2]
        assert same_bits(workers[0].params, workers[1].params)
        assert extra[0].tolist() != [1.0] * 4
        assert workers[0].optimizer.remote.describe().groups[1]["sync_every"] == 2


def test_names_are_the_hosted_keys(server: ServerProcess, name: str) -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = LocalSGD(inner, remote(server.address, name), sync_every=2)
    described = optimizer.remote.describe(parameters=True)
    assert [p.key for p in described.parameters] == ["weight", "bias"]
    optimizer.close()


def test_parameters_changed_right_after_a_sync_are_taken_over(server: ServerProcess, name: str) -> None:
    """A checkpoint loaded into the model after the optimizer was built is where training starts, not a huge gradient."""
    worker = Worker(remote(server.address, name), seed=5, sync_every=2)
    with torch.no_grad():
        for p, q in zip(worker.params, parameters(), strict=True):
            p.copy_(q)
    simulation = Simulation(1, DILOCO)
    simulation.steps(range(2))
    simulation.sync()
    worker.steps(range(2))
    assert same_bits(worker.params, simulation.theta)
    with torch.no_grad():
        worker.params[0].zero_()
    worker.optimizer.sync()
    assert same_bits(worker.params, [torch.zeros(5, 3), *simulation.theta[1:]]), "taken over as it is, momentum or not"
    worker.optimizer.remote.pull()
    assert not worker.params[0].detach().any()
    worker.optimizer.close()


def test_the_handle_speaks_of_the_models_parameters(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=4)
    handle = worker.optimizer.remote
    worker.steps(range(4))
    agreed = [p.detach().clone() for p in worker.params]
    assert handle.state(worker.params[0])["momentum_buffer"].shape == (5, 3)
    with pytest.raises(LookupError, match=r"shape \(8,\)"):
        handle.state(torch.zeros(8))
    for drop in (handle.pull, handle.skip):
        worker.steps(range(1))
        assert not same_bits(worker.params, agreed)
        drop()
        assert same_bits(worker.params, agreed)
    worker.steps(range(3))
    assert handle.version == 1, "the interval began anew"
    worker.steps(range(1))
    assert handle.version == 2
    worker.optimizer.close()
    assert "not attached" in repr(handle)


def test_an_average_is_for_looking_at(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=2)
    handle = worker.optimizer.remote
    handle.set(ema_decay=0.5)
    agreed = []
    for numbers in (range(2), range(2, 4)):
        worker.steps(numbers)
        agreed.append([p.detach().clone() for p in worker.params])
    handle.pull(average="ema")
    assert not same_bits(worker.params, agreed[1])
    before = [p.detach().clone() for p in worker.params]
    with pytest.raises(ConfigurationError, match=r"holds an average.*call opt.remote.pull\(\)"):
        worker.steps(range(1))
    assert same_bits(worker.params, before)
    handle.pull()
    assert same_bits(worker.params, agreed[1])
    worker.steps(range(4, 6))
    assert handle.version == 3
    with pytest.raises(ConfigurationError, match="there is nothing to accumulate"):
        handle.accumulate()
    worker.optimizer.close()


def test_a_schedule_on_the_server_drives_the_outer_optimizer(server: ServerProcess, name: str) -> None:
    worker = Worker(remote(server.address, name), sync_every=2)
    simulation = Simulation(1, DILOCO)
    hosted = lr_scheduler.StepLR(worker.optimizer.outer, 1, gamma=0.5)  # type: ignore[attr-defined]
    local = torch.optim.lr_scheduler.StepLR(simulation.outer, 1, gamma=0.5)
    for steps in (range(2), range(2, 4), range(4, 6)):
        simulation.steps(steps)
        simulation.sync()
        local.step()
        worker.steps(steps)
    assert same_bits(worker.params, simulation.theta)
    assert hosted.get_last_lr() == local.get_last_lr() == [0.7 / 8]
    worker.optimizer.close()
