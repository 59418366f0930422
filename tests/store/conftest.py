"""A store of its own for each test, and no file left open by any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farstep_server.store import SnapshotStore

OpenStore = Callable[..., SnapshotStore]


def open_files() -> set[str]:
    """What this process's descriptors refer to."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{fd.name} {fd.readlink()}")
        except FileNotFoundError:  # the one that lists the others
            continue
    return found


@pytest.fixture(autouse=True)
def _no_file_stays_open(tmp_path: Path) -> Iterator[None]:
    yield
    assert [line for line in open_files() if str(tmp_path) in line] == []


@pytest.fixture
def open_store(tmp_path: Path, _no_file_stays_open: None) -> Iterator[OpenStore]:
    """Opens stores on the test's root; closes them at its end."""
    stores: list[SnapshotStore] = []

    def open_one(keep: int = 3) -> SnapshotStore:
        for store in stores:
            store.close()
        stores.append(SnapshotStore(tmp_path / "root", keep=keep))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> SnapshotStore:
    """A store that keeps three automatic snapshots."""
    return open_store()
