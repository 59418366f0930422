"""InspectionService and the failures of unary and streaming calls, over a real socket."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from farstep import Remote, optim
from farstep.inspection import description_from_proto
from farstep_server.core import events as ev
from farstep_wire import __version__
from farstep_wire.errors import (
    DrainingError,
    FarstepError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    RemovedError,
    ResourceExhaustedError,
    StorageError,
)
from farstep_wire.layout import Layout, ParameterSpec, TensorSpec
from farstep_wire.limits import MESSAGE_BYTES, PROTOCOL
from farstep_wire.policy import Sync
from farstep_wire.v1 import checkpoint_pb2 as cpb
from farstep_wire.v1 import inspection_pb2 as pb
from tests.server.harness import (
    WAIT_SECONDS,
    Inbox,
    Server,
    blueprint,
    contribution,
    host,
    join,
    serving,
    status_and_error,
    step,
)

BAD_NAMES = ["", " padded", "a" * 256, "line\nbreak"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as server:
        yield server


def directory(server: Server) -> Any:
    return server.app.directory


# Reading.


def test_the_server_says_what_it_is(server: Server) -> None:
    owner = host(directory(server))
    info = server.inspection.GetServer(pb.GetServerRequest())
    assert (info.version, info.protocol, info.device, info.torch_version) == (
        __version__, PROTOCOL, "cpu", torch.__version__,
    )  # fmt: skip
    assert (info.hosted, info.durable, info.draining) == (1, True, False)
    assert info.used_bytes == owner.hosted.engine.layout.arena.nbytes
    assert info.limit_bytes == directory(server).limit_bytes
    assert {"AdamW", "LBFGS", "ConjugateGradient"} <= set(info.optimizers)
    assert 0 < info.uptime_seconds < WAIT_SECONDS


def test_a_server_in_memory_says_so_and_refuses_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, durable=False) as server:
        owner = host(directory(server))
        assert not server.inspection.GetServer(pb.GetServerRequest()).durable
        for method, request in (
            (server.checkpoint.Save, cpb.SaveRequest(name="net")),
            (server.checkpoint.ListSnapshots, cpb.ListSnapshotsRequest(name="net")),
            (server.checkpoint.Restore, cpb.RestoreRequest(name="net")),
        ):
            status, error = server.fail(method, request)
            assert status is grpc.StatusCode.INTERNAL
            assert isinstance(error, StorageError)
            assert "--data-dir" in str(error)
        reply = server.inspection.Remove(pb.RemoveRequest(name="net", snapshots=True))
        assert (reply.version, reply.snapshots) == (0, 0)
        assert owner.over


def test_what_is_hosted_is_listed_by_name(server: Server) -> None:
    assert list(server.inspection.List(pb.ListRequest()).optimizers) == []
    host(directory(server), blueprint("b", ephemeral=True))
    first = host(directory(server), blueprint("a", policy=Sync(3)))
    join(first)
    one, other = server.inspection.List(pb.ListRequest()).optimizers
    assert (one.name, other.name, one.ephemeral, other.ephemeral) == ("a", "b", False, True)
    assert (one.optimizer, one.live_workers, one.parameters, one.elements) == ("SGD", 1, 1, 2)
    assert (one.policy.sync.workers, one.device, one.incarnation) == (3, "cpu", 1)
    assert one.lineage == first.hosted.identity.lineage


def test_a_description_agrees_with_a_local_twin(server: Server) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    twin = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    twin.load_state_dict(model.state_dict())
    local = torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.8, 0.9))
    remote = optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.9), remote=server.remote())
    for _ in range(3):
        for net, optimizer in ((model, remote), (twin, local)):
            optimizer.zero_grad()
            net(torch.ones(1, 2, 3, 3)).sum().backward()
            optimizer.step()
    message = server.inspection.Describe(pb.DescribeRequest(name="net", parameters=True))
    description = description_from_proto(message)
    assert (description.version, description.optimizer, description.group_sizes) == (3, "Adam", (4,))
    assert description.arguments["betas"] == (0.8, 0.9)
    assert description.groups[0]["lr"] == 0.01
    for row, parameter in zip(description.parameters, twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert row.spec.shape == tuple(parameter.shape)
        assert row.norm == pytest.approx(float(parameter.detach().norm()))
        assert row.gradient_norm == pytest.approx(float(parameter.grad.norm()))
        state = {entry.name: entry for entry in row.state}
        assert state["step"].value == 3.0
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].norm == pytest.approx(float(local.state[parameter][name].norm()))
            assert state[name].spec is not None
            assert state[name].spec.shape == tuple(parameter.shape)
    numbers = sum(parameter.numel() for parameter in twin.parameters())
    assert description.state_bytes == 4 * (2 * numbers + 4)
    assert description.last_step.total_seconds() > 0
    (worker,) = description.workers
    assert (worker.id, worker.standing, worker.version, worker.contributions) == ("0", "computing", 3, 3)
    assert 0 < worker.lease.total_seconds() <= 30
    remote.remote.close()
    assert server.inspection.Describe(pb.DescribeRequest(name="net")).workers[0].standing == pb.Worker.STANDING_LEFT


def test_standings_and_what_has_no_norm(server: Server) -> None:
    owner = host(directory(server), blueprint(policy=Sync(2)))
    join(owner)
    join(owner, "1")
    waiting = Inbox()
    owner.post(contribution(owner, waiting, 1))
    description = server.inspection.Describe(pb.DescribeRequest(name="net", parameters=True))
    standings = [(worker.id, worker.standing) for worker in description.workers]
    assert standings == [("0", pb.Worker.STANDING_WAITING), ("1", pb.Worker.STANDING_COMPUTING)]
    assert not description.parameters[0].HasField("gradient_norm")
    assert list(description.parameters[0].state) == []
    step(owner, 1, worker="1", abstain=True)
    assert isinstance(waiting.take(), ev.StepReply)
    after = server.inspection.Describe(pb.DescribeRequest(name="net", parameters=True))
    assert [(worker.contributions, worker.abstentions) for worker in after.workers] == [(1, 0), (0, 1)]
    assert after.parameters[0].gradient_norm == pytest.approx(2**0.5)
    assert not server.inspection.Describe(pb.DescribeRequest(name="net")).parameters


def test_reflection_lists_all_services(server: Server) -> None:
    services = set(ProtoReflectionDescriptorDatabase(server.channel).get_services())
    names = {f"farstep.v1.{name}Service" for name in ("Optimizer", "Inspection", "Checkpoint")}
    assert names | {"grpc.health.v1.Health"} <= services


# Failures.


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be_one_is_an_invalid_request(server: Server, name: str) -> None:
    for method, request in (
        (server.inspection.Describe, pb.DescribeRequest(name=name)),
        (server.inspection.Watch, pb.WatchRequest(name=name)),
        (server.inspection.Remove, pb.RemoveRequest(name=name)),
        (server.checkpoint.Save, cpb.SaveRequest(name=name)),
    ):
        status, error = server.fail(method, request)
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, InvalidRequestError)
        assert repr(name)[:20] in str(error)


def test_an_unknown_name_is_not_found(server: Server) -> None:
    host(directory(server), blueprint("here"))
    for method, request in (
        (server.inspection.Describe, pb.DescribeRequest(name="gone")),
        (server.inspection.Watch, pb.WatchRequest(name="gone")),
        (server.inspection.Remove, pb.RemoveRequest(name="gone")),
        (server.inspection.Remove, pb.RemoveRequest(name="gone", snapshots=True)),
        (server.checkpoint.Save, cpb.SaveRequest(name="gone")),
        (server.checkpoint.ListSnapshots, cpb.ListSnapshotsRequest(name="gone")),
        (server.checkpoint.Restore, cpb.RestoreRequest(name="gone")),
    ):
        status, error = server.fail(method, request)
        assert status is grpc.StatusCode.NOT_FOUND
        assert isinstance(error, NotFoundError)
        assert "'gone'" in str(error)


def test_a_defect_is_internal_and_leaves_a_traceback_in_the_log(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down() -> None:
        raise ZeroDivisionError("of some kind")

    monkeypatch.setattr(directory(server), "owners", break_down)
    status, error = server.fail(server.inspection.List, pb.ListRequest())
    assert status is grpc.StatusCode.INTERNAL
    assert isinstance(error, InternalError)
    assert "ZeroDivisionError: of some kind" in str(error)
    (record,) = [record for record in caplog.records if record.getMessage() == "call_failed"]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
    monkeypatch.undo()


def test_a_long_text_still_arrives(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        host(directory(server), blueprint(f"{number}-" + "ü" * 100))
    status, error = server.fail(server.inspection.Describe, pb.DescribeRequest(name="gone"))
    assert status is grpc.StatusCode.NOT_FOUND
    assert isinstance(error, NotFoundError)
    assert str(error).startswith("there is no hosted optimizer 'gone'; hosted here: '0-ü")
    assert str(error).endswith(" …")


def test_a_table_that_fits_no_message_is_refused_in_words(server: Server) -> None:
    keys = [f"{number:04}" + "k" * 2000 for number in range(MESSAGE_BYTES // 2000)]
    spec = TensorSpec.contiguous(torch.float32, ())
    layout = Layout(tuple(ParameterSpec(key, spec, 0) for key in keys), (len(keys),))
    host(directory(server), blueprint(layout=layout))
    status, error = server.fail(server.inspection.Describe, pb.DescribeRequest(name="net", parameters=True))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(error, ResourceExhaustedError)
    assert "without the table" in str(error)
    assert server.inspection.Describe(pb.DescribeRequest(name="net")).summary.parameters == len(keys)


# Watching.


class Watch:
    """A watch whose descriptions are read on a thread of its own."""

    def __init__(self, server: Server, interval_ms: int, *, parameters: bool = False) -> None:
        request = pb.WatchRequest(name="net", interval_ms=interval_ms, parameters=parameters)
        self.call: Any = server.inspection.Watch(request, timeout=WAIT_SECONDS)

    def next(self) -> pb.Description:
        return next(self.call)

    def end(self) -> FarstepError:
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return status_and_error(error)[1]
        raise AssertionError("the watch ended without a word")


def test_a_watch_tells_each_change(server: Server) -> None:
    owner = host(directory(server))
    watch = Watch(server, 1, parameters=True)
    first = watch.next()
    assert (first.summary.version, len(first.workers), len(first.parameters)) == (0, 0, 1)
    join(owner)
    assert len(watch.next().workers) == 1
    for sequence in (1, 2, 3):
        step(owner, sequence)
        assert watch.next().summary.version == sequence
    owner.ask(lambda ticket: ev.Leave(ticket, "0", 1), ev.DoneReply, WAIT_SECONDS)
    assert watch.next().summary.live_workers == 0
    watch.call.cancel()


def test_a_watch_keeps_its_interval_and_loses_no_change(server: Server) -> None:
    owner = host(directory(server))
    join(owner)
    watch = Watch(server, 300)
    watch.next()
    begun = time.monotonic()
    for sequence in range(1, 6):
        step(owner, sequence)
    assert watch.next().summary.version == 5
    assert time.monotonic() - begun >= 0.25
    watch.call.cancel()


def test_a_watch_ends_when_what_it_watches_is_removed(server: Server) -> None:
    host(directory(server))
    watch = Watch(server, 60_000)
    watch.next()
    server.inspection.Remove(pb.RemoveRequest(name="net"))
    assert isinstance(watch.end(), RemovedError)


def test_a_watch_ends_when_the_last_worker_of_an_ephemeral_one_leaves(server: Server) -> None:
    owner = host(directory(server), blueprint(ephemeral=True))
    join(owner)
    watch = Watch(server, 60_000)
    watch.next()
    owner.post(ev.Leave(None, "0", 1))
    assert isinstance(watch.end(), RemovedError)


def test_a_watch_ends_when_the_server_drains(server: Server) -> None:
    host(directory(server))
    watch = Watch(server, 60_000)
    watch.next()
    draining = threading.Thread(target=server.drain)
    draining.start()
    assert isinstance(watch.end(), DrainingError)
    draining.join(WAIT_SECONDS)


def test_watchers_that_go_give_their_threads_back(server: Server) -> None:
    owner = host(directory(server))
    # More than the server has threads for sessions and calls together.
    for _ in range(3):
        watches = [Watch(server, 60_000) for _ in range(30)]
        for watch in watches:
            watch.next()
            watch.call.cancel()
        with owner.changed:
            assert owner.changed.wait_for(lambda: not owner.changed._waiters, WAIT_SECONDS)  # type: ignore[attr-defined]
    assert server.inspection.Describe(pb.DescribeRequest(name="net")).summary.version == 0


# Removing.


def test_removal_keeps_snapshots_unless_they_are_to_go(server: Server) -> None:
    owner = host(directory(server))
    join(owner)
    step(owner, 1)
    saved = server.checkpoint.Save(cpb.SaveRequest(name="net", tag="best"))
    assert (saved.version, saved.tag, saved.lineage) == (1, "best", owner.hosted.identity.lineage)
    assert saved.size_bytes > 0
    assert abs(saved.created_unix - time.time()) < WAIT_SECONDS
    reply = server.inspection.Remove(pb.RemoveRequest(name="net"))
    assert (reply.version, reply.snapshots) == (1, 0)
    found = server.checkpoint.ListSnapshots(cpb.ListSnapshotsRequest(name="net")).snapshots
    assert [info.tag for info in found] == ["best"]
    server.restart()
    assert not server.inspection.List(pb.ListRequest()).optimizers
    back = server.checkpoint.Restore(cpb.RestoreRequest(name="net"))
    assert (back.version, back.incarnation, back.lineage) == (1, 2, saved.lineage)
    reply = server.inspection.Remove(pb.RemoveRequest(name="net", snapshots=True))
    assert (reply.version, reply.snapshots) == (1, 2)
    assert isinstance(server.fail(server.checkpoint.Restore, cpb.RestoreRequest(name="net"))[1], NotFoundError)
    assert not [path for path in (server.folder / "data").iterdir() if path.is_dir()]


def test_snapshots_of_what_is_not_hosted_can_be_removed(server: Server) -> None:
    owner = host(directory(server))
    join(owner)
    step(owner, 1)
    server.checkpoint.Save(cpb.SaveRequest(name="net"))
    server.inspection.Remove(pb.RemoveRequest(name="net"))
    reply = server.inspection.Remove(pb.RemoveRequest(name="net", snapshots=True))
    assert (reply.version, reply.snapshots) == (1, 1)


def test_a_worker_learns_that_its_optimizer_was_removed(server: Server) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    remote: Remote = server.remote()
    optimizer = optim.SGD([parameter], lr=0.1, remote=remote)
    server.inspection.Remove(pb.RemoveRequest(name="net"))
    parameter.grad = torch.ones(2)
    with pytest.raises(RemovedError, match="'net'"):
        optimizer.step()
