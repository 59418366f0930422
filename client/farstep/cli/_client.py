"""The calls of the command line, each with a deadline. A failure is the client's own error, with a look at why."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farstep.cli._probe import explain
from farstep.transports.unary import FAILURE_KEY, error_from_rpc
from farstep_wire.address import Address
from farstep_wire.errors import DeadlineError, FarstepError, UnavailableError
from farstep_wire.limits import CHUNK_BYTES, MESSAGE_BYTES
from farstep_wire.v1 import checkpoint_pb2 as cpb
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.v1 import inspection_pb2 as ipb
from farstep_wire.v1 import link_pb2 as lpb
from farstep_wire.v1 import steering_pb2 as spb
from farstep_wire.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from farstep_wire.v1.inspection_pb2_grpc import InspectionServiceStub
from farstep_wire.v1.steering_pb2_grpc import SteeringServiceStub

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")

READ_SECONDS = 10.0
"""How long a reading call may take unless told otherwise."""

WRITE_SECONDS = 600.0
"""The same for a call that waits for the disk."""

_SEGMENT_SECONDS = 30.0
"""A watch is a chain of calls, each with this deadline: so a server that hangs is noticed, and an idle one is not."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


class Client:
    """One server. ``timeout`` is each call's deadline in seconds; None: READ_SECONDS or WRITE_SECONDS.

    Every method raises the FarstepError that stands for the failure.
    """

    def __init__(self, address: Address, timeout: float | None = None) -> None:
        self._address = address
        self._timeout = timeout
        self._channel = grpc.insecure_channel(address.target, options=_OPTIONS)
        self._inspection = InspectionServiceStub(self._channel)
        self._checkpoint = CheckpointServiceStub(self._channel)
        self._steering = SteeringServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def server(self) -> ipb.ServerInfo:
        """Return what the server is."""
        return self._read(self._inspection.GetServer, ipb.GetServerRequest())

    def list(self) -> ipb.ListReply:
        """Return the hosted optimizers."""
        return self._read(self._inspection.List, ipb.ListRequest())

    def describe(self, name: str, *, parameters: bool) -> ipb.Description:
        """Return one hosted optimizer, with the table of parameters where asked for."""
        return self._read(self._inspection.Describe, ipb.DescribeRequest(name=name, parameters=parameters))

    def watch(self, name: str, interval: float, *, parameters: bool) -> Iterator[ipb.Description]:
        """Yield a description now and after each change, at most one per ``interval`` seconds, without end."""
        request = ipb.WatchRequest(name=name, interval_ms=max(1, round(interval * 1000)), parameters=parameters)
        seconds = max(_SEGMENT_SECONDS, 10 * interval)
        while True:
            yield from self._segment(request, seconds)

    def _segment(self, request: ipb.WatchRequest, seconds: float) -> Iterator[ipb.Description]:
        heard = False
        call: Any = self._inspection.Watch(request, timeout=seconds)
        try:
            for description in call:
                heard = True
                yield description
        except grpc.RpcError as error:
            if heard and call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            raise translate(error, self._address, seconds) from None
        finally:
            call.cancel()
        raise UnavailableError(f"the server at {self._address} ended the watch; it may be shutting down")

    def history(self, name: str, after: int) -> Iterator[ipb.Round]:
        """Yield the rounds after that number that are remembered, oldest first."""
        seconds = self._timeout or READ_SECONDS
        call: Any = self._inspection.History(ipb.HistoryRequest(name=name, after=after), timeout=seconds)
        try:
            yield from call
        except grpc.RpcError as error:
            raise translate(error, self._address, seconds) from None
        finally:
            call.cancel()

    def configure(self, name: str, settings: pb.ValueMap) -> spb.Configured:
        """Change settings; return all as they stand."""
        return self._write(self._steering.Configure, spb.ConfigureRequest(name=name, settings=settings))

    def remove(self, name: str, *, snapshots: bool) -> ipb.RemoveReply:
        """Remove a hosted optimizer."""
        return self._write(self._inspection.Remove, ipb.RemoveRequest(name=name, snapshots=snapshots))

    def save(self, name: str, tag: str) -> cpb.SnapshotInfo:
        """Write a snapshot."""
        return self._write(self._checkpoint.Save, cpb.SaveRequest(name=name, tag=tag))

    def snapshots(self, name: str) -> cpb.ListSnapshotsReply:
        """Return the complete snapshots, oldest first."""
        return self._read(self._checkpoint.ListSnapshots, cpb.ListSnapshotsRequest(name=name))

    def restore(self, name: str, tag: str, version: int | None) -> cpb.SnapshotInfo:
        """Roll a hosted optimizer back."""
        return self._write(self._checkpoint.Restore, cpb.RestoreRequest(name=name, tag=tag, version=version))

    def health(self) -> str:
        """Return what the standard health service says of the whole server, such as "SERVING"."""
        reply = self._read(self._health.Check, health_pb2.HealthCheckRequest(service=""))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    @contextmanager
    def exchange(self) -> Iterator[Callable[[int, int], None]]:
        """Open a bare stream; yield a call that sends so many bytes and returns once so many have come back, at least 1.

        The deadline, WRITE_SECONDS unless told otherwise, is that of the whole stream.
        """
        # Only now: it imports torch, for which the command line should not wait.
        from farstep_wire.frames import split

        seconds = self._timeout or WRITE_SECONDS
        service = lpb.DESCRIPTOR.services_by_name["LinkService"]
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = self._channel.stream_stream(f"/{service.full_name}/Exchange", None, None)
        call: Any = method(iter(outbox.get, None), timeout=seconds)
        full = lpb.Load(payload=bytes(CHUNK_BYTES)).SerializeToString()

        def turn(out_bytes: int, back_bytes: int) -> None:
            count, rest = divmod(out_bytes, CHUNK_BYTES)
            for _ in range(count):
                outbox.put(full)
            outbox.put(lpb.Load(wanted_bytes=back_bytes, payload=bytes(rest)).SerializeToString())
            try:
                while back_bytes > 0:
                    back_bytes -= len(split(next(call))[1])
            except grpc.RpcError as error:
                raise translate(error, self._address, seconds) from None
            except StopIteration:
                raise UnavailableError(f"the server at {self._address} ended the measurement") from None

        try:
            yield turn
        except BaseException:
            call.cancel()
            raise
        finally:
            outbox.put(None)

    def _read(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request) -> _Reply:
        return self._call(method, request, self._timeout or READ_SECONDS, writes=False)

    def _write(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request) -> _Reply:
        return self._call(method, request, self._timeout or WRITE_SECONDS, writes=True)

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request, seconds: float, *, writes: bool
    ) -> _Reply:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            raise translate(error, self._address, seconds, writes=writes) from None


def translate(error: grpc.RpcError, address: Address, seconds: float, *, writes: bool = False) -> FarstepError:
    """Return the error that stands for a failed call.

    It is the client's own, but where no server answered, the address is looked at to say why. ``writes``: the call may
    have taken effect though no answer came.
    """
    known = error_from_rpc(error, address, seconds)
    if _told_by_server(error):
        return known
    match known:
        case DeadlineError() if writes:
            return DeadlineError(
                f"{known}. Whether it carried the request out is unknown, and it may still be at it: look before "
                "asking again, or allow more with --timeout"
            )
        case DeadlineError():
            return DeadlineError(f"{known}: {explain(address, seconds)}")
        case UnavailableError():
            return UnavailableError(f"no farstep server answers at {address}: {explain(address, seconds)}")
    return known


def _told_by_server(error: grpc.RpcError) -> bool:
    call: Any = error
    return any(key == FAILURE_KEY for key, _ in call.trailing_metadata() or ())
