"""torch's default dtype, for steps of clients that have set another.

Some optimizers give their scalar state (step counts, products of coefficients) torch's default dtype, so a client under
``torch.set_default_dtype(torch.float64)`` expects float64 there. The default is one for the whole process; steps that want
different ones therefore take turns, while any number that want the same run side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_changed = threading.Condition()
_users = 0


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Run the block under that default dtype; wait while blocks under another run. Must not be nested."""
    global _users  # noqa: PLW0603 - as global as what it guards
    with _changed:
        _changed.wait_for(lambda: _users == 0 or torch.get_default_dtype() == dtype)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        _users += 1
    try:
        yield
    finally:
        with _changed:
            _users -= 1
            if _users == 0:
                _changed.notify_all()
