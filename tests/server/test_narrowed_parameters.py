"""Parameters that leave the server narrowed: of one version, however many read them and whatever is stepped meanwhile."""

from __future__ import annotations

import random

import pytest
import torch

from farstep_server.core.parameters import ParameterReader, ParameterStore
from farstep_wire.limits import CHUNK_BYTES
from farstep_wire.narrowing import narrow_parameters
from tests.support.raw import flat_layout

LAYOUT = flat_layout(700_001, 33, 600_000)
NARROWINGS = {dtype: narrow_parameters(LAYOUT, dtype) for dtype in ("bfloat16", "float16")}


class _Reading:
    """A reader in the middle of its bytes."""

    def __init__(self, reader: ParameterReader, dtype: str) -> None:
        self.reader, self.dtype = reader, dtype
        reader.narrow(NARROWINGS[dtype])
        self.data = b""

    def go_on(self) -> bool:
        """Read one range more; return whether there are others."""
        start = len(self.data)
        stop = min(start + CHUNK_BYTES, self.reader.nbytes)
        self.data += self.reader.join((), start, stop)
        return stop < self.reader.nbytes


def _expected(contents: torch.Tensor, dtype: str) -> bytes:
    numbers = contents.view(torch.float32).to(getattr(torch, dtype))
    return numbers.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_readers_of_one_version(count: int, seed: int) -> None:
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    contents = torch.randn(LAYOUT.arena.nbytes // 4, generator=generator).view(torch.uint8)
    store = ParameterStore(LAYOUT, torch.device("cpu"), contents.clone())
    readings = [_Reading(store.reader(), chance.choice(sorted(NARROWINGS))) for _ in range(count)]
    under_way = list(readings)
    written = chance.randrange(4)
    turn = 0
    while under_way:
        if turn == written:
            store.write(torch.zeros_like(contents))
        one = chance.choice(under_way)
        if not one.go_on():
            under_way.remove(one)
        turn += 1
    for reading in readings:
        assert reading.data == _expected(contents, reading.dtype)
        assert not reading.reader.open
