"""What the server's tests run: a server in this process, and hosted optimizers without one."""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor

from farstep import Remote
from farstep_server import app as app_module
from farstep_server.app import App, build_registry
from farstep_server.config import ServerConfig
from farstep_server.core import events as ev
from farstep_server.core.gradients import Staged
from farstep_server.core.options import frozen_options
from farstep_server.hosting.directory import Blueprint, Directory
from farstep_server.hosting.owner import FutureTicket, Owner
from farstep_server.hosting.snapshots import Snapshotter
from farstep_server.store import SnapshotStore
from farstep_wire.convert import failure_from_proto
from farstep_wire.errors import FarstepError
from farstep_wire.layout import Layout, ParameterSpec, TensorSpec
from farstep_wire.policy import Policy, Sync
from farstep_wire.v1 import common_pb2
from farstep_wire.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from farstep_wire.v1.inspection_pb2_grpc import InspectionServiceStub

WAIT_SECONDS = 30.0


class Server:
    """A server in this process on a unix socket; ``restart`` drains it and starts another on the same data directory."""

    def __init__(self, folder: Path, config: ServerConfig, monkeypatch: Any) -> None:
        # Sessions of clients that are idle in this same process are not waited for.
        monkeypatch.setattr(app_module, "_STOP_SECONDS", 0.1)
        self.folder = folder
        self.config = config
        self.address = config.listen[0]
        self.app = self._start()
        self.channel = grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.inspection = InspectionServiceStub(self.channel)
        self.checkpoint = CheckpointServiceStub(self.channel)

    def _start(self) -> App:
        app = App(self.config, build_registry(self.config.optimizer))
        app.start()
        return app

    @property
    def snapshots(self) -> Snapshotter:
        """Its snapshotter."""
        assert self.app.snapshots is not None
        return self.app.snapshots

    def remote(self, name: str | None = "net", **options: Any) -> Remote:
        """Where a client finds it."""
        return Remote(self.address, name=name, **options)

    def drain(self) -> bool:
        """End it in good order; return whether everything was saved."""
        return self.app.drain(wait_for_workers=False)

    def restart(self, **changes: Any) -> None:
        """Drain it and start another."""
        self.drain()
        self.config = replace(self.config, **changes)
        self.app = self._start()

    def crash(self) -> None:
        """Start another that knows only what is on disk."""
        for owner in self.app.directory.owners():
            owner.suspended = True
        self.app.directory.stop_all(FarstepError("killed"))
        self.restart()

    def fail(self, method: Callable[..., Any], request: Any) -> tuple[grpc.StatusCode, FarstepError]:
        """Make a call that must fail; return its status and the error in its trailing metadata."""
        try:
            reply = method(request, timeout=WAIT_SECONDS)
            if not hasattr(reply, "DESCRIPTOR"):
                list(reply)
        except grpc.RpcError as error:
            return status_and_error(error)
        raise AssertionError(f"{request} did not fail")


def status_and_error(error: grpc.RpcError) -> tuple[grpc.StatusCode, FarstepError]:
    """Return the status of a failed call and the error in its trailing metadata."""
    call: Any = error
    for key, value in call.trailing_metadata():
        if key == "farstep-failure-bin":
            return call.code(), failure_from_proto(common_pb2.Failure.FromString(value))
    raise AssertionError(f"no Failure came with {error!r}")


@contextmanager
def serving(monkeypatch: Any, *, durable: bool = True, **options: Any) -> Iterator[Server]:
    """A server in this process; drained at the end unless the test has done so."""
    with tempfile.TemporaryDirectory(prefix="farstep-") as text:
        folder = Path(text)
        data = folder / "data" if durable else None
        options.setdefault("snapshot_interval", timedelta(hours=1))
        config = ServerConfig(listen=(f"unix:{folder}/s",), device="cpu", data_dir=data, max_sessions=16, **options)
        server = Server(folder, config, monkeypatch)
        try:
            yield server
        finally:
            server.channel.close()
            if not server.app.directory.draining:
                server.drain()


# Without a server.


class Inbox:
    """A ticket that keeps what is delivered."""

    def __init__(self) -> None:
        self.replies: queue.SimpleQueue[ev.Reply] = queue.SimpleQueue()

    def deliver(self, reply: ev.Reply) -> None:
        """Take the answer."""
        self.replies.put(reply)

    def take(self) -> ev.Reply:
        """Wait for the answer."""
        return self.replies.get(timeout=WAIT_SECONDS)

    @property
    def empty(self) -> bool:
        """Whether nothing has come."""
        return self.replies.empty()


LAYOUT = Layout((ParameterSpec("w", TensorSpec.contiguous(torch.float32, (2,)), 0),), (1,))


def arena(layout: Layout, *tensors: Tensor) -> Tensor:
    """Return the parameters' bytes."""
    contents = torch.zeros(layout.arena.nbytes, dtype=torch.uint8)
    for view, tensor in zip(layout.views(contents), tensors, strict=True):
        view.copy_(tensor)
    return contents


def blueprint(name: str = "net", policy: Policy | None = None, **changes: Any) -> Blueprint:
    """SGD with momentum on one parameter of two numbers."""
    options = [{"lr": 0.5, "momentum": 0.9}]
    plain = Blueprint(name, "SGD", {"lr": 0.5, "momentum": 0.9}, LAYOUT, options, policy or Sync(1), ephemeral=False)
    return replace(plain, **changes)


def host(directory: Directory, plan: Blueprint | None = None) -> Owner:
    """Create a hosted optimizer whose parameters are 1."""
    plan = plan or blueprint()
    contents = arena(plan.layout, *(torch.ones(spec.shape, dtype=spec.dtype) for spec in plan.layout.specs))
    return directory.create(plan, "0", contents)


def join(owner: Owner, worker: str = "0", instance: str = "a", lineage: str = "") -> ev.JoinReply:
    """Attach a worker."""
    layout, identity = owner.hosted.engine.layout, owner.hosted.identity
    options = frozen_options(owner.hosted.engine.optimizer)

    def event(ticket: ev.Ticket) -> ev.Join:
        return ev.Join(ticket, worker, instance, identity.policy, layout, options, identity.optimizer, lineage)

    return owner.ask(event, ev.JoinReply, WAIT_SECONDS)


def contribution(
    owner: Owner,
    ticket: ev.Ticket,
    sequence: int,
    epoch: int = 1,
    worker: str = "0",
    value: float = 1.0,
    **options: Any,
) -> ev.Contribution:
    """Gradients that are ``value`` everywhere, taken at the version as it stands."""
    hosted = owner.hosted
    plan = hosted.engine.layout.dense_plan
    staged = Staged(
        plan, arena(hosted.engine.layout, *(torch.full(s.shape, value) for s in hosted.engine.layout.specs))
    )
    if options.get("closure"):
        staged = None  # type: ignore[assignment]
    options.setdefault("version", hosted.version)
    return ev.Contribution(ticket, worker, epoch, sequence, incarnation=hosted.incarnation, staged=staged, **options)


def step(owner: Owner, sequence: int, epoch: int = 1, worker: str = "0", **options: Any) -> ev.StepReply:
    """Contribute and wait for what comes of it."""
    ticket = FutureTicket()
    owner.post(contribution(owner, ticket, sequence, epoch, worker, **options))
    reply = ticket.result(WAIT_SECONDS)
    assert isinstance(reply, ev.StepReply)
    return reply


def parameters(owner: Owner) -> list[Tensor]:
    """Return copies of the parameters as they stand."""
    return [tensor.detach().clone() for tensor in owner.hosted.engine.store.tensors]


class Machine:
    """A directory with snapshots, as a server has it, without a network. ``crash`` forgets all that is not on disk."""

    def __init__(self, root: Path, *optimizers: str) -> None:
        self.root = root
        self.directory = Directory(build_registry(optimizers), torch.device("cpu"), 30.0, 2**30)
        self.store = SnapshotStore(root)
        self.snapshots = Snapshotter(self.store, self.directory, 3600.0)
        self.snapshots.restore_all()

    def suspend(self, error: FarstepError) -> bool:
        """Drain."""
        self.directory.drain()
        saved = self.snapshots.suspend_all(error)
        self.snapshots.close()
        return saved

    def crash(self) -> None:
        """Let go of the directory as the kernel does for a process that is killed; nothing is saved."""
        for owner in self.directory.owners():
            owner.suspended = True
        self.store.close()
        self.directory.stop_all(FarstepError("killed"))
