"""Descriptions of hosted optimizers as messages."""

from __future__ import annotations

from torch import Tensor

from farstep_server.core.history import Part, Round, RoundKind, RoundOutcome
from farstep_server.core.records import Description, ParameterRow, StateRow, WorkerRow
from farstep_server.core.schedules import ScheduleRow
from farstep_wire.errors import ResourceExhaustedError
from farstep_wire.layout import TensorSpec
from farstep_wire.limits import MESSAGE_BYTES
from farstep_wire.v1 import common_pb2, inspection_pb2
from farstep_wire.v1 import inspection_pb2 as pb
from farstep_wire.values import spec_to_proto, to_map, to_value

_STANDINGS = {
    "computing": pb.Worker.STANDING_COMPUTING,
    "waiting": pb.Worker.STANDING_WAITING,
    "expired": pb.Worker.STANDING_EXPIRED,
    "left": pb.Worker.STANDING_LEFT,
}

_KINDS = {
    RoundKind.STEP: pb.Round.KIND_STEP,
    RoundKind.LOAD_STATE: pb.Round.KIND_LOAD_STATE,
    RoundKind.ADD_PARAM_GROUP: pb.Round.KIND_ADD_PARAM_GROUP,
    RoundKind.RESTORE: pb.Round.KIND_RESTORE,
}
_OUTCOMES = {
    RoundOutcome.COMMITTED: pb.Round.OUTCOME_COMMITTED,
    RoundOutcome.SKIPPED: pb.Round.OUTCOME_SKIPPED,
    RoundOutcome.ROLLED_BACK: pb.Round.OUTCOME_ROLLED_BACK,
    RoundOutcome.REFUSED: pb.Round.OUTCOME_REFUSED,
}


def encode_description(summary: pb.Summary, description: Description) -> pb.Description:
    """Encode a description; what moves in the summary is taken from it, so that the two agree.

    ResourceExhaustedError: the table of parameters takes more than one message may.
    """
    summary.version, summary.incarnation = description.version, description.incarnation
    summary.live_workers = sum(row.standing in {"computing", "waiting"} for row in description.workers)
    message = pb.Description(
        summary=summary,
        workers=[_worker(row) for row in description.workers],
        groups=[_options(options, number) for number, options in enumerate(description.options)],
        group_sizes=description.layout.group_sizes,
        parameters=[_parameter(row) for row in description.rows],
        state_bytes=description.state_bytes,
        arguments=to_map(description.arguments, "arguments"),
        last_step_seconds=description.last_step_seconds,
        stale_contributions=description.stale,
        settings=to_map(description.settings.as_dict(), "settings"),
        schedules=[_schedule(row) for row in description.schedules],
        averaged=description.averaged,
    )
    if message.ByteSize() >= MESSAGE_BYTES:
        raise ResourceExhaustedError(
            f"the description of {description.name!r} with its {len(description.rows)} parameters takes {message.ByteSize()} "
            f"bytes; a message may have {MESSAGE_BYTES}. Ask for it without the table of parameters"
        )
    return message


def _worker(row: WorkerRow) -> pb.Worker:
    return pb.Worker(
        id=row.worker,
        standing=_STANDINGS[row.standing],
        version=row.version,
        contributions=row.contributions,
        abstentions=row.abstentions,
        stale=row.stale,
        epoch=row.epoch,
        lease_seconds=row.lease_seconds,
        round_trip_seconds=row.round_trip_seconds,
        staleness=row.staleness,
    )


def _schedule(row: ScheduleRow) -> pb.Schedule:
    return pb.Schedule(
        scheduler=row.spec.scheduler, every=row.spec.every, last_epoch=row.last_epoch, ended=row.ended, part=row.part
    )


def encode_round(item: Round) -> pb.Round:
    """Encode a round of the history."""
    return pb.Round(
        number=item.number,
        version=item.version,
        incarnation=item.incarnation,
        kind=_KINDS[item.kind],
        outcome=_OUTCOMES[item.outcome],
        parts=[_part(part) for part in item.parts],
        evaluations=item.evaluations,
        seconds=item.seconds,
        reason=item.reason,
    )


def _part(part: Part) -> pb.Part:
    return pb.Part(
        worker=part.worker,
        sequence=part.sequence,
        abstained=part.abstained,
        num_samples=part.num_samples or 0.0,
        staleness=part.staleness,
        ahead=part.ahead,
        evaluations=part.evaluations,
    )


def _options(options: dict[str, object], number: int) -> common_pb2.ValueMap:
    message = common_pb2.ValueMap()
    for key, value in options.items():
        message.entries.add(key=_value(key, "option"), value=_value(value, f"param_groups[{number}][{key!r}]"))
    return message


def _value(value: object, where: str) -> common_pb2.Value:
    """Encode a value; what cannot travel is shown as text."""
    try:
        return to_value(value, where)
    except (TypeError, ValueError):
        return common_pb2.Value(text=repr(value))


def _parameter(row: ParameterRow) -> pb.ParameterRow:
    return pb.ParameterRow(
        key=row.parameter.key,
        group=row.parameter.group,
        spec=spec_to_proto(row.parameter.spec),
        norm=row.norm,
        gradient_norm=row.gradient_norm,
        state=[_state(entry) for entry in row.state],
    )


def _state(row: StateRow) -> inspection_pb2.StateRow:
    if row.norm is None or not isinstance(row.value, Tensor):
        return pb.StateRow(name=row.name, value=_value(row.value, row.name))
    tensor = row.value
    spec = TensorSpec.of(tensor) if not tensor.is_sparse else TensorSpec.contiguous(tensor.dtype, tensor.shape)
    return pb.StateRow(name=row.name, spec=spec_to_proto(spec), norm=row.norm)
