"""The errors of the store.

    StoreError
    ├── StoreLockedError                     another process uses the root
    ├── StoreClosedError                     the store was closed
    ├── SnapshotWriteError                   nothing was saved; what was saved before is intact
    ├── SnapshotExistsError                  the tag names another snapshot; nothing was saved
    ├── SnapshotNotFoundError (LookupError)  no snapshot of that name, tag or version
    ├── SnapshotCorruptError                 a snapshot is damaged or incomplete
    ├── SnapshotFormatError                  written in a format that this release does not read
    └── SnapshotReadError                    the operating system refused a read; says nothing about the snapshot

Caller mistakes (a bad name, tag, number, manifest or tensor) are ValueError or TypeError, raised before
any file is touched.
"""

from __future__ import annotations

from pathlib import Path


class StoreError(Exception):
    """Any failure of the store that is not a caller's mistake."""


class StoreLockedError(StoreError):
    """Another server uses the root; ``pid`` is its process id where it could be read."""

    def __init__(self, root: Path, pid: int | None, holder: str) -> None:
        super().__init__(
            f"the data directory {root} is in use by {holder}; stop that server first, or give this one a directory "
            f"of its own"
        )
        self.root = root
        self.pid = pid


class StoreClosedError(StoreError):
    """The store was closed; nothing was done."""


class SnapshotWriteError(StoreError):
    """A snapshot could not be written. No part of it remains, and earlier snapshots are intact."""

    def __init__(self, path: Path, needed_bytes: int, free_bytes: int | None, reason: str) -> None:
        free = "unknown" if free_bytes is None else f"{free_bytes} bytes"
        super().__init__(
            f"snapshot {path} was not written: {reason}; it needs {needed_bytes} bytes, free there: {free}. "
            f"Earlier snapshots are intact"
        )
        self.path = path
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class SnapshotExistsError(StoreError):
    """The tag already names another snapshot. Nothing was saved."""


class SnapshotNotFoundError(StoreError, LookupError):
    """There is no such snapshot."""


class SnapshotCorruptError(StoreError):
    """A snapshot is damaged or incomplete."""


class SnapshotFormatError(StoreError):
    """A snapshot is intact, but in a format version that this release does not read."""


class SnapshotReadError(StoreError):
    """The operating system refused to read a snapshot, for a reason that is no damage to it."""
