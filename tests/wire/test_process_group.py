"""How tensors are cut into blocks for a process group."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farstep_wire.frames import Body, ScatterSink
from farstep_wire.layout import align
from farstep_wire.process_group import BLOCK_BYTES, DIRECT_BYTES, GATHERED_BYTES, blocks, places

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
