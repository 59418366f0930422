"""Which parameters may come in late, and who waits for them.

A module's forward waits for the parameters that the module owns. That protects a parameter only if nobody reads it without
calling its module, as some modules do with those of their children. So each parameter is watched first: one that had a
gradient in an iteration in which its module's forward was called may come late from then on, and one that had a gradient
without that never may. ``step`` waits for all that may not. Without gradients being recorded, and for a state dict, a module
waits for everything.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LateParameters:
    """The parameters of one session, by number. ``await_some`` waits for those, ``await_all`` for all."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        modules: Sequence[nn.Module],
        await_some: Callable[[Iterable[int]], None],
        await_all: Callable[[], None],
    ) -> None:
        self._await_some = await_some
        self._await_all = await_all
        self._called: set[int] = set()
        self._never: set[int] = set()
        self._may: set[int] = set()
        self._all = frozenset(range(len(tensors)))
        self.must = self._all
        """The parameters that ``step`` waits for."""
        self._hooks: list[Any] = []
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        for module in _all_of(modules) if modules else _modules_of(numbers):
            owned = frozenset(numbers[id(p)] for p in module._parameters.values() if id(p) in numbers)
            self._hooks.append(module.register_forward_pre_hook(_BeforeForward(self, owned)))
            register: Any = module.register_state_dict_pre_hook
            self._hooks.append(register(_BeforeStateDict(self)))

    def produced(self, number: int) -> None:
        """A parameter has its gradient, so it was read in the forward before."""
        if number not in self._called:
            self._never.add(number)
            self._may.discard(number)
        elif number not in self._never:
            self._may.add(number)

    def begin(self) -> None:
        """A new iteration begins: parameters are about to come in."""
        self._called.clear()
        self.must = self._all - self._may

    def before_forward(self, owned: frozenset[int]) -> None:
        """A module is about to read its parameters."""
        self._called |= owned
        if not torch.is_grad_enabled():
            self._await_all()
        elif owned:
            self._await_some(owned)

    def before_state_dict(self) -> None:
        """A module's parameters are about to be read as a whole."""
        self._await_all()

    def close(self) -> None:
        """Nobody waits any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _all_of(roots: Sequence[nn.Module]) -> list[nn.Module]:
    seen: dict[int, nn.Module] = {}
    for root in roots:
        seen.update((id(module), module) for module in root.modules())
    return list(seen.values())


def _modules_of(numbers: dict[int, int]) -> list[nn.Module]:
    """Return the modules that own some of these parameters, wherever they are."""
    # By type: isinstance would ask proxy objects for their class, and wake what lies behind them.
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), nn.Module)
        and any(id(parameter) in numbers for parameter in thing.__dict__.get("_parameters", {}).values())
    ]


class _BeforeForward:
    def __init__(self, late: LateParameters, owned: frozenset[int]) -> None:
        self._late = weakref.ref(late)
        self._owned = owned

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        del module, arguments
        late = self._late()
        if late is not None:
            late.before_forward(self._owned)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody_waits, ()


class _BeforeStateDict:
    def __init__(self, late: LateParameters) -> None:
        self._late = weakref.ref(late)

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        del module, prefix, keep_vars
        late = self._late()
        if late is not None:
            late.before_state_dict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody_waits, ()


def _nobody_waits() -> Callable[..., None]:
    """Return the hook of a module's copy, whose parameters are its own."""
    return _do_nothing


def _do_nothing(*arguments: object) -> None:
    del arguments
