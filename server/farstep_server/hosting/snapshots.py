"""What survives the server: snapshots of hosted optimizers, taken while they run, at their restart, and on demand.

* **At start**, before the server listens, each name's newest complete snapshot is hosted again: same lineage, incarnation,
  version and dedup table, so that a client that reconnects goes on, and a retried contribution counts once. A damaged
  snapshot is logged and the next older one of the same lineage is taken; its clients learn of the steps that are gone by a
  RollbackError. What cannot be restored at all (every snapshot damaged, its class not registered) keeps its name withheld,
  with an error that says why, until someone restores or removes it.
* **While it runs**, every interval, what has changed is snapshotted. Dumps are taken by the owner between two events, written
  here. One is held in memory at a time, unless an owner keeps its dump waiting for long (a closure-driven step).
* **On drain** each hosted optimizer is suspended: its dump is the last thing that its owner answers, so nothing that was
  acknowledged is missing in it.
* **Removal.** A removed hosted optimizer keeps its snapshots unless they are to go too, but its lineage is noted as removed
  and no restart brings it back. Restoring one of its snapshots on purpose hosts it again. The same holds for one that was
  replaced by another of its name. An ephemeral one that has ended, and all its snapshots with it, is gone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from farstep_server.core import events as ev
from farstep_server.core.records import Dump
from farstep_server.hosting.directory import Directory
from farstep_server.hosting.dumps import decode_dump, encode_dump
from farstep_server.hosting.owner import Owner
from farstep_server.hosting.removed import Removed, RemovedLineages
from farstep_server.logs import log_event
from farstep_server.store import (
    Snapshot,
    SnapshotCorruptError,
    SnapshotInfo,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreError,
)
from farstep_wire.errors import (
    Applied,
    DrainingError,
    FarstepError,
    InvalidRequestError,
    MismatchError,
    NotFoundError,
    RemovedError,
    StorageError,
)

_LOGGER = logging.getLogger(__name__)
_DUMP_SECONDS = 300.0
_PATIENCE_SECONDS = 10.0
_STRIPES = 64

Standing = tuple[int, int, int]
"""Incarnation, version and decided acts: what tells whether a snapshot would hold anything new."""


@dataclass(frozen=True)
class _Arrived:
    """An owner's answer to TakeDump."""

    owner: Owner
    standing: Standing
    reply: ev.Reply


class _DumpTicket:
    """Puts the dump into the snapshotter's inbox."""

    def __init__(self, inbox: queue.SimpleQueue[_Arrived | None], owner: Owner, standing: Standing) -> None:
        self._inbox = inbox
        self._owner = owner
        self._standing = standing

    def deliver(self, reply: ev.Reply) -> None:
        """Take the answer."""
        self._inbox.put(_Arrived(self._owner, self._standing, reply))


class Snapshotter:
    """Snapshots and restores the hosted optimizers of a directory. Its methods may be called from any thread."""

    def __init__(self, store: SnapshotStore, directory: Directory, interval_seconds: float) -> None:
        self._store = store
        self._directory = directory
        self._interval_seconds = interval_seconds
        self._removed = RemovedLineages(store.root)
        self._saved: WeakKeyDictionary[Owner, Standing] = WeakKeyDictionary()
        self._asked: set[Owner] = set()
        self._inbox: queue.SimpleQueue[_Arrived | None] = queue.SimpleQueue()
        self._stopping = False
        # Writing a snapshot of a name, and noting that what bears the name has ended, exclude each other.
        self._locks = [threading.Lock() for _ in range(_STRIPES)]
        self._thread = threading.Thread(target=self._run, name="farstep-snapshots", daemon=True)
        directory.when_ending(self._on_ending)

    def _lock(self, name: str) -> threading.Lock:
        return self._locks[hash(name) % _STRIPES]

    # At start and at the end.

    def restore_all(self) -> None:
        """Host what the snapshots hold; called before anyone can ask for it."""
        with _storage():
            self._store.sweep()
            names = self._store.names()
        for name in names:
            try:
                self._restore_newest(name)
            except Exception as error:  # noqa: BLE001 - the others are still to be restored
                log_event(_LOGGER, logging.ERROR, "not_restored", name=name, reason=error, exc_info=error)
                self._directory.withhold(
                    name,
                    f"{name!r} could not be restored when the server started: {error}. Remove the cause and start the server "
                    f"again, or restore another snapshot (farstep checkpoint list, farstep checkpoint restore), or give it "
                    f"up (farstep rm --snapshots)",
                )

    def _restore_newest(self, name: str) -> None:
        candidates = [info for info in reversed(self._store.list(name)) if info.lineage not in self._removed]
        if not candidates:
            return
        for info in candidates:
            if info.lineage != candidates[0].lineage:
                break
            try:
                snapshot = self._store.load(name, tag=info.tag, version=info.version)
            except SnapshotCorruptError as error:
                log_event(_LOGGER, logging.ERROR, "snapshot_damaged", name=name, version=info.version, reason=error)
                continue
            owner = self._directory.adopt(decode_dump(snapshot))
            self._saved[owner] = _standing(owner)
            return
        raise StorageError("every snapshot of it is damaged")

    def start(self) -> None:
        """Begin to snapshot on the interval."""
        self._thread.start()

    def suspend_all(self, error: FarstepError) -> bool:
        """End every hosted optimizer, refusing what waits with the error, and save it; return whether all were saved."""
        self._stop_thread()
        complete = True
        for owner in self._directory.owners():
            try:
                dump = owner.suspend(error, _DUMP_SECONDS)
                if not owner.hosted.abandoned:
                    self._write(owner, dump, "")
            except FarstepError as problem:
                if owner.hosted.abandoned:
                    continue
                complete = False
                log_event(_LOGGER, logging.ERROR, "snapshot_failed", name=owner.name, reason=problem)
        return complete

    def close(self) -> None:
        """End the thread and let another server use the directory."""
        self._stop_thread()
        self._store.close()

    def _stop_thread(self) -> None:
        self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    # On the interval.

    def _run(self) -> None:
        due = time.monotonic() + self._interval_seconds
        while not self._stopping:
            if self._take_next(due - time.monotonic()):
                continue
            self._snapshot_changed()
            due = time.monotonic() + self._interval_seconds

    def _snapshot_changed(self) -> None:
        for owner in self._directory.owners():
            standing = _standing(owner)
            if self._stopping or owner in self._asked or self._saved.get(owner) == standing:
                continue
            self._asked.add(owner)
            owner.post(ev.TakeDump(_DumpTicket(self._inbox, owner, standing)))
            patience = time.monotonic() + _PATIENCE_SECONDS
            while owner in self._asked and self._take_next(patience - time.monotonic()):
                pass

    def _take_next(self, timeout_seconds: float) -> bool:
        """Write the next dump that arrives; return whether one came in time."""
        try:
            arrived = self._inbox.get(timeout=max(0.0, timeout_seconds))
        except queue.Empty:
            return False
        if arrived is None or self._stopping:
            return False
        self._asked.discard(arrived.owner)
        try:
            if isinstance(arrived.reply, ev.DumpReply):
                self._write(arrived.owner, arrived.reply.dump, "")
                self._saved[arrived.owner] = arrived.standing
            elif isinstance(arrived.reply, ev.Refusal) and not arrived.owner.ended:
                raise arrived.reply.error
        except RemovedError:
            pass  # it ended while its dump was on the way
        except Exception as error:  # noqa: BLE001 - the next interval tries again
            log_event(_LOGGER, logging.ERROR, "snapshot_failed", name=arrived.owner.name, reason=error, exc_info=error)
        return True

    # On demand.

    def save(self, name: str, tag: str) -> SnapshotInfo:
        """Write a snapshot of the committed state; it is durable when this returns. A tag moves here from an older one.

        NotFoundError, StorageError, or InvalidRequestError for a tag that cannot be one.
        """
        owner = self._directory.find(name)
        standing = _standing(owner)
        reply = owner.ask(ev.TakeDump, ev.DumpReply, _DUMP_SECONDS)
        info = self._write(owner, reply.dump, tag)
        self._saved[owner] = standing
        return info

    def stored(self, name: str) -> Sequence[SnapshotInfo]:
        """Return the complete snapshots of a name, oldest first; none where it is unknown."""
        with _storage():
            return self._store.list(name)

    def list(self, name: str) -> Sequence[SnapshotInfo]:
        """Return the complete snapshots of a name, oldest first; NotFoundError where it is unknown."""
        found = self.stored(name)
        if not found:
            self._directory.find(name)
        return found

    def restore(self, name: str, tag: str, version: int | None) -> SnapshotInfo:
        """Roll a hosted optimizer back to a snapshot, as a new incarnation; host it again where it is not hosted now.

        With neither tag nor version: the newest. The rollback is itself saved before this returns, so that a crash does not
        undo it. A snapshot of another lineage of that name may be restored where class and layout are the same.

        NotFoundError, StorageError, MismatchError or LayoutMismatchError: nothing has changed. StorageError with ``applied``
        YES: it was rolled back, but that could not be saved.
        """
        with _storage():
            snapshot = self._store.load(name, tag=tag or None, version=version)
        owner = self._directory.get(name)
        owner = self._host_again(snapshot) if owner is None else self._roll_back(owner, snapshot)
        reply = owner.ask(ev.TakeDump, ev.DumpReply, _DUMP_SECONDS)
        self._write_restored(owner, reply.dump)
        log_event(
            _LOGGER, logging.INFO, "restored", name=name, version=snapshot.info.version, tag=snapshot.info.tag,
            incarnation=reply.dump.incarnation,
        )  # fmt: skip
        return replace(snapshot.info, lineage=reply.dump.lineage, incarnation=reply.dump.incarnation)

    def _roll_back(self, owner: Owner, snapshot: Snapshot) -> Owner:
        dump = decode_dump(snapshot)
        if dump.optimizer != owner.hosted.identity.optimizer:
            raise MismatchError(
                f"{owner.name!r} hosts {owner.hosted.identity.optimizer}; the snapshot of version {dump.version} is of "
                f"{dump.optimizer}. Remove the hosted optimizer first, and restore the snapshot then"
            )
        owner.ask(lambda ticket: ev.Restore(ticket, dump), ev.DoneReply, _DUMP_SECONDS)
        return owner

    def _host_again(self, snapshot: Snapshot) -> Owner:
        info = snapshot.info
        if self._directory.draining:
            raise DrainingError("the server is shutting down; restore the snapshot when it is back")
        with _storage():
            lives = [other.incarnation for other in self._store.list(info.name) if other.lineage == info.lineage]
        incarnation = 1 + max(*lives, info.incarnation, self._removed.incarnation(info.lineage))
        dump = decode_dump(snapshot)
        # Whoever was a member then has been told that it is gone, or will attach anew. What someone restored on purpose stays.
        members = [replace(member, live=False) for member in dump.members]
        owner = self._directory.adopt(replace(dump, incarnation=incarnation, members=members, ephemeral=False))
        self._directory.withhold(info.name, "")
        return owner

    def _write_restored(self, owner: Owner, dump: Dump) -> None:
        try:
            self._write(owner, dump, "")
            self._removed.discard(dump.lineage)
        except StorageError as error:
            raise StorageError(
                f"{owner.name!r} was rolled back to version {dump.version}, but that could not be saved, so a restart of the "
                f"server may bring back what was there before: {error}",
                applied=Applied.YES,
            ) from None

    def delete(self, name: str) -> int:
        """Remove all snapshots of a name that is not hosted; return how many there were."""
        with self._lock(name), _storage():
            count = self._store.delete(name)
            self._removed.forget(name)
        self._directory.withhold(name, "")
        return count

    def _write(self, owner: Owner, dump: Dump, tag: str) -> SnapshotInfo:
        manifest, tensors = encode_dump(dump)
        with self._lock(dump.name), _storage():
            if owner.ended and not owner.suspended:
                raise RemovedError(f"{dump.name!r} is no longer hosted here; its snapshot was not written")
            info = self._store.save(
                name=dump.name, version=dump.version, lineage=dump.lineage, incarnation=dump.incarnation,
                manifest=manifest, tensors=tensors, tag=tag or None, created_unix=time.time(), overwrite_tag=True,
            )  # fmt: skip
        log_event(
            _LOGGER, logging.INFO, "snapshot", name=info.name, version=info.version, tag=info.tag, bytes=info.nbytes
        )
        return info

    def _on_ending(self, owner: Owner) -> None:
        """Take note, on the owner's thread, that a hosted optimizer is not to come back at the next start."""
        identity = owner.hosted.identity
        if owner.suspended and not owner.hosted.abandoned:
            return
        with self._lock(owner.name), _storage():
            lineages = {info.lineage for info in self._store.list(owner.name)}
            if identity.lineage not in lineages:
                return
            if identity.ephemeral and len(lineages) == 1:
                self._store.delete(owner.name)
            else:
                self._removed.add(identity.lineage, Removed(owner.name, owner.hosted.incarnation))


def _standing(owner: Owner) -> Standing:
    return owner.hosted.incarnation, owner.hosted.version, owner.hosted.decisions.decided


@contextmanager
def _storage() -> Iterator[None]:
    """Turn the store's errors into farstep's."""
    try:
        yield
    except FarstepError:
        raise
    except SnapshotNotFoundError as error:
        raise NotFoundError(str(error)) from None
    except (StoreError, TypeError) as error:
        raise StorageError(str(error)) from None
    except OSError as error:
        raise StorageError(f"the data directory cannot be used: {error}") from None
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None
