"""Scripts of other people's frameworks, written once and run twice: with torch's class, and with farstep's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

from farstep import Remote, optim
from tests.benchmarks.processes import farstep_server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_numbers = count()

MakeOptimizer = Callable[..., torch.optim.Optimizer]


@pytest.fixture(scope="session")
def frameworks_address() -> Iterator[str]:
    """The address of a server process that lives as long as the session."""
    with farstep_server() as address:
        yield address


@pytest.fixture
def both(frameworks_address: str) -> list[MakeOptimizer]:
    """Two makers of AdamW: local torch's, and the proxy's, each call of which hosts a new optimizer."""

    def local(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, **options)

    def hosted(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        remote = Remote(frameworks_address, name=f"frameworks-{next(_numbers)}")
        made: torch.optim.Optimizer = optim.AdamW(parameters, remote=remote, **options)  # type: ignore[attr-defined]
        return made

    return [local, hosted]
