"""The Hugging Face Trainer trains a tiny model with the proxy as it does with torch's class."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.optim import lr_scheduler
from torch.utils.data import Dataset

from tests.frameworks.twice import Hooked, Run, assert_same_run, run_twice

pytestmark = pytest.mark.frameworks

STEPS = 8


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Counting in steps, modulo 17."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) * (index % 5 + 1) + index) % 17
        return {"input_ids": tokens, "labels": tokens}


def _model(**options: Any) -> transformers.PreTrainedModel:
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config)


def _arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    options = {"save_strategy": "no", "max_steps": STEPS, "max_grad_norm": 0.5, **options}
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, log_level="error", **options,
    )  # fmt: skip


def _losses(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _run(trainer: transformers.Trainer, optimizer: Any, hooked: Hooked) -> Run:
    logged = [{key: entry[key] for key in ("step", "grad_norm", "learning_rate") if key in entry}
              for entry in trainer.state.log_history]  # fmt: skip
    return Run(_losses(trainer), trainer.model, [optimizer], {"logged": logged, "hooks": hooked.calls})


def _script(*, resume: Callable[[Path], Path] | None = None, **options: Any) -> Callable[[Any, Path], Run]:
    """Return a script that passes an optimizer and a scheduler, and resumes from a checkpoint where one is given."""

    def script(optim: Any, folder: Path) -> Run:
        model = _model()
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=0.01)
        hooked = Hooked(optimizer)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        trainer = transformers.Trainer(
            model, _arguments(folder, **options), train_dataset=Sequences(), optimizers=(optimizer, scheduler)
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume(folder)))
        return _run(trainer, optimizer, hooked)

    return script


def test_checkpoints_resume_as_if_never_interrupted(tmp_path: Path) -> None:
    for name in ("whole", "of torch", "of farstep"):
        (tmp_path / name).mkdir()
    whole = run_twice(_script(save_strategy="steps", save_steps=3), tmp_path / "whole")
    assert len(whole.losses) == STEPS
    assert whole.facts["hooks"] == ["pre", "post"] * STEPS
    assert len({entry.get("learning_rate") for entry in whole.facts["logged"]}) > STEPS - 1
    for source in ("torch", "farstep"):

        def checkpoint(folder: Path, source: str = source) -> Path:
            # Only what the other run had written by then.
            shutil.copytree(tmp_path / "whole" / source / "checkpoint-3", folder / "checkpoint-3")
            return folder / "checkpoint-3"

        rest = run_twice(_script(resume=checkpoint), tmp_path / f"of {source}")
        # The first three come from the checkpoint's log.
        assert_same_run(Run(whole.losses, whole.model, facts=rest.facts), rest)
        assert len(rest.facts["hooks"]) == 2 * (STEPS - 3)
        assert rest.optimizers[0].remote.incarnation == 2


def test_accumulation(tmp_path: Path) -> None:
    run = run_twice(_script(gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2), tmp_path)
    # Ten batches an epoch: three of three, and the one that is left.
    assert run.optimizers[0].remote.version == 8


def test_an_optimizer_class_that_the_trainer_builds_and_the_best_model_in_the_end(tmp_path: Path) -> None:
    def script(optim: Any, folder: Path) -> Run:
        arguments = _arguments(
            folder, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, bf16=True,
            load_best_model_at_end=True, warmup_steps=2, lr_scheduler_type="cosine", learning_rate=0.05, weight_decay=0.1,
        )  # fmt: skip
        trainer = transformers.Trainer(
            _model(), arguments, train_dataset=Sequences(), eval_dataset=Sequences(),
            optimizer_cls_and_kwargs=(optim.NAdam, {"lr": 0.05, "decoupled_weight_decay": True}),
        )  # fmt: skip
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        run = _run(trainer, optimizer, Hooked(optimizer))
        run.facts["best"] = Path(str(trainer.state.best_model_checkpoint)).name
        return run

    run = run_twice(script, tmp_path)
    assert len(run.optimizers[0].param_groups) == 2, "with weight decay and without"
    assert run.facts["best"].startswith("checkpoint-")
