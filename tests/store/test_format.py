"""The bytes of format version 1: what is written stays the same, and what was once written can always be read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch
from safetensors.torch import load as parse

import farstep_server.store as package
from farstep_server.store import Json, SnapshotInfo, SnapshotStore
from tests.store.conftest import OpenStore

NAME = "RUN/0"
FOLDER = "run_0-b701cf3a6c75294b2692a26e429dcd4ee118aed9ea36f5aa23a3ec4cb0eb928a"
SNAPSHOT = "0000000001-v42-t-best"
TENSORS = {
    "param/0": torch.arange(6.0).reshape(3, 2).t(),
    "param/1": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "state/0/z": torch.tensor([1 + 2j]),
    "state/0/step": torch.tensor(42),
}
OWN: dict[str, Json] = {"class": "SGD", "groups": [{"lr": 0.1, "nesterov": False, "foreach": None}], "näme": math.inf}

HEADER = (
    '{"__metadata__":{"format":"pt"},'
    '"state/0/z":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    '"state/0/step":{"dtype":"I64","shape":[],"data_offsets":[8,16]},'
    '"param/0":{"dtype":"F32","shape":[2,3],"data_offsets":[16,40]},'
    '"param/1":{"dtype":"BF16","shape":[2],"data_offsets":[40,44]}}'
).ljust(312)
FILES = {
    "tensors-00000.safetensors": struct.pack("<Q", 312)
    + HEADER.encode()
    + struct.pack("<2fq6f", 1, 2, 42, 0, 2, 4, 1, 3, 5)
    + bytes.fromhex("c03f 00c0"),
    "manifest.json": (
        b'{"format":"farstep.snapshot","format_version":1,"name":"RUN/0","version":42,"tag":"best",'
        b'"created_unix":1700000000.25,"lineage":"3f2a9c","incarnation":2,'
        b'"files":[{"file":"tensors-00000.safetensors","nbytes":364,'
        b'"sha256":"977ec979351fedd235435ddce80c09f1f0c490f23b7311b289fec621225d9784","tensors":{'
        b'"param/0":{"dtype":"float32","shape":[2,3],"strides":[1,2]},'
        b'"param/1":{"dtype":"bfloat16","shape":[2]},'
        b'"state/0/z":{"dtype":"complex64","shape":[1]},'
        b'"state/0/step":{"dtype":"int64","shape":[]}}}],'
        b'"manifest":{"class":"SGD","groups":[{"lr":0.1,"nesterov":false,"foreach":null}],"n\\u00e4me":Infinity}}\n'
    ),
    "SHA256SUMS": (
        b"c3220e1513b9e0c45e2ddb076e870114a1c44f6d78f8daa76527549a43f5e3e2  manifest.json\n"
        b"977ec979351fedd235435ddce80c09f1f0c490f23b7311b289fec621225d9784  tensors-00000.safetensors\n"
    ),
}
INFO = SnapshotInfo(NAME, 42, "best", 1700000000.25, sum(map(len, FILES.values())), "3f2a9c", 2)


def test_a_snapshot_is_written_as_these_bytes(store: SnapshotStore) -> None:
    info = store.save(
        name=NAME, version=42, tag="best", created_unix=1700000000.25, lineage="3f2a9c", incarnation=2,
        manifest=OWN, tensors=TENSORS,
    )  # fmt: skip
    directory = store.root / FOLDER / SNAPSHOT
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == FILES
    assert info == INFO


def test_these_bytes_are_read(tmp_path: Path, open_store: OpenStore) -> None:
    directory = tmp_path / "root" / FOLDER / SNAPSHOT
    directory.mkdir(parents=True)
    for name, data in FILES.items():
        (directory / name).write_bytes(data)
    store = open_store()
    snapshot = store.load(NAME, tag="best", version=42)
    assert (snapshot.info, snapshot.manifest) == (INFO, OWN)
    assert list(snapshot.tensors) == list(TENSORS)
    for key, tensor in TENSORS.items():
        found = snapshot.tensors[key]
        assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert torch.equal(found, tensor)


def test_the_reference_reader_takes_these_bytes() -> None:
    seen = parse(FILES["tensors-00000.safetensors"])
    assert torch.equal(seen["param/0"], TENSORS["param/0"])
    assert torch.equal(seen["param/1"], TENSORS["param/1"])
    assert seen["state/0/z"].tolist() == [[1.0, 2.0]]
    assert seen["state/0/step"].item() == 42
    assert json.loads(HEADER)["__metadata__"] == {"format": "pt"}


def test_the_public_names() -> None:
    assert package.__all__ == [
        "Json",
        "Snapshot",
        "SnapshotCorruptError",
        "SnapshotExistsError",
        "SnapshotFormatError",
        "SnapshotInfo",
        "SnapshotNotFoundError",
        "SnapshotReadError",
        "SnapshotStore",
        "SnapshotWriteError",
        "StoreClosedError",
        "StoreError",
        "StoreLockedError",
    ]
    for name in package.__all__:
        assert hasattr(package, name)
