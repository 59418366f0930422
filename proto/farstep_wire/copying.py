"""Copies of large pieces of memory that let Python's other threads run meanwhile; a memoryview's own copies do not."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

_LARGE_BYTES = 64 * 1024
"""Below it a copy is over sooner than a thread would be woken."""

_new_bytes: Any = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_ssize_t]
_address_of: Any = ctypes.pythonapi.PyBytes_AsString
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, [ctypes.py_object]


def copy_bytes(target: memoryview, source: memoryview | bytes) -> None:
    """Copy bytes to a place of the same size."""
    if len(source) < _LARGE_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def join_bytes(pieces: Sequence[memoryview | bytes]) -> bytes:
    """Return the pieces one after another."""
    total = sum(map(len, pieces))
    if total < _LARGE_BYTES:
        return b"".join(pieces)
    # Nobody else has seen it yet: until then the C API allows that it is written.
    result: bytes = _new_bytes(None, total)
    memory = memoryview((ctypes.c_char * total).from_address(_address_of(result))).cast("B")
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        copy_bytes(memory[start:end], piece)
    return result
