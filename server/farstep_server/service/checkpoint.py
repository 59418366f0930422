"""The CheckpointService: snapshots on demand."""

from __future__ import annotations

import grpc

from farstep_server.hosting.snapshots import Snapshotter
from farstep_server.service.inspection import checked_name
from farstep_server.store import SnapshotInfo
from farstep_wire.errors import StorageError
from farstep_wire.v1 import checkpoint_pb2 as pb
from farstep_wire.v1 import checkpoint_pb2_grpc


class CheckpointService(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """Answers from a Snapshotter; None, for a server without a data directory, refuses every call."""

    def __init__(self, snapshots: Snapshotter | None) -> None:
        self._kept = snapshots

    @property
    def _snapshots(self) -> Snapshotter:
        if self._kept is None:
            raise StorageError(
                "this server keeps no snapshots: it was started without a data directory. Start it with --data-dir DIR "
                "(or FARSTEP_DATA_DIR)"
            )
        return self._kept

    def Save(self, request: pb.SaveRequest, context: grpc.ServicerContext) -> pb.SnapshotInfo:
        """Write a snapshot. Saving under a tag that there is moves the tag."""
        return _info(self._snapshots.save(checked_name(request.name), request.tag))

    def ListSnapshots(self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext) -> pb.ListSnapshotsReply:
        """List the snapshots of a hosted optimizer, or of one that was."""
        found = self._snapshots.list(checked_name(request.name))
        return pb.ListSnapshotsReply(snapshots=[_info(info) for info in found])

    def Restore(self, request: pb.RestoreRequest, context: grpc.ServicerContext) -> pb.SnapshotInfo:
        """Roll back to a snapshot, or host it again."""
        version = request.version if request.HasField("version") else None
        return _info(self._snapshots.restore(checked_name(request.name), request.tag, version))


def _info(info: SnapshotInfo) -> pb.SnapshotInfo:
    return pb.SnapshotInfo(
        name=info.name,
        version=info.version,
        tag=info.tag or "",
        created_unix=info.created_unix,
        size_bytes=info.nbytes,
        lineage=info.lineage,
        incarnation=info.incarnation,
    )
