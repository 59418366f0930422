"""100 tensors of 256,000 float32 (102 MB): what the large-model benchmark and its processes step."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farstep import Remote, Sync, Timeouts, optim

TENSORS, ELEMENTS = 100, 256_000
ROUNDS, WARM = 9, 2


def arena() -> Tensor:
    """Return memory for all of them in one piece."""
    return torch.randn(TENSORS * ELEMENTS)


def parameters(memory: Tensor, gradients: Tensor) -> list[torch.nn.Parameter]:
    """Return parameters and their gradients as pieces of two arenas."""
    made = [torch.nn.Parameter(piece) for piece in memory.split(ELEMENTS)]
    for parameter, gradient in zip(made, gradients.split(ELEMENTS), strict=True):
        parameter.grad = gradient
    return made


def seconds(act: Callable[[], object]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def hosted(params: list[torch.nn.Parameter], address: str, name: str, worker: int, workers: int, **how: Any) -> Any:
    """Return a farstep optimizer that steps as the local one does: a fused Adam."""
    remote = Remote(address, name=name, worker=worker, policy=Sync(workers), timeouts=Timeouts(120, 120, 60), **how)
    return optim.Adam(params, lr=1e-3, fused=True, remote=remote)  # type: ignore[attr-defined]


def rank_main(rank: int, count: int, address: str, directory: str) -> None:
    """Take turns between gloo with a replicated fused Adam and a farstep step; leave the medians in ``rank-N.json``."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=count)
    gradients = arena()
    own = parameters(arena(), gradients)
    local = torch.optim.Adam(own, lr=1e-3, fused=True)
    remote = hosted(parameters(arena(), gradients), address, f"ranks-{count}", rank, count)

    def replicated() -> None:
        dist.all_reduce(gradients)
        gradients.div_(count)
        local.step()

    times: dict[str, list[float]] = {"gloo": [], "farstep": []}
    for number in range(ROUNDS + WARM):
        for name, act in (("gloo", replicated), ("farstep", remote.step)):
            dist.barrier()
            taken = seconds(act)
            if number >= WARM:
                times[name].append(taken)
    remote.remote.close()
    dist.destroy_process_group()
    medians = {name: statistics.median(values) for name, values in times.items()}
    Path(directory, f"rank-{rank}.json").write_text(json.dumps(medians))
