"""The table of parameters with norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farstep_server.core.engine import Engine
from farstep_server.core.events import ParameterRow, StateRow


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm, taken in float32 or better."""
    plain = tensor.detach()
    if plain.is_sparse:
        plain = plain.coalesce().values()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    if plain.dtype is not torch.float64:
        plain = plain.to(torch.float32)
    return float(torch.linalg.vector_norm(plain))


def parameter_rows(engine: Engine) -> list[ParameterRow]:
    """Return one row per parameter, in layout order."""
    rows = []
    for parameter, tensor in zip(engine.layout.parameters, engine.store.tensors, strict=True):
        gradient = None if tensor.grad is None else norm(tensor.grad)
        rows.append(ParameterRow(parameter, norm(tensor), gradient, _state_rows(engine.optimizer.state.get(tensor))))
    return rows


def _state_rows(entries: Any) -> list[StateRow]:
    if not isinstance(entries, dict):
        return []
    return [_state_row(str(name), value) for name, value in entries.items()]


def _state_row(name: str, value: Any) -> StateRow:
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return StateRow(name, value.item(), None)
        return StateRow(name, value, norm(value))
    if isinstance(value, (list, tuple)):
        return StateRow(name, f"{type(value).__name__} of {len(value)}", None)
    return StateRow(name, value, None)


def state_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a tree of state."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return state_bytes((value._indices(), value._values()))
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(state_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(state_bytes(item) for item in value)
    return 0
