"""Which of ``torch.optim.lr_scheduler``'s classes can live on a server: those that need numbers alone."""

from __future__ import annotations

import inspect
from functools import cache

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

NESTED = frozenset({"SequentialLR", "ChainedScheduler"})
"""Classes that are made of other schedulers."""

UNSERVED = {
    "LambdaLR": "it calls a function of yours, and functions do not travel",
    "MultiplicativeLR": "it calls a function of yours, and functions do not travel",
    "ReduceLROnPlateau": "it follows a metric that you measure, not the version",
}
"""Classes that stay with the worker, and why. Those of torch do their work there, since options travel with each step."""


@cache
def served_schedulers() -> dict[str, type[LRScheduler]]:
    """Return the classes that a server builds, by name."""
    return {
        name: cls
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls)
        and issubclass(cls, LRScheduler)
        and not name.startswith("_")
        and cls is not LRScheduler
        and name not in UNSERVED
    }
