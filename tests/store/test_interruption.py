"""A save that ends midway: killed, crashed before each of its steps, refused by a full disk. What was saved stays."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from farstep_server.store import SnapshotNotFoundError, SnapshotStore, SnapshotWriteError, _files
from tests.store.conftest import OpenStore
from tests.store.saver import CRASHED
from tests.store.support import directories, loaded_version, save, saver, tensors_of, versions

BIG = os.environ.get("FARSTEP_SOAK") == "big"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_sigkill_at_random_moments_loses_nothing_that_was_reported(
    tmp_path: Path, open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    kills = 60 if BIG else 10
    moments = random.Random(2)
    reported, best, swept = 0, 0, 0
    with saver(tmp_path / "root") as process:
        for _ in range(kills):
            pid = process.order("loop", reported + 1)
            lines = [process.read() for _ in range(moments.randrange(1, 5))]
            time.sleep(moments.uniform(0, 0.03))  # the moment of the fault, somewhere in the next saves
            os.kill(pid, signal.SIGKILL)
            status, rest = process.until_end()
            assert status == -signal.SIGKILL
            said = [int(version) for kind, version in [*lines, *rest] if kind == "saved"]
            best = max([best, *(version for version in said if version % 3 == 0)])

            store = open_store()
            swept += store.sweep()
            newest = loaded_version(store)
            assert newest in (said[-1], said[-1] + 1)
            if best:
                assert loaded_version(store, tag="best") >= best
            assert len(directories(store)) == len(store.list("resnet50"))
            store.close()
            reported = newest
    assert caplog.messages == []  # nothing damaged was passed over
    assert reported >= kills
    assert swept > 0, "no kill hit a save"


@pytest.mark.parametrize("before", [0, 1], ids=["the first save", "a later save"])
def test_a_crash_before_any_step_of_a_save_leaves_the_old_or_the_new(
    tmp_path: Path, open_store: OpenStore, caplog: pytest.LogCaptureFixture, before: int
) -> None:
    outcomes = []
    with saver(tmp_path / "root") as process:
        for step in range(100):
            shutil.rmtree(tmp_path / "root", ignore_errors=True)
            store = open_store(keep=1)
            if before:
                save(store, before)
            store.close()

            process.order("crash", step, 2)
            status, _ = process.until_end()
            assert status in (0, CRASHED)

            store = open_store(keep=1)
            leftovers = store.sweep()
            try:
                found = loaded_version(store)
            except SnapshotNotFoundError:
                found = 0
            assert store.sweep() == 0
            assert leftovers <= 1
            assert store.names() == (["resnet50"] if found else [])
            store.close()
            outcomes.append(found)
            if status == 0:
                break
    assert caplog.messages == []  # nothing damaged was passed over
    # Monotonous: from some step on it is the new one, and that is the case well before the last step.
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == before
    assert outcomes[-2:] == [2, 2]
    assert len(outcomes) > 12


class Fault:
    """Lets an operation fail at its n-th call, and counts."""

    def __init__(self, operation: Callable[..., int], nth: int, error: OSError) -> None:
        self.operation, self.left, self.error, self.fired = operation, nth, error, 0

    def __call__(self, *arguments: object) -> int:
        self.left -= 1
        if self.left == 0:
            self.fired += 1
            raise self.error
        return self.operation(*arguments)


FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = [
    *((("_write", nth, FULL)) for nth in (1, 2, 3, 4, 5, 6)),
    *((("_fsync", nth, FULL)) for nth in (1, 2, 3, 4)),
    ("_fsync", 5, OSError(errno.EIO, "Input/output error")),
    ("_rename", 1, FULL),
]


@pytest.mark.parametrize(("operation", "nth", "error"), FAULTS, ids=str)
def test_a_save_that_fails_leaves_nothing_but_what_was_there(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, operation: str, nth: int, error: OSError
) -> None:
    save(store, 1)
    before = directories(store)
    fault = Fault(getattr(_files, operation), nth, error)
    with monkeypatch.context() as patch:
        patch.setattr(_files, operation, fault)
        with pytest.raises(SnapshotWriteError) as caught:
            save(store, 2)
    assert fault.fired == 1
    assert caught.value.needed_bytes > sum(tensor.nbytes for tensor in tensors_of(2).values())
    assert caught.value.free_bytes is not None
    assert caught.value.path.name == "0000000002-v2"
    for part in (error.strerror, caught.value.path, caught.value.needed_bytes, caught.value.free_bytes):
        assert str(part) in str(caught.value)
    assert directories(store) == before
    assert loaded_version(store) == 1
    save(store, 2)
    assert versions(store) == [1, 2]


def test_a_first_save_that_fails_leaves_no_folder(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_files, "_write", Fault(_files._write, 2, FULL))
        with pytest.raises(SnapshotWriteError):
            save(store, 1)
    assert [path.name for path in store.root.iterdir()] == ["LOCK"]


def test_an_interrupt_in_a_save_leaves_nothing_and_goes_on_up(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    before = directories(store)

    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_files, "_fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2)
    assert directories(store) == before


def test_a_limit_set_by_the_system_is_a_write_error_and_leaves_nothing(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store()
    save(store, 1)
    store.close()
    with saver(tmp_path / "root") as process:
        process.order("limit", 100_000, 2)
        status, [[kind, text]] = process.until_end()
    assert (status, kind) == (0, "error")
    assert os.strerror(errno.EFBIG) in text
    store = open_store()
    assert store.sweep() == 0
    assert versions(store) == [1]


def test_partial_writes_are_completed(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    short = 0

    def write_some(fd: int, data: memoryview) -> int:
        nonlocal short
        short += len(data) > 1000
        return os.write(fd, data[:1000])

    monkeypatch.setattr(_files, "_write", write_some)
    save(store, 1)
    assert short > 5
    assert loaded_version(store) == 1


def test_everything_is_synced_before_it_gets_its_name_and_the_name_after(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []

    def fsync(fd: int) -> None:
        steps.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink())))
        os.fsync(fd)

    def rename(source: Path, target: Path) -> None:
        steps.append(("rename", str(target)))
        assert {path.name for path in source.iterdir()} == {Path(path).name for _, path in steps[1:-2]}
        source.rename(target)

    monkeypatch.setattr(_files, "_fsync", fsync)
    monkeypatch.setattr(_files, "_rename", rename)
    save(store, 1)
    [final] = directories(store)
    partial = Path(steps[1][1]).parent
    assert partial.parent == final.parent
    assert steps == [
        ("sync", str(store.root)),
        ("sync", str(partial / "tensors-00000.safetensors")),
        ("sync", str(partial / "manifest.json")),
        ("sync", str(partial / "SHA256SUMS")),
        ("sync", str(partial)),
        ("rename", str(final)),
        ("sync", str(final.parent)),
    ]
