"""Error feedback: what compressed gradients leave out is kept, and added to the next ones.

With e what has been left out so far, p = gradient + e is sent as c, and e becomes p less what c arrives as. It does so only
once the server has said that the contribution was used; one that was refused as stale, skipped by the guard or lost leaves e as
it was. While a request is repeated after a reconnect its bytes stay the same, so that it does not matter which copy was used.
Where nothing was heard of it at last, the server is asked what became of it before the next one is made.

An infinity or NaN among the gradients is sent, for the server's guard to see, and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from farstep_wire.compression import CompressedPlan, compress_plan, dequantize, encodable, greatest, parts_of, quantize
from farstep_wire.errors import Applied, FarstepError
from farstep_wire.layout import GradientForm, Layout, TensorSpec
from farstep_wire.wire_format import INT8_BLOCK, Wire

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Pending:
    """A contribution that is under way. ``finite``: whether all that was sent is."""

    plan: CompressedPlan
    gradients: Sequence[Tensor]
    wire: Tensor
    finite: bool


class Feedback:
    """The residual of one session, a float32 copy of the parameters' size, taken when the first gradients are sent."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._layout: Layout | None = None
        self._usual: CompressedPlan | None = None
        self._residual = torch.empty(0)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        self._room = torch.empty(0)
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pending: _Pending | None = None
        self._unanswered: tuple[int, Tensor] | None = None

    # Sending.

    def encode(
        self, layout: Layout, forms: dict[int, GradientForm], tensors: Sequence[Sequence[Tensor]], edited: Sequence[int]
    ) -> tuple[dict[int, GradientForm], CompressedPlan, Tensor]:
        """Return the forms and the plan of a contribution, and the wire's bytes of what is encoded of it, uint8.

        The bytes stay as they are until the next call.
        """
        self._bind(layout)
        # Gradients with strides of their own are written in the layout's: what is left out of them must stay in one order.
        forms = {
            number: form
            for number, form in forms.items()
            if not (isinstance(form, TensorSpec) and encodable(layout.specs[number], self._wire))
        }
        plan = self._plan(layout, forms, edited)
        nbytes = sum(plan.head_nbytes)
        if self._bytes.numel() < nbytes:
            self._bytes = torch.zeros(nbytes, dtype=torch.uint8)
        wire = self._bytes[:nbytes]
        gradients = [tensors[part.number][0].detach() for part in plan.parts]
        with torch.no_grad():
            finite = (
                self._quantize(plan, gradients, wire)
                if plan.wire.gradients == "int8"
                else self._pick(plan, gradients, wire)
            )
        self._pending = _Pending(plan, gradients, wire, finite)
        return forms, plan, wire

    def _plan(self, layout: Layout, forms: dict[int, GradientForm], edited: Sequence[int]) -> CompressedPlan:
        if forms or edited:
            return compress_plan(layout, forms, edited, self._wire)
        if self._usual is None:
            self._usual = compress_plan(layout, {}, (), self._wire)
        return self._usual

    def _bind(self, layout: Layout) -> None:
        """Have a residual for a layout; one that has grown by a group begins there with nothing left out."""
        if self._layout is layout:
            return
        parts = parts_of(layout, {}, self._wire)
        end = parts[-1].first + parts[-1].padded if parts else 0
        residual = torch.zeros(end)
        known = min(end, self._residual.numel())
        residual[:known] = self._residual[:known]
        self._layout, self._usual, self._unanswered = layout, None, None
        self._room = torch.zeros(max((part.padded for part in parts), default=0))
        self._use(residual)

    def _use(self, residual: Tensor) -> None:
        assert self._layout is not None, "bound"
        self._residual = residual
        self._views = {
            part.number: (
                residual[part.first : part.first + part.padded],
                residual[part.first :].as_strided(part.spec.shape, part.spec.strides),
            )
            for part in parts_of(self._layout, {}, self._wire)
        }

    def _compensated(self, number: int, gradient: Tensor) -> Tensor:
        """Return a gradient and what was left out before it, flat and in whole blocks; the next call overwrites it."""
        assert self._layout is not None, "bound"
        flat, view = self._views[number]
        spec = self._layout.specs[number]
        room = self._room[: flat.numel()]
        torch.add(view, gradient, out=room.as_strided(spec.shape, spec.strides))
        room[spec.numel :].zero_()
        return room

    def _quantize(self, plan: CompressedPlan, gradients: Sequence[Tensor], wire: Tensor) -> bool:
        scales, codes = plan.int8(wire)
        sizes = [part.padded for part in plan.parts]
        blocks = [size // INT8_BLOCK for size in sizes]
        for part, gradient, scale, code in zip(
            plan.parts, gradients, torch.split(scales, blocks), torch.split(codes, sizes), strict=True
        ):
            quantize(self._compensated(part.number, gradient), scale, code)
        return bool(torch.isfinite(scales).all())

    def _pick(self, plan: CompressedPlan, gradients: Sequence[Tensor], wire: Tensor) -> bool:
        positions, values = plan.topk(wire)
        for part, gradient, count, own, picked in zip(
            plan.parts,
            gradients,
            plan.counts,
            torch.split(positions, plan.counts),
            torch.split(values, plan.counts),
            strict=True,
        ):
            greatest(self._compensated(part.number, gradient)[: part.numel], count, own, picked)
        return bool(torch.isfinite(values).all())

    # What became of it.

    def follow(self, sequence: int, act: Callable[[], Result], used: Callable[[Result], bool]) -> Result:
        """Send the contribution of that number by ``act``, and keep what it left out if the answer says that it was used."""
        try:
            answer = act()
        except BaseException as error:
            self._failed(sequence, error)
            raise
        pending, self._pending = self._pending, None
        if pending is not None and used(answer):
            self._keep(pending)
        return answer

    def _failed(self, sequence: int, error: BaseException) -> None:
        pending, self._pending = self._pending, None
        if pending is None or (isinstance(error, FarstepError) and error.applied is not Applied.UNKNOWN):
            return
        before = self._residual.clone()
        self._keep(pending)
        self._unanswered = sequence, self._residual
        self._use(before)

    @property
    def in_doubt(self) -> bool:
        """Whether a contribution was never answered."""
        return self._unanswered is not None

    def resolve(self, settled: int) -> None:
        """The server has settled what came up to that number, and nothing after it."""
        if self._unanswered is not None:
            sequence, after = self._unanswered
            self._unanswered = None
            if sequence <= settled:
                self._use(after)

    def _keep(self, pending: _Pending) -> None:
        plan = pending.plan
        with torch.no_grad():
            for part, gradient in zip(plan.parts, pending.gradients, strict=True):
                self._views[part.number][1].add_(gradient)
            if plan.wire.gradients == "int8":
                self._take_off_codes(plan, pending.wire)
            else:
                positions, _ = plan.topk(pending.wire)
                for part, own in zip(plan.parts, torch.split(positions, plan.counts), strict=True):
                    self._views[part.number][0].index_fill_(0, own.long(), 0.0)
            if not pending.finite:
                self._residual.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _take_off_codes(self, plan: CompressedPlan, wire: Tensor) -> None:
        scales, codes = plan.int8(wire)
        sizes = [part.padded for part in plan.parts]
        blocks = [size // INT8_BLOCK for size in sizes]
        for part, scale, code in zip(plan.parts, torch.split(scales, blocks), torch.split(codes, sizes), strict=True):
            room = self._room[: part.padded]
            dequantize(scale, code, room)
            self._views[part.number][0].sub_(room)
