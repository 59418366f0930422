"""The SteeringService: changes to a hosted optimizer from outside its rounds."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from farstep_server.core import events as ev
from farstep_server.core.schedules import ScheduleSpec
from farstep_server.hosting.directory import Directory
from farstep_server.hosting.owner import Owner
from farstep_server.service.inspection import checked_name
from farstep_wire.convert import edits_from_proto
from farstep_wire.errors import InvalidRequestError
from farstep_wire.v1 import common_pb2, steering_pb2_grpc
from farstep_wire.v1 import steering_pb2 as pb
from farstep_wire.values import from_map, to_map

_STEERING_SECONDS = 60.0


class SteeringService(steering_pb2_grpc.SteeringServiceServicer):
    """Answers from a directory."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def _owner(self, name: str) -> Owner:
        return self._directory.find(checked_name(name))

    def Configure(self, request: pb.ConfigureRequest, context: grpc.ServicerContext) -> pb.Configured:
        """Change settings."""
        changes = _text_map(request.settings, "settings")
        owner = self._owner(request.name)
        reply = owner.ask(lambda ticket: ev.Configure(ticket, changes), ev.SettingsReply, _STEERING_SECONDS)
        return pb.Configured(settings=to_map(reply.settings.as_dict(), "settings"), version=reply.version)

    def DeclareSchedule(self, request: pb.DeclareScheduleRequest, context: grpc.ServicerContext) -> pb.ScheduleState:
        """Put a schedule here, or find it."""
        if request.every < 1:
            raise InvalidRequestError(f"every must be at least 1, not {request.every}")
        owner = self._owner(request.name)
        arguments = _text_map(request.arguments, "arguments")
        spec = ScheduleSpec(request.scheduler, arguments, tuple(request.parts), request.every)
        try:
            edits = edits_from_proto(request.edits, len(owner.hosted.engine.layout.group_sizes))
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        return _asked(owner, lambda t: ev.DeclareSchedule(t, request.lineage, request.number, spec, edits))

    def GetSchedule(self, request: pb.GetScheduleRequest, context: grpc.ServicerContext) -> pb.ScheduleState:
        """Read a schedule's state."""
        return _asked(self._owner(request.name), lambda ticket: ev.ReadSchedule(ticket, request.number))

    def LoadSchedule(self, request: pb.LoadScheduleRequest, context: grpc.ServicerContext) -> pb.ScheduleState:
        """Replace a schedule's state."""
        state = _text_map(request.state, "state")
        return _asked(self._owner(request.name), lambda ticket: ev.LoadSchedule(ticket, request.number, state))


def _asked(owner: Owner, make: Callable[[ev.Ticket], ev.Steering]) -> pb.ScheduleState:
    reply = owner.ask(make, ev.ScheduleReply, _STEERING_SECONDS)
    return pb.ScheduleState(
        state=to_map(reply.state, "state"),
        groups=[to_map(group, f"param_groups[{number}]") for number, group in enumerate(reply.options)],
        version=reply.version,
        ended=reply.ended,
    )


def _text_map(message: common_pb2.ValueMap, where: str) -> dict[str, object]:
    try:
        values = from_map(message, where)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(str(error)) from None
    for key in values:
        if not isinstance(key, str):
            raise InvalidRequestError(f"{where} has the name {key!r}, which is no text")
    return values
