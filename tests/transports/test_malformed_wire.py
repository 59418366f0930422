"""Whatever stands in compressed or narrowed bytes: a clear refusal, no memory spent on it, and the session served on."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from farstep_wire.errors import InvalidRequestError, ResourceExhaustedError
from farstep_wire.v1 import optimizer_pb2 as pb
from tests.support.raw import RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess

LAYOUT = flat_layout(2600, 3000, 4)
KEPT = 1024  # of the first two; the third travels as it is
TOPK = pb.Wire(gradients=pb.WIRE_FORMAT_TOPK, density=0.02)
INT8 = pb.Wire(gradients=pb.WIRE_FORMAT_INT8)
BFLOAT16 = pb.Wire(gradients=pb.WIRE_FORMAT_BFLOAT16)
NARROW_BYTES = LAYOUT.gradients.nbytes // 2
TOPK_BYTES = 2 * 4 * 2 * KEPT + 64
INT8_ELEMENTS = 2624 + 3008 + 64
INT8_BYTES = 384 + INT8_ELEMENTS  # 89 scales, filled up
ALLOWED_GROWTH_BYTES = 64 * 2**20


class Hosted:
    """An SGD at zeros, with a rate of 0.1, attached to by hand."""

    def __init__(self, session: RawSession, name: str, wire: pb.Wire) -> None:
        self.session = session
        message = attach_message(name, wire=wire)
        self.attached = session.attach(message, layout_bytes(LAYOUT), bytes(LAYOUT.arena.nbytes))
        self.sequence = 0

    def message(self, **fields: Any) -> pb.Contribution:
        usual = {
            "epoch": self.attached.epoch,
            "sequence": self.sequence + 1,
            "version": self.sequence,
            "incarnation": 1,
        }
        return pb.Contribution(**{**usual, **fields})

    def step(self, body: bytes) -> list[torch.Tensor]:
        """Make a step that must be taken; return the parameters."""
        frame, data = self.session.ask(body, contribution=self.message())
        assert frame.stepped.outcome == pb.Stepped.OUTCOME_COMMITTED
        self.sequence += 1
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [spec.view(buffer, offset) for spec, offset in zip(LAYOUT.specs, LAYOUT.arena.offsets, strict=True)]


@pytest.fixture(scope="module")
def baseline(shared_server: ServerProcess) -> int:
    """What the server takes once it has stepped."""
    with RawSession(shared_server.address) as session:
        Hosted(session, "malformed-wire", TOPK).step(topk())
    return shared_server.rss_bytes()


@pytest.fixture
def session(server: ServerProcess, baseline: int) -> Iterator[RawSession]:
    with RawSession(server.address) as own:
        yield own
    assert server.rss_bytes() - baseline < ALLOWED_GROWTH_BYTES


def topk(first: dict[int, int] | None = None, second: dict[int, int] | None = None) -> bytes:
    """Return a contribution of ones at the first positions of both, but for some."""
    positions = [{**dict(enumerate(range(KEPT))), **(own or {})} for own in (first, second)]
    flat = [own[index] for own in positions for index in range(KEPT)]
    return (
        struct.pack(f"<{2 * KEPT}i", *flat)
        + struct.pack("<f", 1.0) * 2 * KEPT
        + struct.pack("<4f", *[2.0] * 4)
        + bytes(48)
    )


def test_topk_as_it_should_be(session: RawSession, name: str) -> None:
    first, second, third = Hosted(session, name, TOPK).step(topk({1023: 2599}))
    ones = torch.zeros(2600)
    ones[[*range(1023), 2599]] = 1.0
    assert torch.equal(first, torch.zeros(2600) - 0.1 * ones)
    assert second.count_nonzero() == KEPT
    assert third.tolist() == pytest.approx([-0.2] * 4)


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        (topk({1023: 2600}), ("'0.0'", "position 2600", "has 2600 elements")),
        (topk({0: -1}), ("'0.0'", "position -1")),
        (topk(None, {1023: 3000}), ("'0.1'", "position 3000", "has 3000 elements")),
        (topk(None, {0: -(2**31)}), ("'0.1'", f"position {-(2**31)}")),
        (topk(None, {1023: 2**31 - 1}), ("'0.1'", f"position {2**31 - 1}")),
        (topk(None, {7: 8}), ("'0.1'", "do not ascend")),
        (topk({100: 2**31 - 1}), ("'0.0'", "do not ascend")),
        (topk({100: -5}), ("'0.0'", "do not ascend")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_topk_positions(session: RawSession, name: str, body: bytes, texts: tuple[str, ...]) -> None:
    hosted = Hosted(session, name, TOPK)
    session.send(body, contribution=hosted.message())
    error = session.refusal()
    assert isinstance(error, InvalidRequestError)
    for text in texts:
        assert text in str(error)
    hosted.step(topk())


@pytest.mark.parametrize(
    ("wire", "due"),
    [(TOPK, TOPK_BYTES), (INT8, INT8_BYTES), (BFLOAT16, NARROW_BYTES)],
    ids=["topk", "int8", "bfloat16"],
)
@pytest.mark.parametrize("size", [0, 64, LAYOUT.gradients.nbytes, 2**31, 2**64 - 1])
def test_declared_sizes(session: RawSession, name: str, wire: pb.Wire, due: int, size: int) -> None:
    """They come from the layout; what is declared is compared with them before anything is read."""
    hosted = Hosted(session, name, wire)
    session.send_frame(request=9, contribution=hosted.message(), total_bytes=size, payload=b"12"[: size and 2])
    error = session.refusal()
    assert isinstance(error, InvalidRequestError)
    assert f"{size} bytes are declared, the layout takes {due}" in str(error)


def test_frames_that_end_within_an_element(session: RawSession, name: str) -> None:
    hosted = Hosted(session, name, BFLOAT16)
    session.send_frame(request=9, contribution=hosted.message(), total_bytes=NARROW_BYTES, payload=b"123")
    error = session.refusal()
    assert isinstance(error, InvalidRequestError)
    assert "bytes 0 to 3 of a message end within an element" in str(error)


def test_frames_of_a_few_elements(session: RawSession, name: str) -> None:
    """However a client cuts them, as long as elements stay whole."""
    hosted = Hosted(session, name, BFLOAT16)
    data = torch.ones(NARROW_BYTES // 2, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    for start in range(0, NARROW_BYTES, 166):
        head: dict[str, Any] = {} if start else {"contribution": hosted.message(), "total_bytes": NARROW_BYTES}
        session.send_frame(request=9, offset=start, payload=data[start : start + 166], **head)
    frame, _ = session.answer()
    assert frame.stepped.outcome == pb.Stepped.OUTCOME_COMMITTED


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 3e38])
def test_any_scale_and_code(session: RawSession, name: str, scale: float, code: int) -> None:
    """All of them mean something; what is not finite is what the guard is for."""
    hosted = Hosted(session, name, INT8)
    scales = struct.pack("<f", scale) * 96
    first, _, _ = hosted.step(scales + struct.pack("<b", code) * INT8_ELEMENTS)
    expected = torch.full((2600,), code, dtype=torch.int8) * torch.tensor(scale)
    assert torch.equal(first, torch.zeros(2600) - 0.1 * expected) or not expected.isfinite().all()
    assert bool(first.isfinite().all()) == bool(expected.isfinite().all())


def _sparse(nnz: int) -> dict[str, Any]:
    form = pb.GradientForm(parameter=0, sparse=pb.SparseForm(nnz=nnz, sparse_dims=1))
    return {"forms": [form, *(pb.GradientForm(parameter=number, absent=True) for number in (1, 2))]}


@pytest.mark.parametrize(("wire", "value"), [(TOPK, 4), (INT8, 4), (BFLOAT16, 2)], ids=["topk", "int8", "bfloat16"])
def test_sparse_gradients_beside_them(session: RawSession, name: str, wire: pb.Wire, value: int) -> None:
    hosted = Hosted(session, name, wire)
    indices = struct.pack("<2q", 0, 2600).ljust(64, b"\0")
    session.send(indices + bytes(64), contribution=hosted.message(**_sparse(2)))
    error = session.refusal()
    assert isinstance(error, InvalidRequestError)
    assert "'0.0' (float32[2600]) has the index 2600" in str(error)
    declared = 2**40 * (8 + value)
    session.send_frame(request=9, contribution=hosted.message(**_sparse(2**40)), total_bytes=declared, payload=b"12")
    assert isinstance(session.refusal(), ResourceExhaustedError)


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (pb.Wire(gradients=77), "gradients is 77"),  # type: ignore[arg-type]
        (pb.Wire(parameters=pb.WIRE_FORMAT_INT8), "parameters must be None or one of bfloat16, float16, not 'int8'"),
        (pb.Wire(gradients=pb.WIRE_FORMAT_TOPK), "density must be above 0 and at most 1, not 0.0"),
        (
            pb.Wire(gradients=pb.WIRE_FORMAT_TOPK, density=float("nan")),
            "density must be above 0 and at most 1, not nan",
        ),
        (pb.Wire(gradients=pb.WIRE_FORMAT_TOPK, density=-1.0), "density must be above 0 and at most 1, not -1.0"),
    ],
)
def test_formats_that_there_are_not(session: RawSession, name: str, wire: pb.Wire, text: str) -> None:
    session.send(layout_bytes(LAYOUT), attach=attach_message(name, wire=wire))
    error = session.refusal()
    assert isinstance(error, InvalidRequestError)
    assert text in str(error)


def test_a_line_search_takes_no_compressed_gradients(session: RawSession, name: str) -> None:
    message = attach_message(name, optimizer="LBFGS", wire=INT8)
    session.send(layout_bytes(LAYOUT, "LBFGS"), attach=message)
    error = session.refusal()
    assert isinstance(error, InvalidRequestError)
    assert "gradients='int8' with LBFGS" in str(error)
