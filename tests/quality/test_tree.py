"""What must hold of the tree as a whole, whatever the code in it does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {
    *("proto", "server", "client", "docker", "tests", "pyproject.toml", "README.md"),
    *("Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"),
}
# What stands directly in the folders that an editable install puts on sys.path.
IN_ROOTS = {"proto": {"farstep_wire"}, "client": {"farstep", "examples"}, "server": {"farstep_server"}}
# Paths and hosts of one machine or network, which mean nothing on another.
LOCAL = re.compile(
    r"(?<![\w.])/(?:work|opt|root|home)/"
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org|proxy\.golang\.org"
)


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    """The files that git tracks, relative to the top."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_holds_only_what_belongs_there(committed: list[Path]) -> None:
    found = {path.parts[0] for path in committed}
    assert {name for name in found - TOP_LEVEL if not name.startswith(".")} == set()


def test_the_top_level_lacks_nothing(committed: list[Path]) -> None:
    assert {path.parts[0] for path in committed} >= TOP_LEVEL | {".ci"}


@pytest.mark.parametrize("root", IN_ROOTS)
def test_the_import_roots_hold_packages_and_no_loose_modules(committed: list[Path], root: str) -> None:
    assert {path.parts[1] for path in committed if path.parts[0] == root} == IN_ROOTS[root]


def test_no_file_names_a_path_or_host_of_one_machine(committed: list[Path]) -> None:
    found = []
    for path in committed:
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {match.group()}" for match in LOCAL.finditer(text)]
    assert found == []


def test_make_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    said = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [target for target in phony.split() if not re.search(rf"^  {target}\s+\S", said, re.MULTILINE)] == []


def test_ci_runs_make_test_and_nothing_else() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test </dev/null"]
