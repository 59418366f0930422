"""farstep: ``torch.optim`` as a service.

``optim``, ``remote_optimizer`` and ``LocalSGD`` are imported when they are first used, since they bring torch with
them and the command ``farstep`` has no need of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from farstep.config import Remote, Retry, Timeouts
from farstep_wire import __version__, errors
from farstep_wire.errors import FarstepError
from farstep_wire.policy import Async, Sync

if TYPE_CHECKING:
    from farstep import optim
    from farstep.local_sgd import LocalSGD
    from farstep.optim import remote_optimizer

__all__ = [
    "Async",
    "FarstepError",
    "LocalSGD",
    "Remote",
    "Retry",
    "Sync",
    "Timeouts",
    "__version__",
    "errors",
    "optim",
    "remote_optimizer",
]


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module("farstep.optim")
    if name == "remote_optimizer":
        return import_module("farstep.optim").remote_optimizer
    if name == "LocalSGD":
        return import_module("farstep.local_sgd").LocalSGD
    raise AttributeError(f"module 'farstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
