"""The non-finite guard: finds the worker and the parameters whose gradients have an infinity or NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from farstep_server.core.gradients import Gradients
from farstep_wire.layout import Layout

_NAMED = 5


def blame(gradients: Mapping[str, Gradients], layout: Layout) -> str:
    """Say which workers' gradients of which parameters are not finite; empty where all are."""
    lines = []
    for worker, own in gradients.items():
        if keys := _non_finite(own, layout):
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            lines.append(f"worker {worker}: {', '.join(repr(key) for key in keys[:_NAMED])}{more}")
    return "; ".join(lines)


def blame_mean(mean: Gradients, layout: Layout) -> str:
    """Say where the workers' mean is not finite although each of them is; empty where it is."""
    keys = _non_finite(mean, layout)
    return f"the sum over the workers overflows: {', '.join(repr(key) for key in keys[:_NAMED])}" if keys else ""


def _non_finite(gradients: Sequence[Tensor | None], layout: Layout) -> list[str]:
    numbers = [number for number, gradient in enumerate(gradients) if gradient is not None]
    dense = [_values(gradient) for gradient in gradients if gradient is not None]
    if not dense:
        return []
    # One pass over each; an infinity or NaN among the elements is one in the norm.
    norms = torch._foreach_norm(dense, math.inf)
    finite = torch.isfinite(torch.stack([norm.to(torch.float64) for norm in norms])).tolist()
    return [layout.parameters[number].key for number, whole in zip(numbers, finite, strict=True) if not whole]


def _values(gradient: Tensor) -> Tensor:
    values = gradient._values() if gradient.is_sparse else gradient
    return values if values.numel() else values.new_zeros(1)
