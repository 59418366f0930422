"""Param groups that come after a session has attached.

``add_param_group`` is one way. Frameworks also assign ``param_groups`` outright, with the groups that there were and some
more (Lightning does when it resumes a run that unfroze a part of the model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from farstep.session.binding import Binding, layout_of
from farstep_wire.convert import layout_to_proto
from farstep_wire.errors import ConfigurationError
from farstep_wire.frames import Body
from farstep_wire.layout import Layout

Groups = list[dict[str, Any]]


def hold(groups: Groups, tensors: Sequence[Tensor], layout: Layout) -> bool:
    """Whether the groups hold these very tensors, grouped as in the layout. At every step, so in a microsecond or two."""
    held = [group["params"] for group in groups]
    return tuple(map(len, held)) == layout.group_sizes and all(map(is_, chain.from_iterable(held), tensors))


def check_only_added(groups: Groups, tensors: Sequence[Tensor], layout: Layout) -> None:
    """ConfigurationError unless the groups are those of the layout, and at most some more after them."""
    sizes = list(layout.group_sizes)
    if not hold(groups[: len(sizes)], tensors, layout):
        raise ConfigurationError(
            f"param_groups hold other parameters (groups of {[len(group['params']) for group in groups]}) than the server "
            f"hosts (groups of {sizes}): groups may be added; to exchange or remove parameters build a new optimizer (and "
            f"clear requires_grad to stop training some)"
        )


def group_layout(groups: Groups, known: Sequence[Tensor]) -> Layout:
    """Return the layout of the last of the groups by itself, the keys being those that it has among all of them.

    ConfigurationError: one of its parameters shares memory with a known one.
    """
    _refuse_shared(groups[-1]["params"], known)
    full = layout_of(groups)
    return Layout(tuple(replace(p, group=0) for p in full.parameters[len(known) :]), full.group_sizes[-1:])


def group_body(parameters: Sequence[Tensor], layout: Layout, options: dict[str, Any]) -> tuple[int, Body]:
    """Return the length of the encoded layout, and the body that has it and the parameters' contents."""
    header = layout_to_proto(layout, [options]).SerializeToString()
    contents = Binding(parameters, layout, detect_edits=False).contents()
    return len(header), Body([header, contents.join((), 0, contents.nbytes)])


def _refuse_shared(new: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    storages = {tensor.untyped_storage().data_ptr() for tensor in known if tensor.numel()}
    for tensor in new:
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            clash = layout_of([{"params": [*known, tensor]}])
            if clash.parameters[-1].storage:
                raise ConfigurationError(
                    "add_param_group: a parameter shares memory with one of an earlier group; give both to the constructor"
                )
