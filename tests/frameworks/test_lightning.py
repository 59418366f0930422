"""PyTorch Lightning and Lightning Fabric train with the proxy as they do with torch's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.frameworks.conftest import MakeOptimizer
from tests.parity.twins import assert_same_parameters

pytestmark = pytest.mark.frameworks


def _data() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


class Regression(lightning.LightningModule):
    """A module as Lightning's documentation writes it; ``make`` is the optimizer class."""

    def __init__(self, make: MakeOptimizer) -> None:
        super().__init__()
        self.network = _network()
        self.make = make
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TwoOptimizers(Regression):
    """Manual optimization with two optimizers, one of which steps every second batch."""

    def __init__(self, make: MakeOptimizer) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        first, second = self.optimizers()
        loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        first.zero_grad()
        if number % 2 == 0:
            second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if number % 2:
            second.step()

    def configure_optimizers(self) -> Any:
        return [self.make(self.network[0].parameters(), lr=0.01), self.make(self.network[2].parameters(), lr=0.02)]


def _trainer(folder: Path, epochs: int, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip


def test_a_trainer_with_clipping_scheduler_checkpoint_and_resume(both: list[MakeOptimizer], tmp_path: Path) -> None:
    modules = []
    for number, make in enumerate(both):
        folder = tmp_path / str(number)
        module = Regression(make)
        trainer = _trainer(folder, 2, gradient_clip_val=0.5, enable_checkpointing=False)
        trainer.fit(module, _data())
        trainer.save_checkpoint(folder / "two.ckpt")
        resumed = Regression(make)
        _trainer(folder, 4, gradient_clip_val=0.5, enable_checkpointing=False).fit(
            resumed, _data(), ckpt_path=folder / "two.ckpt"
        )
        straight = Regression(make)
        _trainer(folder, 4, gradient_clip_val=0.5, enable_checkpointing=False).fit(straight, _data())
        assert module.losses + resumed.losses == straight.losses
        assert_same_parameters(resumed.parameters(), straight.parameters(), "resumed and straight")
        modules.append(straight)
    assert len(modules[0].losses) == 24
    assert modules[0].losses == modules[1].losses
    assert_same_parameters(modules[0].parameters(), modules[1].parameters(), "torch's and farstep's")


def test_manual_optimization_with_two_optimizers(both: list[MakeOptimizer], tmp_path: Path) -> None:
    modules = []
    for make in both:
        module = TwoOptimizers(make)
        _trainer(tmp_path, 2, enable_checkpointing=False).fit(module, _data())
        modules.append(module)
    assert modules[0].losses == modules[1].losses
    assert_same_parameters(modules[0].parameters(), modules[1].parameters(), "torch's and farstep's")


def test_accumulated_batches(both: list[MakeOptimizer], tmp_path: Path) -> None:
    modules = []
    for make in both:
        module = Regression(make)
        _trainer(tmp_path, 2, accumulate_grad_batches=3, enable_checkpointing=False).fit(module, _data())
        modules.append(module)
    assert modules[0].losses == modules[1].losses
    assert_same_parameters(modules[0].parameters(), modules[1].parameters(), "torch's and farstep's")


def test_fabric(both: list[MakeOptimizer], tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    losses: list[list[float]] = [[], []]
    models = []
    for number, make in enumerate(both):
        fabric = Fabric(accelerator="cpu", devices=1)
        network = _network()
        model, optimizer = fabric.setup(network, make(network.parameters(), lr=0.01))
        loader = fabric.setup_dataloaders(_data())
        for epoch in range(4):
            if epoch == 2:
                fabric.save(tmp_path / f"{number}.ckpt", {"model": model, "optimizer": optimizer})
                for parameter in network.parameters():
                    parameter.data.zero_()
                fabric.load(tmp_path / f"{number}.ckpt", {"model": model, "optimizer": optimizer}, weights_only=True)
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(inputs), targets)
                fabric.backward(loss)
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                losses[number].append(loss.item())
        models.append(network)
    assert len(losses[0]) == 24
    assert losses[0] == losses[1]
    assert_same_parameters(models[0].parameters(), models[1].parameters(), "torch's and farstep's")
