"""What survives a server: drained, killed, removed, damaged. Hosted optimizers without a network."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farstep_server.app import build_registry
from farstep_server.core import events as ev
from farstep_server.core.records import Outcome
from farstep_server.hosting import snapshots as module
from farstep_server.hosting.directory import Directory
from farstep_server.hosting.owner import Owner
from farstep_server.hosting.removed import RemovedLineages
from farstep_server.hosting.snapshots import Snapshotter
from farstep_server.store import SnapshotInfo, SnapshotStore, SnapshotWriteError
from farstep_wire.errors import (
    AlreadyExistsError,
    Applied,
    DrainingError,
    InvalidRequestError,
    LayoutMismatchError,
    MismatchError,
    NotFoundError,
    RemovedError,
    StorageError,
)
from farstep_wire.layout import Layout, ParameterSpec, TensorSpec
from farstep_wire.policy import Async, Sync
from tests.server.harness import (
    WAIT_SECONDS,
    Inbox,
    Machine,
    blueprint,
    contribution,
    host,
    join,
    parameters,
    step,
)

DRAINING = DrainingError("the server is shutting down", applied=Applied.NO)
Boot = Callable[..., Machine]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Starts a machine on the test's one data directory."""
    machines = []

    def start(*optimizers: str) -> Machine:
        machines.append(Machine(tmp_path / "data", *optimizers))
        return machines[-1]

    yield start
    for machine in machines:
        machine.crash()


def versions(machine: Machine, name: str = "net") -> list[tuple[int, str | None]]:
    return [(info.version, info.tag) for info in machine.snapshots.stored(name)]


def damage(machine: Machine, version: int) -> None:
    """Flip a byte of a parameter."""
    for path in machine.root.glob(f"*/*-v{version}*/tensors-*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


def refuse_writes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(**arguments: Any) -> SnapshotInfo:
        raise SnapshotWriteError(machine.root / "x", 100, 7, "No space left on device")

    monkeypatch.setattr(machine.store, "save", save)


# Drained and started again.


def test_what_is_drained_is_hosted_again_as_it_was(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(policy=Sync(1)))
    join(owner)
    for sequence in (1, 2, 3):
        step(owner, sequence, edits={0: ({"lr": 0.25}, ())})
    before, lineage = parameters(owner), owner.hosted.identity.lineage
    assert machine.suspend(DRAINING)
    again = boot().directory.find("net")
    assert (again.hosted.version, again.hosted.incarnation, again.hosted.identity.lineage) == (3, 1, lineage)
    assert torch.equal(parameters(again)[0], before[0])
    assert again.hosted.engine.optimizer.param_groups[0]["lr"] == 0.25
    # The momentum is there too: the next step is the one that the first server would have made.
    reply = join(again, lineage=lineage)
    assert (reply.resumed, reply.settled, reply.epoch) == (True, 3, 2)
    step(again, 4, epoch=2)
    local = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([local], lr=0.5, momentum=0.9)
    for _ in range(4):
        optimizer.param_groups[0]["lr"] = 0.25
        local.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(parameters(again)[0], local.detach())


def test_a_retry_after_a_restart_gets_the_recorded_answer(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(policy=Sync(2)))
    join(owner)
    join(owner, "1")
    lost = Inbox()
    owner.post(contribution(owner, lost, 1))
    first = step(owner, 1, worker="1", abstain=True)
    assert (first.version, first.contributions) == (1, 1)
    machine.suspend(DRAINING)
    again = boot().directory.find("net")
    assert join(again, lineage=again.hosted.identity.lineage).settled == 1
    reply = step(again, 1, epoch=2, version=0)
    assert (reply.outcome, reply.version, reply.contributions) == (Outcome.COMMITTED, 1, 1)
    assert again.hosted.version == 1
    row = next(iter(again.hosted.members))
    assert (row.contributions, row.abstentions) == (1, 0)


def test_a_closure_driven_step_answers_a_retry_with_its_loss(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(optimizer="LBFGS", arguments={"max_iter": 1}, options=[{"lr": 1.0}]))
    join(owner)
    inbox, number = Inbox(), 0
    owner.post(contribution(owner, inbox, 1, closure=True))
    while isinstance(reply := inbox.take(), ev.EvaluateReply):
        staged = contribution(owner, inbox, 1).staged
        owner.post(ev.Evaluation(inbox, "0", 1, 1, number, torch.tensor(2.5), staged))
        number += 1
    assert isinstance(reply, ev.StepReply)
    machine.suspend(DRAINING)
    again = boot().directory.find("net")
    join(again, lineage=again.hosted.identity.lineage)
    retried = step(again, 1, epoch=2, version=0, closure=True)
    assert isinstance(retried.loss, torch.Tensor)
    assert torch.equal(retried.loss, torch.tensor(2.5))


def test_what_waits_at_the_drain_is_refused_and_counts_once_when_tried_again(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(policy=Sync(2)))
    join(owner)
    join(owner, "1")
    waiting = Inbox()
    owner.post(contribution(owner, waiting, 1, value=2.0))
    machine.suspend(DRAINING)
    refusal = waiting.take()
    assert isinstance(refusal, ev.Refusal)
    assert refusal.error.applied is Applied.NO
    again = boot().directory.find("net")
    assert (again.hosted.version, again.hosted.live_workers()) == (0, 2)
    for worker in ("0", "1"):
        join(again, worker, lineage=again.hosted.identity.lineage)
    retried = Inbox()
    again.post(contribution(again, retried, 1, epoch=2, value=2.0))
    assert step(again, 1, epoch=2, worker="1", value=4.0).version == 1
    assert torch.equal(parameters(again)[0], torch.full((2,), 1.0 - 0.5 * 3.0))


def test_nothing_is_acknowledged_behind_the_last_dump(boot: Boot) -> None:
    machine = boot()
    for number in range(20):
        owner = host(machine.directory, blueprint(f"net-{number}"))
        join(owner)
        acknowledged, begun = [], threading.Event()

        def work(owner: Owner = owner, acknowledged: list[int] = acknowledged, begun: threading.Event = begun) -> None:
            while True:
                inbox = Inbox()
                owner.post(contribution(owner, inbox, len(acknowledged) + 1))
                if not isinstance(reply := inbox.take(), ev.StepReply):
                    return
                acknowledged.append(reply.version)
                begun.set()

        worker = threading.Thread(target=work)
        worker.start()
        assert begun.wait(WAIT_SECONDS)
        dump = owner.suspend(DRAINING, WAIT_SECONDS)
        worker.join(WAIT_SECONDS)
        assert dump.version == acknowledged[-1] == len(acknowledged)
        assert dump.members[0].settled == dump.version


def test_what_arrives_right_behind_a_stop_is_refused(boot: Boot) -> None:
    owner = host(boot().directory)
    join(owner)
    answer, late = Inbox(), Inbox()
    plain, came = owner._turn, threading.Event()

    class Turn:
        """The owner's lock; the moment it is let go after the Stop, someone comes along."""

        def __enter__(self) -> None:
            plain.acquire()

        def __exit__(self, *_: object) -> None:
            plain.release()
            if not answer.empty and not came.is_set():
                came.set()
                owner.post(contribution(owner, late, 1))

        acquire, release = plain.acquire, plain.release

    owner._turn = Turn()  # type: ignore[assignment]
    owner.post(ev.Stop(answer, DRAINING, dump=True))
    assert isinstance(late.take(), ev.Refusal)
    assert owner.hosted.version == 0


def test_what_changes_without_a_step_is_saved_too(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    step(owner, 1)
    machine.snapshots.save("net", "")
    step(owner, 2, abstain=True, edits={0: ({"lr": 0.125}, ())})
    layout = Layout((ParameterSpec("v", TensorSpec.contiguous(torch.float32, (3,)), 0),), (1,))
    contents = torch.zeros(layout.arena.nbytes, dtype=torch.uint8)
    owner.ask(lambda ticket: ev.AddGroup(ticket, "0", 1, 3, layout, {"lr": 0.5}, contents), ev.DoneReply, WAIT_SECONDS)
    machine.suspend(DRAINING)
    again = boot().directory.find("net").hosted
    assert (again.version, len(again.engine.layout.parameters)) == (1, 2)
    assert again.engine.optimizer.param_groups[0]["lr"] == 0.125
    assert next(iter(again.members)).settled_sequence == 3


def test_state_comes_back_in_its_own_dtype(boot: Boot) -> None:
    # ASGD keeps float32 scalars beside float64 parameters, which load_state_dict would convert.
    layout = Layout((ParameterSpec("w", TensorSpec.contiguous(torch.float64, (2,)), 0),), (1,))
    machine = boot()
    owner = host(machine.directory, blueprint(optimizer="ASGD", arguments={}, options=[{}], layout=layout))
    join(owner)
    step(owner, 1)
    before = owner.hosted.engine.read_state()[0][1]
    machine.suspend(DRAINING)
    after = boot().directory.find("net").hosted.engine.read_state()[0][1]
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert before["eta"].dtype is not torch.float64


def test_a_drain_that_cannot_save_says_so(
    boot: Boot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = boot()
    host(machine.directory)
    refuse_writes(machine, monkeypatch)
    assert not machine.suspend(DRAINING)
    assert "snapshot_failed" in [record.getMessage() for record in caplog.records]


def test_creation_behind_a_drain_is_refused(boot: Boot) -> None:
    machine = boot()
    machine.suspend(DRAINING)
    with pytest.raises(DrainingError):
        host(machine.directory)


# On the interval.


def test_the_interval_saves_what_has_changed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(tmp_path)
    saved: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    plain = store.save

    def save(**arguments: Any) -> SnapshotInfo:
        info = plain(**arguments)
        saved.put((info.name, info.version))
        return info

    monkeypatch.setattr(store, "save", save)
    directory = Directory(build_registry(()), torch.device("cpu"), 30.0, 2**30)
    snapshots = Snapshotter(store, directory, 0.01)
    snapshots.start()
    idle, busy = host(directory, blueprint("idle")), host(directory, blueprint("busy"))
    assert {saved.get(timeout=WAIT_SECONDS) for _ in range(2)} == {("idle", 0), ("busy", 0)}
    join(busy)
    for sequence in (1, 2, 3):
        step(busy, sequence)
        assert saved.get(timeout=WAIT_SECONDS) == ("busy", sequence)
    snapshots.close()
    assert saved.empty()
    assert idle.hosted.version == 0
    directory.stop_all(DRAINING)


def test_a_failed_snapshot_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = SnapshotStore(tmp_path)
    outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()
    plain = store.save
    failures = iter([True, True, False])

    def save(**arguments: Any) -> SnapshotInfo:
        if next(failures, False):
            outcomes.put("failed")
            raise SnapshotWriteError(tmp_path, 100, 7, "No space left on device")
        info = plain(**arguments)
        outcomes.put("saved")
        return info

    monkeypatch.setattr(store, "save", save)
    directory = Directory(build_registry(()), torch.device("cpu"), 30.0, 2**30)
    snapshots = Snapshotter(store, directory, 0.01)
    host(directory)
    snapshots.start()
    assert [outcomes.get(timeout=WAIT_SECONDS) for _ in range(3)] == ["failed", "failed", "saved"]
    snapshots.close()
    assert [record.getMessage() for record in caplog.records].count("snapshot_failed") == 2
    directory.stop_all(DRAINING)


def test_a_closure_driven_step_does_not_keep_others_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.01)
    store = SnapshotStore(tmp_path)
    saved: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    plain = store.save

    def save(**arguments: Any) -> SnapshotInfo:
        info = plain(**arguments)
        saved.put((info.name, info.version))
        return info

    monkeypatch.setattr(store, "save", save)
    directory = Directory(build_registry(()), torch.device("cpu"), 30.0, 2**30)
    snapshots = Snapshotter(store, directory, 0.01)
    driven = host(directory, blueprint("a", optimizer="LBFGS", arguments={"max_iter": 1}, options=[{"lr": 1.0}]))
    join(driven)
    inbox = Inbox()
    driven.post(contribution(driven, inbox, 1, closure=True))
    assert isinstance(inbox.take(), ev.EvaluateReply)
    host(directory, blueprint("b"))
    snapshots.start()
    assert saved.get(timeout=WAIT_SECONDS) == ("b", 0)
    driven.post(ev.Evaluation(inbox, "0", 1, 1, 0, torch.tensor(1.0), contribution(driven, inbox, 1).staged))
    assert isinstance(inbox.take(), ev.StepReply)
    assert saved.get(timeout=WAIT_SECONDS) == ("a", 1)
    snapshots.close()
    directory.stop_all(DRAINING)


# Killed.


def test_a_crash_goes_back_to_the_newest_snapshot(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    step(owner, 1)
    machine.snapshots.save("net", "")
    step(owner, 2)
    machine.crash()
    assert boot().directory.find("net").hosted.version == 1


def test_a_damaged_snapshot_is_passed_over_and_logged(boot: Boot, caplog: pytest.LogCaptureFixture) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    for sequence in (1, 2):
        step(owner, sequence)
        machine.snapshots.save("net", "")
    machine.crash()
    damage(machine, 2)
    assert boot().directory.find("net").hosted.version == 1
    assert ("snapshot_damaged", logging.ERROR) in [(r.getMessage(), r.levelno) for r in caplog.records]


def test_a_name_that_cannot_be_restored_is_withheld_until_someone_decides(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    machine.snapshots.save("net", "")
    step(owner, 1)
    machine.snapshots.save("net", "good")
    machine.crash()
    damage(machine, 0)
    damage(machine, 1)
    machine = boot()
    for ask in (
        lambda: machine.directory.find("net"),
        lambda: machine.directory.find_again("net"),
        lambda: machine.directory.find_or_reserve(blueprint(), "0", "attach", 1.0, lambda: True),
    ):
        with pytest.raises(StorageError, match=r"'net' could not be restored.*damaged.*farstep rm"):
            ask()
    assert machine.snapshots.delete("net") == 2
    assert host(machine.directory).hosted.version == 0


def test_a_class_that_is_not_registered_any_more_withholds_the_name(boot: Boot, tmp_path: Path) -> None:
    machine = boot("Mine=torch.optim:SGD")
    host(machine.directory, blueprint(optimizer="Mine"))
    host(machine.directory, blueprint("other"))
    machine.suspend(DRAINING)
    machine = boot()
    assert machine.directory.find("other").hosted.version == 0
    with pytest.raises(StorageError, match="no optimizer 'Mine'"):
        machine.directory.find("net")
    machine.suspend(DRAINING)
    assert boot("Mine=torch.optim:SGD").directory.find("net").hosted.version == 0


def test_what_does_not_fit_into_memory_any_more_withholds_the_name(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = boot()
    host(machine.directory)
    machine.suspend(DRAINING)
    plain = Directory.__init__

    def small(self: Directory, *arguments: Any) -> None:
        plain(self, *arguments[:3], 10)

    monkeypatch.setattr(Directory, "__init__", small)
    with pytest.raises(StorageError, match=r"asks for 64 bytes of parameters; 10 of the server's 10 are left"):
        boot().directory.find("net")


# Removed, replaced, ended.


def test_a_removed_one_does_not_come_back_by_itself(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    step(owner, 1)
    machine.snapshots.save("net", "best")
    assert machine.directory.remove("net") == 1
    assert versions(machine) == [(1, "best")]
    machine.suspend(DRAINING)
    machine = boot()
    with pytest.raises(NotFoundError):
        machine.directory.find("net")
    with pytest.raises(RemovedError):
        machine.directory.find_again("net")
    # A new one of the same name is another lineage, and does come back.
    lineage = host(machine.directory).hosted.identity.lineage
    machine.suspend(DRAINING)
    again = boot().directory.find("net").hosted
    assert (again.version, again.identity.lineage) == (0, lineage)


def test_a_removed_one_is_hosted_again_by_a_restore_and_stays(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    step(owner, 1)
    machine.snapshots.save("net", "best")
    for _ in range(2):
        machine.snapshots.restore("net", "best", None)
    before = parameters(owner)
    assert owner.hosted.incarnation == 3
    machine.directory.remove("net")
    machine.suspend(DRAINING)
    machine = boot()
    info = machine.snapshots.restore("net", "best", None)
    assert (info.version, info.tag, info.incarnation, info.lineage) == (1, "best", 4, owner.hosted.identity.lineage)
    again = machine.directory.find("net")
    assert torch.equal(parameters(again)[0], before[0])
    assert again.hosted.live_workers() == 0
    machine.crash()
    assert boot().directory.find("net").hosted.incarnation == 4


def test_a_replaced_one_does_not_come_back(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    step(owner, 1)
    machine.snapshots.save("net", "")
    assert machine.directory.find_or_reserve(blueprint(), "0", "replace", 1.0, lambda: True) is None
    machine.crash()  # before the new one was created
    with pytest.raises(NotFoundError):
        boot().directory.find("net")


def test_an_ephemeral_one_that_has_ended_leaves_nothing(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(ephemeral=True))
    join(owner)
    step(owner, 1)
    machine.snapshots.save("net", "kept-while-it-lives")
    owner.post(ev.Leave(None, "0", 1))
    with owner.changed:
        assert owner.changed.wait_for(lambda: owner.over, WAIT_SECONDS)
    assert versions(machine) == []
    assert list(machine.root.glob("*-v*")) == []


def test_an_ephemeral_one_lives_on_through_a_restart_while_its_worker_does(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(ephemeral=True))
    join(owner)
    step(owner, 1)
    machine.suspend(DRAINING)
    machine = boot()
    again = machine.directory.find("net")
    reply = join(again, lineage=again.hosted.identity.lineage)
    assert (reply.resumed, reply.version) == (True, 1)
    again.post(ev.Leave(None, "0", reply.epoch))
    with again.changed:
        assert again.changed.wait_for(lambda: again.over, WAIT_SECONDS)
    assert versions(machine) == []


def test_a_snapshot_on_its_way_does_not_outlive_its_removal(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(ephemeral=True))
    reply = owner.ask(ev.TakeDump, ev.DumpReply, WAIT_SECONDS)
    machine.directory.remove("net")
    with pytest.raises(RemovedError):
        machine.snapshots._write(owner, reply.dump, "")
    assert versions(machine) == []


def test_the_note_of_removals_is_read_or_the_start_fails(tmp_path: Path) -> None:
    (tmp_path / "removed.json").write_text('{"format": 1, "removed": []}')
    with pytest.raises(StorageError, match=r"removed\.json cannot be read"):
        RemovedLineages(tmp_path)


# Rolled back.


def test_a_rollback_begins_a_new_incarnation_and_survives_a_crash(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    step(owner, 1)
    machine.snapshots.save("net", "early")
    early = parameters(owner)
    step(owner, 2)
    step(owner, 3)
    machine.snapshots.save("net", "")
    info = machine.snapshots.restore("net", "", 1)
    assert (info.version, info.tag, info.incarnation) == (1, "early", 2)
    assert torch.equal(parameters(owner)[0], early[0])
    machine.crash()
    again = boot().directory.find("net")
    assert (again.hosted.version, again.hosted.incarnation) == (1, 2)
    assert torch.equal(parameters(again)[0], early[0])


def test_what_waits_when_it_is_rolled_back_is_not_used_and_not_counted_later(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(policy=Sync(2)))
    join(owner)
    join(owner, "1")
    machine.snapshots.save("net", "start")
    waiting = Inbox()
    owner.post(contribution(owner, waiting, 1))
    machine.snapshots.restore("net", "start", None)
    reply = waiting.take()
    assert isinstance(reply, ev.StepReply)
    assert reply.outcome is Outcome.ROLLED_BACK
    assert step(owner, 1).outcome is Outcome.ROLLED_BACK  # the answer was lost, and is asked for again
    assert owner.hosted.version == 0


def test_a_rollback_that_cannot_be_saved_says_that_it_took_effect(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    machine.snapshots.save("net", "start")
    step(owner, 1)
    refuse_writes(machine, monkeypatch)
    with pytest.raises(StorageError, match="was rolled back to version 0, but that could not be saved") as caught:
        machine.snapshots.restore("net", "start", None)
    assert caught.value.applied is Applied.YES
    assert owner.hosted.version == 0


def test_what_a_snapshot_cannot_replace_is_left_alone(boot: Boot) -> None:
    machine = boot()
    host(machine.directory)
    machine.snapshots.save("net", "sgd")
    machine.directory.remove("net")
    other = Layout((ParameterSpec("w", TensorSpec.contiguous(torch.float32, (3,)), 0),), (1,))
    host(machine.directory, blueprint(layout=other))
    with pytest.raises(LayoutMismatchError, match=r"hosted as float32\[3\]"):
        machine.snapshots.restore("net", "sgd", None)
    machine.directory.remove("net")
    owner = host(machine.directory, blueprint(optimizer="Adam", arguments={}, options=[{}]))
    with pytest.raises(MismatchError, match="hosts Adam; the snapshot of version 0 is of SGD"):
        machine.snapshots.restore("net", "sgd", None)
    assert owner.hosted.incarnation == 1


def test_tags_move_and_versions_are_found(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    join(owner)
    machine.snapshots.save("net", "best")
    step(owner, 1)
    info = machine.snapshots.save("net", "best")
    assert (info.version, info.tag) == (1, "best")
    assert versions(machine) == [(1, "best")]
    with pytest.raises(NotFoundError, match="no snapshot with tag 'worst'"):
        machine.snapshots.restore("net", "worst", None)
    with pytest.raises(NotFoundError, match="no snapshot with version 7"):
        machine.snapshots.restore("net", "", 7)
    with pytest.raises(InvalidRequestError, match=r"\.\./up"):
        machine.snapshots.save("net", "../up")
    with pytest.raises(NotFoundError):
        machine.snapshots.save("unknown", "")
    with pytest.raises(NotFoundError):
        machine.snapshots.list("unknown")


def test_a_name_is_hosted_once(boot: Boot) -> None:
    machine = boot()
    owner = host(machine.directory)
    dump = owner.ask(ev.TakeDump, ev.DumpReply, WAIT_SECONDS).dump
    with pytest.raises(AlreadyExistsError):
        machine.directory.adopt(dump)
    machine.directory.remove("net")
    assert machine.directory.find_or_reserve(blueprint(), "0", "attach", 1.0, lambda: True) is None
    with pytest.raises(AlreadyExistsError):
        machine.directory.adopt(dump)


def test_a_failed_write_leaves_the_optimizer_to_go_on(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = boot()
    owner = host(machine.directory, blueprint(policy=Async()))
    join(owner)
    refuse_writes(machine, monkeypatch)
    with pytest.raises(StorageError, match="No space left on device; it needs 100 bytes, free there: 7"):
        machine.snapshots.save("net", "")
    assert step(owner, 1).version == 1
