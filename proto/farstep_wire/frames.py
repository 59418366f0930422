"""Frames: how a message and its bytes cross a stream.

A message is a protobuf header and a body of bytes, sent as one frame or more; a frame holds at most ``CHUNK_BYTES`` of the
body. The payload is the last field of ClientFrame and of ServerFrame, so a frame is made by one join (the only copy on the
way out of this module) and read without any: ``split`` returns a view into the received message. Any protobuf library can
read and write the same frames; one that puts the payload elsewhere in the message costs a copy, no more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError

from farstep_wire.copying import copy_bytes, join_bytes
from farstep_wire.errors import InvalidRequestError
from farstep_wire.layout import align
from farstep_wire.limits import CHUNK_BYTES, HEADER_BYTES
from farstep_wire.v1 import optimizer_pb2 as opb

Frame = TypeVar("Frame", opb.ClientFrame, opb.ServerFrame)

_PAYLOAD_FIELD = 16
_PAYLOAD_TAG = b"\x82\x01"
_COPIED_BYTES = 32 * 1024
"""Up to this size copying a payload costs less than finding it."""
_ZEROS = memoryview(bytes(CHUNK_BYTES))


class Body:
    """Bytes to send: segments one after another, none of them copied until a frame is made."""

    def __init__(self, segments: Iterable[memoryview | bytes] = ()) -> None:
        views: Iterable[memoryview] = (memoryview(segment) for segment in segments)
        self._segments = [view for view in views if len(view)]
        self._ends = list(accumulate(len(segment) for segment in self._segments))
        self.nbytes = self._ends[-1] if self._ends else 0

    def slices(self, start: int, stop: int) -> list[memoryview]:
        """Return the pieces of the segments that make up a range."""
        if start == 0 and stop == self.nbytes:
            return self._segments
        pieces: list[memoryview] = []
        index = bisect_right(self._ends, start)
        while start < stop:
            segment = self._segments[index]
            begin = self._ends[index] - len(segment)
            end = min(stop, self._ends[index])
            pieces.append(segment[start - begin : end - begin])
            start = end
            index += 1
        return pieces

    def join(self, prefix: Sequence[bytes], start: int, stop: int) -> bytes:
        """Return the prefix and a range of the bytes as one."""
        return join_bytes((*prefix, *self.slices(start, stop)))

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the segments, but for what only fills up to the alignment."""
        start = 0
        for stop in self._ends:
            if start == align(start):
                yield start, stop
            start = stop


def padded(segments: Iterable[memoryview | bytes]) -> Iterator[memoryview | bytes]:
    """Yield segments with zeros between them, so that each begins at a multiple of the alignment."""
    for segment in segments:
        yield segment
        gap = align(len(segment)) - len(segment)
        if gap:
            yield _ZEROS[:gap]


class BytesSource(Protocol):
    """Something whose ranges can be read, in order, when their frame is due."""

    nbytes: int

    def join(self, prefix: Sequence[bytes], start: int, stop: int) -> bytes:
        """Return the prefix and a range of the bytes as one."""


EMPTY = Body()


def encode(frame: opb.ClientFrame | opb.ServerFrame, body: BytesSource = EMPTY) -> Iterator[bytes]:
    """Yield the frames of a message. ``frame`` has its request number and header set; its payload is not."""
    total = body.nbytes
    if total:
        frame.total_bytes = total
    header = frame.SerializeToString()
    if len(header) > HEADER_BYTES:
        raise InvalidRequestError(
            f"the header of a message takes {len(header)} bytes; at most {HEADER_BYTES} are possible"
        )
    if not total:
        yield header
        return
    stop = min(CHUNK_BYTES, total)
    yield body.join((header, _PAYLOAD_TAG, _varint(stop)), 0, stop)
    follow = type(frame)(request=frame.request)
    while stop < total:
        start, stop = stop, min(stop + CHUNK_BYTES, total)
        follow.offset = start
        yield body.join((follow.SerializeToString(), _PAYLOAD_TAG, _varint(stop - start)), start, stop)


def decode(kind: type[Frame], data: bytes) -> tuple[Frame, memoryview]:
    """Return a frame and a view of its payload; InvalidRequestError where the bytes are no such frame."""
    try:
        if len(data) <= _COPIED_BYTES:
            frame = kind.FromString(data)
            return frame, memoryview(frame.payload)
        header, payload = split(data)
        if header is None:
            frame = kind.FromString(data)
            return frame, memoryview(frame.payload)
        return kind.FromString(header), payload
    except (DecodeError, IndexError) as error:
        raise InvalidRequestError(f"a message of {len(data)} bytes is not a {kind.DESCRIPTOR.name}: {error}") from None


def split(data: bytes) -> tuple[bytes | None, memoryview]:
    """Split a frame into header and payload; the header is None where protobuf's own reader must read the whole."""
    position = 0
    end = len(data)
    while position < end:
        start = position
        tag, position = _read_varint(data, position)
        if tag >> 3 == _PAYLOAD_FIELD:
            size, position = _read_varint(data, position)
            if tag & 7 != 2 or position + size != end:
                return None, memoryview(b"")
            return data[:start], memoryview(data)[position:]
        skipped = _skip(data, position, tag & 7)
        if skipped is None:
            return None, memoryview(b"")
        position = skipped
    return data, memoryview(b"")


def _skip(data: bytes, position: int, wire_type: int) -> int | None:
    if wire_type == 0:
        return _read_varint(data, position)[1]
    if wire_type == 2:
        size, position = _read_varint(data, position)
        return position + size
    if wire_type in (1, 5):
        return position + (8 if wire_type == 1 else 4)
    return None  # a group, or none of protobuf's types


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value = shift = 0
    while byte >= 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        position += 1
        if shift > 63:
            raise DecodeError("a varint is longer than 10 bytes")
        byte = data[position]
    return value | byte << shift, position + 1


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


class Sink(Protocol):
    """Where received bytes go."""

    def write(self, offset: int, data: memoryview) -> None:
        """Take the bytes that belong at the offset."""


class BufferSink:
    """Bytes into one writable buffer."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def write(self, offset: int, data: memoryview) -> None:
        """Copy the bytes to their place."""
        copy_bytes(self._buffer[offset : offset + len(data)], data)


class NullSink:
    """Bytes that nobody wants: those of a request that was refused."""

    def write(self, offset: int, data: memoryview) -> None:
        """Drop the bytes."""


class ScatterSink:
    """Bytes into many buffers, each with its own offset; bytes between them are dropped. Buffers may share offsets."""

    def __init__(self, places: Iterable[tuple[int, memoryview]]) -> None:
        self._places = sorted(
            ((offset, buffer) for offset, buffer in places if len(buffer)), key=lambda place: place[0]
        )
        self._starts = [offset for offset, _ in self._places]
        self._reach = list(accumulate((offset + len(buffer) for offset, buffer in self._places), max))

    def window(self, start: int, stop: int) -> memoryview | None:
        """Return the memory into which a range goes, where all of it goes to one place, and nothing of it to another."""
        index = bisect_right(self._reach, start)
        if index == len(self._places) or (index + 1 < len(self._places) and self._starts[index + 1] < stop):
            return None
        offset, buffer = self._places[index]
        return buffer[start - offset : stop - offset] if offset <= start and stop <= offset + len(buffer) else None

    def write(self, offset: int, data: memoryview) -> None:
        """Copy each part of the bytes to its place."""
        stop = offset + len(data)
        for index in range(bisect_right(self._reach, offset), len(self._places)):
            start, buffer = self._places[index]
            if start >= stop:
                break
            low, high = max(start, offset), min(start + len(buffer), stop)
            if low < high:
                copy_bytes(buffer[low - start : high - start], data[low - offset : high - offset])


class Incoming:
    """One message on its way in: checks that its frames come in order, without gap or overlap, and end where declared."""

    def __init__(self, total: int, sink: Sink) -> None:
        self._total = total
        self._sink = sink
        self._received = 0

    def __str__(self) -> str:
        return f"{self._received} of {self._total} bytes"

    @property
    def received(self) -> int:
        """How many bytes have come."""
        return self._received

    @property
    def complete(self) -> bool:
        """Whether every byte has come."""
        return self._received == self._total

    def take(self, offset: int, payload: memoryview) -> None:
        """Take the bytes of one frame; InvalidRequestError says which bytes were expected."""
        if offset != self._received:
            problem = "overlap those received" if offset < self._received else "leave a gap"
            raise InvalidRequestError(f"bytes at offset {offset} {problem}: byte {self._received} is next")
        end = offset + len(payload)
        if end > self._total:
            raise InvalidRequestError(f"bytes {offset} to {end} run past the declared {self._total} bytes")
        if not payload and not self.complete:
            raise InvalidRequestError(f"an empty frame where byte {self._received} of {self._total} is next")
        if payload:
            self._sink.write(offset, payload)
        self._received = end
