"""Small problems for every optimizer class: parameters, and each worker's gradients, the same bits for the same numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from farstep_wire.algorithms import ConjugateGradient
from tests.data_parallel.crew import Gradients, mean

DRIVEN = ("ConjugateGradient", "LBFGS")
SPARSE_ONLY = ("SparseAdam",)
_MATRICES_ONLY = ("Muon",)

# Options that make a class keep all the state that it can; the others stand with their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1, "t0": 2},
    "Adadelta": {"lr": 0.5, "weight_decay": 0.01},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "amsgrad": True},
    "Adamax": {"lr": 0.01, "weight_decay": 0.01},
    "ConjugateGradient": {},
    "LBFGS": {"lr": 0.5, "max_iter": 6, "line_search_fn": "strong_wolfe"},
    "NAdam": {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.01},
    "RAdam": {"lr": 0.1},
    "RMSprop": {"lr": 0.01, "centered": True, "momentum": 0.9},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


def classes() -> list[str]:
    """Return every optimizer class of the installed torch, and ConjugateGradient."""
    found = [
        name
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member) and issubclass(member, Optimizer) and member is not Optimizer
    ]
    return sorted([*found, "ConjugateGradient"])


def local_class(name: str) -> Any:
    """Return the class that a local process uses."""
    return ConjugateGradient if name == "ConjugateGradient" else getattr(torch.optim, name)


def parameters(name: str = "SGD", dtype: torch.dtype = torch.float32, *, tables: bool = False) -> list[Tensor]:
    """Return parameters that the class takes; ``tables``: such as may have sparse gradients."""
    generator = torch.Generator().manual_seed(7)
    shapes: list[tuple[int, ...]] = [(9, 6), (17,), ()]
    if tables or name in SPARSE_ONLY or name in _MATRICES_ONLY:
        shapes = [(12, 3), (5, 17)]
    return [nn.Parameter(random(shape, dtype, generator)) for shape in shapes]


def random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return normal numbers of any dtype."""
    drawn = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)


def _seeded(step: int, worker: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 * (step + 1) + worker)


def dense(params: list[Tensor], step: int, worker: int) -> Gradients:
    """Return a worker's gradients for a step."""
    generator = _seeded(step, worker)
    return [random(tuple(p.shape), p.dtype, generator) for p in params]


def sparse(params: list[Tensor], step: int, worker: int) -> Gradients:
    """Return gradients with a few rows each, as an embedding has them: some rows twice, and other rows on each worker."""
    generator = _seeded(step, worker)
    gradients: Gradients = []
    for parameter in params:
        rows = torch.randint(parameter.shape[0], (1, 3 + worker % 3), generator=generator)
        values = random((rows.shape[1], *parameter.shape[1:]), parameter.dtype, generator)
        gradient = torch.sparse_coo_tensor(rows, values, parameter.shape, check_invariants=True)
        gradients.append(gradient.coalesce() if worker % 2 else gradient)
    return gradients


def gaps(params: list[Tensor], step: int, worker: int) -> Gradients:
    """Return gradients that are missing for some parameters on some workers, and for one parameter now and then on all."""
    own = dense(params, step, worker)
    return [None if (index + step) % 3 == 0 or (index + step + worker) % 2 else g for index, g in enumerate(own)]


def mixed(params: list[Tensor], step: int, worker: int) -> Gradients:
    """Return gradients that are dense on some workers and sparse on others."""
    return [g.to_sparse(1) if g is not None and (step + worker) % 2 else g for g in dense(params, step, worker)]


def loss(params: list[Tensor], worker: int) -> Tensor:
    """Return a worker's loss, which is its own function of the parameters."""
    own = 0.3 * worker
    terms = [((p - own) ** 2).sum() * (1 + worker) + ((p + own) ** 4).sum() / 8 for p in params]
    return torch.stack(terms).sum()


def evaluated(params: list[Tensor], worker: int) -> Tensor:
    """Compute a worker's loss and leave its gradients on the parameters; return the loss."""
    for parameter in params:
        parameter.grad = None
    value = loss(params, worker)
    value.backward()
    return value.detach()


def averaging_closure(
    params: list[Tensor], count: int, calls: list[int], weights: list[float] | None = None
) -> Callable[[], Tensor]:
    """Return the closure of one process that has all workers' data: the mean of their losses and of their gradients."""

    def closure() -> Tensor:
        calls.append(len(calls))
        losses, gradients = [], []
        for worker in range(count):
            losses.append(evaluated(params, worker))
            gradients.append([p.grad for p in params])
        for parameter, gradient in zip(params, mean(gradients, weights), strict=True):
            parameter.grad = gradient
        factors = [1.0] * count if weights is None else weights
        total = losses[0] * factors[0]
        for value, factor in zip(losses[1:], factors[1:], strict=True):
            total = total + value * factor
        return total / sum(factors)

    return closure
