"""Parameters that are the server's pages until something is written to them on this side.

The parameters' arena is mapped a second time, privately, and the parameters lie in that mapping: so a step brings the new
parameters without a copy. The server promises to write only while this worker waits for its reply; before a write at another
time it moves on, and leaves these pages as they are.

All that lasts as long as the connection. When it ends, or the process is about to fork, the pages are made copies, and stay
where they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from farstep.transports.private import PrivateParameters
from farstep_wire.layout import Layout
from farstep_wire.shared_memory import PrivateSegment

_COMPLETE_SECONDS = 5.0
"""How long a step of the server's that is under way may take to end, before what lies here is taken for a mixture."""


class View(PrivateParameters):
    """Parameters in a private mapping of the server's arena. SharedMemoryError: they cannot lie there."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout, segment: PrivateSegment) -> None:
        super().__init__(tensors, layout, segment)
        self._changes = -1

    def enter(self) -> bool:
        """Have the parameters, which hold what the server has, lie in its pages; False where theirs are not theirs alone."""
        self._changes = int(self._segment.changes)
        return super().enter()

    @property
    def whole(self) -> bool:
        """Whether the pages that are the server's are of the version that was taken over last."""
        return self._changes == int(self._segment.changes)

    def settle(self, changes: int) -> bool:
        """Take over the server's parameters; False where they are not those after that many changes."""
        if int(self._segment.changes) != changes or bool(self._segment.left):
            return False
        self._changes = changes
        self.show()
        return True

    def received(self) -> None:
        """The parameters hold what the server has, which came another way."""
        if not bool(self._segment.left):
            self._changes = int(self._segment.changes)
            self.show()

    def keep(self) -> None:
        """Make every page a copy; those of a step that is under way when it is complete."""
        if self.inside:
            until = time.monotonic() + _COMPLETE_SECONDS
            while (
                not self.whole
                and int(self._segment.complete) != int(self._segment.changes)
                and time.monotonic() < until
            ):
                time.sleep(0.001)
        super().keep()

    def leave(self) -> None:
        """Keep the parameters as they are; what the server does from now on is not seen any more."""
        self.keep()
        self.inside = False
