"""Files that are damaged, missing or strange: never taken for whole, passed over only where that loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from farstep_server.store import (
    SnapshotCorruptError,
    SnapshotFormatError,
    SnapshotReadError,
    SnapshotStore,
    _files,
)
from tests.store.support import directories, flip_byte, loaded_version, save, versions

TENSORS = "tensors-00000.safetensors"


def rewrite_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as an editor would who also corrects the checksums."""
    path = directory / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    sums = (directory / "SHA256SUMS").read_text().splitlines()
    sums[0] = f"{sha256(path.read_bytes()).hexdigest()}  manifest.json"
    (directory / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def empty_directory(path: Path) -> None:
    """Put an empty directory in a path's place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of a tensor": lambda at: flip_byte(at / TENSORS, -1),
    "a bit of the header": lambda at: flip_byte(at / TENSORS, 40),
    "the header's length, small": lambda at: flip_byte(at / TENSORS, 0),
    "the header's length, huge": lambda at: flip_byte(at / TENSORS, 7),
    "a bit of the header's padding": lambda at: flip_byte(at / TENSORS, header_end(at) - 1),
    "a tensor file cut short": lambda at: os.truncate(at / TENSORS, (at / TENSORS).stat().st_size - 1),
    "a tensor file of no bytes": lambda at: os.truncate(at / TENSORS, 0),
    "a tensor file that grew": lambda at: (at / TENSORS).write_bytes((at / TENSORS).read_bytes() + b"\0"),
    "no tensor file": lambda at: (at / TENSORS).unlink(),
    "a directory for a tensor file": lambda at: empty_directory(at / TENSORS),
    "a bit of the manifest": lambda at: flip_byte(at / "manifest.json", 30),
    "a manifest of no bytes": lambda at: os.truncate(at / "manifest.json", 0),
    "no manifest": lambda at: (at / "manifest.json").unlink(),
    "a bit of the sums": lambda at: flip_byte(at / "SHA256SUMS", 3),
    "a bit of the last sum": lambda at: flip_byte(at / "SHA256SUMS", -40),
    "sums cut short": lambda at: os.truncate(at / "SHA256SUMS", 80),
    "no sums": lambda at: (at / "SHA256SUMS").unlink(),
    "nothing at all": empty_directory,
}
UNSEEN_BY_LIST = {
    name for name in DAMAGE if name.startswith(("a bit of a tensor", "a bit of the header", "the header's"))
}


def header_end(directory: Path) -> int:
    data = (directory / TENSORS).read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


@pytest.fixture
def three(store: SnapshotStore) -> SnapshotStore:
    """A store with versions 1, 2 (tagged "best") and 3."""
    save(store, 1)
    save(store, 2, tag="best")
    save(store, 3)
    return store


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_damaged_falls_back_and_says_so(
    three: SnapshotStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[kind](directories(three)[-1])
    assert loaded_version(three) == 2
    [record] = caplog.records
    assert (record.levelname, record.message) == ("WARNING", "snapshot_damaged")
    assert "resnet50" in str(record.__dict__)
    assert versions(three) == ([1, 2, 3] if kind in UNSEEN_BY_LIST else [1, 2])
    assert three.names() == ["resnet50"]
    save(three, 4)
    assert loaded_version(three) == 4


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_that_was_asked_for_raises(three: SnapshotStore, kind: str) -> None:
    damaged = directories(three)[1]
    DAMAGE[kind](damaged)
    for asked in ({"tag": "best"}, {"version": 2}):
        for _ in range(2):
            with pytest.raises(SnapshotCorruptError, match=str(damaged)):
                three.load("resnet50", **asked)
    assert loaded_version(three) == 3
    assert loaded_version(three, version=1) == 1


def test_all_damaged_is_an_error_that_names_them(three: SnapshotStore) -> None:
    for directory in directories(three):
        DAMAGE["a bit of a tensor"](directory)
    with pytest.raises(SnapshotCorruptError, match=r"all are damaged: version 1, version 2 \('best'\), version 3"):
        three.load("resnet50")


def test_a_bit_that_flips_anywhere_is_noticed(store: SnapshotStore) -> None:
    save(store, 1)
    [directory] = directories(store)
    checked = 0
    for path in directory.iterdir():
        whole = path.read_bytes()
        # Every byte of the small files and of the header, and a sample of the rest.
        for offset in [*range(min(len(whole), 600)), *range(600, len(whole), 997)]:
            flip_byte(path, offset)
            with pytest.raises(SnapshotCorruptError):
                store.load("resnet50", version=1)
            path.write_bytes(whole)
            checked += 1
    assert checked > 1000
    assert loaded_version(store) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format="other"), "'other'"),
        (lambda d: d.pop("format"), "format"),
        (lambda d: d.update(name="other"), "wrong place"),
        (lambda d: d.update(version=5), "wrong place"),
        (lambda d: d.update(tag="x"), "wrong place"),
        (lambda d: d.update(version="1"), "version"),
        (lambda d: d.update(manifest=[1]), "manifest"),
        (lambda d: d["files"][0].update(file="../x"), r"\.\./x"),
        (lambda d: d["files"][0].update(sha256="0"), "SHA256SUMS"),
        (lambda d: d["files"][0]["tensors"]["param/0"].update(dtype="float31"), "float31"),
        (lambda d: d["files"][0]["tensors"]["param/0"].update(dtype="int32"), "other tensors"),
        (lambda d: d["files"][0]["tensors"]["param/0"].update(shape=[2**60]), "other tensors"),
        (lambda d: d["files"][0]["tensors"]["param/0"].update(shape=[-1]), "negative"),
        (lambda d: d["files"][0]["tensors"]["param/1"].update(strides=[60, 0, 15, 3]), "strides"),
        (lambda d: d["files"][0]["tensors"].pop("param/0"), "other tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_that_says_what_is_not_so(
    store: SnapshotStore, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    save(store, 1)
    rewrite_manifest(directories(store)[0], change)
    with pytest.raises(SnapshotCorruptError, match=said):
        store.load("resnet50", version=1)


@pytest.mark.parametrize("data", [b"[]", b"null", b"7", b"{", b"\xff", b"[" * 100_000], ids=lambda data: repr(data[:5]))
def test_a_manifest_that_is_none(store: SnapshotStore, data: bytes) -> None:
    save(store, 1)
    [directory] = directories(store)
    (directory / "manifest.json").write_bytes(data)
    (directory / "SHA256SUMS").write_text(f"{sha256(data).hexdigest()}  manifest.json\n")
    with pytest.raises(SnapshotCorruptError, match="no snapshot's manifest"):
        store.load("resnet50", version=1)
    assert store.list("resnet50") == []


def test_a_snapshot_moved_to_another_name_is_not_taken_for_its_own(store: SnapshotStore) -> None:
    save(store, 1)
    save(store, 5, name="other")
    ours, theirs = (next(store.root.glob(f"{name}-*")) for name in ("resnet50", "other"))
    shutil.copytree(theirs / "0000000001-v5", ours / "0000000002-v5")
    assert loaded_version(store) == 1
    with pytest.raises(SnapshotCorruptError, match="'other'"):
        store.load("resnet50", version=5)


def test_a_later_format_is_never_passed_over(three: SnapshotStore) -> None:
    rewrite_manifest(directories(three)[-1], lambda document: document.update(format_version=2))
    with pytest.raises(SnapshotFormatError, match="format version 2; this release reads 1"):
        three.load("resnet50")
    assert loaded_version(three, version=1) == 1
    assert versions(three) == [1, 2]


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.EMFILE, SnapshotReadError), (errno.EACCES, SnapshotReadError), (errno.EIO, SnapshotCorruptError)],
    ids=["too many open files", "permission", "bad sector"],
)
def test_a_read_that_the_system_refuses_is_no_reason_to_lose_steps(
    three: SnapshotStore, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    newest = directories(three)[-1]
    refused = []

    def open_file(path: Path, *arguments: int) -> int:
        if Path(path) == newest / TENSORS:
            refused.append(path)
            raise OSError(code, os.strerror(code))
        return os.open(path, *arguments)

    monkeypatch.setattr(_files, "_open", open_file)
    with pytest.raises(error, match=os.strerror(code)):
        three.load("resnet50", version=3)
    if error is SnapshotReadError:
        with pytest.raises(error):
            three.load("resnet50")
    else:
        assert loaded_version(three) == 2
    assert len(refused) == 2


def test_links_are_not_followed(store: SnapshotStore, tmp_path: Path) -> None:
    save(store, 1)
    [directory] = directories(store)
    shutil.move(directory / TENSORS, tmp_path / "elsewhere")
    (directory / TENSORS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotCorruptError):
        store.load("resnet50", version=1)
    (directory.parent / "0000000002-v2").symlink_to(directory)
    assert versions(store) == [1]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_stock_tools_verify_a_snapshot(store: SnapshotStore) -> None:
    save(store, 1)
    [directory] = directories(store)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=directory, capture_output=True, check=False).returncode == 0
    flip_byte(directory / TENSORS, -1)
    assert subprocess.run(check, cwd=directory, capture_output=True, check=False).returncode == 1
