"""The LinkService: bytes there and back, for measuring what a link can do by itself.

Messages pass gRPC as bytes, as those of sessions do. A payload is dropped unread; all answers are made of one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError

from farstep_server.service.failures import telling
from farstep_wire.errors import InvalidRequestError
from farstep_wire.frames import split
from farstep_wire.limits import CHUNK_BYTES, LOAD_BYTES
from farstep_wire.v1 import link_pb2 as pb


class LinkService:
    """Serves exchanges; holds nothing."""

    def __init__(self) -> None:
        self._full = pb.Load(payload=bytes(CHUNK_BYTES)).SerializeToString()

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """Return the handler to register with a gRPC server."""
        service = pb.DESCRIPTOR.services_by_name["LinkService"]
        method = grpc.stream_stream_rpc_method_handler(telling(self._exchange))
        return grpc.method_handlers_generic_handler(service.full_name, {"Exchange": method})

    def _exchange(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for wanted in _wanted(messages):
            for _ in range(wanted // CHUNK_BYTES):
                yield self._full
            if rest := wanted % CHUNK_BYTES:
                yield pb.Load(payload=bytes(rest)).SerializeToString()


def _wanted(messages: Iterator[bytes]) -> Iterator[int]:
    """Yield how many bytes each message asks for, until the client is done or gone."""
    while True:
        try:
            data = next(messages)
        except (StopIteration, grpc.RpcError):
            return
        yield _wanted_bytes(data)


def _wanted_bytes(data: bytes) -> int:
    try:
        header, _ = split(data)
        wanted = pb.Load.FromString(data if header is None else header).wanted_bytes
    except (DecodeError, IndexError) as error:
        raise InvalidRequestError(f"a message of {len(data)} bytes is not a Load: {error}") from None
    if wanted > LOAD_BYTES:
        raise InvalidRequestError(f"{wanted} bytes are wanted at a time; at most {LOAD_BYTES} are possible")
    return wanted
