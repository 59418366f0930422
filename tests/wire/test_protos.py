"""The protos read as their own documentation: everything has a comment, and every enum says what its zero means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROTOS = sorted((Path(__file__).parents[2] / "proto/farstep_wire/v1").glob("*.proto"))
DECLARATION = re.compile(
    r"^\s*(?:(?:message|enum|service|oneof|rpc)\s+\w+|(?:repeated\s+|optional\s+)?[\w.]+(?:<.*>)?\s+\w+\s*=\s*\d+\s*;"
    r"|[A-Z][A-Z0-9_]*\s*=\s*\d+\s*;|syntax\b)"
)
PLAIN = re.compile(r"^\s*(?:$|//|\}|package\b|import\b)")


def test_there_are_protos() -> None:
    assert [path.stem for path in PROTOS] == ["checkpoint", "common", "inspection", "link", "optimizer", "steering"]


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_everything_has_a_comment(path: Path) -> None:
    bare, unread = [], []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if DECLARATION.match(line):
            before = lines[number - 1].strip() if number else ""
            if not before.startswith("//") or len(before) < 6:
                bare.append(f"{path.name}:{number + 1}: {line.strip()}")
        elif not PLAIN.match(line):
            unread.append(f"{path.name}:{number + 1}: {line.strip()}")
    assert bare == []
    assert unread == [], "lines that this test cannot read"


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_enums_begin_unspecified(path: Path) -> None:
    for match in re.finditer(r"enum (\w+) \{(.*?)\}", path.read_text(), re.DOTALL):
        values = re.findall(r"^\s*([A-Z0-9_]+) = (\d+);", match[2], re.MULTILINE)
        assert values[0][0].endswith("_UNSPECIFIED"), match[1]
        assert [int(number) for _, number in values] == list(range(len(values)))


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_the_package_is_versioned(path: Path) -> None:
    text = path.read_text()
    assert 'syntax = "proto3";' in text
    assert "package farstep.v1;" in text
