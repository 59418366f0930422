"""Every ``torch.optim`` class, hosted remotely: the same names, the same arguments, and ``remote``.

The classes are those of the installed torch, whichever they are, and ConjugateGradient, which torch does not have. The
schedulers and helpers of ``torch.optim`` (``lr_scheduler``, ``swa_utils``) work on them as they are, and stand here too so
that ``from farstep import optim`` can replace ``from torch import optim``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from farstep.optim.proxy import RemoteOptimizer, proxy_class
from farstep_wire.algorithms.conjugate_gradient import ConjugateGradient as _ConjugateGradient

_DRIVE_CLOSURES = {"LBFGS", "ConjugateGradient"}


def remote_optimizer(cls: type[Optimizer], name: str | None = None) -> Any:
    """Return the farstep class over a third-party optimizer class.

    The server must have the class registered under the name (by default the class's own): ``farstep-server --optimizer
    package.module:Class``. A class whose ``step`` calls its closure more than once says so by a class attribute
    ``farstep_drives_closure = True``.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)) or cls is Optimizer:
        raise TypeError(f"remote_optimizer takes a subclass of torch.optim.Optimizer, not {cls!r}")
    if issubclass(cls, RemoteOptimizer):
        return cls
    return proxy_class(cls, name or cls.__name__, drives_closure=bool(getattr(cls, "farstep_drives_closure", False)))


def _torch_classes() -> dict[str, type[Optimizer]]:
    return {
        name: cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


_classes = {
    name: proxy_class(cls, name, drives_closure=name in _DRIVE_CLOSURES)
    for name, cls in {**_torch_classes(), "ConjugateGradient": _ConjugateGradient}.items()
}
# Whatever else torch.optim exports is torch's own.
_rest = {name: getattr(torch.optim, name) for name in torch.optim.__all__ if name not in _classes}
globals().update(_classes, **_rest)

__all__ = ["remote_optimizer"]
__all__ += list(_classes)
__all__ += list(_rest)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module 'farstep.optim' has no optimizer {name!r}; it has {', '.join(sorted(_classes))}")
