"""An embedding's table as what is stepped: a few of its rows have gradients. ``Size.tensors`` are the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.contenders import LR, Contender, Seat, remote_optimizer
from tests.benchmarks.sizes import Size

TOUCHED = 4096
_BATCHES = 8


def gradients(size: Size, rank: int) -> list[Tensor]:
    """Return sparse gradients of so many rows each, as an embedding gives them."""
    generator = torch.Generator().manual_seed(rank)
    shape = size.tensors, size.elements
    rows = torch.randint(0, size.tensors, (_BATCHES, 1, TOUCHED), generator=generator)
    values = torch.randn(_BATCHES, TOUCHED, size.elements, generator=generator)
    return [torch.sparse_coo_tensor(*pair, shape, check_invariants=True) for pair in zip(rows, values, strict=True)]


def _arriving(own: torch.nn.Parameter, rank: int, size: Size) -> Callable[[], None]:
    arriving, number = gradients(size, rank), 0

    def prepare() -> None:
        nonlocal number
        number += 1
        own.grad = arriving[number % _BATCHES].clone()

    return prepare


def farstep_table(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """This project; ``whole``: something else refers to the table, and torch is told of a change, so that all comes back."""
    how = dict(options)
    whole = how.pop("whole", False)
    own = torch.nn.Parameter(torch.zeros(size.tensors, size.elements))
    other = own.detach() if whole else None
    optimizer, close = remote_optimizer([own], seat, {"optimizer": "SparseAdam", **how})
    arrive = _arriving(own, seat.rank, size)

    def prepare() -> None:
        arrive()
        if other is not None:
            torch.autograd.graph.increment_version(own)

    return Contender(optimizer.step, prepare, close)


def gloo_table(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """What DistributedDataParallel does with a sparse gradient: gloo's all-reduce of it, and everyone steps."""
    import torch.distributed as dist

    del options
    if not dist.is_initialized():
        store = f"file://{seat.directory}/gloo"
        dist.init_process_group("gloo", init_method=store, rank=seat.rank, world_size=seat.workers)
    own = torch.nn.Parameter(torch.zeros(size.tensors, size.elements))
    optimizer = torch.optim.SparseAdam([own], lr=LR)

    def step() -> None:
        assert own.grad is not None
        dist.all_reduce(own.grad)
        own.grad = own.grad / seat.workers
        optimizer.step()

    return Contender(step, _arriving(own, seat.rank, size))


def local_table(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """torch.optim."""
    del options
    own = torch.nn.Parameter(torch.zeros(size.tensors, size.elements))
    return Contender(torch.optim.SparseAdam([own], lr=LR).step, _arriving(own, seat.rank, size))
