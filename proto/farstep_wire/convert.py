"""Between the protos and the plain types: layouts, gradient forms, policies, failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from farstep_wire.errors import Applied, FarstepError, InternalError, error_for
from farstep_wire.layout import GradientForm, Layout, ParameterSpec, SparseForm, TensorSpec
from farstep_wire.limits import MAX_PARAMETERS
from farstep_wire.policy import Async, Policy, Sync
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.v1 import optimizer_pb2 as opb
from farstep_wire.values import from_map, spec_from_proto, spec_to_proto, to_map
from farstep_wire.wire_format import EXACT, Wire

_MILLISECOND = timedelta(milliseconds=1)
_LONGEST_TIMEOUT_MS = 366 * 24 * 3600 * 1000


def layout_to_proto(layout: Layout, options: Sequence[Mapping[str, object]]) -> pb.Layout:
    """Encode a layout with the options of its groups."""
    message = pb.Layout()
    parameters = iter(layout.parameters)
    for number, (size, group) in enumerate(zip(layout.group_sizes, options, strict=True)):
        encoded = message.groups.add(options=to_map(group, f"param_groups[{number}]"))
        for _ in range(size):
            parameter = next(parameters)
            encoded.parameters.add(
                key=parameter.key,
                spec=spec_to_proto(parameter.spec),
                storage=parameter.storage,
                storage_offset=parameter.storage_offset,
            )
    return message


def layout_from_proto(message: pb.Layout) -> tuple[Layout, list[dict[str, Any]]]:
    """Decode and check a layout and its groups' options; ValueError names the field."""
    count = sum(len(group.parameters) for group in message.groups)
    if count > MAX_PARAMETERS:
        raise ValueError(f"the layout has {count} parameters; at most {MAX_PARAMETERS} are possible")
    parameters = [
        _parameter_from_proto(parameter, number)
        for number, group in enumerate(message.groups)
        for parameter in group.parameters
    ]
    layout = Layout(tuple(parameters), tuple(len(group.parameters) for group in message.groups))
    return layout, [from_map(group.options, f"param_groups[{i}]") for i, group in enumerate(message.groups)]


def _parameter_from_proto(message: pb.Parameter, group: int) -> ParameterSpec:
    spec = spec_from_proto(message.spec, f"parameter {message.key!r}")
    if not message.storage and not spec.is_dense:
        raise ValueError(
            f"parameter {message.key!r}: strides {spec.strides} overlap or leave gaps in shape {list(spec.shape)}"
        )
    if message.storage_offset and not message.storage:
        raise ValueError(f"parameter {message.key!r} has storage_offset {message.storage_offset} but no storage")
    if message.storage_offset >= 2**60:
        raise ValueError(f"parameter {message.key!r} has storage_offset {message.storage_offset}, past any storage")
    return ParameterSpec(message.key, spec, group, message.storage, message.storage_offset)


def forms_to_proto(forms: Mapping[int, GradientForm]) -> list[opb.GradientForm]:
    """Encode the exceptions among gradients."""
    result = []
    for index, form in forms.items():
        if form is None:
            result.append(opb.GradientForm(parameter=index, absent=True))
        elif isinstance(form, TensorSpec):
            result.append(opb.GradientForm(parameter=index, strided=spec_to_proto(form)))
        else:
            sparse = opb.SparseForm(nnz=form.nnz, sparse_dims=form.sparse_dims, coalesced=form.coalesced)
            result.append(opb.GradientForm(parameter=index, sparse=sparse))
    return result


def forms_from_proto(messages: Iterable[opb.GradientForm], layout: Layout) -> dict[int, GradientForm]:
    """Decode the exceptions among gradients; ValueError names the field."""
    forms: dict[int, GradientForm] = {}
    for message in messages:
        index = message.parameter
        if index >= len(layout.parameters):
            raise ValueError(f"gradient of parameter {index}; the layout has {len(layout.parameters)}")
        if index in forms:
            raise ValueError(f"two gradients of parameter {index}")
        match message.WhichOneof("form"):
            case "absent":
                forms[index] = None
            case "strided":
                forms[index] = spec_from_proto(message.strided, f"gradient of {layout.parameters[index].key!r}")
            case "sparse":
                sparse = message.sparse
                forms[index] = SparseForm(sparse.nnz, sparse.sparse_dims, sparse.coalesced)
            case _:
                raise ValueError(f"the form of the gradient of parameter {index} is not set")
    return forms


def edited_from_proto(indices: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Check the indices of edited parameters."""
    for index in indices:
        if index >= len(layout.parameters):
            raise ValueError(f"edited parameter {index}; the layout has {len(layout.parameters)}")
    if len(set(indices)) != len(indices):
        raise ValueError("a parameter stands twice among the edited ones")
    return tuple(indices)


def edits_to_proto(edits: Mapping[int, tuple[Mapping[str, object], Sequence[str]]]) -> list[opb.GroupEdit]:
    """Encode edits of group options: by group, what is set and what is removed."""
    return [
        opb.GroupEdit(group=group, set=to_map(changed, f"param_groups[{group}]"), removed=removed)
        for group, (changed, removed) in edits.items()
    ]


def edits_from_proto(
    messages: Iterable[opb.GroupEdit], groups: int
) -> dict[int, tuple[dict[str, Any], tuple[str, ...]]]:
    """Decode edits of group options; ValueError names the group."""
    edits: dict[int, tuple[dict[str, Any], tuple[str, ...]]] = {}
    for message in messages:
        if message.group >= groups:
            raise ValueError(f"edit of group {message.group}; there are {groups} groups")
        if message.group in edits:
            raise ValueError(f"two edits of group {message.group}")
        changed = from_map(message.set, f"param_groups[{message.group}]")
        for key in (*changed, *message.removed):
            if not isinstance(key, str) or key == "params":
                raise ValueError(f"param_groups[{message.group}] has no option {key!r} to edit")
        edits[message.group] = (changed, tuple(message.removed))
    return edits


def policy_to_proto(policy: Policy) -> pb.Policy:
    """Encode a policy."""
    if isinstance(policy, Async):
        message = pb.Policy()
        # The field's name is a keyword of Python.
        getattr(message, "async").CopyFrom(pb.Async(max_staleness=policy.max_staleness, scale_lr=policy.scale_lr))
        return message
    timeout = 0 if policy.timeout is None else max(1, round(_seconds(policy.timeout) * 1000))
    return pb.Policy(sync=pb.Sync(workers=policy.workers, min_workers=policy.min_workers or 0, timeout_ms=timeout))


def _seconds(duration: timedelta | float) -> float:
    return duration.total_seconds() if isinstance(duration, timedelta) else duration


def policy_from_proto(message: pb.Policy) -> Policy:
    """Decode a policy; ValueError names the field."""
    match message.WhichOneof("kind"):
        case "sync":
            sync = message.sync
            if sync.timeout_ms > _LONGEST_TIMEOUT_MS:
                raise ValueError(f"Sync: a timeout of {sync.timeout_ms} ms; at most {_LONGEST_TIMEOUT_MS} are possible")
            timeout = sync.timeout_ms * _MILLISECOND if sync.timeout_ms else None
            return Sync(sync.workers, sync.min_workers or None, timeout)
        case "async":
            relaxed = getattr(message, "async")
            return Async(relaxed.max_staleness if relaxed.HasField("max_staleness") else None, relaxed.scale_lr)
    raise ValueError("policy is not set")


_FORMATS: dict[object, opb.WireFormat.ValueType] = {
    None: opb.WIRE_FORMAT_UNSPECIFIED,
    "bfloat16": opb.WIRE_FORMAT_BFLOAT16,
    "float16": opb.WIRE_FORMAT_FLOAT16,
    "int8": opb.WIRE_FORMAT_INT8,
    "topk": opb.WIRE_FORMAT_TOPK,
}
_FORMAT_NAMES: dict[int, Any] = {value: name for name, value in _FORMATS.items()}


def wire_to_proto(wire: Wire) -> opb.Wire:
    """Encode how a session's tensors are made smaller."""
    return opb.Wire(
        gradients=_FORMATS[wire.gradients], parameters=_FORMATS[wire.parameters], density=float(wire.density)
    )


def wire_from_proto(attach: opb.Attach) -> Wire:
    """Decode how a session's tensors are made smaller; ValueError names the field."""
    if not attach.HasField("wire"):
        return EXACT
    message = attach.wire
    for name in ("gradients", "parameters"):
        if (value := getattr(message, name)) not in _FORMAT_NAMES:
            raise ValueError(f"Wire: {name} is {value}, which is no WireFormat of this release")
    density = {"density": message.density} if message.gradients == opb.WIRE_FORMAT_TOPK else {}
    return Wire(_FORMAT_NAMES[message.gradients], _FORMAT_NAMES[message.parameters], **density)


_APPLIED_TO_PROTO = {
    Applied.NONE: pb.APPLIED_UNSPECIFIED,
    Applied.NO: pb.APPLIED_NO,
    Applied.YES: pb.APPLIED_YES,
    Applied.UNKNOWN: pb.APPLIED_UNKNOWN,
}
_APPLIED_FROM_PROTO = {value: key for key, value in _APPLIED_TO_PROTO.items()}


def failure_to_proto(error: BaseException) -> pb.Failure:
    """Encode an error; anything but a FarstepError is told as a defect of farstep."""
    if not isinstance(error, FarstepError):
        error = InternalError(f"{type(error).__name__}: {error}")
    cause = error.__cause__
    return pb.Failure(
        code=error.code,
        message=str(error),
        applied=_APPLIED_TO_PROTO[error.applied],
        exception_type=type(cause).__name__ if isinstance(cause, Exception) else "",
    )


def failure_from_proto(message: pb.Failure) -> FarstepError:
    """Decode an error."""
    return error_for(message.code, message.message, _APPLIED_FROM_PROTO.get(message.applied, Applied.UNKNOWN))
