"""Steps of torch's own classes that go through the parameters a few at a time, each with its mean just made.

Where torch's fused kernels step, a team of threads shares the slices: those kernels cut a tensor into whole vectors, so that
the bits do not depend on how many threads an operation has. Torch's other kernels are given what threads they have in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farstep_server.core.means import Means
from farstep_server.core.team import team

Step = Callable[[], object]


def bare_step(optimizer: Optimizer) -> Step:
    """Return ``step`` without the wrapper that torch puts around it for hooks and profiling; there are none on a server."""
    step = type(optimizer).step
    inner = getattr(step, "__wrapped__", None) if getattr(step, "hooked", False) else None
    return optimizer.step if inner is None else partial(inner, optimizer)


def step_in_slices(optimizer: Optimizer, step: Step, tensors: Sequence[Tensor], means: Means, *, shared: bool) -> None:
    """Make one step slice by slice; ``tensors`` are all parameters in order, without gradients.

    ``shared``: every parameter that has a gradient also has its state, so that threads may share the slices.
    """
    fused = is_fused(optimizer)
    divides = fused and means.counts and means.divisor != 1.0
    slices = means.slices
    threads = team() if fused and shared and not slices.overlap else None

    def one(run: range, place: int, step: Step) -> None:
        own = tensors[run.start : run.stop]
        for tensor, gradient in zip(own, means.make(run, place, divided=not divides), strict=True):
            tensor.grad = gradient
        step()
        for tensor in own:
            tensor.grad = None

    with _divisor(optimizer, means.divisor if divides else None):
        for run in slices.runs if threads is None else slices.alone:
            with _only(optimizer, run):
                one(run, 0, step)
        if threads is not None:
            threads.share(slices.together, lambda run, place: one(run, place, bare_step(_part(optimizer, run))))


def steps_each_alone(optimizer: Optimizer) -> bool:
    """Whether what a step does to one parameter is independent of the others, for torch's own classes.

    Adafactor chooses its eps1, where none is given, by the dtype of the first parameter that it comes to, for all of them.
    """
    if type(optimizer) is not torch.optim.Adafactor:
        return True
    dtypes = {tensor.dtype for group in optimizer.param_groups for tensor in group["params"]}
    return len(dtypes) == 1


def is_fused(optimizer: Optimizer) -> bool:
    """Whether torch's fused kernels step, which divide a gradient as they read it: by ``grad_scale``, as for mixed precision.

    In dtypes that they do not compute in, a division of its own rounds once more, and the bits depend on how a tensor is cut.
    """
    return all(
        group.get("fused") and all(tensor.dtype in {torch.float32, torch.float64} for tensor in group["params"])
        for group in optimizer.param_groups
    )


def _groups(optimizer: Optimizer, run: range) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """Yield the param groups that a run of the parameters lies in, and what of it."""
    end = 0
    for group in optimizer.param_groups:
        start, end = end, end + len(group["params"])
        own = group["params"][max(run.start - start, 0) : max(run.stop - start, 0)]
        if own:
            yield group, own


@contextmanager
def _only(optimizer: Optimizer, run: range) -> Iterator[None]:
    """Have the optimizer see no more than a run of its parameters."""
    groups = optimizer.param_groups
    touched = [(group, own, group["params"]) for group, own in _groups(optimizer, run)]
    try:
        optimizer.param_groups = [group for group, _, _ in touched]
        for group, own, _ in touched:
            group["params"] = own
        yield
    finally:
        optimizer.param_groups = groups
        for group, _, whole in touched:
            group["params"] = whole


def _part(optimizer: Optimizer, run: range) -> Optimizer:
    """Return an optimizer of a run of the parameters, with their state; the groups' options are copies."""
    part: Optimizer = object.__new__(type(optimizer))
    part.__dict__.update(optimizer.__dict__)
    part.param_groups = [{**group, "params": own} for group, own in _groups(optimizer, run)]
    return part


@contextmanager
def _divisor(optimizer: Optimizer, divisor: float | None) -> Iterator[None]:
    """Have torch's fused kernels divide the gradients."""
    if divisor is None:
        yield
        return
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = torch.tensor(divisor, dtype=torch.float32), None
    try:
        yield
    finally:
        del fused.grad_scale, fused.found_inf
