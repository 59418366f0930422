"""farstep: ``torch.optim`` as a service."""

from farstep import optim
from farstep.config import Remote, Retry, Timeouts
from farstep.optim import remote_optimizer
from farstep_wire import __version__, errors
from farstep_wire.errors import FarstepError
from farstep_wire.policy import Async, Sync

__all__ = [
    "Async",
    "FarstepError",
    "Remote",
    "Retry",
    "Sync",
    "Timeouts",
    "__version__",
    "errors",
    "optim",
    "remote_optimizer",
]
