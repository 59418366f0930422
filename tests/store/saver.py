"""Forks a child for each order on stdin; the child saves, and dies in one way or another.

Orders: ``loop VERSION`` saves one version after another until it is killed; ``crash STEP VERSION`` ends the process
before a step of one save, with status 77 and no clean-up; ``limit BYTES VERSION`` saves where no file may grow past a
size.
Lines on stdout: ``child PID``, from the child ``saved VERSION`` and ``error TEXT``, and ``ended STATUS``.
"""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farstep_server.store import SnapshotStore, SnapshotWriteError, _files
from tests.store.support import save, tensors_of

CRASHED = 77
STEPS = ("_write", "_fsync", "_rename")


def say(*words: object) -> None:
    # One write, so that parent and child cannot mix their lines.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def loop(root: Path, start: int) -> None:
    store = SnapshotStore(root, keep=2)
    version = start
    while True:
        save(store, version, tensors=tensors_of(version, 300_000))
        if version % 3 == 0:
            save(store, version, tag="best", overwrite_tag=True)
        say("saved", version)
        version += 1


def crash(root: Path, step: int, version: int) -> None:
    left = step

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(CRASHED)
            left -= 1
            return operation(*arguments)

        return run

    store = SnapshotStore(root, keep=1)
    for name in STEPS:
        setattr(_files, name, dying(getattr(_files, name)))
    save(store, version)
    say("saved", version)


def limit(root: Path, nbytes: int, version: int) -> None:
    store = SnapshotStore(root)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    try:
        save(store, version, tensors=tensors_of(version, nbytes))
    except SnapshotWriteError as error:
        say("error", error)


ORDERS: dict[str, Callable[..., None]] = {"loop": loop, "crash": crash, "limit": limit}


def carry_out(kind: str, root: Path, *numbers: int) -> None:
    status = 1
    try:
        ORDERS[kind](root, *numbers)
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def main() -> None:
    root = Path(sys.argv[1])
    for line in sys.stdin:
        kind, *numbers = line.split()
        pid = os.fork()
        if pid == 0:
            carry_out(kind, root, *map(int, numbers))
        say("child", pid)
        say("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
