"""Snapshots of hosted optimizers on disk: what survives the server.

A snapshot is a directory that any tool can read::

    ROOT/LOCK                                     held (flock) by the one server that uses ROOT
    ROOT/resnet50-<sha256 of the name>/           one folder per hosted optimizer
        0000000007-v1200/                         the seventh snapshot, of version 1200, automatic
        0000000008-v1250-t-best/                  the eighth, tagged "best"
            tensors-00000.safetensors             every tensor, in C order
            manifest.json                         who, when, which tensors, and the caller's own JSON
            SHA256SUMS                            of both; `sha256sum -c SHA256SUMS` checks a snapshot by hand

Decisions, and why:

* **Written beside, renamed, never overwritten.** Files go into ``.tmp-*`` in the same folder; each is fsynced, then the
  temporary directory, then it is renamed, then the folder is fsynced. What bears a final name was complete when it got
  it. Replacing a tag writes the new snapshot first and removes the old one after.
* **Order is the order of saving**, a number in the directory's name. Not the version: after a rollback to version 50, a
  snapshot of version 60 is newer than one of version 100 that was left behind. Not the clock, which may be set back.
* **Names never become paths.** A folder is named by the SHA-256 of the hosted optimizer's name, with a lower-case ASCII
  excerpt before it for people. That is injective, has no traversal, and is safe where file names ignore case or are
  normalized. The name itself stands in the manifest and is compared on reading.
* **SHA-256.** A checksum must find damage, not an attacker, who could rewrite it too; CRC-32 would do. Measured for
  100 MB on a CPU with SHA instructions: CRC-32 42 ms, SHA-256 65 ms, BLAKE2b 102 ms, beside 80 ms to write and sync the
  file on a fast disk. For those 23 ms, stock tools verify a snapshot, and snapshots can be compared by their sums. A
  file is hashed on its way to and from the disk, piece by piece, so that it is read once; hashing releases the GIL.
* **safetensors, written here.** The library's ``save_file`` can neither hash nor fsync what it writes, and its older
  releases copy every tensor first. The format is a length, a JSON header and raw bytes. Writing takes no memory beyond
  one block (at most 4 MiB, for tensors that are not contiguous); reading goes straight into the new tensors. Tests
  have the library read every dtype.
* **Any reader sees the right values**: tensors lie in C order under their own shape, whatever their strides, which
  stand in the manifest and are restored where dense. What readers commonly lack is stored as something that all have:
  complex as real pairs (``[..., 2]``), rare float8 kinds as their bits (``U8``); the manifest has the dtype.
* **Damage.** ``load`` checks every byte it returns. Asked for nothing in particular, it falls back to the next older
  snapshot and logs a warning; asked for a tag or version, it raises. A snapshot that cannot be read for another reason
  (permissions, too many open files, a format newer than this code) is never passed over: going on from an older version
  because of those would quietly lose steps.
* **Pruning** counts complete automatic snapshots only, so a damaged manifest never displaces one that loads.
* **Concurrency.** Saving, loading and deleting one hosted optimizer exclude each other; different ones go on side by
  side. Listing takes no lock and skips what vanishes under it.
"""

from farstep_server.store._errors import (
    SnapshotCorruptError,
    SnapshotExistsError,
    SnapshotFormatError,
    SnapshotNotFoundError,
    SnapshotReadError,
    SnapshotWriteError,
    StoreClosedError,
    StoreError,
    StoreLockedError,
)
from farstep_server.store._manifest import Json, SnapshotInfo
from farstep_server.store._snapshot import Snapshot
from farstep_server.store._store import SnapshotStore

__all__ = [
    "Json",
    "Snapshot",
    "SnapshotCorruptError",
    "SnapshotExistsError",
    "SnapshotFormatError",
    "SnapshotInfo",
    "SnapshotNotFoundError",
    "SnapshotReadError",
    "SnapshotStore",
    "SnapshotWriteError",
    "StoreClosedError",
    "StoreError",
    "StoreLockedError",
]
