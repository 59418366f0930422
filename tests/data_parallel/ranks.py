"""What each process does: train one model under DistributedDataParallel and its copy under farstep, side by side."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from farstep import Remote, Sync, Timeouts, optim

STEPS = 20
CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "AdamW": {"lr": 0.01, "weight_decay": 0.01},
}


def model() -> nn.Module:
    """Return the same model in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


def _batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(24, 16, generator=generator)
    return inputs, (inputs[:, :3].sum(1) > 0).long() + (inputs[:, 3] > 0.5).long()


def _train(module: nn.Module, optimizer: Any, step: int, rank: int) -> float:
    inputs, labels = _batch(step, rank)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(module(inputs), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def _compare(cls: str, rank: int, count: int, address: str, name: str) -> dict[str, Any]:
    """Train both; return how far apart they ever were, in units of the largest parameter."""
    options = CLASSES[cls]
    wrapped = DistributedDataParallel(model())
    local = getattr(torch.optim, cls)(wrapped.parameters(), **options)
    own = copy.deepcopy(wrapped.module)
    timeouts = Timeouts(connect=60, step=60)
    remote = Remote(address, name=f"{name}-{cls}", worker=rank, policy=Sync(count), timeouts=timeouts)
    hosted = getattr(optim, cls)(own.parameters(), remote=remote, **options)
    apart, losses = [], []
    for step in range(STEPS):
        losses.append((_train(wrapped, local, step, rank), _train(own, hosted, step, rank)))
        pairs = list(zip(wrapped.parameters(), own.parameters(), strict=True))
        largest = max(float(theirs.detach().abs().max()) for theirs, _ in pairs)
        apart.append(max(float((theirs - ours).detach().abs().max()) for theirs, ours in pairs) / largest)
    version = hosted.remote.version
    hosted.remote.close()
    return {"apart": apart, "losses": losses, "version": version}


def rank_main(rank: int, count: int, address: str, name: str, directory: str) -> None:
    """Run one of that many processes; leave what it found in ``rank-N.json``."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=count)
    try:
        found = {cls: _compare(cls, rank, count, address, name) for cls in CLASSES}
    finally:
        dist.destroy_process_group()
    Path(directory, f"rank-{rank}.json").write_text(json.dumps(found))
