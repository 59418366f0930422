"""Models that average their gradients by themselves already: those wrapped in DistributedDataParallel."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from farstep_wire.errors import ConfigurationError
from farstep_wire.policy import Async, Policy, Sync

_LOGGER = logging.getLogger("farstep")


class ReplicaGuard:
    """Keeps gradients that replicas have averaged from being averaged again. It looks once, at the first step."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._known = False
        self._rank: int | None = None

    def only_takes(self, parameters: Sequence[Tensor]) -> bool:
        """Whether another worker contributes this one's gradients: it is a replica, and not of rank 0.

        ConfigurationError: replicas cannot go through ``Async`` and stay in step.
        """
        several = isinstance(self._policy, Async) or self._policy.workers > 1
        if several and not self._known:
            self._rank = replica_rank(parameters)
            if self._rank is not None:
                self._tell(self._rank)
            self._known = True
        return bool(self._rank)

    def _tell(self, rank: int) -> None:
        if not isinstance(self._policy, Sync):
            raise ConfigurationError(
                "the model is wrapped in DistributedDataParallel, whose replicas step together: use farstep.Sync, or drop "
                "the wrapper to have each worker step on its own under farstep.Async"
            )
        _LOGGER.warning(
            "farstep: the model is wrapped in DistributedDataParallel, which has averaged the gradients already: rank 0 "
            "contributes them, the other ranks take the parameters over (this is rank %s)", rank,
        )  # fmt: skip


def replica_rank(parameters: Sequence[Tensor]) -> int | None:
    """Return this process's rank among the replicas that DistributedDataParallel keeps of a model with these parameters.

    None where they are in no such model, or in one of a single replica. The wrapper leaves no mark on the parameters, and may
    come after the optimizer; so it is looked for among the objects of the process, where there is a process group at all.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    own = {id(parameter) for parameter in parameters}
    for candidate in gc.get_objects():
        # Not isinstance: it asks proxies of all kinds for their __class__, and some answer with work.
        if DistributedDataParallel not in type(candidate).__mro__:
            continue
        if any(id(parameter) in own for parameter in candidate.parameters()):
            group = candidate.process_group
            return dist.get_rank(group) if dist.get_world_size(group) > 1 else None
    return None
