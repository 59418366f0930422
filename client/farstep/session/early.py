"""Gradients on their way to the server while ``backward`` goes on.

A hook on each parameter notices its gradient as autograd finishes it, and gradients are sent in buckets. Nothing of that is
final: ``step`` looks which of them are still what was sent, by identity and by torch's version counter, and sends the others
again, as it sends those of which nothing was sent. So clipping, accumulation and a second backward cost the time that was won,
and never the bits. Where that happens in several steps in a row nothing is sent early any more. Not seen is what torch does not
count: a gradient changed through ``.data`` after its backward.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from farstep.session.link import Link
from farstep_wire.frames import Body, padded
from farstep_wire.layout import Layout, TensorSpec
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import memory

_LOGGER = logging.getLogger("farstep")
BUCKET_BYTES = 1024 * 1024
_FUTILE_STEPS = 3

_Mark = tuple["weakref.ref[Tensor]", int, int]
"""What was sent: the gradient, its version then, and the stream that took it."""


class EarlyGradients:
    """The gradients of one session's next contribution that have been sent.

    ``link``: returns the link, where it may be used for that just now. ``produced``: is told of each parameter's gradient.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        layout: Layout,
        link: Callable[[], Link | None],
        produced: Callable[[int], None],
        bucket_bytes: int,
    ) -> None:
        self._tensors = list(tensors)
        self._layout = layout
        self._link = link
        self._produced = produced
        self._bucket_bytes = bucket_bytes
        self._waiting: list[tuple[int, Tensor]] = []
        self._waiting_bytes = 0
        self._marks: dict[int, _Mark] = {}
        self._paused = 0
        self._futile = 0
        self._hooks: list[Any] = []
        own = weakref.ref(self)
        for number, tensor in enumerate(self._tensors):
            if tensor.requires_grad and tensor.is_leaf:
                register: Any = tensor.register_post_accumulate_grad_hook
                self._hooks.append(register(_teller(own, number)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Send nothing early meanwhile."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def close(self) -> None:
        """Send nothing early any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def notice(self, number: int) -> None:
        """A parameter's gradient is finished."""
        self._produced(number)
        gradient = self._tensors[number].grad
        if (
            self._paused
            or self._futile == _FUTILE_STEPS
            or gradient is None
            or not _fits(gradient, self._layout.specs[number])
        ):
            return
        self._waiting.append((number, gradient))
        self._waiting_bytes += gradient.nbytes
        if self._waiting_bytes >= self._bucket_bytes:
            link = self._link()
            if link is not None and link.open:
                self._send(link, self._take_waiting())
            else:
                self._take_waiting()

    def complete(self, link: Link, gradients: Sequence[Tensor | None]) -> bool:
        """Send what is missing of a contribution on the link's stream; False, with nothing sent, where nothing was before."""
        self._take_waiting()
        if not self._marks:
            return False
        missing = [
            (number, gradient)
            for number, gradient in enumerate(gradients)
            if gradient is not None and not self._is_there(number, gradient, link.streams)
        ]
        if len(missing) == sum(gradient is not None for gradient in gradients):
            self._in_vain(link)
            return False
        self._futile = 0
        bucket: list[tuple[int, Tensor]] = []
        for item in missing:
            bucket.append(item)
            if sum(gradient.nbytes for _, gradient in bucket) >= self._bucket_bytes:
                self._send(link, bucket)
                bucket = []
        if bucket:
            self._send(link, bucket)
        return True

    def _in_vain(self, link: Link) -> None:
        if any(stream != link.streams for _, _, stream in self._marks.values()):
            return
        self._futile += 1
        if self._futile == _FUTILE_STEPS:
            _LOGGER.warning(
                "farstep: gradients are changed between backward and step (clipped, say), so that sending them during backward "
                "is in vain; they are sent by step from now on. Settings(clip_grad_norm=...) clips on the server"
            )

    def settled(self) -> None:
        """The contribution is over; what comes now is another one's."""
        self._marks.clear()
        self._take_waiting()

    def _is_there(self, number: int, gradient: Tensor, stream: int) -> bool:
        mark = self._marks.get(number)
        return mark is not None and mark[0]() is gradient and mark[1:] == (gradient._version, stream)

    def _take_waiting(self) -> list[tuple[int, Tensor]]:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        return list(dict(waiting).items())

    def _send(self, link: Link, items: Sequence[tuple[int, Tensor]]) -> None:
        for number, gradient in items:
            # Before the bytes are read: a change meanwhile is one since.
            self._marks[number] = weakref.ref(gradient), gradient._version, link.streams
        segments = [memory(gradient, self._layout.specs[number].nbytes) for number, gradient in items]
        frame = pb.ClientFrame(stage=pb.Stage(parameters=[number for number, _ in items]))
        link.send(frame, _KeptBody(segments, items))


class _KeptBody(Body):
    """Gradients as they lie, kept alive until they are sent."""

    def __init__(self, segments: Sequence[memoryview], owners: object) -> None:
        super().__init__(padded(segments))
        self._owners = owners


def _teller(early: weakref.ref[EarlyGradients], number: int) -> Any:
    def tell(_: Tensor) -> None:
        alive = early()
        if alive is not None:
            alive.notice(number)

    return tell


def _fits(gradient: Tensor, spec: TensorSpec) -> bool:
    return (
        gradient.layout is torch.strided
        and gradient.is_cpu
        and gradient.dtype == spec.dtype
        and gradient.shape == spec.shape
        and gradient.stride() == spec.strides
        and spec.is_dense
        and not (gradient.is_conj() or gradient.is_neg())
    )
