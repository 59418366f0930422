"""Parameters that come in messages, beside which what the server has is kept, at no cost.

They lie in a private mapping of memory of this process's own, and what comes in is written to that memory: they have it at
once. Memory of the parameters' size, and a copy, there is of those pages alone that the user writes to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farstep.transports.private import PrivateParameters
from farstep_wire.layout import Layout
from farstep_wire.shared_memory import private_segment


class Mirror(PrivateParameters):
    """Parameters in a private mapping of what was received. SharedMemoryError: they cannot lie there."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout) -> None:
        super().__init__(tensors, layout, private_segment(layout.arena.nbytes))
        self._known: set[int] = set()

    def _leave_behind(self, number: int) -> None:
        # One by one, so that there is never memory for all of them twice.
        self.arena[number].copy_(self._tensors[number])

    def edited(self) -> list[int]:
        """Return the parameters that are not what the server has."""
        return sorted({*super().edited(), *self._known})

    def show(self) -> None:
        """Have the parameters be as they were received."""
        super().show()
        self._known.clear()

    def remember(self, but: Sequence[int] = ()) -> None:
        """The server has the parameters as they stand, all but some that were changed on this side."""
        with torch.no_grad():
            contents = [
                tensor.detach().clone() if number in but else None for number, tensor in enumerate(self._tensors)
            ]
            for number, content in enumerate(contents):
                if content is None:
                    self.arena[number].copy_(self._tensors[number])
            self.show()
            for number, content in enumerate(contents):
                if content is not None:
                    self._tensors[number].copy_(content)
        self._known.update(but)
