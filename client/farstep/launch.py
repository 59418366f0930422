"""What the launcher says about this process: its rank, how many there are, and the store that they share."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from farstep_wire.errors import ConfigurationError

_PROCESS_RUN = uuid4().hex[:12]
_POLL_SECONDS = 0.02
_optimizers = itertools.count()


@dataclass(frozen=True)
class Launch:
    """One process among ``world_size``; ``local_world_size`` of them are on this host."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    restart: str = "0"


def current_launch() -> Launch:
    """Read torchrun's variables; a process of its own where there are none."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Launch()
    try:
        world = int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return Launch(int(os.environ["RANK"]), world, local, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    except ValueError as error:
        raise ConfigurationError(f"$RANK, $WORLD_SIZE and $LOCAL_WORLD_SIZE must be integers: {error}") from None


def shared_store(timeout: timedelta) -> Store:
    """Return the store that torchrun, or an initialised process group, provides; ConfigurationError where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, timeout=timeout)
    if dist.is_available() and dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    raise ConfigurationError(
        "WORLD_SIZE is larger than 1, but there is no store in which the workers could find each other: start the script "
        "with torchrun, or give remote= or $FARSTEP_REMOTE with a name"
    )


def agree(key: str, launch: Launch, value: str | None, timeout: timedelta) -> str:
    """Return the value that rank 0 publishes under the key; rank 0 gives it, the others wait for it."""
    if launch.world_size == 1:
        assert value is not None, "a single process is rank 0"
        return value
    store = shared_store(timeout)
    full_key = f"farstep/{launch.restart}/{key}"
    if launch.rank == 0:
        assert value is not None, "rank 0 gives the value"
        store.set(full_key, value)
        return value
    # Not store.wait: it waits in C++, where a Ctrl-C would reach it only after the timeout.
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        while not store.check([full_key]):
            if time.monotonic() >= deadline:
                raise ConfigurationError(f"rank 0 published no {key} within {timeout}")
            time.sleep(_POLL_SECONDS)
        return bytes(store.get(full_key)).decode()
    except RuntimeError as error:
        raise ConfigurationError(f"the store in which rank 0 publishes its {key} failed: {error}") from error


def run_name(timeout: timedelta) -> str:
    """Return a name for the next optimizer of this process: the same on every worker of a run, and no other run's."""
    number = next(_optimizers)
    launch = current_launch()
    run = agree("run", launch, _PROCESS_RUN if launch.rank == 0 else None, timeout)
    return f"{run}/{number}"
