"""Frames: their golden bytes, round trips however they are cut, and what is no frame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farstep_wire import frames
from farstep_wire.errors import InvalidRequestError
from farstep_wire.frames import Body, BufferSink, Incoming, NullSink, ScatterSink, decode, encode, padded, split
from farstep_wire.limits import CHUNK_BYTES, HEADER_BYTES, MESSAGE_BYTES
from farstep_wire.v1 import common_pb2 as cpb
from farstep_wire.v1 import optimizer_pb2 as pb


@pytest.fixture(params=[-1, 32 * 1024], ids=["view", "copy"], scope="module", autouse=True)
def _copied_bytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Read small frames by both ways: that of large frames, and their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "_COPIED_BYTES", request.param)
        yield


# Written down once; a change of any byte breaks clients and servers of other releases.
GOLDEN: list[tuple[pb.ClientFrame | pb.ServerFrame, bytes, list[str]]] = [
    (pb.ClientFrame(request=1, pull=pb.Pull()), b"", ["08013a00"]),
    (pb.ClientFrame(request=300, heartbeat=pb.Heartbeat()), b"", ["08ac025a00"]),
    (pb.ClientFrame(request=2, upload=pb.Upload()), b"abc", ["08021a0070038201" + "03" + "616263"]),
    (
        pb.ClientFrame(
            request=7,
            contribution=pb.Contribution(epoch=1, sequence=2, version=3, num_samples=1.5, incarnation=4),
        ),
        bytes(range(5)),
        ["08072211080110021803" + "29000000000000f83f" + "5804" + "7005" + "8201" + "05" + "0001020304"],
    ),
    (
        pb.ServerFrame(request=7, stepped=pb.Stepped(outcome=pb.Stepped.OUTCOME_COMMITTED, version=4, parameters=True)),
        b"\xff",
        ["08071a06080110043001" + "7001" + "8201" + "01" + "ff"],
    ),
    (
        pb.ServerFrame(request=9, failure=cpb.Failure(code="FENCED", message="no", applied=cpb.APPLIED_NO)),
        b"",
        ["0809420e" + "0a0646454e434544" + "12026e6f" + "1801"],
    ),
]


@pytest.mark.parametrize(("frame", "body", "expected"), GOLDEN, ids=range(len(GOLDEN)))
def test_golden_bytes(frame: Any, body: bytes, expected: list[str]) -> None:
    kind = type(frame)
    fresh = kind.FromString(frame.SerializeToString())
    assert [data.hex() for data in encode(fresh, Body([body]))] == expected
    read, payload = decode(kind, bytes.fromhex(expected[0]))
    assert bytes(payload) == body
    for field in ("total_bytes", "payload"):
        read.ClearField(field)
    assert read == frame


def test_a_long_body_goes_in_chunks_whose_frames_are_golden() -> None:
    body = bytes(CHUNK_BYTES) + b"xyz"
    first, second = encode(pb.ClientFrame(request=1, upload=pb.Upload()), Body([body]))
    assert first[:14].hex() == "08011a00" + "7083e03f" + "8201" + "80e03f" + "00"
    assert second.hex() == "0801" + "7880e03f" + "8201" + "03" + "78797a"
    assert max(len(first), len(second)) <= 1024 * 1024 < MESSAGE_BYTES


def _receive(data: list[bytes], kind: Any = pb.ClientFrame) -> tuple[Any, bytes]:
    frame, payload = decode(kind, data[0])
    buffer = bytearray(frame.total_bytes)
    incoming = Incoming(frame.total_bytes, BufferSink(memoryview(buffer)))
    incoming.take(frame.offset, payload)
    for more in data[1:]:
        assert not incoming.complete
        part, payload = decode(kind, more)
        assert part.request == frame.request
        incoming.take(part.offset, payload)
    assert incoming.complete
    return frame, bytes(buffer)


@settings(deadline=None)
@given(
    segments=st.lists(st.binary(max_size=40), max_size=8),
    chunk=st.integers(1, 64),
    request=st.integers(0, 2**64 - 1),
    version=st.integers(0, 2**64 - 1),
)
def test_any_segments_in_any_chunks(segments: list[bytes], chunk: int, request: int, version: int) -> None:
    header = pb.Contribution(version=version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "CHUNK_BYTES", chunk)
        data = list(encode(pb.ClientFrame(request=request, contribution=header), Body(segments)))
    whole = b"".join(segments)
    assert len(data) == max(1, -(-len(whole) // chunk))
    frame, body = _receive(data)
    assert (frame.request, frame.contribution, body) == (request, header, whole)
    # Any protobuf library reads the same.
    assert b"".join(pb.ClientFrame.FromString(one).payload for one in data) == whole


@given(segments=st.lists(st.binary(max_size=20), max_size=6), start=st.integers(0, 130), length=st.integers(0, 130))
def test_any_range_of_a_body(segments: list[bytes], start: int, length: int) -> None:
    whole = b"".join(segments)
    start = min(start, len(whole))
    stop = min(start + length, len(whole))
    body = Body(segments)
    assert body.nbytes == len(whole)
    assert body.join((b"p", b"q"), start, stop) == b"pq" + whole[start:stop]


@given(st.lists(st.binary(max_size=150), max_size=5))
def test_padding_aligns_each_segment(segments: list[bytes]) -> None:
    joined = b"".join(padded(segments))
    position = 0
    for segment in segments:
        assert position % 64 == 0
        assert joined[position : position + len(segment)] == segment
        following = position + -(-len(segment) // 64) * 64
        assert joined[position + len(segment) : following] == bytes(following - position - len(segment))
        position = following
    assert len(joined) == position


def _unknown(number: int, wire: int) -> bytes:
    tag = number << 3 | wire
    head = bytes([tag & 0x7F | 0x80, tag >> 7])
    return head + {0: b"\x96\x01", 1: bytes(8), 2: b"\x03abc", 5: bytes(4)}[wire]


@given(
    before=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3),
    after=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3),
    payload=st.binary(min_size=1, max_size=300),
)
def test_fields_of_a_later_release_and_a_payload_that_is_not_last(
    before: list[int], after: list[int], payload: bytes
) -> None:
    known = pb.ClientFrame(request=5, upload=pb.Upload(), total_bytes=len(payload), offset=0)
    body = pb.ClientFrame(payload=payload).SerializeToString()
    data = known.SerializeToString() + b"".join(_unknown(100 + n, w) for n, w in enumerate(before)) + body
    data += b"".join(_unknown(200 + n, w) for n, w in enumerate(after))
    frame, view = decode(pb.ClientFrame, data)
    assert bytes(view) == payload
    assert (frame.request, frame.total_bytes, frame.WhichOneof("body")) == (5, len(payload), "upload")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_fields_may_come_in_any_order(order: list[int]) -> None:
    parts = [pb.ClientFrame(request=5).SerializeToString(), pb.ClientFrame(payload=b"abc").SerializeToString()]
    frame, payload = decode(pb.ClientFrame, b"".join(parts[index] for index in order))
    assert (frame.request, bytes(payload)) == (5, b"abc")


def test_a_payload_is_read_without_a_copy() -> None:
    data = next(encode(pb.ClientFrame(request=1, upload=pb.Upload()), Body([b"abcdef"])))
    header, payload = split(data)
    assert header is not None
    assert payload.obj is data
    assert data.endswith(payload)


MALFORMED = {
    "tag cut": b"\x82",
    "tag without end": b"\xff" * 20,
    "length cut": b"\x82\x01\xff",
    "payload cut": b"\x82\x01\x05abc",
    "length past all": b"\x82\x01\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "varint of 11 bytes": b"\x08" + b"\x80" * 10 + b"\x01",
    "group": b"\x0b\x0c",
    "wire type 7": b"\x0f",
    "field 0": b"\x00\x01",
    "body that is no message": b"\x3a\x03\xff\xff\xff",
    "fixed64 cut": b"\x09\x01",
    "text that is not UTF-8": b"\x12\x03\x1a\x01\xff",
    "payload as a varint": b"\x80\x01\x05",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_frame_is_refused_or_read_as_protobuf_reads_it(data: bytes) -> None:
    try:
        expected = pb.ClientFrame.FromString(data)
    except Exception:  # noqa: BLE001 - whatever protobuf raises, we refuse
        with pytest.raises(InvalidRequestError, match=f"a message of {len(data)} bytes is not a ClientFrame"):
            decode(pb.ClientFrame, data)
    else:
        frame, payload = decode(pb.ClientFrame, data)
        assert (bytes(payload), frame.request) == (expected.payload, expected.request)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    for kind in (pb.ClientFrame, pb.ServerFrame):
        try:
            frame, payload = decode(kind, data)
        except InvalidRequestError:
            continue
        assert len(payload) <= len(data)
        assert frame.DESCRIPTOR is kind.DESCRIPTOR


@settings(max_examples=200)
@given(data=st.data())
def test_flipped_bits_raise_nothing_but_a_refusal(data: st.DataObject) -> None:
    frame = pb.ClientFrame(request=3, contribution=pb.Contribution(epoch=1, sequence=5, edited_parameters=[1, 2]))
    good = bytearray(next(encode(frame, Body([b"payload of it"]))))
    index = data.draw(st.integers(0, len(good) - 1))
    good[index] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(InvalidRequestError):
        decode(pb.ClientFrame, bytes(good))


def test_a_header_over_the_limit_is_not_sent() -> None:
    frame = pb.ClientFrame(evaluation=pb.Evaluation(error="x" * HEADER_BYTES))
    with pytest.raises(InvalidRequestError, match=f"at most {HEADER_BYTES}"):
        list(encode(frame))


# Receiving.


@pytest.mark.parametrize(
    ("takes", "problem"),
    [
        ([(1, b"a")], "offset 1 leave a gap: byte 0 is next"),
        ([(0, b"abcd"), (2, b"x")], "offset 2 overlap those received: byte 4 is next"),
        ([(0, b"abcd"), (5, b"x")], "offset 5 leave a gap: byte 4 is next"),
        ([(0, b"abcdefghi")], "bytes 0 to 9 run past the declared 8 bytes"),
        ([(0, b"abcdefgh"), (8, b"i")], "bytes 8 to 9 run past the declared 8 bytes"),
        ([(0, b"")], "an empty frame where byte 0 of 8 is next"),
        ([(2**64 - 1, b"a")], "leave a gap"),
    ],
)
def test_frames_out_of_order(takes: list[tuple[int, bytes]], problem: str) -> None:
    buffer = bytearray(8)
    incoming = Incoming(8, BufferSink(memoryview(buffer)))
    *good, (offset, payload) = takes
    for place, data in good:
        incoming.take(place, memoryview(data))
    before = bytes(buffer)
    with pytest.raises(InvalidRequestError, match=problem):
        incoming.take(offset, memoryview(payload))
    assert bytes(buffer) == before, "a refused frame writes nothing"


def test_nothing_is_expected_where_nothing_is_declared() -> None:
    incoming = Incoming(0, NullSink())
    incoming.take(0, memoryview(b""))
    assert incoming.complete


@given(data=st.data())
def test_bytes_scattered_over_buffers(data: st.DataObject) -> None:
    whole = data.draw(st.binary(min_size=1, max_size=120))
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, 30)), max_size=6))
    places = [(start, bytearray(min(size, len(whole) - start))) for start, size in spans]
    sink = ScatterSink((start, memoryview(buffer)) for start, buffer in places)
    position = 0
    while position < len(whole):
        step = data.draw(st.integers(1, len(whole) - position))
        sink.write(position, memoryview(whole)[position : position + step])
        position += step
    for start, buffer in places:
        assert bytes(buffer) == whole[start : start + len(buffer)]
