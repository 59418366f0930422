"""What an Attach asks for, checked."""

from __future__ import annotations

from farstep_server.hosting.directory import Blueprint
from farstep_server.service.requests import Request, read_layout
from farstep_wire.address import check_name
from farstep_wire.convert import policy_from_proto
from farstep_wire.errors import ConfigurationError, InvalidRequestError, ProtocolError
from farstep_wire.limits import OLDEST_PROTOCOL, PROTOCOL, WORKER_BYTES
from farstep_wire.settings import Settings
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import from_map

ON_EXISTING = {
    pb.ON_EXISTING_UNSPECIFIED: "attach",
    pb.ON_EXISTING_ATTACH: "attach",
    pb.ON_EXISTING_ERROR: "error",
    pb.ON_EXISTING_REPLACE: "replace",
}


def check_protocol(attach: pb.Attach) -> None:
    """ProtocolError where this server does not speak the client's revision."""
    if not OLDEST_PROTOCOL <= attach.protocol <= PROTOCOL:
        raise ProtocolError(
            f"the client ({attach.client_version or 'unknown release'}) speaks protocol revision {attach.protocol}; this "
            f"server serves {OLDEST_PROTOCOL} to {PROTOCOL}. Install the same farstep release on both sides"
        )


def blueprint_of(request: Request, attach: pb.Attach) -> Blueprint:
    """Return what is to be hosted; ValueError or InvalidRequestError names what is wrong with it."""
    if not attach.worker or len(attach.worker.encode()) > WORKER_BYTES or not attach.instance:
        raise InvalidRequestError(
            f"attach: worker {attach.worker!r} must be 1 to {WORKER_BYTES} bytes, with an instance"
        )
    layout, options = read_layout(request.buffer)
    if not layout.parameters:
        raise InvalidRequestError("attach: the layout has no parameters")
    arguments = from_map(attach.arguments, "arguments")
    for key in arguments:
        if not isinstance(key, str):
            raise InvalidRequestError(f"attach: arguments has the name {key!r}, which is no text")
    try:
        name = check_name(attach.name)
    except ConfigurationError as error:
        raise InvalidRequestError(f"attach: {error}") from None
    return Blueprint(
        name,
        attach.optimizer,
        arguments,
        layout,
        options,
        policy_from_proto(attach.policy),
        attach.ephemeral,
        attach.default_dtype or "float32",
        Settings().changed(from_map(attach.settings, "settings")) if attach.HasField("settings") else None,
    )
