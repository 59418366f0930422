"""The manifest: what a snapshot is and holds, as JSON.

::

    {"format": "farstep.snapshot", "format_version": 1,
     "name": …, "version": …, "tag": … or null, "created_unix": …, "lineage": …, "incarnation": …,
     "files": [{"file": "tensors-00000.safetensors", "nbytes": …, "sha256": …,
                "tensors": {KEY: {"dtype": "float32", "shape": [2, 3], "strides": [1, 2]}, …}}, …],
     "manifest": the caller's own JSON}

Strides are left out where contiguous. Floats are Python's: they keep their bits, and NaN and the infinities are written
as ``NaN`` and ``Infinity``, which Python and most other readers take.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from farstep_server.store._errors import SnapshotCorruptError, SnapshotFormatError
from farstep_server.store._files import FileRecord
from farstep_server.store._naming import check_name, check_tag
from farstep_wire.layout import TensorSpec, contiguous_strides, dtype_from_name, dtype_name

FORMAT = "farstep.snapshot"
FORMAT_VERSION = 1

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


@dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot is.

    ``name`` is the hosted optimizer's; ``tag`` is None for an automatic one; ``created_unix`` is in seconds since 1970,
    as the caller of ``save`` said; ``nbytes`` is the size of its files.
    """

    name: str
    version: int
    tag: str | None
    created_unix: float
    nbytes: int
    lineage: str
    incarnation: int


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file of a snapshot."""

    record: FileRecord
    specs: dict[str, TensorSpec]


@dataclass(frozen=True)
class Manifest:
    """A manifest, decoded."""

    info: SnapshotInfo
    files: tuple[TensorFile, ...]
    own: dict[str, Json]

    def with_size(self, nbytes: int) -> Manifest:
        """Return it with the size of its files, which it cannot hold itself."""
        return replace(self, info=replace(self.info, nbytes=nbytes))


def check_info(info: SnapshotInfo) -> None:
    """ValueError or TypeError where a field cannot be saved."""
    check_name(info.name)
    check_tag(info.tag)
    for field, number in (("version", info.version), ("incarnation", info.incarnation)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{field} is an int, not {number!r}")
        if number < 0:
            raise ValueError(f"{field} is at least 0, not {number}")
    if not isinstance(info.lineage, str):
        raise TypeError(f"lineage is a str, not {info.lineage!r}")
    if not math.isfinite(info.created_unix):
        raise ValueError(f"created_unix is a time in seconds, not {info.created_unix}")


def check_json(value: object, where: str) -> None:
    """TypeError names the place of a value that would not come back from JSON as it is, like a tuple or an int key."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; JSON has only str keys")
            check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON does not have: {value!r}")


def encode(manifest: Manifest) -> bytes:
    """Return the manifest's file."""
    info = manifest.info
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": info.name,
        "version": info.version,
        "tag": info.tag,
        "created_unix": float(info.created_unix),
        "lineage": info.lineage,
        "incarnation": info.incarnation,
        "files": [_file_to_json(file) for file in manifest.files],
        "manifest": manifest.own,
    }
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _file_to_json(file: TensorFile) -> dict[str, object]:
    tensors = {key: _spec_to_json(spec) for key, spec in file.specs.items()}
    return {"file": file.record.name, "nbytes": file.record.nbytes, "sha256": file.record.sha256, "tensors": tensors}


def _spec_to_json(spec: TensorSpec) -> dict[str, object]:
    fields: dict[str, object] = {"dtype": dtype_name(spec.dtype), "shape": spec.shape}
    if spec.strides != contiguous_strides(spec.shape):
        fields["strides"] = spec.strides
    return fields


def decode(data: bytes, where: object) -> Manifest:
    """Decode a manifest's file; ``where`` names it in errors.

    SnapshotCorruptError: not a manifest. SnapshotFormatError: a later format's.
    """
    try:
        document = json.loads(data)
        if document["format"] != FORMAT:
            raise SnapshotCorruptError(f"{where} is of the format {document['format']!r}, not {FORMAT!r}")
        if document["format_version"] != FORMAT_VERSION:
            raise SnapshotFormatError(
                f"{where} has format version {document['format_version']}; this release reads {FORMAT_VERSION}. "
                f"Was it written by a newer farstep?"
            )
        return _from_document(document)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SnapshotCorruptError(f"{where} is no snapshot's manifest: {error!r}") from error


def _from_document(document: dict[str, Any]) -> Manifest:
    info = SnapshotInfo(
        name=document["name"],
        version=document["version"],
        tag=document["tag"],
        created_unix=document["created_unix"],
        nbytes=0,
        lineage=document["lineage"],
        incarnation=document["incarnation"],
    )
    check_info(info)
    return Manifest(info, tuple(_file_from_json(item) for item in document["files"]), dict(document["manifest"]))


def _file_from_json(item: dict[str, Any]) -> TensorFile:
    record = FileRecord(str(item["file"]), int(item["nbytes"]), str(item["sha256"]))
    if "/" in record.name or record.name.startswith("."):
        raise ValueError(f"the file name {record.name!r}")
    return TensorFile(record, {key: _spec_from_json(fields) for key, fields in item["tensors"].items()})


def _spec_from_json(fields: dict[str, Any]) -> TensorSpec:
    shape = tuple(fields["shape"])
    spec = TensorSpec(dtype_from_name(fields["dtype"]), shape, tuple(fields.get("strides", contiguous_strides(shape))))
    if not spec.is_dense:
        raise ValueError(f"strides {spec.strides} that are not dense for shape {spec.shape}")
    return spec
