"""constraints.txt pins what pyproject.toml asks for, and what that asks for in turn."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def direct_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]


def test_every_direct_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in direct_requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement} leaves out the pin {version}"


def test_pins_are_public_versions() -> None:
    """A local version (torch's +cpu) would tie an install to one build."""
    assert [f"{name}=={version}" for name, version in pins().items() if "+" in version] == []


def test_what_the_pinned_packages_need_is_pinned_too() -> None:
    """Of what is installed here: what a direct requirement pulls in must not float.

    Except from torch, each build of which names exact versions of its own CUDA libraries or none.
    """
    pinned, missing = pins(), set()
    for name in pinned.keys() - {"torch"}:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        wanted = [Requirement(text) for text in needs]
        needed = {canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
        missing |= {need for need in needed - pinned.keys() if installed(need)}
    assert missing == set()


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
