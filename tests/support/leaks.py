"""What a test leaves behind: threads, child processes, file descriptors, shared memory."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 5.0
_PAUSE_SECONDS = 0.02

# Threads that a library keeps for the life of the process.
_LASTING_THREADS = ("tqdm_monitor",)
# gRPC's and torch's own wake-up and event descriptors, devices, and what the kernel offers to read.
_LASTING_FILES = ("anon_inode:", "/dev/", "/proc/", "/sys/")
_SHARED_MEMORY = ("farstep", "psm_", f"torch_{os.getpid()}_")


@dataclass(frozen=True)
class Holdings:
    """What this process holds at one moment."""

    threads: frozenset[threading.Thread]
    files: frozenset[tuple[int, str]]
    children: frozenset[int]
    segments: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        """Take stock."""
        threads = frozenset(thread for thread in threading.enumerate() if not thread.name.startswith(_LASTING_THREADS))
        return cls(threads, frozenset(_files()), frozenset(_children()), frozenset(_segments()))

    def beyond(self, before: Holdings) -> list[str]:
        """Say in words what is here that was not before."""
        lines = [f"thread {thread.name!r}" for thread in self.threads - before.threads]
        lines += [f"descriptor {number} of {target}" for number, target in sorted(self.files - before.files)]
        lines += [f"child process {pid}: {_command(pid)}" for pid in sorted(self.children - before.children)]
        lines += [f"shared memory segment {name}" for name in sorted(self.segments - before.segments)]
        return lines


def left_behind(before: Holdings) -> list[str]:
    """Say what has come since and does not go within the grace period; most ends a moment after its owner."""
    found = Holdings.now().beyond(before)
    if not found:
        return []
    gc.collect()
    deadline = time.monotonic() + GRACE_SECONDS
    while (found := Holdings.now().beyond(before)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
    return found


def _files() -> list[tuple[int, str]]:
    own = _lasting_pipes()
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # the descriptor of this very listing
        if not target.startswith(_LASTING_FILES) and int(entry.name) not in own:
            found.append((int(entry.name), target))
    return found


def _lasting_pipes() -> set[int]:
    pipes = set()
    server = _embedded_process()
    if server is not None and server.stdin is not None and not server.stdin.closed:
        pipes.add(server.stdin.fileno())
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    descriptor = getattr(getattr(tracker, "_resource_tracker", None), "_fd", None)
    return pipes if descriptor is None else {*pipes, descriptor}


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(int(pid) for pid in (task / "children").read_text().split())
        except OSError:
            continue  # the thread has ended
    server = _embedded_process()
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    lasting = {
        None if server is None else server.pid,
        getattr(getattr(tracker, "_resource_tracker", None), "_pid", None),
    }
    return {pid for pid in found if pid not in lasting}


def _embedded_process():  # type: ignore[no-untyped-def]
    # One per process that was ever asked for, by design until the process ends.
    embedded = sys.modules.get("farstep.embedded")
    return getattr(getattr(embedded, "_server", None), "_process", None)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") or "a zombie"
    except OSError:
        return "gone by now"


def _segments() -> list[str]:
    directory = Path("/dev/shm")
    return (
        [path.name for path in directory.iterdir() if path.name.startswith(_SHARED_MEMORY)]
        if directory.is_dir()
        else []
    )
