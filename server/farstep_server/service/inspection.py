"""The InspectionService: what a server is, what it hosts, and how to be rid of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import torch

from farstep_server.core import events as ev
from farstep_server.core.records import Description
from farstep_server.hosting.directory import Directory, summary_fields
from farstep_server.hosting.owner import Owner
from farstep_server.hosting.snapshots import Snapshotter
from farstep_server.service.descriptions import encode_description, encode_round
from farstep_wire import __version__
from farstep_wire.address import check_name
from farstep_wire.convert import policy_to_proto
from farstep_wire.errors import (
    ConfigurationError,
    DrainingError,
    InvalidRequestError,
    NotFoundError,
    RemovedError,
    StorageError,
)
from farstep_wire.limits import OLDEST_PROTOCOL, PROTOCOL
from farstep_wire.v1 import inspection_pb2 as pb
from farstep_wire.v1 import inspection_pb2_grpc

_DESCRIBE_SECONDS = 60.0
_DEFAULT_INTERVAL_SECONDS = 1.0
_LONGEST_INTERVAL_SECONDS = 3600.0


def checked_name(name: str) -> str:
    """Return a hosted optimizer's name if it can be one; InvalidRequestError quotes it."""
    try:
        return check_name(name)
    except ConfigurationError as error:
        raise InvalidRequestError(str(error)) from None


class InspectionService(inspection_pb2_grpc.InspectionServiceServicer):
    """Answers from a directory. ``snapshots`` is None for a server without a data directory."""

    def __init__(self, directory: Directory, snapshots: Snapshotter | None) -> None:
        self._directory = directory
        self._snapshots = snapshots
        self._started = time.monotonic()

    def GetServer(self, request: pb.GetServerRequest, context: grpc.ServicerContext) -> pb.ServerInfo:
        """Say what the server is."""
        directory = self._directory
        return pb.ServerInfo(
            version=__version__,
            protocol=PROTOCOL,
            oldest_protocol=OLDEST_PROTOCOL,
            device=str(directory.device),
            torch_version=torch.__version__,
            uptime_seconds=time.monotonic() - self._started,
            hosted=len(directory.owners()),
            optimizers=directory.registry.names(),
            durable=self._snapshots is not None,
            limit_bytes=directory.limit_bytes,
            used_bytes=directory.used_bytes(),
            draining=directory.draining,
        )

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListReply:
        """List what is hosted. Waits for no owner, however busy."""
        return pb.ListReply(optimizers=[_summary(owner) for owner in self._directory.owners()])

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        """Describe one hosted optimizer."""
        return _describe(self._directory.find(checked_name(request.name)), parameters=request.parameters)

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Description]:
        """Describe one hosted optimizer now and after each change, until the client goes.

        Ends with REMOVED when it is no longer hosted, and with DRAINING when the server stops.
        """
        owner = self._directory.find(checked_name(request.name))
        seconds = min(request.interval_ms / 1000 or _DEFAULT_INTERVAL_SECONDS, _LONGEST_INTERVAL_SECONDS)
        watcher = _Watcher(owner)
        if not context.add_callback(watcher.leave):
            return
        while watcher.wait(seconds):
            yield _describe(owner, parameters=request.parameters)
        if not watcher.left:
            raise self._end_of(owner)

    def _end_of(self, owner: Owner) -> RemovedError | DrainingError:
        if self._directory.draining and not owner.hosted.abandoned:
            return DrainingError("the server is shutting down; watch again when it is back")
        return RemovedError(f"{owner.name!r} is no longer hosted: it was removed, or its last worker has left")

    def History(self, request: pb.HistoryRequest, context: grpc.ServicerContext) -> Iterator[pb.Round]:
        """Tell the rounds that are remembered, oldest first."""
        owner = self._directory.find(checked_name(request.name))
        reply = owner.ask(lambda ticket: ev.ReadHistory(ticket, request.after), ev.HistoryReply, _DESCRIBE_SECONDS)
        for item in reply.rounds:
            yield encode_round(item)

    def Remove(self, request: pb.RemoveRequest, context: grpc.ServicerContext) -> pb.RemoveReply:
        """Remove a hosted optimizer, its snapshots, or both.

        Without ``snapshots`` those that there are stay, but are hosted again only by a Restore. With it a name that is not
        hosted, but has snapshots, is known too; the version in the reply is then that of the newest.
        """
        name = checked_name(request.name)
        if not request.snapshots or self._snapshots is None:
            return pb.RemoveReply(version=self._directory.remove(name))
        return _remove_all(self._directory, self._snapshots, name)


def _remove_all(directory: Directory, snapshots: Snapshotter, name: str) -> pb.RemoveReply:
    version = None
    kept = snapshots.stored(name)
    try:
        version = directory.remove(name)
    except (NotFoundError, StorageError):
        if not kept:
            raise
    removed = snapshots.delete(name)
    return pb.RemoveReply(version=kept[-1].version if version is None else version, snapshots=max(removed, len(kept)))


def _summary(owner: Owner) -> pb.Summary:
    return pb.Summary(policy=policy_to_proto(owner.hosted.identity.policy), **summary_fields(owner))


def _describe(owner: Owner, *, parameters: bool) -> pb.Description:
    def event(ticket: ev.Ticket) -> ev.ReadDescription:
        return ev.ReadDescription(ticket, parameters)

    return encode_description(_summary(owner), owner.ask(event, Description, _DESCRIBE_SECONDS))


class _Watcher:
    """Waits for the next change of a hosted optimizer; ``left`` once the client is gone."""

    def __init__(self, owner: Owner) -> None:
        self.left = False
        self._owner = owner
        self._seen = -1
        self._next = 0.0

    def leave(self) -> None:
        """End the wait; called by gRPC when the call ends."""
        with self._owner.changed:
            self.left = True
            self._owner.changed.notify_all()

    def wait(self, interval_seconds: float) -> bool:
        """Wait for a change, at least the interval after the last; return False where there will be none."""
        owner = self._owner
        with owner.changed:
            owner.changed.wait_for(self._finished, max(0.0, self._next - time.monotonic()))
            owner.changed.wait_for(lambda: self._finished() or owner.changes != self._seen)
            self._seen = owner.changes
            self._next = time.monotonic() + interval_seconds
            return not self._finished()

    def _finished(self) -> bool:
        return self.left or self._owner.over
