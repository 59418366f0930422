"""Hugging Face Accelerate trains with the proxy as it does with torch's class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.optim import lr_scheduler

from tests.frameworks.twice import BATCHES, Hooked, Run, loader, network, run_twice

pytestmark = pytest.mark.frameworks


def _reset() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _states_of_its_own() -> Iterator[None]:
    _reset()
    yield
    _reset()


def _accelerator(**options: Any) -> Accelerator:
    _reset()
    return Accelerator(cpu=True, **options)


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_accumulation_clipping_a_scheduler_and_saved_states(mixed: str, tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        accelerator = _accelerator(gradient_accumulation_steps=2, mixed_precision=mixed)
        bare = network(dropout=True)
        plain = optim.AdamW(bare.parameters(), lr=0.01)
        hooked = Hooked(plain)
        scheduler = lr_scheduler.OneCycleLR(plain, 0.02, total_steps=4 * BATCHES // 2)
        model, optimizer, batches, scheduler = accelerator.prepare(bare, plain, loader(shuffle=True), scheduler)
        losses, rates = [], []
        for epoch in range(4):
            if epoch == 2:
                accelerator.save_state(str(folder / "saved"))
            if epoch == 3:
                # Once more from the end of the second epoch, random numbers and order of the batches included.
                accelerator.load_state(str(folder / "saved"))
            for inputs, targets in batches:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                        accelerator.clip_grad_value_(model.parameters(), 0.01)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    losses.append(loss.item())
                    rates.append(scheduler.get_last_lr())
        assert not optimizer.step_was_skipped
        return Run(losses, bare, [plain], {"rates": rates, "hooks": hooked.calls})

    run = run_twice(script, tmp_path)
    assert len(run.losses) == 4 * BATCHES
    assert run.losses[2 * BATCHES : 3 * BATCHES] == run.losses[3 * BATCHES :], "the state that was saved came back"
    assert run.facts["hooks"] == ["pre", "post"] * (4 * BATCHES // 2)
    assert run.optimizers[0].remote.incarnation == 2


def test_prepare_restores_nothing_before_or_amid_training(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        bare = network()
        plain = optim.Adam(bare.parameters(), lr=0.01)
        losses = []
        for _ in range(2):
            accelerator = _accelerator()
            model, optimizer, batches = accelerator.prepare(bare, plain, loader())
            for inputs, targets in batches:
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            accelerator.free_memory()
        return Run(losses, bare, [plain])

    [optimizer] = run_twice(script, tmp_path).optimizers
    assert (optimizer.remote.incarnation, optimizer.remote.version) == (1, 2 * BATCHES)


def test_a_scaler_that_overflows_skips_steps(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        accelerator = _accelerator()
        # On the CPU Accelerate makes none itself, but it takes one.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
        bare = network()
        plain = optim.SGD(bare.parameters(), lr=0.003, momentum=0.9)
        hooked = Hooked(plain)
        schedule = lr_scheduler.LinearLR(plain, total_iters=8)
        model, optimizer, batches, scheduler = accelerator.prepare(bare, plain, loader(), schedule)
        losses, skipped = [], []
        for _ in range(3):
            for inputs, targets in batches:
                loss = nn.functional.cross_entropy(model(inputs), targets, reduction="sum")
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                skipped.append(optimizer.step_was_skipped)
        return Run(losses, bare, [plain], {"skipped": skipped, "hooks": hooked.calls, "rate": schedule.get_last_lr()})

    run = run_twice(script, tmp_path)
    stepped = run.facts["skipped"].count(False)
    assert 0 < stepped < 3 * BATCHES, "some steps overflow and some do not"
    assert len(run.facts["hooks"]) == 2 * stepped
    assert run.optimizers[0].remote.version == stepped


def test_two_models_with_an_optimizer_each(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        accelerator = _accelerator()
        teacher, student = network(), nn.Linear(64, 10)
        plain = [optim.Adam(teacher.parameters(), lr=0.01), optim.RMSprop(student.parameters(), lr=0.01)]
        first, second, one, two, batches = accelerator.prepare(teacher, student, *plain, loader())
        losses = []
        for number, (inputs, targets) in enumerate(batches):
            if number == 3:
                accelerator.save_state(str(folder / "saved"), safe_serialization=False)
                accelerator.load_state(str(folder / "saved"))
            loss = nn.functional.cross_entropy(first(inputs), targets)
            accelerator.backward(loss)
            one.step()
            one.zero_grad()
            distance = nn.functional.mse_loss(second(inputs), first(inputs).detach())
            accelerator.backward(distance)
            two.step()
            two.zero_grad()
            losses += [loss.item(), distance.item()]
        return Run(losses, nn.ModuleList([teacher, student]), plain)

    first, second = run_twice(script, tmp_path).optimizers
    # Nothing was stepped between saving and loading, so there was nothing to restore.
    assert (first.remote.incarnation, second.remote.incarnation) == (1, 1)
