"""The outer optimizer of a LocalSGD: how it is built, and what it is given for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farstep import optim
from farstep.config import Remote
from farstep.optim.proxy import RemoteOptimizer

OPTION = "sync_every"
"""The option of the hosted param groups."""

OuterFactory = Callable[..., Optimizer]
"""Called with (param groups, remote=...), as the classes of ``farstep.optim`` can be; returns one of them."""


def diloco(groups: list[dict[str, Any]], *, remote: str | Remote | None = None) -> Optimizer:
    """Return DiLoCo's outer optimizer."""
    made: Optimizer = optim.SGD(groups, lr=0.7, momentum=0.9, nesterov=True, remote=remote)
    return made


def outer_group(group: dict[str, Any], sync_every: int) -> dict[str, Any]:
    """Return a param group of copies in CPU memory, under the same names, for the outer optimizer."""
    copies = [parameter.detach().clone().cpu() for parameter in group["params"]]
    names = group.get("param_names")
    return {"params": list(zip(names, copies, strict=True)) if names else copies, OPTION: sync_every}


def build_outer(outer: OuterFactory, groups: list[dict[str, Any]], remote: str | Remote | None) -> RemoteOptimizer:
    """Have the outer optimizer built over the groups; TypeError or ValueError where it is not one, or not over these."""
    wanted = [len(group["params"]) for group in groups]
    built = outer(groups, remote=remote)
    if not isinstance(built, RemoteOptimizer):
        raise TypeError(f"outer must return an optimizer of farstep.optim, not {built!r}")
    try:
        if built._farstep_drives_closure:
            raise TypeError(
                f"outer: {type(built).__name__} evaluates a closure of its own, and a pseudo-gradient has none; "
                f"SGD, or Adam, are outer optimizers"
            )
        sizes = [len(group["params"]) for group in built.param_groups if OPTION in group]
        if sizes != wanted:
            raise ValueError(
                f"outer must build its optimizer over the groups that it is given, options included: they have {wanted} "
                f"parameters; its own that came of them have {sizes}"
            )
    except BaseException:
        built.remote.close()
        raise
    return built


def pseudo_gradient(parameter: Tensor, outer: Tensor) -> Tensor | None:
    """Return how far the parameter is from its outer one; None for one that is frozen and was left alone."""
    own = parameter.to(outer.device)
    if not parameter.requires_grad and torch.equal(own, outer):
        return None
    return outer - own
