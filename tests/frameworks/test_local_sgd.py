"""Frameworks drive a LocalSGD as they drive any optimizer, and resume it in the middle of an interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.optim import lr_scheduler

from farstep import LocalSGD
from tests.frameworks.modules import Classifier, fit
from tests.frameworks.twice import BATCHES, loader, network
from tests.parity.twins import same_bits

pytestmark = pytest.mark.frameworks

H = 4


class Local(Classifier):
    """A Classifier whose AdamW is the inner optimizer."""

    def make_optimizer(self) -> Any:
        return LocalSGD(super().make_optimizer(), sync_every=H)


def test_lightning_resumes_between_two_syncs(tmp_path: Path) -> None:
    assert BATCHES % H, "the first epoch ends in the middle of an interval"
    runs = []
    for path in (None, tmp_path / "saved.ckpt"):
        torch.manual_seed(0)
        module = Local(torch.optim, epochs=2)
        if path is not None:
            half = Local(torch.optim, epochs=2)
            fit(half, tmp_path, 1).save_checkpoint(path)
        fit(module, tmp_path, 2, path=path)
        runs.append(module)
    straight, resumed = runs
    assert straight.losses[BATCHES:] == resumed.losses
    for mine, other in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert same_bits(mine, other)
    optimizer: Any = straight.trainer.strategy.optimizers[0]
    assert optimizer.remote.version == 2 * BATCHES // H


@pytest.fixture
def _accelerate() -> Any:
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.mark.usefixtures("_accelerate")
def test_accelerate_saves_and_loads_it(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    bare = network()
    local = LocalSGD(torch.optim.AdamW(bare.parameters(), lr=0.01), sync_every=H)
    scheduler = lr_scheduler.OneCycleLR(local, 0.02, total_steps=2 * BATCHES)
    model, optimizer, batches, scheduler = accelerator.prepare(bare, local, loader(), scheduler)
    assert local.remote.incarnation == 1, "what prepare loads is what it has just fetched"
    ends = []
    for epoch in range(3):
        if epoch == 1:
            accelerator.save_state(str(tmp_path / "saved"))
        if epoch == 2:
            accelerator.load_state(str(tmp_path / "saved"))
        for inputs, targets in batches:
            accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in bare.parameters()])
    assert all(same_bits(a, b) for a, b in zip(ends[1], ends[2], strict=True)), "the same epoch from the same state"
    assert not all(same_bits(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    assert local.remote.incarnation == 2
    local.close()
