"""Replies of the core as frames of the wire."""

from __future__ import annotations

from farstep_server.core import events as ev
from farstep_server.core.parameters import InSharedMemory, Parameters
from farstep_server.core.partial import ChangedReader
from farstep_server.core.records import Outcome
from farstep_wire import __version__
from farstep_wire.bundle import BundleBody
from farstep_wire.convert import edits_to_proto, failure_to_proto, policy_to_proto
from farstep_wire.errors import FarstepError
from farstep_wire.frames import EMPTY, BytesSource
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import to_map, to_value

_OUTCOMES = {
    Outcome.COMMITTED: pb.Stepped.OUTCOME_COMMITTED,
    Outcome.STALE: pb.Stepped.OUTCOME_STALE,
    Outcome.ROLLED_BACK: pb.Stepped.OUTCOME_ROLLED_BACK,
    Outcome.SKIPPED: pb.Stepped.OUTCOME_SKIPPED,
}


def encode_reply(request: int, reply: ev.Reply) -> tuple[pb.ServerFrame, BytesSource]:
    """Return the frame and the bytes that answer a request."""
    frame = pb.ServerFrame(request=request)
    match reply:
        case ev.StepReply():
            frame.stepped.CopyFrom(_stepped(reply))
            return frame, _parameters(frame.stepped, reply.parameters)
        case ev.EvaluateReply():
            frame.evaluate.number = reply.number
            return frame, _parameters(frame.evaluate, reply.parameters)
        case ev.ParametersReply():
            frame.parameters.version, frame.parameters.incarnation = reply.version, reply.incarnation
            return frame, _parameters(frame.parameters, reply.parameters)
        case ev.StateReply():
            body = BundleBody(reply.state, "state")
            frame.state.version, frame.state.incarnation = reply.version, reply.incarnation
            frame.state.header_bytes = body.header_bytes
            return frame, body
        case ev.DoneReply():
            frame.done.version, frame.done.incarnation = reply.version, reply.incarnation
        case ev.Refusal():
            return encode_failure(request, reply.error), EMPTY
        case _:
            raise AssertionError(f"{type(reply).__name__} is no reply of a session")
    return frame, EMPTY


def _parameters(message: pb.Stepped | pb.Evaluate | pb.Parameters, parameters: Parameters | None) -> BytesSource:
    if parameters is None:
        return EMPTY
    if isinstance(parameters, InSharedMemory):
        message.changes = parameters.changes
        return EMPTY
    if isinstance(parameters, ChangedReader):
        assert isinstance(message, pb.Stepped), "no other reply brings changes"
        message.changed.CopyFrom(_changed(parameters))
    return parameters


def _changed(reader: ChangedReader) -> pb.Changed:
    plan = reader.plan
    return pb.Changed(
        since=reader.since,
        whole=[number for number, _ in plan.whole],
        in_rows=[place.number for place in plan.rows],
        rows=[place.index.numel for place in plan.rows],
    )


def _stepped(reply: ev.StepReply) -> pb.Stepped:
    return pb.Stepped(
        outcome=_OUTCOMES[reply.outcome],
        version=reply.version,
        incarnation=reply.incarnation,
        contributions=reply.contributions,
        edits=edits_to_proto(reply.edits),
        loss=None if reply.loss is None else to_value(reply.loss, "loss"),
        parameters=reply.parameters is not None,
        staleness=reply.staleness,
        notice=reply.notice,
    )


def attached(reply: ev.JoinReply, outcome: pb.Attached.Outcome.ValueType) -> pb.Attached:
    """Encode where a session stands."""
    return pb.Attached(
        outcome=outcome,
        lineage=reply.lineage,
        incarnation=reply.incarnation,
        version=reply.version,
        epoch=reply.epoch,
        settled_sequence=reply.settled,
        lease_ms=round(reply.lease_seconds * 1000),
        groups=[to_map(group, f"param_groups[{number}]") for number, group in enumerate(reply.options)],
        shards=[pb.Shard(parameters=reply.parameters)],
        policy=policy_to_proto(reply.policy),
        server_version=__version__,
        device=reply.device,
    )


def encode_failure(request: int, error: FarstepError) -> pb.ServerFrame:
    """Return the frame that refuses a request."""
    return pb.ServerFrame(request=request, failure=failure_to_proto(error))
