"""The optimizer classes that a server hosts, by registered name. A client can name one; it can never bring one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from farstep_wire.algorithms.conjugate_gradient import ConjugateGradient


@dataclass(frozen=True)
class OptimizerEntry:
    """A class that may be hosted.

    ``drives_closure``: its step calls the closure as often as it likes, so the server drives it. ``immutable_state`` names
    state entries whose tensors are replaced but never written to, so that an undo copy need not duplicate them.
    ``trusted``: one of torch's own, whose step raises, if at all, the first time it sees inputs of a kind.
    """

    cls: type[Optimizer]
    drives_closure: bool = False
    immutable_state: frozenset[str] = frozenset()
    trusted: bool = False


class Registry:
    """Registered names and what they stand for."""

    def __init__(self) -> None:
        self._entries: dict[str, OptimizerEntry] = dict(_builtin())

    def register(self, name: str, cls: type[Optimizer], *, drives_closure: bool = False) -> None:
        """Add a class; ValueError where it is no Optimizer or the name is taken."""
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise ValueError(f"{name!r} is {cls!r}, not a subclass of torch.optim.Optimizer")
        if name in self._entries:
            raise ValueError(f"the optimizer name {name!r} is taken by {self._entries[name].cls!r}")
        self._entries[name] = OptimizerEntry(cls, drives_closure=drives_closure)

    def get(self, name: str) -> OptimizerEntry | None:
        """Return the entry of that name, or None."""
        return self._entries.get(name)

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        return sorted(self._entries)


def _builtin() -> Iterator[tuple[str, OptimizerEntry]]:
    for name, cls in vars(torch.optim).items():
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer:
            if name == "LBFGS":
                history = frozenset({"old_dirs", "old_stps", "ro"})
                yield name, OptimizerEntry(cls, drives_closure=True, immutable_state=history, trusted=True)
            else:
                yield name, OptimizerEntry(cls, trusted=True)
    yield "ConjugateGradient", OptimizerEntry(ConjugateGradient, drives_closure=True, trusted=True)
