"""Layouts and arenas: where each parameter and each gradient lies in one run of bytes.

An arena is one contiguous buffer per dtype; the buffers of a layout stand one after another in a single run of bytes, so
that a byte range names the same elements on both sides. Both sides compute the places from the declared shapes alone; no
offset is ever taken from the wire. Each tensor begins at a multiple of 64 bytes, which is also what torch's CPU allocator
gives, so that kernels whose bits depend on alignment see the same.

Tensors keep their strides: a channels-last parameter is channels-last on the server. Parameters whose memory overlaps on
the client (two views of one storage) share one place here too, so that an update of one is an update of the other.

This module stands on torch and the standard library alone; the server's core uses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64

_WHOLE = {
    getattr(torch, name) for name in ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
}
DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name in dir(torch)
    if isinstance(dtype := getattr(torch, name), torch.dtype)
    and (dtype.is_floating_point or dtype.is_complex or dtype in _WHOLE)
}
"""Every dtype of this torch whose elements are plain numbers, by name, aliases included."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the prefix, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Return the dtype of that name; ValueError where this torch has none."""
    dtype = DTYPES.get(name)
    if dtype is None:
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of that shape."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def align(nbytes: int) -> int:
    """Round a size up to the alignment."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (in elements) and dtype of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.strides):
            raise ValueError(f"shape {self.shape} and strides {self.strides} differ in length")
        if any(size < 0 for size in self.shape) or any(stride < 0 for stride in self.strides):
            raise ValueError(f"negative size or stride in shape {self.shape}, strides {self.strides}")

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe a tensor as it is."""
        return cls(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    @classmethod
    def contiguous(cls, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
        """Describe a contiguous tensor."""
        return cls(dtype, tuple(shape), contiguous_strides(shape))

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last one."""
        if self.numel == 0:
            return 0
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return extent * self.dtype.itemsize

    @cached_property
    def is_dense(self) -> bool:
        """Whether the elements fill their bytes: no gaps, no two elements in one place."""
        expected = 1
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size == 1:
                continue
            if stride != expected:
                return self.numel == 0
            expected *= size
        return True

    def densified(self) -> TensorSpec:
        """Return the dense strides that ``torch.empty_like`` would give this tensor."""
        if self.is_dense:
            return self
        meta = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        return TensorSpec.of(torch.empty_like(meta))

    def view(self, buffer: Tensor, offset: int) -> Tensor:
        """Return the tensor that lies at a byte offset of a uint8 buffer; it shares the buffer's memory."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype, device=buffer.device)
        flat = buffer[offset : offset + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.strides)

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a layout."""

    key: str
    spec: TensorSpec
    group: int
    storage: int = 0
    """0: memory of its own; parameters with the same other number share one storage."""
    storage_offset: int = 0
    """First element in the shared storage."""


@dataclass(frozen=True)
class Placement:
    """Byte offset of each tensor, and the bytes of all."""

    offsets: tuple[int, ...]
    nbytes: int


def place(specs: Iterable[TensorSpec]) -> Placement:
    """Place tensors one after another, those of one dtype together, each at a multiple of the alignment."""
    items = list(specs)
    order = _dtype_order([spec.dtype for spec in items])
    offsets = [0] * len(items)
    end = 0
    for index in order:
        offsets[index] = end
        end += align(items[index].nbytes)
    return Placement(tuple(offsets), end)


def _dtype_order(dtypes: Sequence[torch.dtype]) -> list[int]:
    first = {dtype: index for index, dtype in reversed(list(enumerate(dtypes)))}
    return sorted(range(len(dtypes)), key=lambda index: (first[dtypes[index]], index))


@dataclass(frozen=True)
class Layout:
    """The ordered parameters of a hosted optimizer.

    ``group_sizes`` gives the number of parameters of each group; the parameters stand group by group.
    """

    parameters: tuple[ParameterSpec, ...]
    group_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        keys = [parameter.key for parameter in self.parameters]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"parameter key {twice!r} stands twice in the layout")
        if sum(self.group_sizes) != len(keys):
            raise ValueError(f"group sizes {self.group_sizes} do not add up to {len(keys)} parameters")

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The parameters' shapes, strides and dtypes, in order."""
        return tuple(parameter.spec for parameter in self.parameters)

    @cached_property
    def gradients(self) -> Placement:
        """Where dense gradients with the parameters' own strides lie."""
        return place(self.specs)

    @cached_property
    def arena(self) -> Placement:
        """Where the parameters lie. Parameters that share a storage overlap as they do on the client."""
        if not any(parameter.storage for parameter in self.parameters):
            return self.gradients
        regions: dict[tuple[int, int], int] = {}
        for index, parameter in enumerate(self.parameters):
            region = self._region(index)
            end = parameter.storage_offset * parameter.spec.dtype.itemsize + parameter.spec.nbytes
            regions[region] = max(regions.get(region, 0), end)
        sizes = [TensorSpec.contiguous(torch.uint8, [size]) for size in regions.values()]
        starts = dict(zip(regions, place(sizes).offsets, strict=True))
        offsets = tuple(
            starts[self._region(index)] + parameter.storage_offset * parameter.spec.dtype.itemsize
            for index, parameter in enumerate(self.parameters)
        )
        return Placement(offsets, place(sizes).nbytes)

    def _region(self, index: int) -> tuple[int, int]:
        storage = self.parameters[index].storage
        return (storage, 0) if storage else (0, index)

    @cached_property
    def dense_plan(self) -> GradientPlan:
        """The plan of a contribution whose gradients are all dense with the parameters' own strides."""
        pieces = tuple(((spec, offset),) for spec, offset in zip(self.specs, self.gradients.offsets, strict=True))
        return GradientPlan({}, pieces, (), self.gradients.nbytes)

    @cached_property
    def bare_plan(self) -> GradientPlan:
        """The plan of a contribution that brings neither gradients nor edited parameters."""
        return GradientPlan({}, tuple(() for _ in self.parameters), (), 0)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the parameters that lie in a uint8 buffer of ``arena.nbytes`` bytes."""
        return [spec.view(buffer, offset) for spec, offset in zip(self.specs, self.arena.offsets, strict=True)]

    def extended(self, group: Layout) -> Layout:
        """Return this layout with one more group."""
        added = tuple(
            ParameterSpec(p.key, p.spec, len(self.group_sizes), p.storage, p.storage_offset) for p in group.parameters
        )
        return Layout(self.parameters + added, (*self.group_sizes, len(added)))

    def begins_with(self, other: Layout) -> bool:
        """Whether the other's groups are the first of these."""
        parameters, groups = len(other.parameters), len(other.group_sizes)
        return self.parameters[:parameters] == other.parameters and self.group_sizes[:groups] == other.group_sizes

    def difference(self, other: Layout) -> str | None:
        """Say in words how another layout differs, naming the key and both sides; None where it does not."""
        for mine, theirs in zip(self.parameters, other.parameters, strict=False):
            if mine.key != theirs.key:
                return f"parameter {mine.key!r} is hosted where the client has {theirs.key!r}"
            if mine.spec != theirs.spec:
                detail = "" if str(mine.spec) != str(theirs.spec) else f", strides {mine.spec.strides}"
                other_detail = f", strides {theirs.spec.strides}" if detail else ""
                return f"parameter {mine.key!r} is hosted as {mine.spec}{detail}; the client has {theirs.spec}{other_detail}"
            if mine != theirs:
                return (
                    f"parameter {mine.key!r} is hosted in group {mine.group}; the client has it in group {theirs.group}"
                )
        if len(self.parameters) != len(other.parameters):
            return f"{len(self.parameters)} parameters are hosted; the client has {len(other.parameters)}"
        if self.group_sizes != other.group_sizes:
            return f"the groups hold {self.group_sizes} parameters; the client's hold {other.group_sizes}"
        return None


@dataclass(frozen=True)
class SparseForm:
    """A sparse COO gradient: ``nnz`` elements over the first ``sparse_dims`` dimensions."""

    nnz: int
    sparse_dims: int
    coalesced: bool


GradientForm = None | TensorSpec | SparseForm
"""How a gradient comes where it is not dense with the parameter's strides: absent, with strides of its own, or sparse."""


@dataclass(frozen=True)
class GradientPlan:
    """Where the pieces of a contribution lie in its bytes.

    ``pieces`` has, for each parameter, the spec and offset of its dense gradient, or of indices and values of a sparse one;
    none for an absent one. ``edited`` has the same for the edited parameters that follow.
    """

    forms: dict[int, GradientForm]
    pieces: tuple[tuple[tuple[TensorSpec, int], ...], ...]
    edited: tuple[tuple[int, TensorSpec, int], ...]
    nbytes: int

    @property
    def is_dense(self) -> bool:
        """Whether no gradient is sparse."""
        return not any(isinstance(form, SparseForm) for form in self.forms.values())


def plan_gradients(
    layout: Layout, forms: dict[int, GradientForm], edited: Sequence[int] = (), *, no_gradients: bool = False
) -> GradientPlan:
    """Lay out a contribution's bytes; ValueError names the parameter whose form does not fit it."""
    if not forms and not edited:
        return layout.bare_plan if no_gradients else layout.dense_plan
    parts: list[list[TensorSpec]] = []
    for index, parameter in enumerate(layout.parameters):
        if no_gradients or (index in forms and forms[index] is None):
            parts.append([])
            continue
        form = forms.get(index)
        parts.append([parameter.spec] if form is None else _form_specs(parameter, form))
    edits = [layout.specs[index].densified() for index in edited]
    flat = [spec for part in parts for spec in part]
    placement = place(flat)
    edit_placement = place(edits)
    offsets = iter(placement.offsets)
    pieces = tuple(tuple((spec, next(offsets)) for spec in part) for part in parts)
    placed = tuple(
        (index, spec, placement.nbytes + offset)
        for index, spec, offset in zip(edited, edits, edit_placement.offsets, strict=True)
    )
    return GradientPlan(forms, pieces, placed, placement.nbytes + edit_placement.nbytes)


def _form_specs(parameter: ParameterSpec, form: TensorSpec | SparseForm) -> list[TensorSpec]:
    spec = parameter.spec
    if isinstance(form, TensorSpec):
        if form.shape != spec.shape or form.dtype != spec.dtype or not form.is_dense:
            raise ValueError(
                f"gradient of {parameter.key!r} is {form}, strides {form.strides}; the parameter is {spec}"
            )
        return [form]
    if not 0 < form.sparse_dims <= len(spec.shape):
        raise ValueError(
            f"sparse gradient of {parameter.key!r} has {form.sparse_dims} sparse dimensions; {spec} has {len(spec.shape)}"
        )
    return [
        TensorSpec.contiguous(torch.int64, (form.sparse_dims, form.nnz)),
        TensorSpec.contiguous(spec.dtype, (form.nnz, *spec.shape[form.sparse_dims :])),
    ]
