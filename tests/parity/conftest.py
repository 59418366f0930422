"""Real servers for all parity tests, and the tally of what they compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

from farstep import Remote
from tests.support import comparison
from tests.support.servers import Servers

_numbers = count()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two processes with a thread per core each spend their time waiting for each other; the models here are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parity_addresses(session_servers: Servers) -> dict[str, str]:
    """The address of a server process for each kind of device that there is."""

    def start(device: str) -> str:
        arguments = ("--device", device, "--optimizer", "tests.parity.third_party:Counting")
        return session_servers(*arguments, environment={"OMP_NUM_THREADS": "1"}).address

    return {"cpu": start("cpu"), **({"cuda": start("cuda:0")} if torch.cuda.is_available() else {})}


@pytest.fixture
def remote(parity_addresses: dict[str, str]) -> Callable[..., Remote]:
    """Makes a Remote with a name of its own, on a server for the device."""

    def make(device: str = "cpu", **options: object) -> Remote:
        options.setdefault("name", f"parity-{next(_numbers)}")
        return Remote(parity_addresses[device], **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def tally() -> Callable[..., None]:
    """Count what was compared, by class and kind."""

    def add(name: str, kind: str, number: int = 1) -> None:
        comparison.count(name, kind, number)

    return add
