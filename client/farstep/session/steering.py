"""What a session asks its server beside the stream, and the schedules that it has declared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from farstep.config import Remote
from farstep.inspection import Server, connect
from farstep_wire.address import Address
from farstep_wire.errors import DeadlineError, UnavailableError
from farstep_wire.v1.steering_pb2 import DeclareScheduleRequest
from farstep_wire.values import to_map

Result = TypeVar("Result")


def ask_again(address: Address, remote: Remote, act: Callable[[Server], Result]) -> Result:
    """Ask a server; again where the connection breaks, until it should be back. Only for what may be asked twice."""
    pause, begun = remote.retry.first, time.monotonic()
    deadline = begun + remote.timeouts.seconds("step")
    last = min(deadline, begun + remote.timeouts.seconds("reconnect"))
    while True:
        try:
            with connect(address, deadline - time.monotonic()) as server:
                return act(server)
        except UnavailableError as error:
            if isinstance(error, DeadlineError) or time.monotonic() + pause >= last:
                raise
        time.sleep(pause)
        pause = min(2 * pause, remote.retry.longest)


class Declared:
    """The schedules that a session has declared, in order; a hosted optimizer that is created anew gets them again."""

    def __init__(self) -> None:
        self._requests: list[DeclareScheduleRequest] = []
        self._new: DeclareScheduleRequest | None = None

    def __iter__(self) -> Iterator[DeclareScheduleRequest]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def new(
        self, scheduler: str, arguments: Mapping[str, Any], parts: Sequence[int], every: int
    ) -> DeclareScheduleRequest:
        """Return the request for the next schedule; TypeError where an argument cannot travel."""
        number, values = len(self._requests), to_map(arguments, scheduler)
        self._new = DeclareScheduleRequest(
            number=number, scheduler=scheduler, arguments=values, parts=parts, every=every
        )
        return self._new

    def confirm(self) -> None:
        """Keep the new one: the server has it."""
        assert self._new is not None, "made before"
        self._requests.append(self._new)
