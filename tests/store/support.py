"""Saving with as few words as a test needs, and a process whose forks save and die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import farstep_server
import farstep_wire
from farstep_server.store import Json, SnapshotInfo, SnapshotStore

LINEAGE = "3f2a9c"


def tensors_of(version: int, elements: int = 3000) -> dict[str, Tensor]:
    """Return tensors of which every element tells the version."""
    return {
        "param/0": torch.full((elements,), float(version)),
        "param/1": torch.full((2, 3, 4, 5), version, dtype=torch.float64).to(memory_format=torch.channels_last),
        "state/0/step": torch.tensor(version),
    }


def save(store: SnapshotStore, version: int, name: str = "resnet50", **changes: Any) -> SnapshotInfo:
    """Save a version whose tensors and manifest tell it."""
    manifest: Mapping[str, Json] = {"version": version}
    arguments: dict[str, Any] = {
        "lineage": LINEAGE,
        "incarnation": 1,
        "manifest": manifest,
        "tensors": tensors_of(version),
        "created_unix": 1000.0 + version,
    }
    return store.save(name=name, version=version, **(arguments | changes))


def loaded_version(store: SnapshotStore, name: str = "resnet50", **asked: Any) -> int:
    """Load a snapshot and return its version, once it is certain that all of it is of that version."""
    snapshot = store.load(name, **asked)
    version = snapshot.info.version
    assert snapshot.manifest == {"version": version}
    assert set(snapshot.tensors) == set(tensors_of(0))
    for key, tensor in snapshot.tensors.items():
        assert bool((tensor == version).all()), key
    return version


def versions(store: SnapshotStore, name: str = "resnet50") -> list[int]:
    """Return the versions of the complete snapshots, oldest first."""
    return [info.version for info in store.list(name)]


def directories(store: SnapshotStore) -> list[Path]:
    """Return the snapshot directories of the only hosted optimizer, oldest first, leftovers included."""
    [folder] = [path for path in store.root.iterdir() if path.is_dir()]
    return sorted(folder.iterdir())


def flip_byte(path: Path, offset: int) -> None:
    """Damage a file; a negative offset counts from its end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


class Saver:
    """A process that imports torch once and forks a child for each order (`tests/store/saver.py`)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def order(self, *words: object) -> int:
        """Have a child made that carries out the order; return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        kind, pid = self.read()
        assert kind == "child"
        return int(pid)

    def read(self) -> list[str]:
        """Return the words of the next line that the process or its child writes."""
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split(maxsplit=1)
        assert len(words) == 2, f"the saver ended: {words}"
        return [word.strip() for word in words]

    def until_end(self) -> tuple[int, list[list[str]]]:
        """Wait for the child's end; return its exit status (negative: the signal) and what it still wrote."""
        lines = []
        while (words := self.read())[0] != "ended":
            lines.append(words)
        return int(words[1]), lines


@contextmanager
def saver(root: Path) -> Iterator[Saver]:
    """Run a saver on a root."""
    packages = [Path(str(package.__file__)).parents[1] for package in (farstep_server, farstep_wire)]
    paths = [str(Path(__file__).parents[2]), *map(str, packages)]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("saver.py")), str(root)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Saver(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            if process.wait(timeout=60) != 0:
                raise AssertionError(f"the saver ended with {process.returncode}")
