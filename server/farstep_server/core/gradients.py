"""Gradients as they come: staged by each worker, and what is made of them where the owner takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farstep_wire.layout import GradientPlan, Layout, SparseForm

Gradients = list[Tensor | None]


@dataclass
class Staged:
    """The bytes of one contribution in a host buffer, and the plan that says what lies where.

    ``buffer`` may be longer than the plan. ``views``: the gradients, where they are known. ``elsewhere``: the memory in which
    they lie, each at its place among dense ones, and not in the buffer; the worker's, or the server's ``own``.
    """

    plan: GradientPlan
    buffer: Tensor
    views: Gradients | None = None
    elsewhere: Tensor | None = None
    own: bool = False

    @property
    def borrowed(self) -> bool:
        """Whether the gradients lie in the worker's memory."""
        return self.elsewhere is not None and not self.own


def materialize(staged: Staged, layout: Layout, device: torch.device) -> tuple[Gradients, dict[int, Tensor]]:
    """Return the gradients and the edited parameters as views of the staged bytes, moved to the device in one copy."""
    plan = staged.plan
    if staged.views is not None and device.type == "cpu" and not plan.edited:
        return list(staged.views), {}
    buffer = staged.buffer[: plan.nbytes]
    if device.type != "cpu":
        buffer = buffer.to(device, non_blocking=buffer.is_pinned())
    edited = {index: spec.view(buffer, offset) for index, spec, offset in plan.edited}
    if staged.views is not None and device.type == "cpu":
        return list(staged.views), edited
    if staged.views is not None and staged.elsewhere is not None:
        moved = staged.elsewhere.to(device)
        places = zip(layout.specs, layout.gradients.offsets, staged.views, strict=True)
        return [None if view is None else spec.view(moved, offset) for spec, offset, view in places], edited
    gradients: Gradients = []
    for index, pieces in enumerate(plan.pieces):
        if not pieces:
            gradients.append(None)
            continue
        tensors = [spec.view(buffer, offset) for spec, offset in pieces]
        form = plan.forms.get(index)
        if isinstance(form, SparseForm):
            gradients.append(_sparse(tensors[0], tensors[1], layout.specs[index].shape, form))
        else:
            gradients.append(tensors[0])
    return gradients, edited


def _sparse(indices: Tensor, values: Tensor, shape: tuple[int, ...], form: SparseForm) -> Tensor:
    # The indices were checked when they came.
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=form.coalesced, check_invariants=False)


def check_indices(staged: Staged, layout: Layout) -> None:
    """ValueError where an index of a sparse gradient lies outside its parameter; names both."""
    for number, form in staged.plan.forms.items():
        if not isinstance(form, SparseForm) or not form.nnz:
            continue
        spec, offset = staged.plan.pieces[number][0]
        parameter = layout.parameters[number]
        for row, size in zip(spec.view(staged.buffer, offset), parameter.spec.shape, strict=False):
            low, high = (int(bound) for bound in torch.aminmax(row))
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise ValueError(f"the sparse gradient of {parameter.key!r} ({parameter.spec}) has the index {wrong}")


def accumulate(accumulator: Tensor | None, gradient: Tensor, weight: float | None) -> Tensor:
    """Return the sum with a (weighted) gradient, in the memory of one of the two."""
    if accumulator is None:
        return gradient if weight is None else gradient.mul_(weight)
    if gradient.is_sparse and not accumulator.is_sparse:
        return accumulator.add_(gradient, alpha=1.0 if weight is None else weight)
    if accumulator.is_sparse and not gradient.is_sparse:
        dense = gradient if weight is None else gradient.mul_(weight)
        return dense.add_(accumulator)
    return accumulator.add_(gradient) if weight is None else accumulator.add_(gradient, alpha=weight)


def reduce_losses(losses: Sequence[object], weights: Sequence[float] | None) -> object:
    """Return the (weighted) mean of what closures returned, in the order given; one is taken as it is."""
    if len(losses) == 1:
        return losses[0]
    if any(loss is None for loss in losses):
        return None
    tensors = [torch.as_tensor(loss) for loss in losses]
    total = tensors[0] * (1.0 if weights is None else weights[0])
    for index, loss in enumerate(tensors[1:], start=1):
        total = total + loss * (1.0 if weights is None else weights[index])
    return total / (len(tensors) if weights is None else sum(weights))
