"""One snapshot's directory: written whole, read whole, looked at, verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from farstep_server.store import _manifest
from farstep_server.store._errors import SnapshotCorruptError
from farstep_server.store._files import FileRecord, open_reader, read_file, sync_directory, translated, write_file
from farstep_server.store._manifest import Json, Manifest, SnapshotInfo, TensorFile, check_info, check_json
from farstep_server.store._naming import Entry
from farstep_server.store._tensors import contents_of, file_bytes, read_tensors, spec_of
from farstep_wire.layout import TensorSpec

_MANIFEST = "manifest.json"
_SUMS = "SHA256SUMS"
_READ_BYTES = 1024 * 1024

# Readers refuse a header of more than 100 MB, which a million parameters with their state would need.
_TENSORS_PER_FILE = 100_000


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as loaded: ``manifest`` is the caller's JSON, ``tensors`` are new CPU tensors by the caller's keys."""

    info: SnapshotInfo
    manifest: dict[str, Json]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Draft:
    """A snapshot that was found fit to be written."""

    info: SnapshotInfo
    manifest: dict[str, Json]
    tensors: Mapping[str, Tensor]
    shards: tuple[dict[str, TensorSpec], ...]
    needed_bytes: int
    """About what it takes on disk."""


def draft(info: SnapshotInfo, manifest: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Draft:
    """Check all of a snapshot before any file is touched; ValueError or TypeError names what is wrong."""
    check_info(info)
    own = dict(manifest)
    check_json(own, "manifest")
    for key in tensors:
        _check_key(key)
    shards = tuple(_shards({key: spec_of(key, tensor) for key, tensor in tensors.items()}))
    text = _manifest.encode(Manifest(info, tuple(TensorFile(FileRecord("", 0, ""), shard) for shard in shards), own))
    return Draft(info, own, tensors, shards, sum(map(file_bytes, shards)) + len(text) + 200 * (len(shards) + 1))


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise TypeError(f"a tensor's key is a str, not {key!r}")
    if key == "__metadata__":
        raise ValueError(f"a tensor cannot have the key {key!r}, which safetensors reserves")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a tensor's key {key!r} is no valid Unicode text") from None


def _shards(specs: dict[str, TensorSpec]) -> Iterator[dict[str, TensorSpec]]:
    items = iter(specs.items())
    while shard := dict(islice(items, _TENSORS_PER_FILE)):
        yield shard


def write_snapshot(directory: Path, plan: Draft) -> SnapshotInfo:
    """Write a snapshot's files into an empty directory and make them durable. OSError passes through."""
    files = []
    for number, specs in enumerate(plan.shards):
        path = directory / f"tensors-{number:05d}.safetensors"
        files.append(TensorFile(write_file(path, contents_of(specs, plan.tensors)), specs))
    manifest = Manifest(plan.info, tuple(files), plan.manifest)
    record = write_file(directory / _MANIFEST, [_manifest.encode(manifest)])
    sums = write_file(directory / _SUMS, [_sums_of([record, *(file.record for file in files)])])
    sync_directory(directory)
    return manifest.with_size(sums.nbytes + record.nbytes + sum(file.record.nbytes for file in files)).info


def _sums_of(records: list[FileRecord]) -> bytes:
    return "".join(f"{record.sha256}  {record.name}\n" for record in records).encode()


def read_manifest(entry: Entry, name: str | None = None) -> Manifest:
    """Read and check the manifest, and that all files are there with their sizes; tensors are not read.

    ``name`` is whose snapshot it must be, where known.
    """
    path = entry.path / _MANIFEST
    data = read_file(path)
    sums = read_file(entry.path / _SUMS)
    record = FileRecord(_MANIFEST, len(data), hashlib.sha256(data).hexdigest())
    if not sums.startswith(_sums_of([record])):
        raise SnapshotCorruptError(f"{path} is damaged: {_SUMS} does not have its SHA-256, {record.sha256}")
    manifest = _manifest.decode(data, path)
    records = [file.record for file in manifest.files]
    if sums != _sums_of([record, *records]):
        raise SnapshotCorruptError(f"{entry.path / _SUMS} is damaged: it does not agree with {_MANIFEST}")
    _check_place(entry, manifest.info, name)
    _check_sizes(entry.path, records)
    return manifest.with_size(len(data) + len(sums) + sum(item.nbytes for item in records))


def _check_place(entry: Entry, info: SnapshotInfo, name: str | None) -> None:
    if (info.version, info.tag) != (entry.version, entry.tag) or name not in (None, info.name):
        raise SnapshotCorruptError(
            f"{entry.path} stands in the wrong place: it is version {info.version}, tag {info.tag!r}, of {info.name!r}"
        )


def _check_sizes(directory: Path, records: list[FileRecord]) -> None:
    for record in records:
        path = directory / record.name
        with translated(path):
            nbytes = path.stat().st_size
        if nbytes != record.nbytes:
            raise SnapshotCorruptError(f"{path} has {nbytes} bytes, its manifest says {record.nbytes}")


def read_snapshot(entry: Entry, name: str) -> Snapshot:
    """Read a snapshot and check every byte. SnapshotCorruptError, SnapshotFormatError or SnapshotReadError."""
    manifest = read_manifest(entry, name)
    tensors: dict[str, Tensor] = {}
    for file in manifest.files:
        with open_reader(entry.path / file.record.name) as reader:
            tensors |= read_tensors(reader, file.specs)
            reader.check(file.record.sha256)
    return Snapshot(manifest.info, manifest.own, tensors)


def verify_snapshot(entry: Entry, manifest: Manifest) -> None:
    """Check every byte without keeping any; SnapshotCorruptError or SnapshotReadError."""
    for file in manifest.files:
        with open_reader(entry.path / file.record.name) as reader:
            left = file.record.nbytes
            buffer = memoryview(bytearray(min(left, _READ_BYTES)))
            while left:
                reader.read_into(buffer[:left])
                left -= min(left, len(buffer))
            reader.check(file.record.sha256)
