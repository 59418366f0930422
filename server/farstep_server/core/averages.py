"""The exponential moving average of a hosted optimizer's parameters, as ``torch.optim.swa_utils`` keeps it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from farstep_server.core.parameters import ParameterStore


class ExponentialAverage:
    """The average, in an arena beside the parameters'. ``count``: the steps that it has taken in.

    Equal, bit for bit, to an ``AveragedModel`` with ``get_ema_multi_avg_fn(decay)`` that is updated after every step: the
    first update copies the parameters.
    """

    def __init__(self, store: ParameterStore, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self._store = store
        self._buffer = torch.empty_like(store.buffer)
        self._views = store.layout.views(self._buffer)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they stand."""
        parameters = [tensor.detach() for tensor in self._store.tensors]
        if self.count == 0:
            self._buffer.copy_(self._store.buffer)
        else:
            average: Any = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
            for kind in {tensor.dtype for tensor in parameters}:
                own = [view for view in self._views if view.dtype == kind]
                average(own, [tensor for tensor in parameters if tensor.dtype == kind], None)
        self.count += 1

    def contents(self) -> Tensor:
        """Return a copy of the average's bytes on the CPU, laid out as the parameters' arena."""
        copy = self._buffer.cpu()
        return copy.clone() if self._buffer.device.type == "cpu" else copy

    def restore(self, contents: Tensor, count: int) -> None:
        """Take over what ``contents`` gave."""
        self._buffer.copy_(contents)
        self.count = count

    def moved_to(self, store: ParameterStore) -> ExponentialAverage:
        """Return it for a store that has some parameters more, whose average begins where they begin."""
        moved = ExponentialAverage(store, self.decay)
        with torch.no_grad():
            for number, view in enumerate(moved._views):
                view.copy_(self._views[number] if number < len(self._views) else store.tensors[number])
        moved.count = self.count
        return moved
