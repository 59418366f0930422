"""Which lineages were removed although snapshots of them remain, so that a restart does not bring them back.

One small JSON file beside the snapshots, replaced as a whole::

    {"format": 1, "removed": {LINEAGE: {"name": …, "incarnation": …}, …}}
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from farstep_wire.errors import StorageError

FILE_NAME = "removed.json"
_FORMAT = 1


@dataclass(frozen=True)
class Removed:
    """A removed lineage: whose it was, and the incarnation it had reached."""

    name: str
    incarnation: int


class RemovedLineages:
    """The file. Its methods may be called from any thread; what they change is durable when they return.

    StorageError: the file cannot be read, is damaged, or cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FILE_NAME
        self._lock = threading.Lock()
        self._removed = self._read()

    def __contains__(self, lineage: str) -> bool:
        with self._lock:
            return lineage in self._removed

    def incarnation(self, lineage: str) -> int:
        """Return the incarnation that a removed lineage had reached; 0 where it was not removed."""
        with self._lock:
            removed = self._removed.get(lineage)
            return 0 if removed is None else removed.incarnation

    def add(self, lineage: str, removed: Removed) -> None:
        """Note a removal."""
        with self._lock:
            self._write({**self._removed, lineage: removed})

    def discard(self, lineage: str) -> None:
        """Forget a removal: the lineage is hosted again."""
        with self._lock:
            if lineage in self._removed:
                self._write({key: value for key, value in self._removed.items() if key != lineage})

    def forget(self, name: str) -> None:
        """Forget all removals of a name: its snapshots are gone too."""
        with self._lock:
            left = {key: value for key, value in self._removed.items() if value.name != name}
            if len(left) != len(self._removed):
                self._write(left)

    def _read(self) -> dict[str, Removed]:
        try:
            document = json.loads(self._path.read_bytes())
            if document["format"] != _FORMAT:
                raise ValueError(f"its format is {document['format']!r}, not {_FORMAT}")
            return {
                lineage: Removed(str(fields["name"]), int(fields["incarnation"]))
                for lineage, fields in document["removed"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise StorageError(
                f"{self._path} cannot be read: {error}. It says which of the optimizers with snapshots were removed; delete it "
                f"to have the newest snapshot of every one of them hosted again"
            ) from None

    def _write(self, removed: dict[str, Removed]) -> None:
        entries = {key: {"name": value.name, "incarnation": value.incarnation} for key, value in removed.items()}
        beside = self._path.with_name(f".{FILE_NAME}")
        try:
            with beside.open("w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT, "removed": entries}, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror}") from None
        self._removed = removed
