"""Gradients for slow links: eight bits for each number, or the few greatest of them. ``wire_format`` has the formulas.

The plan of such a contribution puts the dense float32 gradients first, each at a whole block of ``INT8_BLOCK`` elements, so
that one pass over all of them decodes them; what else it has (sparse gradients, other dtypes, edited parameters) follows, and
travels as it is. Both sides compute from the layout how many bytes that makes; nothing of it is taken from the wire.

This module stands on torch and the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from farstep_wire.layout import GradientForm, GradientPlan, Layout, TensorSpec, align, place, plan_gradients
from farstep_wire.narrowing import PIECE_ELEMENTS
from farstep_wire.wire_format import INT8_BLOCK, Wire, kept

_PIECE_BLOCKS = PIECE_ELEMENTS // INT8_BLOCK
_LEVELS = 127.0
_LARGEST_ELEMENTS = 2**31
"""A tensor of that many elements or more travels as it is: its positions do not fit int32."""


@dataclass(frozen=True)
class Part:
    """One encoded gradient: its parameter, its elements, and where it begins among all encoded ones in whole blocks."""

    number: int
    spec: TensorSpec
    first: int

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.spec.numel

    @property
    def padded(self) -> int:
        """Its elements, filled up to whole blocks."""
        return -(-self.spec.numel // INT8_BLOCK) * INT8_BLOCK


def encodable(spec: TensorSpec, wire: Wire) -> bool:
    """Whether a dense gradient with a parameter's own strides is encoded, and does not travel as it is."""
    if spec.dtype != torch.float32 or not spec.is_dense or not 0 < spec.numel < _LARGEST_ELEMENTS:
        return False
    return wire.gradients != "topk" or kept(spec.numel, wire.density) > 0


def parts_of(layout: Layout, forms: Mapping[int, GradientForm], wire: Wire) -> tuple[Part, ...]:
    """Return the encoded gradients, in layout order, one after another."""
    parts: list[Part] = []
    first = 0
    for number, spec in enumerate(layout.specs):
        if number not in forms and encodable(spec, wire):
            parts.append(Part(number, spec, first))
            first += parts[-1].padded
    return tuple(parts)


@dataclass(frozen=True)
class CompressedPlan:
    """Where a contribution's bytes lie once they are decoded (``plan``), and where on the wire."""

    wire: Wire
    plan: GradientPlan
    parts: tuple[Part, ...]

    @cached_property
    def elements(self) -> int:
        """Elements of all encoded gradients, in whole blocks."""
        return self.parts[-1].first + self.parts[-1].padded if self.parts else 0

    @cached_property
    def counts(self) -> list[int]:
        """How many elements of each part top-k sends."""
        return [kept(part.numel, self.wire.density) for part in self.parts]

    @cached_property
    def head_nbytes(self) -> tuple[int, int]:
        """Bytes of what the encoded gradients are on the wire: scales and int8, or positions and values."""
        if self.wire.gradients == "int8":
            return align(self.elements // INT8_BLOCK * 4), align(self.elements)
        return align(4 * sum(self.counts)), align(4 * sum(self.counts))

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return sum(self.head_nbytes) + self.plan.nbytes - 4 * self.elements

    def int8(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 scales and the int8 values in the bytes of the wire."""
        first, _ = self.head_nbytes
        scales = data[: self.elements // INT8_BLOCK * 4].view(torch.float32)
        return scales, data[first : first + self.elements].view(torch.int8)

    def topk(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int32 positions and the float32 values in the bytes of the wire."""
        first, _ = self.head_nbytes
        nbytes = 4 * sum(self.counts)
        return data[:nbytes].view(torch.int32), data[first : first + nbytes].view(torch.float32)

    def decode(self, data: Tensor, target: Tensor, layout: Layout) -> None:
        """Write what came as the plan has it into ``target``, both uint8 on the CPU.

        ValueError: positions that are out of range or not ascending; it names the parameter.
        """
        flat = target[: 4 * self.elements].view(torch.float32)
        if self.wire.gradients == "int8":
            scales, values = self.int8(data)
            dequantize(scales, values, flat)
        else:
            self._scatter(*self.topk(data), flat, layout)
        target[4 * self.elements : self.plan.nbytes] = data[sum(self.head_nbytes) : self.nbytes]

    def _scatter(self, positions: Tensor, values: Tensor, flat: Tensor, layout: Layout) -> None:
        torch._foreach_zero_(torch.split(flat, PIECE_ELEMENTS))
        for part, own, given in zip(
            self.parts, torch.split(positions, self.counts), torch.split(values, self.counts), strict=True
        ):
            _check_positions(own, part.numel, layout.parameters[part.number].key)
            target = flat[part.first : part.first + part.numel]
            for piece, value in zip(torch.split(own, PIECE_ELEMENTS), torch.split(given, PIECE_ELEMENTS), strict=True):
                target.scatter_(0, piece.long(), value)


def compress_plan(layout: Layout, forms: dict[int, GradientForm], edited: Sequence[int], wire: Wire) -> CompressedPlan:
    """Lay out a contribution's bytes; ValueError names the parameter whose form does not fit it."""
    plain = plan_gradients(layout, forms, edited)
    parts = parts_of(layout, forms, wire)
    encoded = {part.number: part for part in parts}
    rest = [spec for number, pieces in enumerate(plain.pieces) if number not in encoded for spec, _ in pieces]
    begin = 4 * (parts[-1].first + parts[-1].padded) if parts else 0
    placement = place(rest)
    offsets: Iterator[int] = iter(placement.offsets)
    pieces = tuple(
        ((encoded[number].spec, 4 * encoded[number].first),)
        if number in encoded
        else tuple((spec, begin + next(offsets)) for spec, _ in own)
        for number, own in enumerate(plain.pieces)
    )
    edits_begin = begin + placement.nbytes
    shift = edits_begin - (plain.edited[0][2] if plain.edited else 0)
    placed = tuple((index, spec, offset + shift) for index, spec, offset in plain.edited)
    end = edits_begin + sum(align(spec.nbytes) for _, spec, _ in placed)
    return CompressedPlan(wire, GradientPlan(plain.forms, pieces, placed, end), parts)


# Elements.


def quantize(values: Tensor, scales: Tensor, codes: Tensor) -> None:
    """Make int8 of float32 values in whole blocks. ``values`` is overwritten; ``scales`` and ``codes`` are written to."""
    blocks = values.view(-1, INT8_BLOCK)
    torch.linalg.vector_norm(blocks, math.inf, dim=1, out=scales)
    scales.div_(_LEVELS)
    blocks.div_(torch.where(scales > 0, scales, 1.0).unsqueeze(1)).round_()
    # A number that is none becomes a zero, which its block's scale makes one again.
    codes.copy_(values.nan_to_num_(nan=0.0).clamp_(-_LEVELS, _LEVELS))


def dequantize(scales: Tensor, codes: Tensor, target: Tensor) -> None:
    """Write what int8 in whole blocks stands for, float32; on this thread alone."""
    for scale, code, out in zip(
        torch.split(scales, _PIECE_BLOCKS),
        torch.split(codes.view(-1, INT8_BLOCK), _PIECE_BLOCKS),
        torch.split(target.view(-1, INT8_BLOCK), _PIECE_BLOCKS),
        strict=True,
    ):
        torch.mul(code, scale.unsqueeze(1), out=out)


def greatest(values: Tensor, count: int, positions: Tensor, picked: Tensor) -> None:
    """Pick the ``count`` values of greatest magnitude, a NaN before all: int32 positions, ascending, and float32 values."""
    found = torch.topk(values.abs(), count, sorted=False).indices.sort().values
    positions.copy_(found)
    torch.index_select(values, 0, found, out=picked)


def _check_positions(positions: Tensor, numel: int, key: str) -> None:
    if not positions.numel():
        return
    first, last = int(positions[0]), int(positions[-1])
    if first < 0 or last >= numel:
        wrong = first if first < 0 else last
        raise ValueError(f"the top-k gradient of {key!r} has the position {wrong}; it has {numel} elements")
    step = PIECE_ELEMENTS - 1
    for begin in range(0, positions.numel() - 1, step):
        piece = positions[begin : begin + step + 1]
        if not bool((piece[1:] > piece[:-1]).all()):
            raise ValueError(f"the positions of the top-k gradient of {key!r} do not ascend")
