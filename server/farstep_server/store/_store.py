"""The store: which snapshots there are, which one is meant, which ones go."""

from __future__ import annotations

import builtins
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from torch import Tensor

from farstep_server.logs import log_event
from farstep_server.store._errors import (
    SnapshotCorruptError,
    SnapshotExistsError,
    SnapshotFormatError,
    SnapshotNotFoundError,
    SnapshotWriteError,
    StoreClosedError,
    StoreError,
)
from farstep_server.store._files import free_bytes, remove_tree, rename, sync_directory
from farstep_server.store._lock import RootLock, create_root
from farstep_server.store._manifest import Json, Manifest, SnapshotInfo
from farstep_server.store._naming import (
    TEMPORARY,
    Entry,
    check_name,
    check_tag,
    directories_in,
    entries_in,
    entry_in,
    folder_name,
    is_folder_name,
)
from farstep_server.store._snapshot import (
    Draft,
    Snapshot,
    draft,
    read_manifest,
    read_snapshot,
    verify_snapshot,
    write_snapshot,
)

_LOGGER = logging.getLogger(__name__)
_STRIPES = 64


class SnapshotStore:
    """The snapshots below one directory. Its methods may be called from any thread.

    Args:
        root: the directory; created with mode 0700 where missing, and locked against other processes until `close`.
        keep: automatic snapshots kept per hosted optimizer, at least 1. Tagged ones stay until they are deleted.

    Raises:
        StoreLockedError: another process uses the root.
        StoreError: the root cannot be created or locked.
    """

    def __init__(self, root: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep is the number of automatic snapshots to keep, at least 1, not {keep}")
        self.root = Path(root).absolute()
        self.keep = keep
        create_root(self.root)
        self._lock = RootLock(self.root)
        self._closed = False
        # Hosted optimizers come and go; a fixed number of locks does not grow with them.
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._sound: set[Path] = set()
        """Snapshots that this store has written or verified."""

    # Writing.

    def save(
        self,
        *,
        name: str,
        version: int,
        lineage: str,
        incarnation: int,
        manifest: Mapping[str, Json],
        tensors: Mapping[str, Tensor],
        tag: str | None = None,
        created_unix: float,
        overwrite_tag: bool = False,
    ) -> SnapshotInfo:
        """Write a snapshot; it is durable when this returns.

        What is saved already (same name, version, tag and manifest of the same lineage and incarnation, and not damaged)
        is not written again; its info is returned. Older automatic snapshots beyond ``keep`` are then removed.

        Args:
            name: the hosted optimizer's; any text of 1 to 255 bytes in UTF-8.
            version: the committed version that the tensors belong to.
            lineage: the hosted optimizer's identity across restarts.
            incarnation: which life of it.
            manifest: the caller's JSON, returned by ``load`` as it is.
            tensors: strided tensors by key, of any dtype but quantized and sub-byte integer ones. They come back bit
                for bit with their shapes, and with their strides where dense; those that share memory no longer do.
                They must not change during the call: if they do, the snapshot may be found damaged when it is loaded.
            tag: a name that keeps it from being pruned: 1 to 100 letters, digits, '.', '_' and '-'. None: automatic.
            created_unix: seconds since 1970.
            overwrite_tag: whether a tag may move here from another snapshot, which is then removed.

        Raises:
            SnapshotWriteError: the disk is full or broken. Nothing of it remains; earlier snapshots are intact.
            SnapshotExistsError: the tag names another snapshot, and ``overwrite_tag`` is False. Nothing was written.
            ValueError, TypeError: an argument cannot be saved. Nothing was written.
        """
        info = SnapshotInfo(name, version, tag, created_unix, 0, lineage, incarnation)
        plan = draft(info, manifest, tensors)
        with self._exclusive(name) as folder:
            entries = entries_in(folder)
            found = self._saved_already(entries, plan)
            if found is not None:
                return found
            namesakes = [entry for entry in entries if tag is not None and entry.tag == tag]
            if not overwrite_tag:
                self._check_tag_is_free(namesakes, info)
            entry = entry_in(folder, 1 + max((entry.sequence for entry in entries), default=0), version, tag)
            saved = self._write(entry, plan)
            self._discard(namesakes)
            self._prune(folder, name)
        return saved

    def _saved_already(self, entries: Sequence[Entry], plan: Draft) -> SnapshotInfo | None:
        info = plan.info
        for entry in reversed(entries):
            if (entry.version, entry.tag) != (info.version, info.tag):
                continue
            with suppress(StoreError):
                found = read_manifest(entry, info.name)
                if _same_life(found.info, info) and found.own == plan.manifest:
                    self._verify(entry, found)
                    return found.info
        return None

    def _verify(self, entry: Entry, manifest: Manifest) -> None:
        if entry.path not in self._sound:
            verify_snapshot(entry, manifest)
            self._sound.add(entry.path)

    def _check_tag_is_free(self, namesakes: Sequence[Entry], info: SnapshotInfo) -> None:
        for entry in namesakes:
            with suppress(StoreError):
                found = read_manifest(entry, info.name).info
                if entry.version == info.version and _same_life(found, info):
                    continue  # the very same one, damaged: about to be written again
            raise SnapshotExistsError(
                f"the tag {info.tag!r} of {info.name!r} names the snapshot of version {entry.version}; version "
                f"{info.version} was not saved. Choose another tag, or overwrite this one"
            )

    def _write(self, entry: Entry, plan: Draft) -> SnapshotInfo:
        folder = entry.path.parent
        partial: Path | None = None
        try:
            if not folder.exists():
                folder.mkdir(mode=0o700)
                sync_directory(self.root)
            partial = Path(mkdtemp(prefix=TEMPORARY, dir=folder))
            saved = write_snapshot(partial, plan)
            rename(partial, entry.path)
            sync_directory(folder)
        except BaseException as error:
            # After a failed sync of the folder the snapshot is in place but may not last: better none than perhaps.
            for path in (partial, entry.path):
                if path is not None:
                    remove_tree(path)
            with suppress(OSError):
                folder.rmdir()  # only if it is empty
            if not isinstance(error, OSError):
                raise
            reason = error.strerror or str(error)
            raise SnapshotWriteError(entry.path, plan.needed_bytes, free_bytes(self.root), reason) from error
        self._sound.add(entry.path)
        return saved

    # Reading.

    def list(self, name: str) -> builtins.list[SnapshotInfo]:
        """Return the complete snapshots of a hosted optimizer, in the order in which they were saved.

        Manifests are checked, and the presence and size of all files; tensors are not read. What is damaged is left out
        and logged.
        """
        check_name(name)
        self._check_open()
        return [manifest.info for manifest in self._complete(entries_in(self._folder(name)), name)]

    def names(self) -> builtins.list[str]:
        """Return the names of which there is a complete snapshot, sorted."""
        self._check_open()
        found = set()
        for folder in directories_in(self.root):
            if not is_folder_name(folder.name):
                continue
            newest = next(self._complete(entries_in(folder)[::-1]), None)
            if newest is not None and folder_name(newest.info.name) == folder.name:
                found.add(newest.info.name)
        return sorted(found)

    def _complete(self, entries: Sequence[Entry], name: str | None = None) -> Iterator[Manifest]:
        for entry in entries:
            try:
                yield read_manifest(entry, name)
            except (SnapshotCorruptError, SnapshotFormatError) as error:
                if entry.path.exists():  # else it has just been pruned
                    log_event(_LOGGER, logging.WARNING, "snapshot_not_listed", reason=error)

    def load(self, name: str, *, tag: str | None = None, version: int | None = None) -> Snapshot:
        """Return a snapshot, every byte of it checked.

        With a tag or a version: the newest snapshot of that tag and version. With neither: the newest that is not
        damaged; those that were passed over are logged.

        Raises:
            SnapshotNotFoundError: there is none such; the text lists what there is.
            SnapshotCorruptError: the one asked for is damaged, or, where nothing was asked for, all are.
            SnapshotFormatError: it was written in a later format.
            SnapshotReadError: the system refused to read it.
        """
        check_name(name)
        check_tag(tag)
        with self._exclusive(name) as folder:
            entries = entries_in(folder)
            asked = [entry for entry in entries if tag in (None, entry.tag) and version in (None, entry.version)]
            if not asked:
                raise _not_found(name, tag, version, entries)
            if tag is not None or version is not None:
                return self._load(asked[-1], name)
            return self._load_newest(asked, name)

    def _load(self, entry: Entry, name: str) -> Snapshot:
        snapshot = read_snapshot(entry, name)
        self._sound.add(entry.path)
        return snapshot

    def _load_newest(self, entries: Sequence[Entry], name: str) -> Snapshot:
        for entry in reversed(entries):
            try:
                return self._load(entry, name)
            except SnapshotCorruptError as error:
                log_event(
                    _LOGGER, logging.WARNING, "snapshot_damaged", name=name, version=entry.version, tag=entry.tag,
                    reason=error,
                )  # fmt: skip
                last = error
        damaged = ", ".join(entry.describe() for entry in entries)
        raise SnapshotCorruptError(f"no snapshot of {name!r} can be loaded; all are damaged: {damaged}") from last

    # Removing.

    def delete(self, name: str) -> int:
        """Remove all snapshots of a hosted optimizer, tagged ones too; return how many there were.

        They are gone for good when this returns, also after a power failure. StoreError: they could not be removed.
        """
        check_name(name)
        with self._exclusive(name) as folder:
            entries = entries_in(folder)
            if not folder.exists():
                return 0
            try:
                trash = Path(mkdtemp(prefix=TEMPORARY, dir=self.root))  # empty, and so may be replaced
                rename(folder, trash)
                sync_directory(self.root)
            except OSError as error:
                raise StoreError(f"the snapshots of {name!r} cannot be removed: {error.strerror}") from error
            self._sound.difference_update(entry.path for entry in entries)
            self._remove(trash)
            return len(entries)

    def _prune(self, folder: Path, name: str) -> None:
        automatic = [entry for entry in entries_in(folder) if entry.tag is None]
        kept = 0
        for entry in reversed(automatic):
            if kept == self.keep:
                self._discard([entry])
                continue
            with suppress(StoreError):
                read_manifest(entry, name)
                kept += 1

    def _discard(self, entries: Sequence[Entry]) -> None:
        """Remove snapshots; a failure is logged, since what was asked for, a save, has succeeded."""
        for entry in entries:
            self._sound.discard(entry.path)
            trash = entry.path.with_name(TEMPORARY + entry.path.name)
            try:
                # First out of sight, so that an interruption leaves no half of it under its name.
                rename(entry.path, trash)
            except OSError as error:
                log_event(_LOGGER, logging.WARNING, "snapshot_not_removed", path=entry.path, reason=error.strerror)
                continue
            self._remove(trash)

    def _remove(self, path: Path) -> bool:
        gone = remove_tree(path)
        if not gone:
            log_event(_LOGGER, logging.WARNING, "leftover_not_removed", path=path)
        return gone

    def sweep(self) -> int:
        """Remove what interrupted saves and removals left behind; return how many there were. Called at start."""
        self._check_open()
        swept = sum(self._remove(path) for path in directories_in(self.root) if path.name.startswith(TEMPORARY))
        for folder in directories_in(self.root):
            if is_folder_name(folder.name):
                with self._stripe(folder):
                    leftovers = [path for path in directories_in(folder) if path.name.startswith(TEMPORARY)]
                    swept += sum(map(self._remove, leftovers))
                    with suppress(OSError):
                        folder.rmdir()  # only if it is empty
        if swept:
            log_event(_LOGGER, logging.INFO, "swept", root=self.root, leftovers=swept)
        return swept

    # The root.

    def close(self) -> None:
        """Wait for what is going on to end, then let another process take the root. Closing again does nothing."""
        with ExitStack() as stack:
            for stripe in self._stripes:
                stack.enter_context(stripe)
            if not self._closed:
                self._closed = True
                self._lock.release()

    def _folder(self, name: str) -> Path:
        return self.root / folder_name(name)

    def _stripe(self, folder: Path) -> threading.Lock:
        return self._stripes[int(folder.name[-8:], 16) % _STRIPES]

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[Path]:
        """The folder of a hosted optimizer, for one caller at a time."""
        folder = self._folder(name)
        with self._stripe(folder):
            self._check_open()
            yield folder

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"the store of {self.root} is closed")


def _same_life(left: SnapshotInfo, right: SnapshotInfo) -> bool:
    return (left.lineage, left.incarnation) == (right.lineage, right.incarnation)


def _not_found(name: str, tag: str | None, version: int | None, entries: Sequence[Entry]) -> SnapshotNotFoundError:
    asked = [f"version {version}"] if version is not None else []
    asked += [f"tag {tag!r}"] if tag is not None else []
    what = f" with {' and '.join(asked)}" if asked else ""
    there = ", ".join(entry.describe() for entry in entries) or "none"
    return SnapshotNotFoundError(f"{name!r} has no snapshot{what}; there are: {there}")
