"""Lightning's own callbacks that touch parameters, groups or optimizers behind the training step's back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner

from tests.frameworks.modules import Classifier, Plateau, fit, trainer
from tests.frameworks.twice import BATCHES, Run, assert_same_run, loader, run_twice

pytestmark = pytest.mark.frameworks


def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        module = Classifier(optim, epochs=4)
        averaging = StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=2, annealing_epochs=2)
        fit(module, folder, epochs=4, callbacks=[averaging])
        return module.run(averaged=averaging._average_model is not None)

    run = run_twice(script, tmp_path)
    assert run.facts["averaged"]
    assert run.optimizers[0].param_groups[0]["lr"] == 0.005


def test_moving_averages_that_take_the_models_place_in_validation(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        module = Classifier(optim, epochs=3)
        made = fit(module, folder, epochs=3, callbacks=[EMAWeightAveraging(decay=0.9)])
        return module.run(validation=made.callback_metrics["validation"].item())

    run_twice(script, tmp_path)


class Unfreezing(BaseFinetuning):
    """Trains the head alone, and from the second epoch on the rest as well, in a group of its own."""

    def on_fit_start(self, made: Any, module: Any) -> None:
        resuming = self._restarting
        super().on_fit_start(made, module)
        if resuming:
            self.make_trainable(module.network[:2])

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.network[:2])

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.network[:2], optimizer, lr=0.004)


class Head(Classifier):
    """Gives the optimizer what is not frozen when it is built."""

    def configure_optimizers(self) -> Any:
        return self.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_a_group_added_by_finetuning_and_added_again_by_resuming(tmp_path: Path) -> None:
    def straight(optim: Any, folder: Path) -> Run:
        module = Head(optim)
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fit(module, folder, epochs=4, callbacks=[Unfreezing(), saving], enable_checkpointing=True)
        return module.run()

    def resumed(optim: Any, folder: Path) -> Run:
        module = Head(optim)
        path = tmp_path / "straight" / folder.name / "epoch=1.ckpt"
        fit(module, folder, epochs=4, path=path, callbacks=[Unfreezing()])
        return module.run()

    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    whole = run_twice(straight, tmp_path / "straight")
    assert len(whole.optimizers[0].param_groups) == 2
    rest = run_twice(resumed, tmp_path / "resumed")
    assert len(rest.optimizers[0].param_groups) == 2
    assert_same_run(Run(whole.losses[2 * BATCHES :], whole.model, facts=rest.facts), rest)


def test_early_stopping_accumulation_by_epoch_and_the_best_checkpoint(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        module = Plateau(optim)
        best = ModelCheckpoint(folder, monitor="validation", save_weights_only=True)
        stopping = EarlyStopping("validation", min_delta=1.0, patience=1)
        callbacks = [best, stopping, GradientAccumulationScheduler({1: 2})]
        made = fit(module, folder, epochs=9, callbacks=callbacks, enable_checkpointing=True)
        name = Path(best.best_model_path).name
        return module.run(best=name, score=best.best_model_score.item(), epochs=made.current_epoch)

    assert run_twice(script, tmp_path).facts["epochs"] < 9


def test_the_search_for_a_learning_rate_leaves_no_trace(tmp_path: Path) -> None:
    class Searched(Plateau):
        lr = 0.05

        def configure_optimizers(self) -> Any:
            return self.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def script(optim: Any, folder: Path) -> Run:
        module = Searched(optim)
        made = trainer(folder)
        found = Tuner(made).lr_find(module, loader(), num_training=20)
        made.fit(module, loader())
        return module.run(found=found.suggestion(), tried=found.results["loss"])

    run_twice(script, tmp_path)
