"""The ``shm`` transport: gradients and parameters in memory that the worker and its server both see; gRPC carries the control.

Copies of a gradient on its way to the optimizer's step: one, in ``backward``, from the memory that autograd chose into the
shared segment, while it is still in the cache; none where it was accumulated there. Copies of the parameters on their way
back: none where the parameters lie in a view of the server's arena or are adopted, else one, into their own memory.

A gradient is moved to the segment only where nobody can tell: it came fresh from autograd, and nothing but the parameter
refers to its memory. Any other is copied when the step is made. Memory of the segment that was a gradient, and that
somebody has kept, is not written again: while it is kept, gradients travel in messages.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farstep.transports.base import Lane
from farstep.transports.views import View
from farstep_wire.frames import Sink
from farstep_wire.layout import Layout, TensorSpec
from farstep_wire.shared_memory import PrivateSegment, Segment, SegmentName, SharedMemoryError, open_segment
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import memory, uses

# Python's references to a tensor that only a parameter or a list has: that, the caller's variable, and the argument.
_ONLY_REFERENCES = 3


class SharedMemoryLane(Lane):
    """A session's segments, mapped. SharedMemoryError: they are not to be seen from here."""

    def __init__(self, shared: pb.Shared, tensors: Sequence[Tensor], layout: Layout, *, adopt: bool) -> None:
        expected = layout.arena.nbytes, layout.gradients.nbytes
        found = shared.parameters.content_bytes, shared.gradients.content_bytes
        if found != expected:
            raise SharedMemoryError(f"the server shares {found} bytes of parameters and gradients; {expected} are due")
        self._parameters = open_segment(_named(shared.parameters), writable=adopt, private=shared.looks_on)
        self._gradients = open_segment(_named(shared.gradients), writable=True)
        self._bytes = memory(self._parameters.content, self._parameters.nbytes)
        self._homes = Homes(tensors, layout, self._gradients)
        self._adopted = _Adopted(tensors, layout, self._parameters) if adopt else None
        self._view = _view(tensors, layout, self._parameters)
        self.proof = self._gradients.prove()

    @property
    def name(self) -> str:
        """The transport's name."""
        return "shm"

    def put(self, gradients: Sequence[Tensor | None]) -> bool:
        """Copy the gradients that do not lie in shared memory yet; False where there is one whose memory somebody has kept."""
        return self._homes.fill(gradients)

    def take(self, changes: int, sink: Sink) -> bool:
        """Copy the parameters, where they are not adopted; see Lane."""
        if self._view is not None and self._view.inside:
            return self._view.settle(changes)
        if not self.adopted:
            sink.write(0, self._bytes)
        return int(self._parameters.changes) == changes

    def adopt(self) -> None:
        """Have the parameters lie in shared memory from now on; see Lane."""
        if self._adopted is not None and not self._adopted.inside:
            self._adopted.enter()

    @property
    def left(self) -> bool:
        """Whether the server has gone on in other memory; see Lane."""
        return bool(self._parameters.left)

    def let_go(self) -> None:
        """Have the parameters be their own; see Lane."""
        if self._view is not None:
            self._view.leave()

    @property
    def view(self) -> View | None:
        """The view of the server's parameters; see Lane."""
        return self._view

    @property
    def adopted(self) -> bool:
        """Whether the parameters lie in shared memory."""
        return self._adopted is not None and self._adopted.inside

    def close(self, *, settled: bool) -> None:
        """Give the segments up; see Lane. Parameters that lie there get memory of their own."""
        self.let_go()
        self._homes.leave(move_out=not settled)
        if self._adopted is not None:
            self._adopted.leave()


def _view(tensors: Sequence[Tensor], layout: Layout, segment: Segment) -> View | None:
    if not isinstance(segment, PrivateSegment):
        return None
    try:
        return View(tensors, layout, segment)
    except SharedMemoryError:
        return None


def _named(segment: pb.Segment) -> SegmentName:
    return SegmentName(segment.process, segment.descriptor, segment.content_bytes, segment.nonce)


class Homes:
    """A place in shared memory for each parameter's gradient, and the hooks that move it there as autograd produces it.

    A home is the tensor that a parameter gets as its gradient. It is then the user's, who may keep it, or give it other memory
    (``module.to`` does); the place stays.
    """

    def __init__(self, tensors: Sequence[Tensor], layout: Layout, segment: Segment) -> None:
        self._tensors = list(tensors)
        spots = list(zip(layout.specs, layout.gradients.offsets, strict=True))
        self._specs = layout.specs
        self._places = [spec.view(segment.content, offset) for spec, offset in spots]
        # With a storage of its own for each, so that it can be told whether anything else refers to it.
        self._storages = [segment.tensor(torch.uint8, offset, spec.nbytes).untyped_storage() for spec, offset in spots]
        self._homes = [_tensor_in(storage, spec) for storage, spec in zip(self._storages, self._specs, strict=True)]
        self._pointers = [place.data_ptr() for place in self._places]
        self._hooks: list[Any] = []
        own = weakref.ref(self)
        for number, tensor in enumerate(self._tensors):
            if tensor.requires_grad and tensor.is_leaf and tensor.is_cpu:
                register: Any = tensor.register_post_accumulate_grad_hook
                self._hooks.append(register(_mover(own, number)))

    def move_in(self, number: int) -> None:
        """Move a fresh gradient to its place, where nobody can tell."""
        tensor = self._tensors[number]
        gradient = tensor.grad
        if (
            gradient is None
            or not _fits(gradient, self._specs[number])
            or gradient.data_ptr() == self._pointers[number]
        ):
            return
        fresh = sys.getrefcount(gradient) <= _ONLY_REFERENCES and uses(gradient.untyped_storage()) == 1
        if fresh and self._is_free(number):
            if self._homes[number].data_ptr() != self._pointers[number]:
                self._homes[number] = _tensor_in(self._storages[number], self._specs[number])
            with torch.no_grad():
                tensor.grad = self._homes[number].copy_(gradient)

    def fill(self, gradients: Sequence[Tensor | None]) -> bool:
        """Copy to their places the gradients that do not lie there yet; False, with nothing done, where one is kept."""
        coming = [
            (number, gradient)
            for number, gradient in enumerate(gradients)
            if gradient is not None and gradient.data_ptr() != self._pointers[number]
        ]
        if not all(self._is_free(number) for number, _ in coming):
            return False
        for number, gradient in coming:
            self._places[number].copy_(gradient.detach())
        return True

    def _is_free(self, number: int) -> bool:
        """Whether nobody has kept what was a gradient in a place."""
        home = self._homes[number]
        inside = home.data_ptr() == self._pointers[number]
        kept = inside and sys.getrefcount(home) > _ONLY_REFERENCES
        return not kept and uses(self._storages[number]) == int(inside)

    def leave(self, *, move_out: bool) -> None:
        """Move no more gradients; ``move_out``: those that are here get memory of their own."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if move_out:
            for tensor, pointer in zip(self._tensors, self._pointers, strict=True):
                gradient = tensor.grad
                if gradient is not None and gradient.layout is torch.strided and gradient.data_ptr() == pointer:
                    tensor.grad = gradient.detach().clone()


def _tensor_in(storage: torch.UntypedStorage, spec: TensorSpec) -> Tensor:
    return torch.empty(0, dtype=spec.dtype).set_(storage, 0, spec.shape, spec.strides)


def _mover(homes: weakref.ref[Homes], number: int) -> Any:
    def move(_: Tensor) -> None:
        alive = homes()
        if alive is not None:
            alive.move_in(number)

    return move


def _fits(gradient: Tensor, spec: TensorSpec) -> bool:
    return (
        gradient.layout is torch.strided
        and gradient.stride() == spec.strides
        and gradient.dtype == spec.dtype
        and gradient.is_cpu
        and not (gradient.requires_grad or gradient.is_conj() or gradient.is_neg())
    )


class _Adopted:
    """Parameters that lie in shared memory instead of their own."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout, segment: Segment) -> None:
        self._tensors = list(tensors)
        self._views = [
            spec.view(segment.tensor(torch.uint8, offset, spec.nbytes), 0)
            for spec, offset in zip(layout.specs, layout.arena.offsets, strict=True)
        ]
        self.inside = False

    def enter(self) -> None:
        """Move in."""
        with torch.no_grad():
            for tensor, view in zip(self._tensors, self._views, strict=True):
                tensor.data = view
        self.inside = True

    def leave(self) -> None:
        """Move out, with what is there now."""
        if self.inside:
            self.inside = False
            for tensor in self._tensors:
                tensor.data = tensor.data.clone()
