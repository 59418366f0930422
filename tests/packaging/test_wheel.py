"""The wheel holds the three import packages with their protos and type markers, and nothing else."""

from __future__ import annotations

import configparser
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "farstep_wire": ROOT / "proto/farstep_wire",
    "farstep": ROOT / "client/farstep",
    "farstep_server": ROOT / "server/farstep_server",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without a network and without touching the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def sources(package: Path) -> set[str]:
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_three_packages_as_they_lie_in_the_tree(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == set().union(*(sources(folder) for folder in PACKAGES.values()))


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_in_the_wheel_is_typed(wheel: zipfile.ZipFile, name: str) -> None:
    assert f"{name}/py.typed" in wheel.namelist()


def test_wheel_holds_the_protos_and_their_stubs(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    protos = [name for name in held if name.endswith(".proto")]
    assert protos
    for proto in protos:
        stem = proto.removesuffix(".proto")
        assert {f"{stem}_pb2.py", f"{stem}_pb2.pyi"} <= held


def test_wheel_carries_the_license(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert "Apache License" in wheel.read(name).decode()


def test_each_command_names_a_function_that_is_there(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    commands = dict(entries["console_scripts"])
    assert sorted(commands) == ["farstep", "farstep-server"]
    for target in commands.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("package", ["farstep", "farstep_server"])
def test_commands_also_run_as_modules(package: str) -> None:
    """`python -m farstep` works where the scripts are not on the path; the embedded server is started so."""
    said = subprocess.run([sys.executable, "-m", package, "--help"], capture_output=True, text=True, check=True).stdout
    assert "usage" in said.lower()


def generated_for(pattern: str, glob: str) -> tuple[int, ...]:
    """The one version of a runtime that all stubs say they were generated for."""
    texts = [path.read_text() for path in (ROOT / "proto/farstep_wire/v1").glob(glob)]
    found = {match.group(1) for text in texts if (match := re.search(pattern, text))}
    assert len(found) == 1, f"stubs of several generators: {sorted(found)}"
    return tuple(int(part) for part in found.pop().split("."))


@pytest.mark.parametrize(
    ("distribution", "pattern", "glob"),
    [
        ("grpcio", r"GRPC_GENERATED_VERSION = '([\d.]+)'", "*_pb2_grpc.py"),
        ("protobuf", r"Protobuf Python Version: ([\d.]+)", "*_pb2.py"),
    ],
)
def test_stubs_run_on_the_oldest_runtime_that_is_admitted(distribution: str, pattern: str, glob: str) -> None:
    """Generated code refuses to be imported on a runtime older than its generator."""
    [requirement] = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == distribution]
    [floor] = [s.version for s in requirement.specifier if s.operator == ">="]
    assert generated_for(pattern, glob) <= tuple(int(part) for part in floor.split("."))
