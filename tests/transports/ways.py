"""The ways that tensors can travel, each as the options of a Remote; all pass the same tests."""

from __future__ import annotations

from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "grpc": {"transport": "grpc"},
    "pipe": {"transport": "pipe"},
    "pg": {"transport": "pg"},
    "shm": {"transport": "shm"},
    "shm-adopted": {"transport": "shm", "adopt_parameters": True},
}


def transport_of(way: str) -> str:
    """Return the transport that ``opt.remote.transport`` must report."""
    return str(WAYS[way]["transport"])
