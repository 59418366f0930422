"""Failures of unary and server-streaming calls: the one place where an error becomes a gRPC status.

The status is the one of the error table; the whole error travels as a serialized Failure in the trailing metadata, under
``FAILURE_KEY``. What is no FarstepError is a defect of farstep: it is logged with its traceback and told as INTERNAL.
Calls with a stream of requests are left alone: in a session (OptimizerService) a failure is a reply like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from farstep_server.logs import log_event
from farstep_wire.convert import failure_to_proto
from farstep_wire.errors import ERROR_TABLE, FarstepError, InternalError
from farstep_wire.v1 import common_pb2 as pb

FAILURE_KEY = "farstep-failure-bin"
"""Key of the trailing metadata that holds a serialized Failure."""

_PACKAGE = "/farstep.v1."
_TEXT_BYTES = 1500
"""Clients take 8 KiB of metadata as a rule, and the text is in it twice, percent-encoded once."""

_LOGGER = logging.getLogger(__name__)


class FailureInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps the handlers of farstep's own unary and server-streaming methods."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler of a call, wrapped where its failures are ours to tell."""
        handler = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_PACKAGE):
            return handler
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary), **codecs)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(telling(handler.unary_stream), **codecs)
        return handler


def _unary(method: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request, context)
        except Exception as error:  # noqa: BLE001 - told to the client and, if a defect, logged
            _abort(context, error, method)

    return call


def telling(
    method: Callable[[Any, grpc.ServicerContext], Iterator[Any]],
) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
    """Return a method that answers with a stream such that what it raises is told to the client."""

    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(request, context)
        except Exception as error:  # noqa: BLE001 - told to the client and, if a defect, logged
            _abort(context, error, method)

    return call


def _abort(context: grpc.ServicerContext, error: Exception, method: Callable[..., Any]) -> NoReturn:
    if not isinstance(error, FarstepError):
        name = getattr(method, "__qualname__", repr(method))
        log_event(_LOGGER, logging.ERROR, "call_failed", method=name, exc_info=error)
        error = InternalError(f"{type(error).__name__}: {error}")
    failure = failure_to_proto(error)
    failure.message = _shortened(failure.message)
    context.set_trailing_metadata(((FAILURE_KEY, failure.SerializeToString()),))
    context.abort(status_of(failure), failure.message)
    raise AssertionError("abort raises")


def status_of(failure: pb.Failure) -> grpc.StatusCode:
    """Return the gRPC status that stands for a failure."""
    row = ERROR_TABLE.get(failure.code)
    return grpc.StatusCode.INTERNAL if row is None else grpc.StatusCode[row.grpc_status]


def _shortened(text: str) -> str:
    data = text.encode("utf-8", errors="replace")
    return text if len(data) <= _TEXT_BYTES else data[:_TEXT_BYTES].decode("utf-8", errors="ignore") + " …"
