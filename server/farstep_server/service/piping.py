"""A session's pipes, from the offer until the session goes on in them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from secrets import compare_digest

from farstep_server.service.sharing import check_directly
from farstep_wire.errors import ConfigurationError, InvalidRequestError
from farstep_wire.pipes import Check, OwnPipes, PipeError, Pipes
from farstep_wire.v1 import optimizer_pb2 as pb


class Piping:
    """The pipes of one session."""

    def __init__(self) -> None:
        self._offered: OwnPipes | None = None
        self._agreed: Pipes | None = None
        self._lock = threading.Lock()

    def offer(self, listening: Sequence[str], directly_at: str) -> pb.Piped:
        """Make pipes, and say where they are; ConfigurationError where there can be none."""
        self.withdraw()
        check_directly(listening, directly_at)
        try:
            own = self._offered = OwnPipes()
        except PipeError as error:
            raise ConfigurationError(str(error)) from None
        requests = pb.PipeName(descriptor=own.requests.descriptor, inode=own.requests.inode)
        replies = pb.PipeName(descriptor=own.replies.descriptor, inode=own.replies.inode)
        return pb.Piped(process=os.getpid(), requests=requests, replies=replies)

    def confirm(self, proof: bytes) -> None:
        """The client has opened them; InvalidRequestError where it has not."""
        if self._offered is None:
            raise InvalidRequestError("direct: a proof where no pipes were offered")
        if not compare_digest(self._offered.proof, proof):
            self.withdraw()
            raise InvalidRequestError("direct: the proof is not what stands in the pipe")
        with self._lock:
            self._agreed, self._offered = self._offered.hand_over(), None

    def take(self) -> Pipes | None:
        """Return the pipes that the session is to go on in, once."""
        with self._lock:
            agreed, self._agreed = self._agreed, None
        return agreed

    @property
    def agreed(self) -> bool:
        """Whether there are pipes to go on in."""
        return self._agreed is not None

    def withdraw(self) -> None:
        """Close what was offered and not taken."""
        with self._lock:
            offered, self._offered = self._offered, None
        if offered is not None:
            offered.close()
        agreed = self.take()
        if agreed is not None:
            agreed.close()


def messages(pipes: Pipes, check: Check) -> Iterator[bytes]:
    """Yield what comes until the other side ends."""
    try:
        while (data := pipes.read(check)) is not None:
            yield data
    except PipeError as error:
        raise InvalidRequestError(str(error)) from None
