"""The OptimizerService: sessions over gRPC streams.

Messages pass gRPC as bytes; frames are built and read by ``farstep_wire.frames``, which spares a copy of each payload.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from farstep_server.hosting.directory import Directory
from farstep_server.service.session import Session
from farstep_wire.v1 import optimizer_pb2


class OptimizerService:
    """Serves sessions from a directory."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """Return the handler to register with a gRPC server."""
        service = optimizer_pb2.DESCRIPTOR.services_by_name["OptimizerService"]
        method = grpc.stream_stream_rpc_method_handler(self._session)
        return grpc.method_handlers_generic_handler(service.full_name, {"Session": method})

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        session = Session(self._directory, requests, context.is_active, context.peer())
        # Told of the stream's end in any case: gRPC drops a generator that it no longer needs where that stands.
        if not context.add_callback(session.end):
            session.end()
            return iter(())
        return session.frames()
