"""Lightning Fabric trains with the proxy as it does with torch's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler

from tests.frameworks.twice import BATCHES, Hooked, Run, loader, network, run_twice

pytestmark = pytest.mark.frameworks


def _fabric(**options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **options)


@pytest.mark.parametrize("clip", [{"max_norm": 0.1}, {"clip_val": 0.005}], ids=["norm", "value"])
def test_clipping_a_scheduler_and_a_checkpoint(clip: dict[str, float], tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        fabric = _fabric()
        model = network(dropout=True)
        bare = optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
        hooked = Hooked(bare)
        scheduler = lr_scheduler.CosineAnnealingLR(bare, 4)
        module, optimizer = fabric.setup(model, bare)
        batches = fabric.setup_dataloaders(loader())
        state = {"model": module, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}
        losses = []
        for epoch in range(4):
            if epoch == 2:
                fabric.save(folder / "saved.ckpt", {**state, "epoch": epoch})
            if epoch == 3:
                # Once more from the end of the second epoch, as a run does that was interrupted in the third.
                fabric.load(folder / "saved.ckpt", state, weights_only=True)
                assert state["epoch"] == 2
            for inputs, targets in batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module(inputs), targets)
                fabric.backward(loss)
                fabric.clip_gradients(module, optimizer, **clip)
                optimizer.step()
                losses.append(loss.item())
            scheduler.step()
        return Run(losses, model, [bare], {"hooks": hooked.calls, "rates": scheduler.get_last_lr()})

    run = run_twice(script, tmp_path)
    assert run.facts["hooks"] == ["pre", "post"] * (4 * BATCHES)
    assert run.optimizers[0].remote.incarnation == 2


def test_accumulation_with_a_closure_and_a_group_that_is_added(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        fabric = _fabric()
        model = network()
        bare = optim.SGD(model[:2].parameters(), lr=0.1, momentum=0.9)
        module, optimizer = fabric.setup(model, bare)
        losses: list[float] = []
        for number, (inputs, targets) in enumerate(fabric.setup_dataloaders(loader())):
            accumulating = number % 3 != 2

            def closure(inputs: Any = inputs, targets: Any = targets, skip: bool = accumulating) -> Any:
                with fabric.no_backward_sync(module, enabled=skip):
                    loss = nn.functional.cross_entropy(module(inputs), targets)
                    fabric.backward(loss)
                losses.append(loss.item())
                return loss

            if accumulating:
                closure()
                continue
            optimizer.step(closure)
            optimizer.zero_grad()
            if number == 2:
                optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.05})
        return Run(losses, model, [bare])

    run = run_twice(script, tmp_path)
    assert (len(run.losses), run.optimizers[0].remote.version) == (BATCHES, BATCHES // 3)


def test_l_bfgs(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        fabric = _fabric()
        model = network()
        bare = optim.LBFGS(model.parameters(), max_iter=3)
        module, optimizer = fabric.setup(model, bare)
        losses: list[float] = []
        for inputs, targets in fabric.setup_dataloaders(loader()):

            def closure(inputs: Any = inputs, targets: Any = targets) -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module(inputs), targets)
                fabric.backward(loss)
                losses.append(loss.item())
                return loss

            losses.append(optimizer.step(closure).item())
        return Run(losses, model, [bare])

    run_twice(script, tmp_path)


def test_half_precision_with_overflows_and_two_optimizers(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        fabric = _fabric(plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
        model = network()
        bare = [optim.Adam(model[:2].parameters(), lr=0.01), optim.SGD(model[4].parameters(), lr=0.1)]
        hooked = [Hooked(optimizer) for optimizer in bare]
        module, *optimizers = fabric.setup(model, *bare)
        losses = []
        for _ in range(3):
            for inputs, targets in fabric.setup_dataloaders(loader()):
                loss = nn.functional.cross_entropy(module(inputs), targets)
                fabric.backward(loss)
                fabric.clip_gradients(module, optimizers[0], max_norm=0.5, error_if_nonfinite=False)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return Run(losses, model, bare, {"scale": scaler.get_scale(), "hooks": [h.calls for h in hooked]})

    run = run_twice(script, tmp_path)
    stepped = [len(calls) // 2 for calls in run.facts["hooks"]]
    assert 0 < min(stepped) <= max(stepped) < 3 * BATCHES, "some steps overflow and some do not"
    assert [optimizer.remote.version for optimizer in run.optimizers] == stepped
