"""Gradients out of a model's tensors and parameters into them, half as wide on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farstep_wire.frames import BytesSource, Sink
from farstep_wire.layout import GradientPlan, Layout, TensorSpec
from farstep_wire.narrowing import Narrowing, NarrowSource, WideningSink, narrow_gradients, narrow_parameters
from farstep_wire.values import memory

Piece = tuple[int, TensorSpec, Tensor]
"""Where something begins in a contribution's bytes, and what it is: a CPU tensor in the order of its memory."""


class NarrowGradients:
    """Makes the bytes of contributions; what it makes of the usual plan is kept."""

    def __init__(self, format_name: str) -> None:
        self._format_name = format_name
        self._usual: tuple[GradientPlan, Narrowing] | None = None

    def body(self, plan: GradientPlan, pieces: Sequence[Piece]) -> BytesSource:
        """Return the bytes of a contribution, made from its tensors as each frame is due."""
        if self._usual is None or self._usual[0] is not plan:
            self._usual = plan, narrow_gradients(plan, self._format_name)
        narrowing = self._usual[1]
        edits_begin = min((offset for _, _, offset in plan.edited), default=plan.nbytes)
        places = narrowing.places(
            (offset, _flat(tensor, spec, exact=offset >= edits_begin)) for offset, spec, tensor in pieces
        )
        return NarrowSource(places, narrowing.nbytes, pieces)


def narrow_sink(layout: Layout, tensors: Sequence[Tensor], format_name: str) -> Sink:
    """Return where the bytes of a narrowed parameter arena go: CPU tensors with the layout's own strides."""
    flats = [
        _flat(tensor, parameter.spec, exact=parameter.storage > 0)
        for tensor, parameter in zip(tensors, layout.parameters, strict=True)
    ]
    narrowing = narrow_parameters(layout, format_name)
    return WideningSink(narrowing.places(zip(layout.arena.offsets, flats, strict=True)))


def _flat(tensor: Tensor, spec: TensorSpec, *, exact: bool) -> Tensor:
    """Return a tensor in one dimension: float32 that is narrowed as such, all else as bytes."""
    if spec.dtype == torch.float32 and not exact:
        return tensor.detach().as_strided((spec.numel,), (1,))
    if not spec.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory(tensor, spec.nbytes), dtype=torch.uint8)
