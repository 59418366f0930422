"""Process groups: how tensors are cut into blocks for them, and how their ends find and trust each other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farstep_wire.frames import Body, ScatterSink
from farstep_wire.layout import align
from farstep_wire.process_group import (
    BLOCK_BYTES,
    DIRECT_BYTES,
    GATHERED_BYTES,
    Group,
    GroupError,
    Making,
    blocks,
    places,
)

SIZES = st.lists(
    st.one_of(st.integers(1, 300), st.integers(DIRECT_BYTES - 3, 3 * DIRECT_BYTES), st.just(2 * BLOCK_BYTES + 5)),
    min_size=1,
    max_size=40,
)


@given(SIZES)
def test_blocks_hold_every_tensor_and_are_found_again_by_their_sizes(sizes: list[int]) -> None:
    spans, end = [], 0
    for size in sizes:
        spans.append((end, end + size))
        end = align(end + size)
    found = blocks(spans)
    assert places([stop - start for start, stop in found], end) == found
    for start, stop in spans:
        assert all(any(low <= byte < high for low, high in found) for byte in (start, stop - 1))
        direct = [(low, high) for low, high in found if low < stop and start < high]
        assert stop - start < DIRECT_BYTES or all(start <= low and high <= stop for low, high in direct)
    assert all(stop - start <= BLOCK_BYTES for start, stop in found)
    runs = [(start, stop) for start, stop in found if (start, stop) not in spans and stop - start < DIRECT_BYTES]
    assert all(stop - start <= GATHERED_BYTES for start, stop in runs)
    assert all(first[1] <= second[0] for first, second in pairwise(found))


@pytest.mark.parametrize(
    ("sizes", "total"),
    [([128, 0], 128), ([129], 128), ([64], 128), ([2**40], 2**40), ([-1], 128), ([], 1), ([1], 2**40)],
)
def test_sizes_that_do_not_make_up_the_total(sizes: list[int], total: int) -> None:
    with pytest.raises(ValueError, match=r"due|possible"):
        places(sizes, total)


def test_what_only_fills_up_is_in_no_span() -> None:
    body = Body([bytes(64), bytes(5), bytes(59), bytes(70), bytes(58), bytes(1)])
    assert list(body.spans()) == [(0, 64), (64, 69), (128, 198), (256, 257)]


def test_a_window_is_where_a_range_goes_alone() -> None:
    first, second, both = bytearray(64), bytearray(100), bytearray(100)
    sink = ScatterSink(
        [(0, memoryview(first)), (64, memoryview(second)), (256, memoryview(both)), (256, memoryview(both))]
    )
    window = sink.window(70, 80)
    assert window is not None
    window[:] = b"0123456789"
    assert second[6:16] == b"0123456789"
    assert sink.window(0, 64) is not None
    for start, stop in ((0, 65), (60, 70), (64, 165), (164, 170), (200, 256), (256, 260), (400, 410)):
        assert sink.window(start, stop) is None


def _meet(tokens: tuple[bytes, bytes], shown: tuple[bytes, bytes]) -> list[Making]:
    """Have two ends in this process made, the entries of each carried to the other."""
    ends = [
        Making(rank, "127.0.0.1", own, other, 10) for rank, (own, other) in enumerate(zip(tokens, shown, strict=True))
    ]
    deadline = time.monotonic() + 20
    while not all(end.over for end in ends):
        assert time.monotonic() < deadline
        for end, other in (ends, ends[::-1]):
            other.put(end.take(0.02))
    return ends


def _groups(ends: list[Making]) -> list[Group]:
    assert [end.error for end in ends] == ["", ""]
    return [end.group for end in ends if end.group is not None]


_TOKENS = (b"0123456789abcdef", b"ABCDEFGHIJKLMNOP")


def test_blocks_come_in_order_and_only_whole() -> None:
    left, right = _groups(_meet(_TOKENS, _TOKENS[::-1]))
    sent = [torch.full((size,), number, dtype=torch.uint8) for number, size in enumerate([10, 200_000, 7, 1] * 5)]
    posted = [left.post(tensor) for tensor in sent]
    for tensor, block in zip(right.receive([torch.zeros_like(each) for each in sent], 5), sent, strict=True):
        assert tensor.equal(block)
    for each in posted:
        left.wait(each, 5)
    begun = time.monotonic()
    with pytest.raises(GroupError, match="Timed out"):
        list(right.receive([torch.zeros(1, dtype=torch.uint8)], 0.2))
    with pytest.raises(GroupError):
        left.send(sent, 5)
    assert time.monotonic() - begun < 4
    left.close()


def test_an_end_that_shows_another_token_is_refused() -> None:
    ends = _meet(_TOKENS, (_TOKENS[1], bytes(16)))
    assert ends[0].group is None
    assert "somebody else has taken the other end's place" in ends[0].error
    for end in ends:
        end.give_up()


def test_a_forked_child_may_let_go_of_a_group() -> None:
    def child(act: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            act()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    left, right = _groups(_meet(_TOKENS, _TOKENS[::-1]))
    assert child(left.close) == 0
    posted = left.post(torch.ones(3, dtype=torch.uint8))
    assert [each.tolist() for each in right.receive([torch.zeros(3, dtype=torch.uint8)], 5)] == [[1, 1, 1]]
    left.wait(posted, 5)
    left.close()
    right.close()
