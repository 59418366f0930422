"""Parameters that come in part: where the changed rows, and what changed as a whole, lie in the bytes of a reply.

Both sides compute the places from the layout and from how many rows of which parameters there are. The numbers of the rows
come first, so that they can be checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farstep_wire.layout import Layout, TensorSpec, align, contiguous_strides, place


@dataclass(frozen=True)
class RowsPlace:
    """One parameter's changed rows: int64 numbers and values, each with its offset in the bytes."""

    number: int
    index: TensorSpec
    index_offset: int
    values: TensorSpec
    values_offset: int


@dataclass(frozen=True)
class ChangePlan:
    """Where everything lies. ``whole``: parameter and offset. ``index_bytes``: of the rows' numbers, which come first."""

    rows: tuple[RowsPlace, ...]
    whole: tuple[tuple[int, int], ...]
    index_bytes: int
    nbytes: int


def comes_in_rows(layout: Layout, number: int) -> bool:
    """Whether a parameter may come in rows: it has memory of its own, in which they lie one after another."""
    parameter = layout.parameters[number]
    spec = parameter.spec
    return (
        not parameter.storage
        and len(spec.shape) > 0
        and spec.numel > 0
        and spec.strides == contiguous_strides(spec.shape)
    )


def plan_changes(layout: Layout, whole: Sequence[int], rows: Mapping[int, int]) -> ChangePlan:
    """Lay out a reply's bytes; ``rows``: how many of each parameter. ValueError names what does not fit the layout."""
    numbers = [*whole, *rows]
    if len(set(numbers)) < len(numbers) or any(number >= len(layout.parameters) for number in numbers):
        raise ValueError(
            f"changed parameters {sorted(numbers)[-8:]}: each once, of the {len(layout.parameters)} there are"
        )
    for number, count in rows.items():
        spec = layout.specs[number]
        if not comes_in_rows(layout, number) or not 0 < count <= spec.shape[0]:
            raise ValueError(f"{count} rows of {layout.parameters[number].key!r} ({spec}) cannot come alone")
    indices = [TensorSpec.contiguous(torch.int64, (count,)) for count in rows.values()]
    at_indices = place(indices)
    order = sorted(numbers)
    bodies = [_body(layout.specs[number], rows.get(number)) for number in order]
    offsets, end = [], at_indices.nbytes
    for body in bodies:
        offsets.append(end)
        end += align(body.nbytes)
    placed = {number: (body, offset) for number, body, offset in zip(order, bodies, offsets, strict=True)}
    in_rows = zip(rows, indices, at_indices.offsets, strict=True)
    return ChangePlan(
        tuple(RowsPlace(number, index, offset, *placed[number]) for number, index, offset in in_rows),
        tuple((number, placed[number][1]) for number in whole),
        at_indices.nbytes,
        end,
    )


def _body(spec: TensorSpec, count: int | None) -> TensorSpec:
    return spec if count is None else TensorSpec.contiguous(spec.dtype, (count, *spec.shape[1:]))


def check_rows(index: Tensor, size: int, key: str) -> None:
    """ValueError unless the numbers of rows ascend, each within the parameter's ``size`` rows; ``index`` is 1-D int64."""
    if int(index[0]) < 0 or int(index[-1]) >= size or not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"the rows of {key!r} do not ascend from 0 to {size - 1}")
