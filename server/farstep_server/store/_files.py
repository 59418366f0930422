"""Files that are hashed on their way to and from the disk, and the few operations that durability hangs on."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from farstep_server.store._errors import SnapshotCorruptError, SnapshotReadError

# Hashed and written in pieces that stay in the processor's cache between the two.
_PIECE_BYTES = 1024 * 1024

# What a save or load asks of the system goes through these; tests put faults and records in their place.
_write = os.write
_fsync = os.fsync
_rename = os.rename
_open = os.open

_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}


@dataclass(frozen=True)
class FileRecord:
    """A file's name in its directory, its size, and the SHA-256 of its contents in hex."""

    name: str
    nbytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, mode 0600, and fsync it. Each piece is done with before the next is asked for."""
    digest = hashlib.sha256()
    nbytes = 0
    fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for piece in pieces:
            for part in _parts(memoryview(piece)):
                digest.update(part)
                _write_all(fd, part)
                nbytes += len(part)
        _fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(path.name, nbytes, digest.hexdigest())


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[_write(fd, data) :]


def _parts(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), _PIECE_BYTES):
        yield view[start : start + _PIECE_BYTES]


class HashingReader:
    """Reads a file from its start to its end and hashes what it reads."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._digest = hashlib.sha256()

    def read_into(self, view: memoryview) -> None:
        """Fill the view; SnapshotCorruptError where the file ends before."""
        for part in _parts(view):
            done = 0
            while done < len(part):
                count = os.readv(self._fd, [part[done:]])
                if count == 0:
                    raise SnapshotCorruptError(f"{self.path} ends too early")
                done += count
            self._digest.update(part)

    def read(self, nbytes: int) -> bytes:
        """Return that many bytes; SnapshotCorruptError where the file ends before."""
        data = bytearray(nbytes)
        self.read_into(memoryview(data))
        return bytes(data)

    def check(self, sha256: str) -> None:
        """SnapshotCorruptError unless all that was read is the whole file and has that SHA-256."""
        if os.read(self._fd, 1):
            raise SnapshotCorruptError(f"{self.path} is longer than its manifest says")
        found = self._digest.hexdigest()
        if found != sha256:
            raise SnapshotCorruptError(f"{self.path} is damaged: its SHA-256 is {found}, not {sha256}")


@contextmanager
def open_reader(path: Path) -> Iterator[HashingReader]:
    """Open a file for reading; what the system reports while it is open is translated (`translated`)."""
    with translated(path):
        fd = _open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield HashingReader(path, fd)
        finally:
            os.close(fd)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise SnapshotCorruptError for what means damage (missing, unreadable sectors), else SnapshotReadError."""
    try:
        yield
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
        raise (SnapshotCorruptError if error.errno in _DAMAGE else SnapshotReadError)(reason) from error


def read_file(path: Path) -> bytes:
    """Return a small file's contents."""
    with translated(path):
        return path.read_bytes()


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable."""
    fd = _open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Give a directory its final name; the parent must be synced to make that durable."""
    _rename(source, target)


def remove_tree(path: Path) -> bool:
    """Remove a directory and all in it as far as possible; return whether it is gone."""
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def free_bytes(path: Path) -> int | None:
    """Return the bytes free for files at a path, or None where the system does not say."""
    with suppress(OSError):
        return shutil.disk_usage(path).free
    return None
