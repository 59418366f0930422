"""int8 and top-k with error feedback train the demo as float32 does.

The example's own training loop, on one worker. With 360 test images a run's accuracy says little: so each is shown in all nine
places that the training shows images in, and the mean is taken over runs from several seeds.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.servers import ServerProcess

SEEDS = (0, 1, 2)
STEPS = 440
PARAMETER_BYTES = 4 * 38_314


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "client/examples/digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    del sys.modules["digits"]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of images that the model labels correctly, moved by up to one pixel each way."""
    wide = functional.pad(images, (1, 1, 1, 1))
    places = [wide[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    correct = sum(int((model(place).argmax(dim=1) == labels).sum()) for place in places)
    return 100 * correct / (len(places) * len(labels))


def _trained(digits: ModuleType, wire: str | None) -> list[Any]:
    options = [digits.Options(20, 64, 1e-2, seed, "sync", None, None, wire, None) for seed in SEEDS]
    return [digits.train(option, 0, 1) for option in options]


@pytest.fixture(scope="module")
def float32(digits: ModuleType) -> float:
    """What torch itself reaches, which farstep does too, bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "accuracy", accuracy)
        patch.setattr(digits, "optim", torch.optim)
        return statistics.mean(result.accuracy for result in _trained(digits, None))


@pytest.mark.parametrize(("wire", "part"), [("int8", 0.27), ("topk", 0.14)])
def test_within_half_a_point(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, digits: ModuleType, float32: float, wire: str, part: float
) -> None:
    monkeypatch.setenv("FARSTEP_REMOTE", server.address)
    monkeypatch.setattr(digits, "accuracy", accuracy)
    results = _trained(digits, wire)
    assert statistics.mean(result.accuracy for result in results) > float32 - 0.5
    for result in results:
        gradients = result.traffic_bytes / STEPS - PARAMETER_BYTES
        assert gradients < part * PARAMETER_BYTES
