"""The lock on a root: one server at a time, released by the kernel however its holder ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from farstep_server.store._errors import StoreError, StoreLockedError
from farstep_server.store._files import sync_directory


def create_root(root: Path) -> None:
    """Create the root, mode 0700, where it is missing; StoreError where that fails."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        try:
            root.mkdir(mode=0o700)
        except FileExistsError:
            if not root.is_dir():
                raise
        else:
            sync_directory(root.parent)
    except OSError as error:
        raise StoreError(f"the data directory {root} cannot be created: {error.strerror}") from error


class RootLock:
    """Holds ``root/LOCK`` from construction to `release`; the file says who does, for the error that others get."""

    def __init__(self, root: Path) -> None:
        path = root / "LOCK"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self._acquire(root)
        except BaseException:
            os.close(self._fd)
            raise

    def _acquire(self, root: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(root, os.pread(self._fd, 256, 0)) from None
        except OSError as error:
            raise StoreError(f"{root / 'LOCK'} cannot be locked: {error.strerror}") from error
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()} {os.uname().nodename}\n".encode(), 0)
        except OSError as error:
            raise StoreError(f"{root / 'LOCK'} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        """Let another take the root."""
        os.close(self._fd)


def _locked(root: Path, written: bytes) -> StoreLockedError:
    pid, _, host = written.decode(errors="replace").strip().partition(" ")
    if not pid.isdecimal():  # its holder has not written it yet
        return StoreLockedError(root, None, "another process")
    return StoreLockedError(root, int(pid), f"process {pid}" + (f" on {host}" if host else ""))
