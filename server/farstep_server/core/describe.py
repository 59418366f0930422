"""What a hosted optimizer says of itself: its description, its table of parameters with norms, and the dump of all it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from farstep_server.core.engine import Engine
from farstep_server.core.options import frozen_options
from farstep_server.core.records import Description, Dump, ParameterRow, StateRow
from farstep_wire.layout import dtype_name

if TYPE_CHECKING:
    from farstep_server.core.hosted import HostedOptimizer


def description(hosted: HostedOptimizer, waiting: set[str], now: float, *, parameters: bool) -> Description:
    """Describe a hosted optimizer; ``waiting`` are the workers whose part in the round is in."""
    identity, engine = hosted.identity, hosted.engine
    return Description(
        name=identity.name,
        optimizer=identity.optimizer,
        version=hosted.version,
        incarnation=hosted.incarnation,
        lineage=identity.lineage,
        policy=identity.policy,
        ephemeral=identity.ephemeral,
        device=str(engine.store.device),
        layout=engine.layout,
        arguments=identity.arguments,
        options=frozen_options(engine.optimizer),
        workers=hosted.members.rows(waiting, now),
        state_bytes=state_bytes(dict(engine.optimizer.state)),
        last_step_seconds=hosted.decisions.last_step_seconds,
        stale=hosted.stale,
        rows=parameter_rows(engine) if parameters else [],
        settings=hosted.pipeline.settings,
        schedules=hosted.pipeline.schedules.rows(),
        averaged=hosted.pipeline.averaged,
    )


def dump(hosted: HostedOptimizer) -> Dump:
    """Copy everything that makes a hosted optimizer what it is to the CPU."""
    identity, engine = hosted.identity, hosted.engine
    return Dump(
        name=identity.name,
        optimizer=identity.optimizer,
        arguments=identity.arguments,
        layout=engine.layout,
        options=frozen_options(engine.optimizer),
        policy=identity.policy,
        ephemeral=identity.ephemeral,
        lineage=identity.lineage,
        incarnation=hosted.incarnation,
        version=hosted.version,
        contents=engine.store.host().clone(),
        state=engine.read_state(),
        members=hosted.members.members(),
        started=hosted.decisions.started,
        scalar_dtype=dtype_name(engine.scalar_dtype),
        settings=hosted.pipeline.settings,
        schedules=hosted.pipeline.schedules.dump(),
        average=hosted.pipeline.dumped_average(),
        averaged=hosted.pipeline.averaged,
    )


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
    for number, (parameter, tensor) in enumerate(zip(engine.layout.parameters, engine.store.tensors, strict=True)):
        gradient = engine.gradient(number)
        steepness = None if gradient is None else norm(gradient)
        rows.append(ParameterRow(parameter, norm(tensor), steepness, _state_rows(engine.optimizer.state.get(tensor))))
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
