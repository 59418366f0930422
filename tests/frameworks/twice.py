"""Run a training script twice, with ``torch.optim`` and with ``farstep.optim``, and compare what came of it bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from farstep import optim as farstep_optim
from farstep.optim.proxy import RemoteOptimizer
from tests.parity.twins import assert_same_parameters, assert_same_state, same_bits

BATCH = 32
BATCHES = 6


@dataclass
class Run:
    """What a script leaves: its losses, its model, its optimizers, and whatever else must be the same."""

    losses: list[float]
    model: nn.Module
    optimizers: Sequence[Any] = ()
    facts: dict[str, Any] = field(default_factory=dict)


# Takes torch.optim or farstep.optim, which is all that differs between two runs, and a folder of its own.
Script = Callable[[Any, Path], Run]


def run_twice(script: Script, folder: Path) -> Run:
    """Run the script with either, check that they agree in every bit, and return what the proxy's run left."""
    runs = []
    for name, optim in (("torch", torch.optim), ("farstep", farstep_optim)):
        own = folder / name
        own.mkdir()
        torch.manual_seed(0)
        runs.append(script(optim, own))
    local, hosted = runs
    assert local.losses, "nothing was trained"
    assert_same_run(local, hosted)
    assert len(local.optimizers) == len(hosted.optimizers)
    for number, (ours, theirs) in enumerate(zip(hosted.optimizers, local.optimizers, strict=True)):
        assert isinstance(ours, RemoteOptimizer)
        assert not isinstance(theirs, RemoteOptimizer)
        assert_same_state(ours, theirs, f"optimizer {number}")
        assert ours.remote.version > 0
    return hosted


def assert_same_run(left: Run, right: Run) -> None:
    """Losses, facts, parameters and buffers have the same bits."""
    assert same_bits(torch.tensor(left.losses), torch.tensor(right.losses)), f"{left.losses} and {right.losses}"
    assert left.facts == right.facts
    assert_same_parameters(left.model.parameters(), right.model.parameters(), "parameters")
    assert_same_parameters(left.model.buffers(), right.model.buffers(), "buffers")


@cache
def digits() -> TensorDataset:
    """Return a part of scikit-learn's handwritten digits: images of 64 floats, labels."""
    bunch = load_digits()
    count = BATCH * BATCHES
    return TensorDataset(
        torch.tensor(bunch.data[:count] / 16.0, dtype=torch.float32), torch.tensor(bunch.target[:count])
    )


def loader(*, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Return the digits in six batches."""
    return DataLoader(digits(), batch_size=BATCH, shuffle=shuffle)


def network(*, dropout: bool = False) -> nn.Sequential:
    """Return a classifier of digits, the same at every call; with buffers, and random numbers if asked for."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2 if dropout else 0.0), nn.Linear(24, 10)
    )


class Hooked:
    """Counts the calls of an optimizer's step hooks."""

    def __init__(self, optimizer: Any) -> None:
        self.calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: self.calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: self.calls.append("post"))
