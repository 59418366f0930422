"""What a proxy last fetched, so that loading it back unchanged can be told from a restore."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farstep_wire.layout import TensorSpec
from farstep_wire.values import dense_cpu, memory


@dataclass(frozen=True)
class FetchedState:
    """Version and digest of a fetched state."""

    incarnation: int
    version: int
    digest: bytes

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, Any]], incarnation: int, version: int) -> FetchedState:
        """Describe fetched state."""
        return cls(incarnation, version, state_digest(pairs))


def state_digest(pairs: Sequence[tuple[Any, Any]]) -> bytes:
    """Return a digest of optimizer state: every key, value and bit of it."""
    digest = hashlib.blake2b(digest_size=16)
    for key, entries in sorted(pairs, key=lambda pair: repr(pair[0])):
        _add(digest, key)
        _add(digest, entries)
    return digest.digest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    if isinstance(value, Tensor) and value.layout is torch.sparse_coo:
        _add(digest, ("sparse", tuple(value.shape), value._indices(), value._values()))
    elif isinstance(value, Tensor):
        plain = dense_cpu(value)
        spec = TensorSpec.of(plain)
        digest.update(str(spec).encode())
        digest.update(memory(plain, spec.nbytes))
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _add(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
