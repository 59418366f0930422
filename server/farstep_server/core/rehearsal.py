"""A step of the same kind on parameters of one element each, before the one that counts.

What torch's own classes refuse, they refuse by kind, not by value: sparse gradients where they take dense ones, dtypes that a
fused kernel does not know, options that do not go together. A rehearsal finds that out without a copy of everything to go
back to. It says nothing of state that was loaded, which may be of any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farstep_server.core.gradients import Gradients
from farstep_server.core.means import Means

_Kind = tuple[torch.dtype, int, int]
"""Dtype and dimensions of a parameter, and the sparse dimensions of its gradient, 0 where it is dense."""


def rehearse(
    make: Callable[[list[dict[str, Any]]], Optimizer],
    sizes: Sequence[int],
    options: Sequence[Mapping[str, Any]],
    tensors: Sequence[Tensor],
    gradients: Gradients | Means,
) -> bool:
    """Return whether a step with such gradients goes through.

    ``make`` builds an optimizer of param groups, so many parameters with those options each; it may change the options.
    """
    groups = []
    first = 0
    for size, group in zip(sizes, options, strict=True):
        numbers = range(first, first + size)
        first += size
        kinds = {_kind(tensors[number], gradients, number) for number in numbers if _is_there(gradients, number)}
        small = [_small(kind, tensors[first - size].device) for kind in sorted(kinds, key=str)]
        if small:
            groups.append({"params": small, **{key: group[key] for key in group if key != "param_names"}})
    try:
        make(groups).step()
    except Exception:  # noqa: BLE001 - whatever it is, the step that counts will meet it too
        return False
    return True


def _is_there(gradients: Gradients | Means, number: int) -> bool:
    return not gradients.absent(number) if isinstance(gradients, Means) else gradients[number] is not None


def _kind(tensor: Tensor, gradients: Gradients | Means, number: int) -> _Kind:
    gradient = None if isinstance(gradients, Means) else gradients[number]
    sparse = gradient.sparse_dim() if gradient is not None and gradient.is_sparse else 0
    return tensor.dtype, tensor.dim(), sparse


def _small(kind: _Kind, device: torch.device) -> torch.nn.Parameter:
    dtype, dimensions, sparse = kind
    content = torch.zeros((1,) * dimensions, dtype=dtype, device=device)
    takes_gradients = dtype.is_floating_point or dtype.is_complex
    parameter = torch.nn.Parameter(content, takes_gradients)
    if takes_gradients:
        gradient = torch.ones_like(content)
        parameter.grad = gradient.to_sparse(sparse) if sparse else gradient
    return parameter
