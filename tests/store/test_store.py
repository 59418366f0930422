"""Which snapshots there are, which one is meant, which ones go, and who may use the root."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from farstep_server.store import (
    Json,
    SnapshotExistsError,
    SnapshotInfo,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreClosedError,
    StoreError,
    StoreLockedError,
    _files,
)
from tests.store.conftest import OpenStore
from tests.store.support import LINEAGE, directories, flip_byte, loaded_version, save, versions

# Saving and loading.


def test_a_snapshot_comes_back_as_it_was_saved(store: SnapshotStore, open_store: OpenStore) -> None:
    manifest: dict[str, Json] = {
        "class": "AdamW",
        "groups": [{"lr": 0.1 + 0.2, "betas": [0.9, 0.999], "maximize": False, "foreach": None}],
        "dedup": {"0": [1, 2**63], "näme": -0.0},
        "limits": [math.inf, -math.inf],
    }
    info = save(store, 7, manifest=manifest, tag="best", incarnation=3, created_unix=1234.5)
    size = sum(path.stat().st_size for path in directories(store)[0].iterdir())
    assert info == SnapshotInfo("resnet50", 7, "best", 1234.5, size, LINEAGE, 3)

    again = open_store()
    snapshot = again.load("resnet50")
    assert snapshot.info == info
    assert snapshot.manifest == manifest
    assert math.copysign(1, snapshot.manifest["dedup"]["näme"]) == -1  # type: ignore[call-overload,index,arg-type]
    assert list(snapshot.manifest) == list(manifest)
    assert again.list("resnet50") == [info]
    assert again.names() == ["resnet50"]


def test_nan_comes_back_in_a_manifest(store: SnapshotStore) -> None:
    save(store, 1, manifest={"loss": math.nan})
    found = store.load("resnet50").manifest["loss"]
    assert isinstance(found, float)
    assert math.isnan(found)


def test_the_order_is_that_of_saving_not_of_versions_or_clocks(store: SnapshotStore) -> None:
    for version, incarnation, created in [(100, 1, 50.0), (60, 2, 40.0), (70, 2, 30.0)]:
        save(store, version, incarnation=incarnation, created_unix=created)
    assert versions(store) == [100, 60, 70]
    assert loaded_version(store) == 70


def test_a_tag_or_version_chooses(store: SnapshotStore) -> None:
    save(store, 1, tag="first")
    save(store, 2)
    save(store, 2, tag="second")
    save(store, 3)
    assert loaded_version(store, tag="first") == 1
    assert loaded_version(store, version=2) == 2
    assert store.load("resnet50", version=2).info.tag == "second"
    assert store.load("resnet50", version=2, tag="second").info.tag == "second"
    assert loaded_version(store) == 3


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tag": "worst"}, "tag 'worst'"),
        ({"version": 9}, "version 9"),
        ({"tag": "best", "version": 9}, "version 9 and tag 'best'"),
    ],
    ids=str,
)
def test_what_is_not_there_is_said_with_what_is(store: SnapshotStore, asked: dict[str, Any], said: str) -> None:
    save(store, 1)
    save(store, 2, tag="best")
    with pytest.raises(SnapshotNotFoundError, match="'resnet50'") as caught:
        store.load("resnet50", **asked)
    assert said in str(caught.value)
    assert "version 1, version 2 ('best')" in str(caught.value)
    assert isinstance(caught.value, LookupError)


def test_a_name_never_saved_has_nothing(store: SnapshotStore) -> None:
    with pytest.raises(SnapshotNotFoundError, match="there are: none"):
        store.load("resnet50")
    assert store.list("resnet50") == []
    assert store.names() == []
    assert store.delete("resnet50") == 0
    assert [path.name for path in store.root.iterdir()] == ["LOCK"]


# Saving the same again.


@pytest.mark.parametrize("tag", [None, "best"])
def test_the_same_again_is_not_written_again(open_store: OpenStore, tag: str | None) -> None:
    store = open_store()
    first = save(store, 1, tag=tag)
    before = directories(store)
    for reopens in (False, True):
        reopened = open_store() if reopens else store
        again = save(reopened, 1, tag=tag, created_unix=9999.0, tensors={"other": torch.zeros(1)})
        assert again == first
        assert directories(reopened) == before


def test_the_same_version_of_another_life_is_another_snapshot(store: SnapshotStore) -> None:
    save(store, 1)
    save(store, 1, incarnation=2)
    save(store, 1, incarnation=2, lineage="other")
    assert [(info.lineage, info.incarnation) for info in store.list("resnet50")] == [
        (LINEAGE, 1), (LINEAGE, 2), ("other", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("file", ["manifest.json", "tensors-00000.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize("tag", [None, "best"])
def test_the_same_again_is_written_again_where_it_is_damaged(open_store: OpenStore, file: str, tag: str | None) -> None:
    store = open_store()
    save(store, 1, tag=tag)
    flip_byte(directories(store)[0] / file, -2)
    store = open_store()
    save(store, 1, tag=tag, overwrite_tag=True)
    assert loaded_version(store, tag=tag) == 1
    assert len(directories(store)) == (1 if tag else 2)


def test_a_damaged_tag_is_saved_again_without_leave_to_overwrite(open_store: OpenStore) -> None:
    store = open_store()
    save(store, 1, tag="best")
    flip_byte(directories(store)[0] / "tensors-00000.safetensors", -2)
    store = open_store()
    save(store, 1, tag="best")
    assert loaded_version(store, tag="best") == 1


# Tags.


@pytest.mark.parametrize(
    "other", [{"version": 2}, {"version": 1, "incarnation": 2}, {"version": 1, "lineage": "x"}], ids=str
)
def test_a_tag_moves_only_with_leave(store: SnapshotStore, other: dict[str, Any]) -> None:
    save(store, 1, tag="best")
    with pytest.raises(SnapshotExistsError, match=r"'best'.*version 1.*overwrite"):
        save(store, tag="best", **other)
    assert len(store.list("resnet50")) == 1
    moved = save(store, tag="best", overwrite_tag=True, **other)
    assert store.list("resnet50") == [moved]
    assert store.load("resnet50", tag="best").info == moved


def test_tags_that_differ_in_case_are_two(store: SnapshotStore) -> None:
    save(store, 1, tag="Best")
    save(store, 2, tag="best")
    assert loaded_version(store, tag="Best") == 1
    assert loaded_version(store, tag="best") == 2


@pytest.mark.parametrize("tag", ["a", ".", "..", "-", "-v3-t-x", "A.b_c-9", "x" * 100])
def test_good_tags(store: SnapshotStore, tag: str) -> None:
    save(store, 1, tag=tag)
    assert store.load("resnet50", tag=tag).info.tag == tag
    assert [path.parent.parent for path in directories(store)] == [store.root]


@pytest.mark.parametrize("tag", ["", "a b", "a/b", "../x", "é", "a\n", "x" * 101, "a\0", 5], ids=repr)
def test_bad_tags_are_refused(store: SnapshotStore, tag: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="tag") as caught:
        save(store, 1, tag=tag)
    assert repr(tag) in str(caught.value)
    with pytest.raises((ValueError, TypeError), match="tag"):
        store.load("resnet50", tag=tag)
    assert [path.name for path in store.root.iterdir()] == ["LOCK"]


# Pruning and deleting.


def test_automatic_snapshots_beyond_keep_go_and_tagged_ones_stay(open_store: OpenStore) -> None:
    store = open_store(keep=2)
    for version in range(1, 6):
        save(store, version)
        if version in (1, 3):
            save(store, version, tag=f"v{version}")
    assert [(info.version, info.tag) for info in store.list("resnet50")] == [(1, "v1"), (3, "v3"), (4, None), (5, None)]
    assert len(directories(store)) == 4


def test_a_store_that_keeps_fewer_prunes_at_the_next_save(open_store: OpenStore) -> None:
    store = open_store(keep=5)
    for version in range(5):
        save(store, version)
    store = open_store(keep=1)
    assert len(store.list("resnet50")) == 5
    save(store, 9)
    assert versions(store) == [9]


def test_a_damaged_snapshot_does_not_count_among_those_kept(open_store: OpenStore) -> None:
    store = open_store(keep=2)
    for version in (1, 2, 3):
        save(store, version)
    assert versions(store) == [2, 3]
    flip_byte(directories(store)[-1] / "manifest.json", 30)
    save(store, 4)
    assert versions(store) == [2, 4]
    assert len(directories(store)) == 3
    save(store, 5)
    assert versions(store) == [4, 5]
    assert len(directories(store)) == 2  # the damaged one went, older than those that are kept


def test_pruning_that_fails_does_not_fail_the_save(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(keep=1)
    save(store, 1)
    calls = []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(_files, "_rename", second_fails)
        save(store, 2)
    assert len(calls) == 2
    assert "snapshot_not_removed" in caplog.messages
    assert versions(store) == [1, 2]
    save(store, 3)
    assert versions(store) == [3]


def test_delete_removes_all_of_one_name(open_store: OpenStore) -> None:
    store = open_store()
    save(store, 1)
    save(store, 2, tag="best")
    save(store, 1, name="other")
    assert store.delete("resnet50") == 2
    assert store.names() == ["other"]
    assert store.list("resnet50") == []
    assert len([path for path in store.root.iterdir() if path.is_dir()]) == 1
    save(store, 1)
    assert loaded_version(store) == 1


def test_deletion_is_durable_before_it_returns(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    synced = []

    def fsync(fd: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{fd}").readlink()), store.names()))

    monkeypatch.setattr(_files, "_fsync", fsync)
    store.delete("resnet50")
    assert synced == [(str(store.root), [])]


def test_sweep_removes_leftovers_and_nothing_else(open_store: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    save(store, 1)
    folder = directories(store)[0].parent
    for leftover in (folder / ".tmp-abc", store.root / ".tmp-def"):
        (leftover / "inner").mkdir(parents=True)
        (leftover / "tensors-00000.safetensors").write_bytes(b"half")
    (store.root / "notes.txt").write_text("the operator's own")
    (store.root / "lost+found").mkdir()
    empty = store.root / ("0" * 64)
    empty.mkdir()
    assert store.names() == ["resnet50"]
    assert versions(store) == [1]

    caplog.set_level("INFO")
    assert store.sweep() == 2
    assert "swept" in caplog.messages
    assert {path.name for path in store.root.iterdir()} == {"LOCK", "notes.txt", "lost+found", folder.name}
    assert loaded_version(store) == 1
    assert store.sweep() == 0


# Names.

NAMES = [
    "resnet50", "ResNet50", "RESNET50", "RUN/0", "RUN_0", "run/0", "run/1", "..", ".", "../..", "/etc/passwd", "a/../b",
    "LOCK", "lock", ".tmp-x", "con", "nul.txt", "trailing. ", " ", "\n", "\0", "a\\b", "C:", "é", "e\u0301", "ﬁ", "fi",
    "ß", "ss", "学習", "🚀" * 63, "x" * 255, "X" * 255, "x" * 254, "%2e%2e", "a" * 40, "a" * 41, "0" * 64,
]  # fmt: skip


def test_any_name_has_a_folder_of_its_own(store: SnapshotStore) -> None:
    for number, name in enumerate(NAMES):
        save(store, number, name=name)
    assert store.names() == sorted(NAMES)
    for number, name in enumerate(NAMES):
        assert loaded_version(store, name) == number
        assert [info.name for info in store.list(name)] == [name]
    folders = [path.name for path in store.root.iterdir() if path.is_dir()]
    assert len({folder.casefold() for folder in folders}) == len(NAMES)
    assert all(folder.isascii() and folder == folder.lower() and len(folder) <= 128 for folder in folders)
    assert not any(folder.startswith(".") for folder in folders)
    assert [path.name for path in store.root.parent.iterdir()] == ["root"]
    for name in NAMES:
        assert store.delete(name) == 1
    assert [path.name for path in store.root.iterdir()] == ["LOCK"]


@pytest.mark.parametrize("name", ["", "x" * 256, "🚀" * 64, "half a pair \ud800", None, 5, b"x"], ids=repr)
def test_bad_names_are_refused_everywhere(store: SnapshotStore, name: Any) -> None:
    for call in (lambda: save(store, 1, name=name), lambda: store.load(name), lambda: store.list(name)):
        with pytest.raises((ValueError, TypeError), match="name"):
            call()
    with pytest.raises((ValueError, TypeError), match="name"):
        store.delete(name)
    assert [path.name for path in store.root.iterdir()] == ["LOCK"]


# What else is refused.


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"version": -1}, ValueError, "version is at least 0, not -1"),
        ({"version": 1.0}, TypeError, "version is an int, not 1.0"),
        ({"incarnation": True}, TypeError, "incarnation is an int, not True"),
        ({"lineage": None}, TypeError, "lineage is a str, not None"),
        ({"created_unix": math.nan}, ValueError, "created_unix"),
        ({"manifest": {"a": [{"b": (1, 2)}]}}, TypeError, r"manifest\['a'\]\[0\]\['b'\] is a tuple"),
        ({"manifest": {"a": {1: 2}}}, TypeError, r"manifest\['a'\] has the key 1"),
        ({"manifest": {"a": torch.ones(1)}}, TypeError, r"manifest\['a'\] is a Tensor"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_saved(
    store: SnapshotStore, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        save(store, **({"version": 1} | changes))
    assert [path.name for path in store.root.iterdir()] == ["LOCK"]


def test_a_store_keeps_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not 0"):
        SnapshotStore(tmp_path / "root", keep=0)
    assert list(tmp_path.iterdir()) == []


# The root.


def test_the_root_is_created_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = SnapshotStore(tmp_path / "a" / "b")
        save(store, 1)
    finally:
        os.umask(old)
    store.close()
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    for path in store.root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_two_stores_never_share_a_root(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "root")
    for _ in range(2):
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()} on ") as caught:
            SnapshotStore(tmp_path / "root")
        assert caught.value.pid == os.getpid()
        assert str(tmp_path / "root") in str(caught.value)
    save(store, 1)
    store.close()
    with_more = SnapshotStore(tmp_path / "root")
    assert versions(with_more) == [1]
    with_more.close()


HOLDER = """
import pathlib, sys
from farstep_server.store import SnapshotStore
store = SnapshotStore(pathlib.Path(sys.argv[1]))
print(1, flush=True)
input()
"""


def test_the_lock_of_another_process_names_it_and_ends_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "root")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(StoreLockedError) as caught:
            SnapshotStore(tmp_path / "root")
        assert caught.value.pid == holder.pid
        holder.kill()
    SnapshotStore(tmp_path / "root").close()


def test_a_lock_whose_holder_has_not_said_who_it_is(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "root")
    (tmp_path / "root" / "LOCK").write_text("")
    with pytest.raises(StoreLockedError, match="another process") as caught:
        SnapshotStore(tmp_path / "root")
    assert caught.value.pid is None
    store.close()


def test_a_root_that_cannot_be_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "root"):
        with pytest.raises(StoreError, match=f"{tmp_path}.*cannot be created"):
            SnapshotStore(root)


def test_a_closed_store_does_nothing(store: SnapshotStore) -> None:
    save(store, 1)
    store.close()
    store.close()
    for call in (
        lambda: save(store, 2),
        lambda: store.load("resnet50"),
        lambda: store.list("resnet50"),
        lambda: store.delete("resnet50"),
        store.names,
        store.sweep,
    ):
        with pytest.raises(StoreClosedError, match="closed"):
            call()


def test_many_threads_save_list_load_and_delete(open_store: OpenStore) -> None:
    store = open_store(keep=1)
    save(store, 1, name="shared")

    def work(number: int) -> int:
        for version in range(1, 16):
            save(store, version * 10 + number, name="shared")
            assert loaded_version(store, "shared") > 0
            store.list("shared")
            save(store, version, name=f"own/{number}")
            assert versions(store, f"own/{number}") == [version]
            assert f"own/{number}" in store.names()
            store.sweep()
        return store.delete(f"own/{number}")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [1, 1, 1, 1]
    assert store.names() == ["shared"]
    assert len(directories(store)) == 1
