"""Float32 numbers that travel half as wide, as bfloat16 or float16, and all else beside them as it is.

Both sides compute from the layout which bytes of an arena hold float32. These take half as many bytes on the wire, the others
as many as they have. Numbers are converted a frame at a time, when it is made and as it comes in: so they are read and written
once, while they are in the cache, and one frame is converted while others travel. The thread that sends or receives converts
by itself; for 32,768 elements or more torch would take others, and keep them for each thread that it is called from.

This module stands on torch and the standard library alone; the server's core uses it.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farstep_wire.copying import join_bytes
from farstep_wire.errors import InvalidRequestError
from farstep_wire.layout import GradientPlan, Layout, align
from farstep_wire.limits import CHUNK_BYTES

PIECE_ELEMENTS = 32 * 1023
"""What is handed to torch at once: below the size from which it takes more threads than one."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Stretch:
    """A run of bytes ``start`` to ``stop`` of an arena that is at ``wire`` on the wire; ``narrow``: it holds float32."""

    start: int
    stop: int
    wire: int
    narrow: bool


@dataclass(frozen=True)
class Narrowing:
    """Which bytes of an arena travel as which. ``nbytes``: of all on the wire."""

    dtype: torch.dtype
    stretches: tuple[Stretch, ...]
    nbytes: int

    @classmethod
    def of(cls, format_name: str, spans: Iterable[tuple[int, int, bool]]) -> Narrowing:
        """Return how spans of an arena (start, stop, whether it holds float32) travel; only alike ones may overlap."""
        merged: list[tuple[int, int, bool]] = []
        for start, stop, narrow in sorted(span for span in spans if span[0] < span[1]):
            if merged and merged[-1][2] is narrow and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]), narrow)
            else:
                merged.append((start, stop, narrow))
        stretches = []
        end = 0
        for start, stop, narrow in merged:
            stretches.append(Stretch(start, stop, end, narrow))
            end += align((stop - start) // 2 if narrow else stop - start)
        return cls(_DTYPES[format_name], tuple(stretches), end)

    def places(self, tensors: Iterable[tuple[int, Tensor]]) -> Places:
        """Return where tensors stand on the wire that begin at these offsets of the arena.

        Each is 1-D on the CPU: float32 where the arena has it there, else its bytes as uint8.
        """
        starts = [stretch.start for stretch in self.stretches]
        placed = []
        for offset, tensor in tensors:
            if tensor.numel():
                stretch = self.stretches[bisect_right(starts, offset) - 1]
                inside = offset - stretch.start
                placed.append((stretch.wire + (inside // 2 if stretch.narrow else inside), tensor))
        return Places(placed, self.dtype)

    def places_in(self, arena: Tensor) -> Places:
        """Return where the bytes of a whole arena, uint8 on the CPU, stand on the wire."""
        parts = [(stretch, arena[stretch.start : stretch.stop]) for stretch in self.stretches]
        return Places(
            [(stretch.wire, part.view(torch.float32) if stretch.narrow else part) for stretch, part in parts],
            self.dtype,
        )


def narrow_gradients(plan: GradientPlan, format_name: str) -> Narrowing:
    """Return how a contribution's bytes travel: its gradients narrowed, values of sparse ones too, edits as they are."""
    spans = [
        (offset, offset + align(spec.nbytes), spec.dtype == torch.float32)
        for pieces in plan.pieces
        for spec, offset in pieces
    ]
    spans += [(offset, offset + align(spec.nbytes), False) for _, spec, offset in plan.edited]
    return Narrowing.of(format_name, spans)


def narrow_parameters(layout: Layout, format_name: str) -> Narrowing:
    """Return how the bytes of a parameter arena travel: those of parameters that share a storage as they are."""
    return Narrowing.of(
        format_name,
        (
            (offset, offset + (spec.nbytes if parameter.storage else align(spec.nbytes)), narrow)
            for parameter, offset in zip(layout.parameters, layout.arena.offsets, strict=True)
            for spec in (parameter.spec,)
            for narrow in (spec.dtype == torch.float32 and not parameter.storage,)
        ),
    )


class Places:
    """1-D CPU tensors and where they stand on the wire: float32 ones as ``dtype``, uint8 ones as they are."""

    def __init__(self, tensors: Iterable[tuple[int, Tensor]], dtype: torch.dtype) -> None:
        entries = sorted(((offset, tensor) for offset, tensor in tensors if tensor.numel()), key=lambda entry: entry[0])
        self._dtype = dtype
        self._starts = [offset for offset, _ in entries]
        self._tensors = [tensor for _, tensor in entries]
        self._stops = [
            offset + tensor.numel() * (2 if tensor.dtype == torch.float32 else 1) for offset, tensor in entries
        ]

    def read(self, start: int, stop: int, wire: Tensor) -> None:
        """Write the bytes ``start`` to ``stop`` of the wire into ``wire``, uint8; zeros where no tensor is."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        end = start
        for own, part, low, high in self._within(start, stop, wire):
            if low > end:
                wire[end - start : low - start].zero_()
            targets.append(part)
            sources.append(own)
            end = high
        if end < stop:
            wire[end - start : stop - start].zero_()
        _copy(targets, sources)

    def write(self, start: int, wire: Tensor) -> None:
        """Take over the bytes of the wire that begin at ``start``; ValueError where they end within an element."""
        pairs = list(self._within(start, start + wire.numel(), wire))
        _copy([own for own, _, _, _ in pairs], [part for _, part, _, _ in pairs])

    def _within(self, start: int, stop: int, wire: Tensor) -> Iterable[tuple[Tensor, Tensor, int, int]]:
        """Yield the parts of tensors that stand in a range, what they are in ``wire``, and from where to where."""
        for index in range(bisect_right(self._stops, start), len(self._starts)):
            begin, end, tensor = self._starts[index], self._stops[index], self._tensors[index]
            if begin >= stop:
                break
            low, high = max(begin, start), min(end, stop)
            part = wire[low - start : high - start]
            if tensor.dtype == torch.float32:
                if (low - begin) % 2 or (high - begin) % 2:
                    raise ValueError(f"bytes {start} to {stop} of a message end within an element of two bytes")
                part = part.view(self._dtype) if (low - start) % 2 == 0 else part.clone().view(self._dtype)
                if high - low < end - begin:
                    tensor = tensor[(low - begin) // 2 : (high - begin) // 2]
            elif high - low < end - begin:
                tensor = tensor[low - begin : high - begin]
            yield tensor, part, low, high


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors to tensors, converting between dtypes, on this thread alone."""
    with torch.no_grad():
        small = [(target, source) for target, source in zip(targets, sources, strict=True) if _is_small(target)]
        if small:
            torch._foreach_copy_([target for target, _ in small], [source for _, source in small])
        for target, source in zip(targets, sources, strict=True):
            if not _is_small(target):
                torch._foreach_copy_(torch.split(target, PIECE_ELEMENTS), torch.split(source, PIECE_ELEMENTS))


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= PIECE_ELEMENTS


class Room:
    """Memory for one frame's bytes, as a tensor and as what Python joins."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = bytearray(max(nbytes, 1))
        self.tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self.memory = memoryview(self._bytes)


class NarrowSource:
    """The bytes of places, each frame's made when it is due: a BytesSource. Keeps the owners of their memory alive."""

    def __init__(self, places: Places, nbytes: int, owners: object = None) -> None:
        self.nbytes = nbytes
        self._places = places
        self._owners = owners
        self._room: Room | None = None

    def join(self, prefix: Sequence[bytes], start: int, stop: int) -> bytes:
        """Return the prefix and a range of the bytes as one."""
        if self._room is None:
            self._room = Room(min(self.nbytes, CHUNK_BYTES))
        self._places.read(start, stop, self._room.tensor[: stop - start])
        return join_bytes((*prefix, self._room.memory[: stop - start]))


class WideningSink:
    """Takes received bytes to their places as float32: a Sink."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def write(self, offset: int, data: memoryview) -> None:
        """Take the bytes that belong at the offset; InvalidRequestError where they end within an element."""
        try:
            self._places.write(offset, torch.frombuffer(data, dtype=torch.uint8))
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None


def _said_once() -> None:
    """Have torch say now, to nobody, what it says once in a process: that bytes which it is shown must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


_said_once()
