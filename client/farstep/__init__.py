"""farstep: ``torch.optim`` as a service.

``optim``, ``lr_scheduler``, ``remote_optimizer`` and ``LocalSGD`` are imported when they are first used, since they bring
torch with them and the command ``farstep`` has no need of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from farstep.config import Remote, Retry, Timeouts
from farstep_wire import __version__, errors
from farstep_wire.errors import FarstepError
from farstep_wire.policy import Async, Sync
from farstep_wire.settings import Settings
from farstep_wire.wire_format import Wire

if TYPE_CHECKING:
    from farstep import lr_scheduler, optim
    from farstep.local_sgd import LocalSGD
    from farstep.optim import remote_optimizer

__all__ = [
    "Async",
    "FarstepError",
    "LocalSGD",
    "Remote",
    "Retry",
    "Settings",
    "Sync",
    "Timeouts",
    "Wire",
    "__version__",
    "errors",
    "lr_scheduler",
    "optim",
    "remote_optimizer",
]


def __getattr__(name: str) -> Any:
    if name in {"optim", "lr_scheduler"}:
        return import_module(f"farstep.{name}")
    if name == "remote_optimizer":
        return import_module("farstep.optim").remote_optimizer
    if name == "LocalSGD":
        return import_module("farstep.local_sgd").LocalSGD
    raise AttributeError(f"module 'farstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
