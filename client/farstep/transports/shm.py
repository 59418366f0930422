"""The ``shm`` transport: gradients and parameters in memory that the worker and its server both see; gRPC carries the control.

Copies of a gradient on its way to the optimizer's step: one, in ``backward``, from the memory that autograd chose into the
shared segment, while it is still in the cache; none where it was accumulated there. Copies of the parameters on their way
back: one, into the parameters' own memory; none where they are adopted.

A gradient is moved to the segment only where nobody can tell: it came fresh from autograd, and nothing but the parameter
refers to its memory, or to the memory that it is moved to. Any other is copied when the step is made.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farstep.transports.base import Lane
from farstep_wire.frames import Sink
from farstep_wire.layout import Layout, TensorSpec
from farstep_wire.shared_memory import Segment, SegmentName, SharedMemoryError, open_segment
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import memory

# Python's references to a gradient that only its parameter has: the parameter's, the caller's variable, and the argument.
_ONLY_REFERENCES = 3


class SharedMemoryLane(Lane):
    """A session's segments, mapped. SharedMemoryError: they are not to be seen from here."""

    def __init__(self, shared: pb.Shared, tensors: Sequence[Tensor], layout: Layout, *, adopt: bool) -> None:
        expected = layout.arena.nbytes, layout.gradients.nbytes
        found = shared.parameters.content_bytes, shared.gradients.content_bytes
        if found != expected:
            raise SharedMemoryError(f"the server shares {found} bytes of parameters and gradients; {expected} are due")
        self._parameters = open_segment(_named(shared.parameters), writable=adopt)
        self._gradients = open_segment(_named(shared.gradients), writable=True)
        self._bytes = memory(self._parameters.content, self._parameters.nbytes)
        self._homes = Homes(tensors, layout, self._gradients)
        self._adopted = _Adopted(tensors, layout, self._parameters) if adopt else None
        self.proof = self._gradients.prove()

    @property
    def name(self) -> str:
        """The transport's name."""
        return "shm"

    def put(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy the gradients that do not lie in shared memory yet."""
        self._homes.fill(gradients)

    def take(self, changes: int, sink: Sink) -> bool:
        """Copy the parameters, where they are not adopted; see Lane."""
        if not self.adopted:
            sink.write(0, self._bytes)
        return int(self._parameters.changes) == changes

    def adopt(self) -> None:
        """Have the parameters lie in shared memory from now on; see Lane."""
        if self._adopted is not None and not self._adopted.inside:
            self._adopted.enter()

    @property
    def adopted(self) -> bool:
        """Whether the parameters lie in shared memory."""
        return self._adopted is not None and self._adopted.inside

    def close(self, *, settled: bool) -> None:
        """Give the segments up; see Lane. Parameters that lie there get memory of their own."""
        self._homes.leave(move_out=not settled)
        if self._adopted is not None:
            self._adopted.leave()


def _named(segment: pb.Segment) -> SegmentName:
    return SegmentName(segment.process, segment.descriptor, segment.content_bytes, segment.nonce)


class Homes:
    """A place in shared memory for each parameter's gradient, and the hooks that move it there as autograd produces it."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout, segment: Segment) -> None:
        self._tensors = list(tensors)
        self._strides = [spec.strides for spec in layout.specs]
        places = zip(layout.specs, layout.gradients.offsets, strict=True)
        self._homes = [_home(segment, spec, offset) for spec, offset in places]
        self._pointers = [home.data_ptr() for home in self._homes]
        self._hooks: list[Any] = []
        own = weakref.ref(self)
        for number, tensor in enumerate(self._tensors):
            if tensor.requires_grad and tensor.is_leaf and tensor.is_cpu:
                register: Any = tensor.register_post_accumulate_grad_hook
                self._hooks.append(register(_mover(own, number)))

    def move_in(self, number: int) -> None:
        """Move a fresh gradient to its place, where nobody can tell."""
        tensor, home = self._tensors[number], self._homes[number]
        gradient = tensor.grad
        if gradient is None or gradient is home or not _fits(gradient, home, self._strides[number]):
            return
        if sys.getrefcount(gradient) <= _ONLY_REFERENCES and _uses(gradient) == 1 and _uses(home) == 1:
            with torch.no_grad():
                home.copy_(gradient)
            tensor.grad = home

    def fill(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy to their places the gradients that do not lie there yet."""
        for gradient, home, pointer in zip(gradients, self._homes, self._pointers, strict=True):
            if gradient is not None and gradient.data_ptr() != pointer:
                home.copy_(gradient.detach())

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


def _home(segment: Segment, spec: TensorSpec, offset: int) -> Tensor:
    # With a storage of its own and no view of another tensor, so that it can be told whether anything else refers to it.
    flat = segment.tensor(spec.dtype, offset, spec.nbytes // spec.dtype.itemsize)
    return torch.empty(0, dtype=spec.dtype).set_(flat.untyped_storage(), 0, spec.shape, spec.strides)


def _mover(homes: weakref.ref[Homes], number: int) -> Any:
    def move(_: Tensor) -> None:
        alive = homes()
        if alive is not None:
            alive.move_in(number)

    return move


def _fits(gradient: Tensor, home: Tensor, strides: tuple[int, ...]) -> bool:
    return (
        gradient.layout is torch.strided
        and gradient.stride() == strides
        and gradient.dtype == home.dtype
        and gradient.is_cpu
        and not (gradient.requires_grad or gradient.is_conj() or gradient.is_neg())
    )


def _uses(tensor: Tensor) -> int:
    """Return how many tensors refer to the memory of one."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


class _Adopted:
    """Parameters that lie in shared memory instead of their own."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout, segment: Segment) -> None:
        self._tensors = list(tensors)
        self._views = layout.views(segment.content)
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
