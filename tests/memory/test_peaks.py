"""A worker holds no optimizer state and no second copy of anything: its peak is that of a local step without state."""

from __future__ import annotations

import pytest

from tests.memory.peaks import ALLOWED, TENSORS, mib, peak
from tests.support.servers import ServerProcess


@pytest.fixture(scope="module")
def local() -> int:
    """The peak of local SGD without momentum."""
    return peak("torch.optim", "SGD", TENSORS, None)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_worker_takes_what_a_stateless_local_step_takes(
    server: ServerProcess, name: str, local: int, transport: str
) -> None:
    own = peak("farstep.optim", "Adam", TENSORS, {"address": server.address, "transport": transport, "name": name})
    assert own <= local + ALLOWED, f"a worker of Adam takes {mib(own)}, local SGD {mib(local)}"
