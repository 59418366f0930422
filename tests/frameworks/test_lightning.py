"""PyTorch Lightning trains with the proxy as it does with torch's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from farstep import optim as farstep_optim
from tests.frameworks.modules import Adversaries, Classifier, Plateau, SecondOrder, fit
from tests.frameworks.twice import BATCHES, Run, assert_same_run, run_twice

pytestmark = pytest.mark.frameworks


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_automatic_optimization_with_clipping_and_a_scheduler(algorithm: str, tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        module = Classifier(optim, dropout=True)
        fit(module, folder, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
        return module.run()

    run = run_twice(script, tmp_path)
    assert len(run.losses) == 2 * BATCHES
    assert len(set(run.facts["rates"])) == 2 * BATCHES
    assert run.facts["hooks"] == [["pre", "post"] * (2 * BATCHES)]


def test_accumulated_batches(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        module = Plateau(optim, epochs=3)
        fit(module, folder, epochs=3, accumulate_grad_batches=4)
        return module.run()

    run = run_twice(script, tmp_path)
    assert run.optimizers[0].remote.version == 6  # four batches, then the two that are left
    assert len(set(run.facts["rates"])) == 3


def test_l_bfgs_in_automatic_optimization(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        module = SecondOrder(optim)
        fit(module, folder, epochs=1)
        return module.run()

    run = run_twice(script, tmp_path)
    assert len(run.losses) > 4 * BATCHES  # the closure was called several times a step
    assert run.optimizers[0].remote.version == BATCHES


def test_two_optimizers_in_manual_optimization(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        module = Adversaries(optim)
        fit(module, folder)
        return Run(module.losses, module, module.trainer.strategy.optimizers)

    generator, discriminator = run_twice(script, tmp_path).optimizers
    assert (generator.remote.version, discriminator.remote.version) == (BATCHES, 2 * BATCHES)
    assert generator.remote.name != discriminator.remote.name


def test_half_precision_with_overflows(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        module = Classifier(optim, epochs=3)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        fit(module, folder, epochs=3, gradient_clip_val=0.5, plugins=[plugin])
        return module.run(scale=scaler.get_scale())

    run = run_twice(script, tmp_path)
    stepped = len(run.facts["hooks"][0]) // 2
    assert 0 < stepped < len(run.losses), "some steps overflow and some do not"
    assert run.optimizers[0].remote.version == stepped


def _saving(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False, **options)


def test_checkpoints_resume_as_if_never_interrupted(tmp_path: Path) -> None:
    def straight(optim: Any, folder: Path) -> Run:
        module = Classifier(optim, epochs=4)
        fit(module, folder, epochs=4, enable_checkpointing=True, callbacks=[_saving(folder)])
        return module.run()

    def resumed_from(source: str) -> Any:
        def script(optim: Any, folder: Path) -> Run:
            module = Classifier(optim, epochs=4)
            fit(module, folder, epochs=4, path=tmp_path / "straight" / source / "epoch=1.ckpt")
            return module.run()

        return script

    for name in ("straight", "of torch", "of farstep"):
        (tmp_path / name).mkdir()
    whole = run_twice(straight, tmp_path / "straight")
    for source in ("torch", "farstep"):
        rest = run_twice(resumed_from(source), tmp_path / f"of {source}")
        assert rest.losses == whole.losses[2 * BATCHES :]
        tail = Run(whole.losses[2 * BATCHES :], whole.model, facts=rest.facts)
        assert_same_run(tail, rest)
        assert rest.optimizers[0].remote.incarnation == 2, "loading was a restore, once"


def test_a_checkpoint_is_plain(tmp_path: Path) -> None:
    module = Classifier(farstep_optim)
    fit(module, tmp_path, epochs=1).save_checkpoint(tmp_path / "plain.ckpt", weights_only=False)
    # Nothing of farstep's own that an unpickler would have to be allowed.
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["farstep"]["version"] == BATCHES
