"""All or nothing: an undo copy of parameters, state and options around a step that may raise midway.

A copy of everything at every step would cost more than the step. A step is therefore guarded where it may fail: with state
that was loaded, when a closure drives it, and always for third-party classes. The first time that torch's own class meets
inputs of a kind (which gradients are absent or sparse; kinds of options) it is rehearsed, and guarded where that fails.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from farstep_server.core.options import frozen_options
from farstep_server.core.parameters import ParameterStore
from farstep_server.core.registry import OptimizerEntry

_SHARED_ATTRIBUTES = frozenset({"state", "param_groups", "defaults"})


class Undo:
    """What a hosted optimizer was before a step, and the way back."""

    def __init__(self, optimizer: Optimizer, store: ParameterStore, entry: OptimizerEntry) -> None:
        self._optimizer = optimizer
        self._store = store
        self._buffer = store.buffer.clone()
        self._options = frozen_options(optimizer)
        self._state = {key: _copy_state(value, entry) for key, value in optimizer.state.items()}
        self._attributes = {key: _copy(value) for key, value in vars(optimizer).items() if _is_plain(key, value)}

    def restore(self) -> None:
        """Put everything back."""
        self._store.write(self._buffer)
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(params=parameters, **options)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        vars(self._optimizer).update(self._attributes)


def _is_plain(key: str, value: object) -> bool:
    scalar = isinstance(value, (bool, int, float, complex, str, Tensor)) or value is None
    return scalar and key not in _SHARED_ATTRIBUTES


def _copy_state(value: Any, entry: OptimizerEntry) -> Any:
    if not isinstance(value, dict):
        return _copy(value)
    return {key: copy.copy(item) if key in entry.immutable_state else _copy(item) for key, item in value.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_copy(item) for item in value)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return copy.copy(value)
