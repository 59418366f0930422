"""Schedulers, scalers, hooks and groups: all that drives an optimizer from outside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from farstep import Remote, optim
from tests.parity import twins

STEPS = 50


def _sequential(optimizer: Any) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[5])


def _chained(optimizer: Any) -> Any:
    first = lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=4)
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 20, 33], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=12),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=30, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=15, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=8, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=6, mode="triangular2"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=10),
}


def test_the_table_has_every_scheduler_of_torch() -> None:
    classes = {
        name
        for name in lr_scheduler.__all__
        if inspect.isclass(cls := getattr(lr_scheduler, name)) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert classes - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_scheduler_drives_the_remote_learning_rate(
    name: str, tensor_lr: bool, remote: Callable[..., Remote], tally: Callable[..., None]
) -> None:
    if tensor_lr and name in {"CyclicLR", "OneCycleLR"}:
        name_of_error = _construct(name, tensor_lr, torch.optim.SGD)
        assert name_of_error == _construct(name, tensor_lr, optim.SGD, remote=remote())
    local_model = twins.small_model()
    remote_model = twins.twin(local_model)
    lr: Any = (lambda: torch.tensor(0.05)) if tensor_lr else (lambda: 0.05)
    pairs = []
    for cls, model, extra in ((torch.optim.SGD, local_model, {}), (optim.SGD, remote_model, {"remote": remote()})):
        optimizer = cls(model.parameters(), lr=lr(), momentum=0.9, **extra)
        pairs.append((model, optimizer, SCHEDULERS[name](optimizer)))
    for number in range(STEPS):
        for model, optimizer, scheduler in pairs:
            loss = twins.closure_for(model, optimizer, number, [])()
            optimizer.step()
            scheduler.step(loss.item()) if name == "ReduceLROnPlateau" else scheduler.step()
        local_lr, remote_lr = (optimizer.param_groups[0]["lr"] for _, optimizer, _ in pairs)
        assert float(local_lr) == float(remote_lr)
        twins.assert_same_parameters(local_model.parameters(), remote_model.parameters(), f"step {number}")
    server_lr = pairs[1][1].remote.describe().groups[0]["lr"]
    assert isinstance(server_lr, torch.Tensor) == isinstance(remote_lr, torch.Tensor)
    tally("SGD", "schedulers")


def _construct(name: str, tensor_lr: bool, cls: Any, **extra: Any) -> str | None:
    optimizer = cls(
        twins.small_model().parameters(), lr=torch.tensor(0.05) if tensor_lr else 0.05, momentum=0.9, **extra
    )
    try:
        SCHEDULERS[name](optimizer)
    except Exception as error:  # noqa: BLE001 - both sides must say the same
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_a_grad_scaler_run_with_overflows_equals_the_local_one(
    options: dict[str, Any], remote: Callable[..., Remote]
) -> None:
    local_model = twins.small_model()
    remote_model = twins.twin(local_model)
    runs = []
    for cls, model, extra in ((torch.optim.AdamW, local_model, {}), (optim.AdamW, remote_model, {"remote": remote()})):
        optimizer = cls(model.parameters(), lr=0.01, **options, **extra)
        runs.append((model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)))
    overflows = 0
    for number in range(20):
        scales = []
        for model, optimizer, scaler in runs:
            optimizer.zero_grad()
            loss = model(twins.batch(model, number)).square().mean()
            if number in {3, 4, 11}:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if number % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            overflows += scaler.get_scale() < before
            scales.append(scaler.get_scale())
        assert scales[0] == scales[1]
        twins.assert_same_parameters(local_model.parameters(), remote_model.parameters(), f"step {number}")
    assert overflows == 6
    twins.assert_same_state(runs[1][1], runs[0][1], "state_dict()")
