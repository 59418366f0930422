"""Which parameters the user changed on this side since the server's last word.

torch records changes made through the tensor itself in its version counter, but not those made through ``p.data``, which
weight clipping and averaging commonly use. So the bits are compared too: small parameters with a copy of them, large ones
with a sum over their words, which reads them once and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farstep_wire.layout import TensorSpec
from farstep_wire.values import memory

_COPIED_BYTES = 64 * 1024


class EditDetector:
    """Remembers the parameters' bits and tells which have changed."""

    def __init__(self, tensors: Sequence[Tensor], *, compare_bits: bool) -> None:
        self._tensors = list(tensors)
        self._compare_bits = compare_bits
        self._versions: list[int] = []
        self._pointers: list[int] = []
        self._marks: list[bytes | int] = []

    def remember(self, but: Sequence[int] = ()) -> None:
        """Take the parameters as they are for unchanged, all but some."""
        self._versions = [tensor._version for tensor in self._tensors]
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        if self._compare_bits:
            self._marks = _marks(self._tensors)
        for index in but:
            self._pointers[index] = -1
            if self._compare_bits:
                self._marks[index] = b"changed"

    def changed(self) -> list[int]:
        """Return the indices of parameters that are not as remembered; none before the first ``remember``."""
        if not self._versions:
            return []
        if self._compare_bits:
            marks = _marks(self._tensors)
            return [index for index, (old, new) in enumerate(zip(self._marks, marks, strict=True)) if old != new]
        return [
            index
            for index, tensor in enumerate(self._tensors)
            if tensor._version != self._versions[index] or tensor.data_ptr() != self._pointers[index]
        ]


def _marks(tensors: Sequence[Tensor]) -> list[bytes | int]:
    marks: list[bytes | int] = []
    sums: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        dense = tensor.is_contiguous() or TensorSpec.of(tensor).is_dense
        if tensor.is_cpu and dense and tensor.nbytes <= _COPIED_BYTES:
            marks.append(memory(tensor, tensor.nbytes).tobytes())
            continue
        plain = tensor.detach()
        marks.append(0)
        sums.setdefault(plain.device, []).append((index, _sum_of_words(plain, dense=dense)))
    for entries in sums.values():
        # One transfer per device, not one per parameter.
        values = torch.stack([value for _, value in entries]).tolist()
        for (index, _), value in zip(entries, values, strict=True):
            marks[index] = value
    return marks


def _sum_of_words(tensor: Tensor, *, dense: bool) -> Tensor:
    flat = tensor.as_strided((tensor.numel(),), (1,)) if dense else tensor.contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    for words in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if flat.nbytes % words.itemsize == 0 and flat.data_ptr() % words.itemsize == 0 and _fits(flat, words):
            return flat.view(words).sum(dtype=torch.int64)
    return flat.view(torch.uint8).sum(dtype=torch.int64)


def _fits(flat: Tensor, words: torch.dtype) -> bool:
    return flat.storage_offset() * flat.element_size() % words.itemsize == 0
