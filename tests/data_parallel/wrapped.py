"""What each rank does: train one model under DistributedDataParallel with torch's optimizer, and its copy with farstep's."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from farstep import Async, Remote, Sync, Timeouts, optim
from farstep_wire.errors import ConfigurationError

STEPS = 4


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def _step(module: nn.Module, optimizer: Any, step: int, rank: int) -> None:
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
    optimizer.zero_grad()
    module(inputs).square().sum().backward()
    optimizer.step()


def _hosted(module: nn.Module, rank: int, address: str, name: str, policy: Any) -> Any:
    timeouts = Timeouts(connect=60, step=60)
    remote = Remote(address, name=name, worker=rank, policy=policy, timeouts=timeouts)
    return optim.AdamW(module.parameters(), lr=0.01, remote=remote)  # type: ignore[attr-defined]


def _compare(rank: int, count: int, address: str, name: str, *, wrap: str) -> dict[str, Any]:
    """Train twice; ``wrap``: whether the wrapper comes before the optimizer or after it, or not at all."""
    lines = _Lines()
    logging.getLogger("farstep").addHandler(lines)
    torchs = DistributedDataParallel(_model())
    local = torch.optim.AdamW(torchs.parameters(), lr=0.01)
    own: nn.Module = copy.deepcopy(torchs.module)
    if wrap == "before":
        own = DistributedDataParallel(own)
    hosted = _hosted(own, rank, address, name, Sync(count))
    if wrap == "after":
        own = DistributedDataParallel(own)
    equal = []
    for step in range(STEPS):
        _step(torchs, local, step, rank)
        _step(own, hosted, step, rank)
        pairs = zip(torchs.parameters(), own.parameters(), strict=True)
        equal.append(all(torch.equal(a, b) for a, b in pairs))
    workers = {row.id: [row.contributions, row.abstentions] for row in hosted.remote.describe().workers}
    version = hosted.remote.version
    dist.barrier()
    hosted.remote.close()
    logging.getLogger("farstep").removeHandler(lines)
    return {"equal": equal, "workers": workers, "version": version, "log": lines.lines}


def _async(rank: int, address: str, name: str) -> str:
    module = DistributedDataParallel(_model())
    hosted = _hosted(module, rank, address, name, Async())
    try:
        _step(module, hosted, 0, rank)
    except ConfigurationError as error:
        return str(error)
    finally:
        hosted.remote.close()
    return "not refused"


def rank_main(rank: int, count: int, address: str, name: str, directory: str) -> None:
    """Run one of that many processes; leave what it found in ``rank-N.json``."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=count)
    try:
        found: dict[str, Any] = {
            wrap: _compare(rank, count, address, f"{name}-{wrap}", wrap=wrap) for wrap in ("before", "after", "plain")
        }
        found["async"] = _async(rank, address, f"{name}-async")
    finally:
        dist.destroy_process_group()
    Path(directory, f"rank-{rank}.json").write_text(json.dumps(found))
