"""Unary calls over gRPC: the status table, one way. Every call has a deadline, every failure is a FarstepError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from farstep_wire.address import Address
from farstep_wire.errors import DeadlineError, FarstepError, ProtocolError, RefusedError, UnavailableError
from farstep_wire.v1 import common_pb2

FAILURE_KEY = "farstep-failure-bin"
"""Trailing metadata in which a server says, as a serialized Failure, why a unary call failed."""


@contextmanager
def raised_as_farstep(address: Address, timeout_seconds: float) -> Iterator[None]:
    """Turn what gRPC raises in the block into farstep's errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error, address, timeout_seconds) from None


def error_from_rpc(error: grpc.RpcError, address: Address, timeout_seconds: float) -> FarstepError:
    """Return the error that a failed call stands for."""
    call: Any = error
    for key, value in call.trailing_metadata() or ():
        if key == FAILURE_KEY:
            # Only now: it imports torch, for which the command line should not wait.
            from farstep_wire.convert import failure_from_proto

            try:
                return failure_from_proto(common_pb2.Failure.FromString(value))
            except DecodeError:
                break
    code, details = call.code(), call.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"the server at {address} did not answer within {timeout_seconds:g} s")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(
            f"no farstep server answers at {address} ({details}); check that farstep-server runs there, and the address"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"the server at {address} does not know this call ({details}); is it a farstep-server?")
    return RefusedError(f"the server at {address} refused: {code.name}: {details}")
