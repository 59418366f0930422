"""Peak memory: a worker's is that of a local step without state; the server's is that of what it hosts and receives."""

from __future__ import annotations

import pytest

from tests.memory.peaks import ALLOWED, MODEL, SERVER_MOST, TENSORS, mib, peak, peaks
from tests.support.servers import Servers


@pytest.fixture(scope="module")
def local() -> int:
    """The peak of local SGD without momentum."""
    return peak("torch.optim", "SGD", TENSORS, None)


@pytest.mark.parametrize("transport", ["grpc", "shm", "pg"])
def test_a_step_takes_what_it_must_on_both_sides(servers: Servers, local: int, transport: str) -> None:
    found = peaks(servers(), {"transport": transport})
    for when, most in (("at first", found.server_first), ("later", found.server_later)):
        assert most <= SERVER_MOST, f"the server of an Adam of {mib(MODEL)} takes {mib(most)} {when}"
    assert found.worker <= local + ALLOWED, f"a worker of Adam takes {mib(found.worker)}, local SGD {mib(local)}"
