"""Gradients that come before their contribution, while the worker's backward goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from farstep_server.core.gradients import Staged
from farstep_server.core.parameters import tensor_memory
from farstep_server.service.staging import StagingBuffers
from farstep_wire.frames import ScatterSink, Sink
from farstep_wire.layout import GradientForm, GradientPlan, Layout, align


class EarlyGradients:
    """What a session has received of its next contribution, each gradient at its place among dense ones."""

    def __init__(self, staging: StagingBuffers) -> None:
        self._staging = staging
        self._layout: Layout | None = None
        self._buffer: Tensor | None = None
        self._views: list[Tensor | None] = []
        self._there: set[int] = set()

    def sink(self, parameters: Sequence[int], nbytes: int, layout: Layout, *, keep_last: bool) -> Sink:
        """Return where the gradients of some parameters go; ValueError where they are none of the layout, or of another size.

        ``keep_last``: the gradients of the last contribution are still read.
        """
        offset = 0
        places = []
        for number in parameters:
            if not 0 <= number < len(layout.parameters):
                raise ValueError(f"parameter {number}; there are {len(layout.parameters)}")
            places.append((number, offset))
            offset += align(layout.specs[number].nbytes)
        if len(set(parameters)) != len(places):
            raise ValueError("a parameter stands twice among those whose gradients come")
        if nbytes != offset:
            raise ValueError(f"{nbytes} bytes are declared, the gradients of these parameters take {offset}")
        if self._buffer is None or self._layout is not layout:
            self.forget()
            self._layout = layout
            self._buffer = self._staging.take(layout.gradients.nbytes, keep_last=keep_last)
            self._views = self._staging.views(layout)
        bytes_of_all = tensor_memory(self._buffer)
        self._there.difference_update(parameters)
        starts = layout.gradients.offsets
        return ScatterSink(
            (offset, bytes_of_all[starts[number] : starts[number] + layout.specs[number].nbytes])
            for number, offset in places
        )

    def came(self, parameters: Sequence[int]) -> None:
        """All bytes of these are there."""
        self._there.update(parameters)

    def staged(self, layout: Layout, forms: Mapping[int, GradientForm], plan: GradientPlan, buffer: Tensor) -> Staged:
        """Return a contribution that has its gradients here, which are taken out; ValueError names one that has not come.

        ``buffer`` has what ``plan`` says comes with the contribution itself.
        """
        views: list[Tensor | None] = list(self._views) if self._layout is layout else []
        for number, form in forms.items():
            if form is not None:
                raise ValueError(f"the gradient of parameter {number} is {form}; only dense ones come early")
        for number, parameter in enumerate(layout.parameters):
            if number in forms:
                if views:
                    views[number] = None
            elif number not in self._there or not views:
                raise ValueError(f"the gradient of {parameter.key!r} is said to have come before, and has not")
        whole = self._buffer
        self.forget()
        return Staged(plan, buffer, views, None if whole is None else whole[: layout.gradients.nbytes], own=True)

    def forget(self) -> None:
        """Forget what has come."""
        self._layout, self._buffer, self._views = None, None, []
        self._there.clear()
