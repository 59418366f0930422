"""Hugging Face Accelerate and the Trainer train with the proxy as they do with torch's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.frameworks.conftest import MakeOptimizer
from tests.parity.twins import assert_same_parameters

pytestmark = pytest.mark.frameworks


def _accelerate_run(make: MakeOptimizer, folder: Path) -> tuple[list[float], nn.Module, torch.optim.Optimizer]:
    """Train with accumulation, clipping and a scheduler; save in the middle, spoil everything, and load."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs = torch.randn(48, 6)
    optimizer = make(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)
    model, wrapped, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for epoch in range(4):
        if epoch == 2:
            accelerator.save_state(str(folder))
            for parameter in model.parameters():
                parameter.data.add_(1)
            accelerator.load_state(str(folder))
        for features, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(features), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
                losses.append(loss.item())
    return losses, model, optimizer


def test_accelerate(both: list[MakeOptimizer], tmp_path: Path) -> None:
    runs = [_accelerate_run(make, tmp_path / str(number)) for number, make in enumerate(both)]
    assert len(runs[0][0]) == 24
    assert runs[0][0] == runs[1][0]
    assert_same_parameters(runs[0][1].parameters(), runs[1][1].parameters(), "torch's and farstep's")


def test_prepare_does_not_restore_the_server(both: list[MakeOptimizer]) -> None:
    model = nn.Linear(3, 1)
    optimizer: Any = both[1](model.parameters(), lr=0.01)
    accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    assert optimizer.remote.incarnation == 1


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Counting, modulo 17."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) * (index % 5 + 1) + index) % 17
        return {"input_ids": tokens, "labels": tokens}


def _trainer(make: MakeOptimizer, folder: Path, steps: int) -> Any:
    transformers.set_seed(0)
    config = transformers.GPT2Config(vocab_size=17, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = make(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=5, logging_steps=1,
        max_grad_norm=0.5, report_to=[], use_cpu=True, disable_tqdm=True, save_total_limit=3, seed=0,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Sequences(), optimizers=(optimizer, scheduler))


def _losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_the_trainer_with_checkpoint_and_resume(both: list[MakeOptimizer], tmp_path: Path) -> None:
    runs = []
    for number, make in enumerate(both):
        folder = tmp_path / str(number)
        straight = _trainer(make, folder, 10)
        straight.train()
        resumed = _trainer(make, folder, 10)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
        runs.append((straight, resumed))
    (local, local_resumed), (hosted, hosted_resumed) = runs
    assert len(_losses(local)) == 10
    assert _losses(local) == _losses(hosted)
    assert _losses(local_resumed) == _losses(hosted_resumed)
    assert_same_parameters(local.model.parameters(), hosted.model.parameters(), "straight")
    assert_same_parameters(local_resumed.model.parameters(), hosted_resumed.model.parameters(), "resumed")
