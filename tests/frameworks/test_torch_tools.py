"""torch's own tools around an optimizer: clipping, weight averaging, scaled gradients, all in one loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from tests.frameworks.twice import BATCHES, Run, loader, network, run_twice

pytestmark = pytest.mark.frameworks


def _epochs(model: nn.Module, optimizer: Any, count: int, after: Any = None) -> list[float]:
    losses = []
    for epoch in range(count):
        for inputs, targets in loader():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            losses.append(loss.item())
        if after is not None:
            after(epoch)
    return losses


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models(kind: str, tmp_path: Path) -> None:
    average = {"swa": swa_utils.get_swa_multi_avg_fn(), "ema": swa_utils.get_ema_multi_avg_fn(0.9)}[kind]

    def script(optim: Any, folder: Path) -> Run:
        model = network(dropout=True)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)

        def after(epoch: int) -> None:
            averaged.update_parameters(model)
            scheduler.step()

        losses = _epochs(model, optimizer, 3, after)
        swa_utils.update_bn(loader(), averaged)
        # The average takes the model's place, and training goes on from it.
        with torch.no_grad():
            for own, mean in zip(model.parameters(), averaged.module.parameters(), strict=True):
                own.copy_(mean)
        losses += _epochs(model, optimizer, 1)
        return Run(losses, nn.ModuleList([model, averaged]), [optimizer], {"rate": scheduler.get_last_lr()})

    [optimizer] = run_twice(script, tmp_path).optimizers
    assert (optimizer.remote.incarnation, optimizer.remote.version) == (1, 4 * BATCHES)


def test_weights_clamped_and_loaded_between_steps(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        model = network()
        optimizer = optim.Adam(model.parameters(), lr=0.01)

        def after(epoch: int) -> None:
            if epoch == 0:
                torch.save(model.state_dict(), folder / "model.pt")
            if epoch == 1:
                model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
            for parameter in model.parameters():
                parameter.data.clamp_(-0.1, 0.1)

        return Run(_epochs(model, optimizer, 3, after), model, [optimizer])

    run_twice(script, tmp_path)
