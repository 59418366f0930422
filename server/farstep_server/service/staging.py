"""Host buffers that a session receives contributions into.

For torch's own classes, which keep no gradient beyond its step, one is enough. For others two take turns: the gradients of the
step before stay readable in one while the next ones arrive in the other. A buffer is taken anew only when a larger one is
needed. Pages cost no memory until bytes have been received into them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farstep_wire.errors import ResourceExhaustedError
from farstep_wire.layout import Layout


class StagingBuffers:
    """The two buffers of one session."""

    def __init__(self, limit_bytes: int, *, pinned: bool) -> None:
        self._limit_bytes = limit_bytes
        self._pinned = pinned
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        self._views: list[tuple[Layout, list[Tensor | None]] | None] = [None, None]
        self._turn = 0

    def take(self, nbytes: int, *, keep_last: bool) -> Tensor:
        """Return a buffer of at least that size; ResourceExhaustedError past the server's limit.

        ``keep_last``: not the one that was taken last.
        """
        if keep_last:
            self._turn ^= 1
        if self._buffers[self._turn].numel() < nbytes:
            self._buffers[self._turn] = new_buffer(nbytes, self._limit_bytes, pinned=self._pinned)
            self._views[self._turn] = None
        return self._buffers[self._turn]

    def views(self, layout: Layout) -> list[Tensor | None]:
        """Return the gradients of the layout's dense plan in the buffer taken last; made once per buffer and layout."""
        known = self._views[self._turn]
        if known is None or known[0] is not layout:
            buffer = self._buffers[self._turn]
            pieces = zip(layout.specs, layout.gradients.offsets, strict=True)
            known = self._views[self._turn] = (layout, [spec.view(buffer, offset) for spec, offset in pieces])
        return known[1]


def new_buffer(nbytes: int, limit_bytes: int, *, pinned: bool = False) -> Tensor:
    """Return a new buffer; ResourceExhaustedError past the limit or where the machine has no room."""
    if nbytes > limit_bytes:
        raise ResourceExhaustedError(f"a request of {nbytes} bytes; the server's limit is {limit_bytes}")
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        raise ResourceExhaustedError(f"no memory for a request of {nbytes} bytes: {error}") from None
