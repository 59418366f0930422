"""Which parameters the user changed on this side since the server's last word.

torch records changes made through the tensor itself in its version counter, but not those made through ``p.data``, which
weight clipping and averaging commonly use. So the bits are compared too: small parameters with one copy of them all, large
ones with a sum over their words, which reads them once and keeps nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farstep_wire.layout import TensorSpec

_COPIED_BYTES = 64 * 1024
_SHARED_BYTES = 4 * 1024 * 1024
"""From twice this on, two threads share the sums."""


class EditDetector:
    """Remembers the parameters' bits and tells which have changed."""

    def __init__(self, tensors: Sequence[Tensor], *, compare_bits: bool) -> None:
        self._tensors = list(tensors)
        self._compare_bits = compare_bits
        self._small: list[int] = []
        self._memories: list[memoryview] = []
        self._large: list[int] = []
        self._remembered = False
        self._versions: list[tuple[int, int]] = []
        self._copies: list[bytes] = []
        self._joined = b""
        self._sums: list[int] = []
        self._edited: set[int] = set()
        self._marks: list[tuple[int, int]] = []

    def look_at(self, memories: Sequence[memoryview | None]) -> None:
        """Take the places of the parameters in CPU memory, None where one has none of its own or not in its layout."""
        changed = self._remembered and self._compare_bits
        if changed:
            # Compare with what was remembered of the old places before they are forgotten.
            copies = dict(zip(self._small, self._copies, strict=True))
            sums = dict(zip(self._large, self._sums, strict=True))
        small = [index for index, memory in enumerate(memories) if memory is not None and len(memory) <= _COPIED_BYTES]
        chosen = set(small)
        self._small, self._large = small, [index for index in range(len(memories)) if index not in chosen]
        self._memories = [memory for memory in (memories[index] for index in small) if memory is not None]
        if changed:
            self._edited.update(index for index in self._small if index not in copies)
            self._edited.update(index for index in self._large if index not in sums)
            self._copies = [copies.get(index, b"") for index in self._small]
            self._joined = b"".join(self._copies)
            self._sums = [sums.get(index, 0) for index in self._large]

    def remember(self, but: Sequence[int] = ()) -> None:
        """Take the parameters as they are for unchanged, all but some."""
        self._remembered = True
        self._edited = set(but)
        if not self._compare_bits:
            self._versions = self._marks_of_torch()
            return
        if self._large:
            self._sums = sums_of_words([self._tensors[index] for index in self._large])
        self._remember_rest()

    def _remember_rest(self) -> None:
        self._marks = self._marks_of_large()
        self._joined = b"".join(self._memories)
        ends = accumulate(len(memory) for memory in self._memories)
        self._copies = [self._joined[end - len(memory) : end] for memory, end in zip(self._memories, ends, strict=True)]

    def remember_changes(self, whole: Sequence[int], rows: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Take the parameters for unchanged, of which nothing is new since the last time but some, or some rows of them.

        ``rows``: as they were, and as they are. Large parameters are not read but for what is new in them; those whose rows do
        not consist of the words that are added up, as of three float32, are read as a whole.
        """
        if not self._remembered or self._edited or not self._compare_bits:
            self.remember()
            return
        places = {index: place for place, index in enumerate(self._large)}
        again = [index for index in whole if index in places]
        for index, (before, after) in rows.items():
            if index in places:
                words = _row_words(self._tensors[index].detach())
                if words is None:
                    again.append(index)
                else:
                    change = _sum_of_rows(after, words) - _sum_of_rows(before, words)
                    place = places[index]
                    self._sums[place] = (self._sums[place] + change + 2**63) % 2**64 - 2**63
        for index, value in zip(again, sums_of_words([self._tensors[index] for index in again]), strict=True):
            self._sums[places[index]] = value
        self._remember_rest()

    def untouched(self, but: Sequence[int]) -> bool:
        """Whether torch knows of no change either, to large ones ``but`` some: what exchanges rows leaves the sum as it is."""
        if not self._compare_bits:
            return True
        marks = zip(self._large, self._marks, self._marks_of_large(), strict=False)
        known = len(self._marks) == len(self._large)
        return known and all(old == new or index in but for index, old, new in marks)

    def changed(self) -> list[int]:
        """Return the indices of parameters that are not as remembered; none before the first ``remember``."""
        if not self._remembered:
            return []
        found = set(self._edited)
        if not self._compare_bits:
            marks = zip(self._versions, self._marks_of_torch(), strict=True)
            return sorted(found | {index for index, (old, new) in enumerate(marks) if old != new})
        if b"".join(self._memories) != self._joined:
            pairs = zip(self._small, self._memories, self._copies, strict=True)
            found.update(index for index, memory, copy in pairs if memory.tobytes() != copy)
        if self._large:
            sums = sums_of_words([self._tensors[index] for index in self._large])
            found.update(index for index, old, new in zip(self._large, self._sums, sums, strict=True) if old != new)
        return sorted(found)

    def _marks_of_torch(self) -> list[tuple[int, int]]:
        return [(tensor._version, tensor.data_ptr()) for tensor in self._tensors]

    def _marks_of_large(self) -> list[tuple[int, int]]:
        return [(self._tensors[index]._version, self._tensors[index].data_ptr()) for index in self._large]


def sums_of_words(tensors: Sequence[Tensor]) -> list[int]:
    """Return, for each tensor, the sum of its bytes taken as the widest integers that fit, modulo 2**64."""
    words = [_words(tensor.detach()) for tensor in tensors]
    result = [0] * len(tensors)
    here = [index for index, each in enumerate(words) if each.is_cpu]
    for index, value in zip(here, _sums_here([words[index] for index in here]), strict=True):
        result[index] = value
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, each in enumerate(words):
        if not each.is_cpu:
            by_device.setdefault(each.device, []).append((index, each.sum(dtype=torch.int64)))
    for entries in by_device.values():
        # One transfer per device, not one per parameter.
        values = torch.stack([value for _, value in entries]).tolist()
        for (index, _), value in zip(entries, values, strict=True):
            result[index] = value
    return result


def _sums_here(words: Sequence[Tensor]) -> list[int]:
    # Not by torch, whose threads meet at the end of each tensor, and on a busy machine wait for each other for long.
    arrays = [each.numpy() for each in words]
    half = sum(array.nbytes for array in arrays) // 2
    if half < _SHARED_BYTES:
        return _sums(arrays)
    behind = bisect_left(list(accumulate(array.nbytes for array in arrays)), half)
    second: list[int] = []
    thread = Thread(target=lambda: second.extend(_sums(arrays[behind:])), name="farstep-edits")
    thread.start()
    first = _sums(arrays[:behind])
    thread.join()
    return first + second


def _sums(arrays: Sequence[Any]) -> list[int]:
    return [int(np.add.reduce(array, dtype=np.int64)) for array in arrays]


def _words(tensor: Tensor) -> Tensor:
    dense = TensorSpec.of(tensor).is_dense
    flat = tensor.as_strided((tensor.numel(),), (1,)) if dense else tensor.contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    start = int(flat.storage_offset()) * flat.element_size()
    for words in (torch.int64, torch.int32, torch.int16):
        if (flat.nbytes | flat.data_ptr() | start) % words.itemsize == 0:
            return flat.view(words)
    return flat.view(torch.uint8)


def _row_words(tensor: Tensor) -> torch.dtype | None:
    """Return what a tensor's rows are added up as, one by one; None where they do not consist of whole words."""
    if tensor.is_complex() or not tensor.is_contiguous() or not tensor.numel():
        return None
    words = _words(tensor).dtype
    return None if tensor[0].nbytes % words.itemsize else words


def _sum_of_rows(rows: Tensor, words: torch.dtype) -> int:
    return int(rows.contiguous().view(-1).view(words).sum(dtype=torch.int64))
