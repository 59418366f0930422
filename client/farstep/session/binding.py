"""Between a model's tensors and the arenas: layouts from parameters, bytes out of gradients, bytes into parameters.

A dense CPU tensor is read and written where it lies. Everything else (another device, strides other than those of the
layout) goes through a CPU tensor in the layout's own strides, one copy more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farstep.session.changes import ChangedSink, write_rows
from farstep.session.edits import EditDetector
from farstep.session.feedback import Feedback
from farstep.session.narrow import NarrowGradients, Piece, narrow_sink
from farstep.transports.base import Lane
from farstep.transports.mirror import Mirror
from farstep.transports.private import PrivateParameters
from farstep.transports.views import View
from farstep_wire.frames import EMPTY, Body, BytesSource, ScatterSink, Sink
from farstep_wire.layout import (
    GradientForm,
    GradientPlan,
    Layout,
    ParameterSpec,
    SparseForm,
    TensorSpec,
    align,
    plan_gradients,
)
from farstep_wire.shared_memory import SharedMemoryError
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import memory
from farstep_wire.wire_format import EXACT, Wire

_PADDING = memoryview(bytes(64))
_MIRRORED_BYTES = 1024 * 1024
"""Smaller parameters are compared in no time."""


def parameter_keys(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return the parameters' keys: their names where given, else "GROUP.INDEX"."""
    keys: list[str] = []
    for number, group in enumerate(groups):
        names = group.get("param_names")
        keys.extend(str(names[i]) if names else f"{number}.{i}" for i in range(len(group["params"])))
    return keys


def layout_of(groups: Sequence[dict[str, Any]], known: Sequence[Tensor] = ()) -> Layout:
    """Return the layout of param groups as they stand; ``known`` are parameters that earlier groups hold."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    shared = _shared_storages([*known, *tensors])[len(known) :]
    keys = iter(parameter_keys(groups))
    parameters = []
    index = 0
    for number, group in enumerate(groups):
        for tensor in group["params"]:
            storage, offset = shared[index]
            spec = TensorSpec.of(tensor)
            parameters.append(ParameterSpec(next(keys), spec if storage else spec.densified(), number, storage, offset))
            index += 1
    return Layout(tuple(parameters), tuple(len(group["params"]) for group in groups))


def _shared_storages(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return, for each tensor whose memory overlaps another's, a number for their storage and its place in it."""
    result = [(0, 0)] * len(tensors)
    spans: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for index, tensor in enumerate(tensors):
        nbytes = TensorSpec.of(tensor).nbytes
        if nbytes:
            storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
            spans.setdefault(storage, []).append((tensor.data_ptr(), tensor.data_ptr() + nbytes, index))
    number = 0
    for entries in spans.values():
        for cluster in _overlapping(sorted(entries)):
            number += 1
            start = cluster[0][0]
            for begin, _, index in cluster:
                result[index] = (number, (begin - start) // tensors[index].element_size())
    return result


def _overlapping(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    clusters: list[list[tuple[int, int, int]]] = []
    end = -1
    for span in spans:
        if span[0] < end:
            clusters[-1].append(span)
        else:
            clusters.append([span])
        end = max(end, span[1])
    return [cluster for cluster in clusters if len(cluster) > 1]


class _Place:
    """Where one parameter is read and written: its own memory, or a staging tensor."""

    __slots__ = ("direct", "memory", "owner", "staging")

    def __init__(self, tensor: Tensor, spec: TensorSpec) -> None:
        # Kept alive, so that no other tensor can come to lie there unnoticed.
        self.owner = tensor.detach()
        self.direct = tensor.device.type == "cpu" and tensor.stride() == spec.strides and spec.is_dense
        self.staging = None if self.direct else _staging(spec)
        own = tensor if self.staging is None else self.staging
        self.memory = memory(own, spec.nbytes)


def _staging(spec: TensorSpec) -> Tensor:
    return spec.view(torch.zeros(max(spec.nbytes, 1), dtype=torch.uint8), 0)


@dataclass(frozen=True)
class Load:
    """What a contribution brings, whichever way it takes.

    ``whole`` makes the bytes of all of it. ``dense``: the gradients as CPU tensors with the layout's strides, None where one is
    no such; ``rest``: the bytes of what does not go with them.
    """

    forms: dict[int, GradientForm] = field(default_factory=dict)
    whole: Callable[[], BytesSource] | None = None
    dense: Sequence[Tensor | None] | None = None
    rest: BytesSource = EMPTY

    def through(self, lane: Lane | None) -> tuple[bool, BytesSource]:
        """Lay the gradients into a lane, where they can go there; return whether it is used, and the bytes of the message."""
        if self.whole is None:
            return lane is not None, self.rest
        if lane is None or self.dense is None or not lane.put(self.dense):
            return False, self.whole()
        return True, self.rest


class Binding:
    """The parameters of a proxy optimizer, bound to a layout. ``feedback``: of the session, where gradients are compressed."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        layout: Layout,
        *,
        detect_edits: bool,
        wire: Wire = EXACT,
        feedback: Feedback | None = None,
    ) -> None:
        self.layout = layout
        self._wire = wire
        self._feedback = feedback
        narrow = wire.gradients is not None and not wire.compresses
        self._narrow = NarrowGradients(str(wire.gradients)) if narrow else None
        self.tensors = list(tensors)
        self.adopted = False
        """Whether the parameters are the server's own, so that nothing is received, and no edit is one of this side alone."""
        self.view: View | None = None
        """The view of the server's parameters in which these lie, or lay until the connection ended."""
        self._mirror: Mirror | None = None
        self._mirrors = detect_edits and layout.arena.nbytes >= _MIRRORED_BYTES
        self._edits = EditDetector(self.tensors, compare_bits=detect_edits)
        self._places: list[_Place] = []
        self._pointers: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._strided = [tensor for tensor in self.tensors if tensor.dim() > 1]
        self._staged: list[tuple[Tensor, Tensor]] = []
        self._sink: Sink | None = None
        self._changed: ChangedSink | None = None
        self._gradient_memory: list[tuple[int, memoryview] | None] = [None] * len(self.tensors)
        self._order = [
            (index, spec.nbytes, _PADDING[: align(spec.nbytes) - spec.nbytes] if spec.nbytes % 64 else None)
            for _, index, spec in sorted(
                (offset, index, layout.specs[index]) for index, offset in enumerate(layout.gradients.offsets)
            )
        ]

    def check(self) -> None:
        """TypeError where a parameter has changed shape or dtype since the layout was made."""
        for tensor, parameter in zip(self.tensors, self.layout.parameters, strict=True):
            spec = parameter.spec
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise TypeError(
                    f"parameter {parameter.key!r} was {spec} when the optimizer was built and is "
                    f"{TensorSpec.of(tensor)} now: convert the model first, then build the optimizer"
                )

    def _look(self) -> None:
        """Find out where the parameters lie, if that has changed since the last look."""
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        strides = [tensor.stride() for tensor in self._strided]
        if pointers == self._pointers and strides == self._strides and self._places:
            return
        self.check()
        self._places = [_Place(tensor, spec) for tensor, spec in zip(self.tensors, self.layout.specs, strict=True)]
        self._pointers, self._strides = pointers, strides
        self._staged = [
            (tensor, place.staging)
            for tensor, place in zip(self.tensors, self._places, strict=True)
            if place.staging is not None and self._mirror is None
        ]
        self._sink = self._new_sink()
        self._edits.look_at([place.memory if place.direct else None for place in self._places])

    def _new_sink(self) -> Sink:
        if self._wire.parameters is None:
            return ScatterSink(zip(self.layout.arena.offsets, self._memories(), strict=True))
        tensors = [place.owner if place.staging is None else place.staging for place in self._places]
        if self._mirror is not None:
            tensors = self._mirror.arena
        return narrow_sink(self.layout, tensors, str(self._wire.parameters))

    def _memories(self) -> list[memoryview]:
        """Return where each parameter's bytes are received."""
        if self._mirror is None:
            return [place.memory for place in self._places]
        return [memory(own, spec.nbytes) for own, spec in zip(self._mirror.arena, self.layout.specs, strict=True)]

    @property
    def _private(self) -> PrivateParameters | None:
        return self._mirror if self.view is None else self.view

    # Out.

    def contents(self) -> Body:
        """Return all parameters as the bytes of their arena."""
        arena = torch.zeros(self.layout.arena.nbytes, dtype=torch.uint8)
        for view, tensor in zip(self.layout.views(arena), self.tensors, strict=True):
            view.copy_(tensor.detach())
        return _KeptBody([memory(arena, arena.numel())], [arena])

    def remember(self, but: Sequence[int] = ()) -> None:
        """The server has the parameters as they stand, all but some that were changed on this side."""
        self._look()
        if self.view is not None:
            return
        if self._mirror is None:
            self._edits.remember(but)
        else:
            self._mirror.remember(but)

    def restore(self, contents: Sequence[Tensor], edited: Sequence[int]) -> None:
        """Set the parameters back to what they were, some of them being edited then."""
        with torch.no_grad():
            for tensor, content in zip(self.tensors, contents, strict=True):
                tensor.copy_(content)
        self.remember(but=edited)

    def edited_again(self, contents: Mapping[int, Tensor]) -> None:
        """Parameters that were edited on this side still are, wherever they have moved."""
        with torch.no_grad():
            for number, content in contents.items():
                self.tensors[number].copy_(content)
        self.remember(but=list(contents))

    def edited_contents(self, edited: Sequence[int]) -> Body:
        """Return the bytes of a contribution that has no gradients but some edited parameters."""
        plan = plan_gradients(self.layout, {}, edited, no_gradients=True)
        return self._planned_body(plan, [[] for _ in self.tensors])

    @property
    def adoptable(self) -> bool:
        """Whether the parameters could lie in the server's memory as they are."""
        self._look()
        return all(place.direct for place in self._places)

    def edited(self) -> list[int]:
        """Return the parameters that were changed on this side since they were last received."""
        if self.adopted:
            return []
        self._look()
        private = self._private
        return self._edits.changed() if private is None else private.edited()

    def undisturbed(self) -> AbstractContextManager[None]:
        """Until this ends none but this package runs; see PrivateParameters."""
        private = self._private
        return nullcontext() if private is None else private.undisturbed()

    def load(self, edited: Sequence[int] = ()) -> Load:
        """Return the gradients and the edited parameters as a contribution brings them.

        TypeError: a gradient has another dtype or shape than its parameter.
        """
        forms: dict[int, GradientForm] = {}
        tensors: list[list[Tensor]] = []
        for index, tensor in enumerate(self.tensors):
            gradient = tensor.grad
            if gradient is None:
                forms[index] = None
                tensors.append([])
            elif gradient.is_sparse:
                forms[index], parts = self._sparse(index, gradient)
                tensors.append(parts)
            else:
                tensors.append([self._dense(index, gradient, forms)])
        if self._feedback is not None:
            return self._compressed(self._feedback, forms, edited, tensors)
        return Load(
            forms,
            lambda: self._body(forms, edited, tensors),
            None if any(form is not None for form in forms.values()) else [own[0] if own else None for own in tensors],
            self.edited_contents(edited) if edited else EMPTY,
        )

    def _body(self, forms: dict[int, GradientForm], edited: Sequence[int], tensors: list[list[Tensor]]) -> BytesSource:
        if self._narrow is None and not forms and not edited:
            return self._plain_body(tensors)
        plan = plan_gradients(self.layout, forms, edited)
        if self._narrow is None:
            return self._planned_body(plan, tensors)
        return self._narrow.body(plan, self._pieces(plan, tensors))

    def _compressed(
        self,
        feedback: Feedback,
        forms: dict[int, GradientForm],
        edited: Sequence[int],
        tensors: list[list[Tensor]],
    ) -> Load:
        forms, plan, head = feedback.encode(self.layout, forms, tensors, edited)
        rest = [piece for piece in self._pieces(plan.plan, tensors) if piece[0] >= 4 * plan.elements]
        segments = [memory(head, head.numel()), *_padded(rest)]
        return Load(forms, lambda: _KeptBody(segments, (head, rest)))

    def _dense(self, index: int, gradient: Tensor, forms: dict[int, GradientForm]) -> Tensor:
        spec = self.layout.specs[index]
        if gradient.dtype != spec.dtype or gradient.shape != spec.shape:
            self.check()
            key = self.layout.parameters[index].key
            raise TypeError(f"the gradient of {key!r} is {TensorSpec.of(gradient)}, the parameter is {spec}")
        lazy = gradient.is_conj() or gradient.is_neg()
        if gradient.stride() == spec.strides and gradient.is_cpu and spec.is_dense and not lazy:
            return gradient
        plain = gradient.detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        if plain.device.type != "cpu":
            plain = plain.cpu()
        if plain.stride() == spec.strides and spec.is_dense:
            return plain
        own = TensorSpec.of(plain)
        if not own.is_dense:
            plain = torch.empty_like(plain).copy_(plain)
            own = TensorSpec.of(plain)
        forms[index] = own
        return plain

    def _sparse(self, index: int, gradient: Tensor) -> tuple[SparseForm, list[Tensor]]:
        spec = self.layout.specs[index]
        if gradient.dtype != spec.dtype or gradient.shape != spec.shape:
            key = self.layout.parameters[index].key
            raise TypeError(f"the sparse gradient of {key!r} is {gradient.dtype} {list(gradient.shape)}, not {spec}")
        indices = gradient._indices().cpu().contiguous()
        values = gradient._values().detach().cpu().contiguous()
        return SparseForm(values.shape[0], gradient.sparse_dim(), gradient.is_coalesced()), [indices, values]

    def _plain_body(self, tensors: list[list[Tensor]]) -> Body:
        segments: list[memoryview | bytes] = []
        for index, nbytes, padding in self._order:
            gradient = tensors[index][0]
            pointer = gradient.data_ptr()
            known = self._gradient_memory[index]
            if known is None or known[0] != pointer:
                known = self._gradient_memory[index] = (pointer, memory(gradient, nbytes))
            segments.append(known[1])
            if padding is not None:
                segments.append(padding)
        return _KeptBody(segments, tensors)

    def _planned_body(self, plan: GradientPlan, tensors: list[list[Tensor]]) -> Body:
        pieces = self._pieces(plan, tensors)
        return _KeptBody(_padded(pieces), pieces)

    def _pieces(self, plan: GradientPlan, tensors: list[list[Tensor]]) -> list[Piece]:
        """Return what a plan has, in the order of its bytes."""
        pieces = [
            (offset, spec, tensor)
            for placed, own in zip(plan.pieces, tensors, strict=True)
            for (spec, offset), tensor in zip(placed, own, strict=True)
        ]
        for index, spec, offset in plan.edited:
            copy = torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype)
            pieces.append((offset, spec, copy.copy_(self.tensors[index].detach())))
        return sorted(pieces, key=lambda piece: piece[0])

    # In.

    def sink(self) -> Sink:
        """Return where the bytes of a parameter arena go. ``received`` must follow once all of them have come."""
        self._look()
        assert self._sink is not None, "made by the look"
        return self._sink

    def received(self) -> None:
        """Finish what the sink began: move staged parameters to theirs, and let autograd know of the change."""
        if self._staged:
            with torch.no_grad():
                for tensor, staging in self._staged:
                    tensor.copy_(staging)
        self.expect()
        self.settle()

    def takes_changes(self, but: Sequence[int]) -> bool:
        """Whether the parameters, if they were what the server has, still are, ``but`` for those that were edited."""
        own_memory = not self.adopted and self.view is None
        if not own_memory or self._wire.parameters is not None:
            return False
        return self._mirror is not None or self._edits.untouched(but)

    def changed_sink(self, changed: pb.Changed, total_bytes: int) -> Sink:
        """Return where the bytes of what has changed go; ``received_changed`` must follow. InternalError: see ChangedSink."""
        self._look()
        self._changed = ChangedSink(changed, total_bytes, self.layout, self._memories())
        return self._changed

    def received_changed(self) -> None:
        """Finish what ``changed_sink`` began."""
        changed, self._changed = self._changed, None
        assert changed is not None, "begun"
        for number in changed.whole:
            staging = self._places[number].staging
            if staging is not None and self._mirror is None:
                with torch.no_grad():
                    self.tensors[number].copy_(staging)
        places = self.tensors if self._mirror is None else self._mirror.arena
        rows = {
            number: (write_rows(places[number], index, values), values)
            for number, (index, values) in changed.rows.items()
        }
        torch.autograd.graph.increment_version([self.tensors[number] for number in (*changed.whole, *rows)])
        if self._mirror is None:
            self._edits.remember_changes(changed.whole, rows)
        else:
            self._mirror.show()

    @property
    def may_come_late(self) -> bool:
        """Whether each parameter's bytes go straight to where it lies, so that it is there as soon as they are."""
        self._look()
        displaced = self._mirror is not None and self._mirror.displaced
        return self._wire.parameters is None and not self._staged and not displaced

    def expect(self) -> None:
        """Have the parameters be what is received, and let autograd know of the change."""
        if self._mirror is not None:
            self._mirror.show()
        self.announce()

    def announce(self) -> None:
        """Let autograd know of the change, before a forward reads what it changes to."""
        torch.autograd.graph.increment_version(self.tensors)

    def settle(self) -> None:
        """Take the parameters as they are for what the server has."""
        if not self.adopted and self._private is None:
            self._edits.remember()

    def enter(self, view: View) -> None:
        """Have the parameters lie in a view, where nothing else refers to their memory; they hold what the server has."""
        self._forget_places()
        if view.enter():
            self._mirrors = self._mirrors or self._mirror is not None
            self.view, self._mirror = view, None

    def mirror(self) -> None:
        """Have large parameters lie in a mirror, where that can be; they hold what the server has."""
        wanted, self._mirrors = self._mirrors, False
        if not wanted or not self.adoptable:
            return
        try:
            mirror = Mirror(self.tensors, self.layout)
        except SharedMemoryError:
            return
        self._forget_places()
        if mirror.enter():
            self._mirror = mirror

    def _forget_places(self) -> None:
        self._places, self._staged, self._sink = [], [], None
        self._edits.look_at([None] * len(self.tensors))


def _padded(pieces: Sequence[Piece]) -> list[memoryview | bytes]:
    segments: list[memoryview | bytes] = []
    for _, spec, tensor in pieces:
        segments.append(memory(tensor, spec.nbytes))
        segments.append(_PADDING[: align(spec.nbytes) - spec.nbytes])
    return segments


class _KeptBody(Body):
    """A body that keeps the owners of its memory alive."""

    def __init__(self, segments: list[memoryview | bytes], owners: object) -> None:
        super().__init__(segments)
        self._owners = owners
