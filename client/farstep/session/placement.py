"""Where an optimizer is to be hosted, by whom, and under which policy: the remote's word, or the launcher's."""

from __future__ import annotations

from dataclasses import replace

from farstep.config import Remote
from farstep.embedded import embedded_address
from farstep.launch import current_launch, run_name
from farstep_wire.address import Address, parse_address
from farstep_wire.policy import Policy, Sync


def policy_of(remote: Remote) -> Policy:
    """Return the policy: by default rounds of all processes of the launch."""
    return remote.policy if remote.policy is not None else Sync(workers=current_launch().world_size)


def worker_of(remote: Remote) -> str:
    """Return this worker's id: by default its rank."""
    return str(current_launch().rank) if remote.worker is None else str(remote.worker)


def locate(remote: Remote) -> tuple[Address, str, bool]:
    """Return the server's address, the hosted optimizer's name, and whether that was made up."""
    connect = remote.timeouts.connect
    address = remote.parsed()
    if address is None:
        address = parse_address(embedded_address(connect))  # type: ignore[arg-type]
    name = address.name or remote.name
    if name:
        return replace(address, name=None), name, False
    return replace(address, name=None), run_name(connect), True  # type: ignore[arg-type]
