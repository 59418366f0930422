"""torch's default dtype, for steps of clients that have set another.

Some optimizers give their scalar state (step counts, products of coefficients) torch's default dtype, so a client under
``torch.set_default_dtype(torch.float64)`` expects float64 there. The default is one for the whole process; steps that want
different ones therefore take turns, while any number that want the same run side by side.
"""

from __future__ import annotations

import threading

import torch

_changed = threading.Condition()
_users = 0


class default_dtype:  # noqa: N801 - used like a function, and once per step: a generator would cost more
    """Runs a block under that default dtype; waits while blocks under another run. Must not be nested."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        global _users  # noqa: PLW0603 - as global as what it guards
        with _changed:
            while torch.get_default_dtype() != self._dtype:
                if _users == 0:
                    torch.set_default_dtype(self._dtype)
                else:
                    _changed.wait()
            _users += 1

    def __exit__(self, *exception: object) -> None:
        global _users  # noqa: PLW0603 - as above
        with _changed:
            _users -= 1
            if _users == 0:
                _changed.notify_all()
