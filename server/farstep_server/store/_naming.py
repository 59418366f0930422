"""Which directory is whose: from names, versions and tags to file names, and back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME_BYTES = 255
"""A hosted optimizer's name, in UTF-8."""

TEMPORARY = ".tmp-"
"""What begins so is not a snapshot, and is swept away if its maker is gone."""

_TAG = re.compile(r"[A-Za-z0-9._-]{1,100}")
_FOLDER = re.compile(r"(?:[a-z0-9][a-z0-9._-]*-)?[0-9a-f]{64}")
_SNAPSHOT = re.compile(r"(?P<sequence>[0-9]{10,})-v(?P<version>[0-9]+)(?:-t-(?P<tag>[A-Za-z0-9._-]{1,100}))?")
_EXCERPT_CHARACTERS = 40


@dataclass(frozen=True)
class Entry:
    """A directory that bears the name of a snapshot; whether it is complete is another question."""

    sequence: int
    version: int
    tag: str | None
    path: Path

    def describe(self) -> str:
        """Return its version and tag in words."""
        return f"version {self.version}" + (f" ({self.tag!r})" if self.tag is not None else "")


def check_name(name: object) -> None:
    """ValueError or TypeError unless it can be the name of a hosted optimizer: text of 1 to 255 bytes in UTF-8."""
    if not isinstance(name, str):
        raise TypeError(f"a hosted optimizer's name is a str, not {name!r}")
    try:
        nbytes = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the name {name!r} is no valid Unicode text") from None
    if not 1 <= nbytes <= NAME_BYTES:
        raise ValueError(f"a hosted optimizer's name has 1 to {NAME_BYTES} bytes in UTF-8; {name!r} has {nbytes}")


def check_tag(tag: object) -> None:
    """ValueError or TypeError unless it can be a tag, or is None."""
    if tag is None:
        return
    if not isinstance(tag, str):
        raise TypeError(f"a tag is a str or None, not {tag!r}")
    if not _TAG.fullmatch(tag):
        raise ValueError(f"a tag has 1 to 100 letters (A to Z, a to z), digits, '.', '_' and '-'; not {tag!r}")


def folder_name(name: str) -> str:
    """Return the directory name of a hosted optimizer: an excerpt for people and the SHA-256 that identifies it."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    excerpt = re.sub(r"[^a-z0-9._-]+", "_", name[:_EXCERPT_CHARACTERS].lower()).strip("._-")
    return f"{excerpt}-{digest}" if excerpt else digest


def is_folder_name(name: str) -> bool:
    """Whether a directory name is one that `folder_name` gives."""
    return _FOLDER.fullmatch(name) is not None


def entry_in(folder: Path, sequence: int, version: int, tag: str | None) -> Entry:
    """Return a snapshot's entry in a folder. Its sequence number makes it unique, so tags may differ in case alone."""
    name = f"{sequence:010d}-v{version}" + (f"-t-{tag}" if tag is not None else "")
    return Entry(sequence, version, tag, folder / name)


def parse_entry(path: Path) -> Entry | None:
    """Return what a directory's name says, or None where it is not a snapshot's."""
    match = _SNAPSHOT.fullmatch(path.name)
    if match is None:
        return None
    return Entry(int(match["sequence"]), int(match["version"]), match["tag"], path)


def entries_in(folder: Path) -> list[Entry]:
    """Return the snapshots in a folder, oldest first; none where there is no folder."""
    found = [entry for path in directories_in(folder) if (entry := parse_entry(path)) is not None]
    return sorted(found, key=lambda entry: entry.sequence)


def directories_in(parent: Path) -> Iterator[Path]:
    """Yield the directories in a directory, links excluded; none where it is gone."""
    try:
        children = list(parent.iterdir())
    except FileNotFoundError:
        return
    for child in children:
        if child.is_dir() and not child.is_symlink():
            yield child
