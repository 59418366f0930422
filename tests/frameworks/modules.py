"""LightningModules as Lightning's documentation writes them; each takes the module that its optimizers come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.frameworks.twice import BATCHES, Hooked, Run, loader, network

Batch = tuple[Tensor, Tensor]


def classes(optim: Any) -> SimpleNamespace:
    """Return the optimizer classes of a module as an object that can be copied: callbacks copy whole LightningModules."""
    return SimpleNamespace(**{name: getattr(optim, name) for name in ("Adam", "AdamW", "LBFGS", "RMSprop", "SGD")})


class Classifier(lightning.LightningModule):
    """Automatic optimization: AdamW over two groups, a scheduler by step."""

    def __init__(self, optim: Any, *, epochs: int = 2, dropout: bool = False) -> None:
        super().__init__()
        self.network = network(dropout=dropout)
        self.optim = classes(optim)
        self.epochs = epochs
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.hooked: list[Hooked] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("validation", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def make_optimizer(self) -> Any:
        weights = [p for p in self.network.parameters() if p.dim() > 1]
        others = [p for p in self.network.parameters() if p.dim() <= 1]
        optimizer = self.optim.AdamW([{"params": weights}, {"params": others, "weight_decay": 0.0}], lr=0.01)
        self.hooked.append(Hooked(optimizer))
        return optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=self.epochs * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def run(self, **facts: Any) -> Run:
        """Return what was done so far."""
        calls = [hooked.calls for hooked in self.hooked]
        facts = {"rates": self.rates, "hooks": calls, **facts}
        return Run(self.losses, self, self.trainer.strategy.optimizers, facts)


class Plateau(Classifier):
    """Two schedulers by epoch, one of them driven by the validation loss, and plain SGD with momentum."""

    def configure_optimizers(self) -> Any:
        optimizer = self.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return [optimizer], [
            lr_scheduler.ExponentialLR(optimizer, 0.9),
            {"scheduler": plateau, "monitor": "validation"},
        ]


class SecondOrder(Classifier):
    """L-BFGS, whose closure Lightning hands over as for any other."""

    def configure_optimizers(self) -> Any:
        return self.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


class Adversaries(lightning.LightningModule):
    """Manual optimization of a generator and a discriminator, which steps twice as often, each with its own scheduler."""

    def __init__(self, optim: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optim = classes(optim)
        torch.manual_seed(2)
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.losses: list[float] = []

    def _judge(self, images: Tensor, *, real: bool) -> Tensor:
        verdict = self.discriminator(images)
        return nn.functional.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, float(real)))

    def training_step(self, batch: Batch, number: int) -> None:
        first, second = self.optimizers()
        noise = torch.randn(len(batch[0]), 8)
        if number % 2:
            self.toggle_optimizer(first)
            self._descend(first, self._judge(self.generator(noise), real=True))
            self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        loss = self._judge(batch[0], real=True) + self._judge(self.generator(noise).detach(), real=False)
        self._descend(second, loss)
        self.untoggle_optimizer(second)

    def _descend(self, optimizer: Any, loss: Tensor) -> None:
        self.losses.append(loss.item())
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        generator = self.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.999))
        discriminator = self.optim.RMSprop(self.discriminator.parameters(), lr=0.005)
        schedulers = [lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (generator, discriminator)]
        return [generator, discriminator], schedulers


def trainer(folder: Path, epochs: int = 2, **options: Any) -> Any:
    """Return a silent Trainer on the CPU, which writes nothing unless told to."""
    options = {"enable_checkpointing": False, **options}
    return lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def fit(module: Any, folder: Path, epochs: int = 2, *, path: Path | None = None, **options: Any) -> Any:
    """Train a module on the digits, in their order, and validate after every epoch where it can; return the Trainer."""
    made = trainer(folder, epochs, **options)
    made.fit(module, loader(), loader() if isinstance(module, Classifier) else None, ckpt_path=path)
    return made
