"""The check for leaks finds each kind of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.leaks import Holdings, left_behind


@contextmanager
def _thread() -> Iterator[str]:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="stray")
    thread.start()
    yield "thread 'stray'"
    release.set()
    thread.join()


@contextmanager
def _file() -> Iterator[str]:
    with Path(__file__).open():
        yield Path(__file__).name


@contextmanager
def _socket() -> Iterator[str]:
    with socket.socket():
        yield "socket:"


@contextmanager
def _child() -> Iterator[str]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdin is not None
    yield f"child process {child.pid}"
    child.stdin.close()
    child.wait()


@contextmanager
def _segment() -> Iterator[str]:
    path = Path(f"/dev/shm/farstep-test-{os.getpid()}")
    path.touch()
    yield path.name
    path.unlink()


@pytest.mark.parametrize("leak", [_thread, _file, _socket, _child, _segment], ids=lambda leak: leak.__name__[1:])
def test_a_leak_is_found_and_named(leak: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_SECONDS", 0.05)
    before = Holdings.now()
    with leak() as words:  # type: ignore[attr-defined]
        assert any(words in line for line in left_behind(before))
    assert left_behind(before) == []
