"""Models that average their gradients by themselves already: those wrapped in DistributedDataParallel."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


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
