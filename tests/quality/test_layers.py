"""The layer rules in pyproject.toml bite: each is broken on purpose in a copy of the packages, and must be reported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("proto/farstep_wire", "client/farstep", "server/farstep_server")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages and their rules."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    # Not by the script, which takes the packages from where they are installed.
    roots = [str((tree / package).parent) for package in PACKAGES]
    source = f"import sys; sys.path[:0] = {roots!r}; from importlinter.cli import lint_imports_command as c; c()"
    command = [sys.executable, "-c", source, "--no-cache"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def test_the_tree_as_it_is_keeps_the_rules(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("client/farstep/intruder.py", "import farstep_server"),
        ("client/farstep/intruder.py", "import grpc"),
        ("client/farstep/intruder.py", "import pickle"),
        ("server/farstep_server/intruder.py", "import farstep"),
        ("server/farstep_server/intruder.py", "import grpc"),
        ("server/farstep_server/core/intruder.py", "import asyncio"),
        ("server/farstep_server/core/intruder.py", "import farstep_server.service"),
        ("server/farstep_server/core/intruder.py", "import grpc"),
        ("server/farstep_server/core/intruder.py", "import pathlib"),
        ("server/farstep_server/core/intruder.py", "import time"),
        ("server/farstep_server/core/intruder.py", "from farstep_wire.v1 import common_pb2"),
        ("server/farstep_server/core/intruder.py", "from google.protobuf import message"),
        ("proto/farstep_wire/intruder.py", "import farstep"),
        ("proto/farstep_wire/intruder.py", "import grpc"),
    ],
)
def test_a_forbidden_import_is_reported(tree: Path, module: str, statement: str) -> None:
    (tree / module).write_text(f'"""Breaks a rule."""\n\n{statement}\n')
    done = lint(tree)
    assert done.returncode == 1, done.stdout
    assert "intruder" in done.stdout
