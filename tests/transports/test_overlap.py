"""Transfers that overlap with computation: the bits of those that do not, whatever happens in between."""

from __future__ import annotations

import copy
import io
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import Remote, Sync, Timeouts, errors, optim
from farstep_wire.v1 import optimizer_pb2 as pb
from tests.data_parallel.crew import Worker, crew, mean
from tests.parity import twins
from tests.support.proxy import Proxy
from tests.support.raw import RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess

WIDTH = 400
LAYERS = 6
BUCKET_BYTES = 256 * 1024
SECONDS = 30


class Direct(nn.Module):
    """Reads a child's parameters without calling it, as attention does with its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)


def _model(*, direct: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    if direct:
        layers.append(Direct())
    return nn.Sequential(*layers)


def _loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(2, WIDTH, generator=generator)).square().sum()


def _remote(address: str, name: str, **how: Any) -> Remote:
    return Remote(address, name=name, transport="grpc", timeouts=Timeouts(SECONDS, SECONDS, SECONDS), **how)


def _adam(address: str, name: str, model: nn.Module, **how: Any) -> Any:
    own: Any = optim.Adam(model.parameters(), remote=_remote(address, name, **how))
    own.remote.overlap(model, bucket_bytes=BUCKET_BYTES)
    return own


Train = Callable[[nn.Module, Any, int], None]


def _plain(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    _loss(model, step).backward()
    optimizer.step()


def _clipped(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    _loss(model, step).backward()
    if step % 2:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def _accumulated(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad(set_to_none=step % 2 == 0)
    for part in range(3):
        _loss(model, 10 * step + part).backward()
    optimizer.step()


def _thought_again(model: nn.Module, optimizer: Any, step: int) -> None:
    _loss(model, 100 + step).backward()
    optimizer.zero_grad()
    _loss(model, step).backward()
    next(iter(model.parameters())).grad = None
    optimizer.step()


def _kept(model: nn.Module, optimizer: Any, step: int) -> None:
    """Gradients are never reset; some come from elsewhere."""
    _loss(model, step).backward()
    parameter = list(model.parameters())[3]
    assert parameter.grad is not None
    parameter.grad = parameter.grad * 0.5
    optimizer.step()


def _edited(model: nn.Module, optimizer: Any, step: int) -> None:
    _plain(model, optimizer, step)
    if isinstance(optimizer, optim.Adam):
        optimizer.remote.wait()  # type: ignore[attr-defined]
    for parameter in model.parameters():
        parameter.data.clamp_(-0.04, 0.04)


def _evaluated(model: nn.Module, optimizer: Any, step: int) -> None:
    _plain(model, optimizer, step)
    with torch.no_grad():
        _loss(model, 1000 + step)


@pytest.mark.parametrize(
    "train",
    [_plain, _clipped, _accumulated, _thought_again, _kept, _edited, _evaluated],
    ids=lambda train: train.__name__,
)
@pytest.mark.parametrize("direct", [False, True], ids=["called", "read-directly"])
def test_bits(server: ServerProcess, name: str, train: Train, direct: bool) -> None:
    ours, theirs = _model(direct=direct), _model(direct=direct)
    own, local = _adam(server.address, name, ours), torch.optim.Adam(theirs.parameters())
    for step in range(5):
        train(ours, own, step)
        train(theirs, local, step)
        for key, value in ours.state_dict().items():
            assert twins.same_bits(value, theirs.state_dict()[key]), f"step {step}: {key} differs"
    own.remote.close()


def test_nothing_is_late_where_that_is_not_wanted(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(), _model()
    own: Any = optim.Adam(ours.parameters(), remote=_remote(server.address, name))
    own.remote.overlap(late_parameters=False)
    local = torch.optim.Adam(theirs.parameters())
    for step in range(4):
        _plain(ours, own, step)
        _plain(theirs, local, step)
        twins.assert_same_parameters(ours.parameters(), theirs.parameters(), f"step {step}")
    own.remote.close()


def test_asked_for_in_remote(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(), _model()
    own: Any = optim.SGD(ours.parameters(), lr=0.1, remote=_remote(server.address, name, overlap=True))
    local = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for step in range(4):
        _plain(ours, own, step)
        _plain(theirs, local, step)
    own.remote.wait()
    twins.assert_same_parameters(ours.parameters(), theirs.parameters(), "after 4 steps")
    own.remote.close()


def test_several_workers(server: ServerProcess, name: str) -> None:
    models = {number: _model() for number in range(3)}
    numbers = iter(range(3))
    theirs = _model()
    local = torch.optim.Adam(theirs.parameters())
    with crew(
        server.address, name, 3, lambda: list(models[next(numbers)].parameters()), "Adam", transport="grpc"
    ) as own:

        def act(worker: Worker, step: int) -> None:
            model = models[worker.number]
            worker.optimizer.zero_grad()
            _loss(model, 10 * step + worker.number).backward()
            worker.optimizer.step()

        for worker in own.workers:
            worker.params = list(models[worker.number].parameters())
            worker.optimizer.remote.overlap(models[worker.number], bucket_bytes=BUCKET_BYTES)
        for step in range(4):
            gradients = [
                list(torch.autograd.grad(_loss(theirs, 10 * step + number), list(theirs.parameters())))
                for number in range(3)
            ]
            own.together(act, step)
            for parameter, gradient in zip(theirs.parameters(), mean(gradients), strict=True):
                parameter.grad = gradient
            local.step()
            for worker in own.workers:
                worker.optimizer.remote.wait()
                twins.assert_same_parameters(worker.params, theirs.parameters(), f"step {step}, worker {worker.number}")


# What overlaps.


def _await_blackhole(proxy: Proxy) -> None:
    deadline = time.monotonic() + SECONDS
    while not proxy.fired["blackhole"]:
        assert time.monotonic() < deadline, "the messages have not come that are to be held back"
        time.sleep(0.002)


def _await_sent(own: Any, nbytes: int) -> None:
    deadline = time.monotonic() + SECONDS
    while own.remote.traffic.sent < nbytes:
        assert time.monotonic() < deadline, f"{own.remote.traffic.sent} bytes were sent, {nbytes} are due"
        time.sleep(0.002)


def test_gradients_leave_before_the_step(server: ServerProcess, name: str) -> None:
    model = _model()
    own = _adam(server.address, name, model)
    total = sum(parameter.nbytes for parameter in model.parameters())
    before = own.remote.traffic.sent
    _loss(model, 0).backward()
    _await_sent(own, before + total - BUCKET_BYTES)
    own.step()
    assert own.remote.traffic.sent - before < total * 1.1, "none of them twice"
    own.remote.close()


def test_none_leave_where_they_are_to_stay(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(), _model()
    own, local = _adam(server.address, name, ours), torch.optim.Adam(theirs.parameters())
    total = sum(parameter.nbytes for parameter in ours.parameters())
    before = own.remote.traffic.sent
    with own.remote.no_sync():
        for part in range(3):
            _loss(ours, part).backward()
    _loss(ours, 3).backward()
    own.step()
    assert own.remote.traffic.sent - before < total * 1.1, "four backwards, and their sum once"
    for part in range(4):
        _loss(theirs, part).backward()
    local.step()
    twins.assert_same_parameters(ours.parameters(), theirs.parameters(), "after a step")
    own.remote.close()


def test_a_model_trains_on_with_what_has_come(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(), _model()
    local = torch.optim.Adam(theirs.parameters())
    with Proxy(server.address, measure=True) as proxy:
        own = _adam(proxy.address, name, ours)
        for step in range(2):
            _plain(ours, own, step)
            _plain(theirs, local, step)
        _loss(ours, 2).backward()
        _plain(theirs, local, 2)
        own.zero_grad()
        _loss(ours, 2).backward()
        own.remote.wait()
        # The third step's parameters take four messages; two of them come through, since the proxy reads 1 MiB at most.
        proxy.blackhole_at_reply(proxy.replies + 4)
        own.step()
        _await_blackhole(proxy)
        assert own.remote.version == 3
        first: Any = ours[0]
        seen = first(torch.ones(1, WIDTH))
        assert torch.equal(seen, theirs[0](torch.ones(1, WIDTH))), "its parameters are there"
        assert not torch.equal(ours[-1].weight, theirs[-1].weight), "these are not"
        proxy.heal()
        assert torch.equal(ours(torch.ones(1, WIDTH)), theirs(torch.ones(1, WIDTH))), "the last ones were awaited"
        own.remote.close()


def test_a_parameter_that_is_read_directly_is_awaited(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(direct=True), _model(direct=True)
    own, local = _adam(server.address, name, ours), torch.optim.Adam(theirs.parameters())
    for step in range(4):
        _plain(ours, own, step)
        _plain(theirs, local, step)
        last: Any = ours[-1]
        assert torch.equal(last.inner.weight, theirs[-1].inner.weight), "and it is the last to come"  # type: ignore[union-attr]
    own.remote.close()


def test_clipping_every_step_is_found_out(server: ServerProcess, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "farstep")
    model = _model()
    own = _adam(server.address, name, model)
    total = sum(parameter.nbytes for parameter in model.parameters())
    sent = []
    for step in range(5):
        before = own.remote.traffic.sent
        own.zero_grad()
        _loss(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        own.step()
        sent.append(own.remote.traffic.sent - before)
    assert sent[0] > 1.5 * total
    assert sent[-1] < 1.1 * total
    assert sum("in vain" in record.message for record in caplog.records) == 1
    own.remote.close()


# Faults.


def test_parameters_that_break_off_are_taken_anew(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(), _model()
    local = torch.optim.Adam(theirs.parameters())
    with Proxy(server.address, message_bytes=50_000) as proxy:
        own = _adam(proxy.address, name, ours)
        for step in range(6):
            if step >= 2:
                proxy.arm("cut reply")
            _plain(ours, own, step)
            _plain(theirs, local, step)
        own.remote.wait()
        twins.assert_same_parameters(ours.parameters(), theirs.parameters(), "after 6 steps")
        assert proxy.fired["cut reply"] == 4
        assert own.remote.version == 6
        own.remote.close()


def test_gradients_that_break_off_are_sent_anew(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(), _model()
    local = torch.optim.Adam(theirs.parameters())
    with Proxy(server.address, message_bytes=50_000) as proxy:
        own = _adam(proxy.address, name, ours)
        for step in range(6):
            if step >= 2:
                proxy.arm("cut request")
            _plain(ours, own, step)
            _plain(theirs, local, step)
        own.remote.wait()
        twins.assert_same_parameters(ours.parameters(), theirs.parameters(), "after 6 steps")
        assert proxy.fired["cut request"] == 4
        assert own.remote.version == 6
        own.remote.close()


def test_a_server_that_is_gone_is_said_so_by_whoever_waits(server: ServerProcess, name: str) -> None:
    model = _model()
    with Proxy(server.address, measure=True) as proxy:
        remote = Remote(proxy.address, name=name, transport="grpc", timeouts=Timeouts(SECONDS, 2, 1))
        own: Any = optim.Adam(model.parameters(), remote=remote)
        own.remote.overlap(model, bucket_bytes=BUCKET_BYTES)
        for step in range(2):
            _plain(model, own, step)
        own.zero_grad()
        _loss(model, 2).backward()
        proxy.blackhole_at_reply(proxy.replies + 4)
        own.step()
        _await_blackhole(proxy)
        with pytest.raises(errors.UnavailableError):
            model(torch.ones(1, WIDTH))
        proxy.heal()
        own.remote.wait()
        _plain(model, own, 3)
        assert own.remote.version == 4
        own.remote.close()


# Copies and groups.


def test_copies_of_the_model_are_nobodys(server: ServerProcess, name: str) -> None:
    model = _model()
    own = _adam(server.address, name, model)
    _plain(model, own, 0)
    own.remote.wait()
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        other(torch.ones(1, WIDTH)).sum().backward()
        twins.assert_same_parameters(other.parameters(), model.parameters(), "copied")
    own.remote.close()


def test_a_group_that_is_added(server: ServerProcess, name: str) -> None:
    ours, theirs = _model(), _model()
    more, others = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    others.load_state_dict(more.state_dict())
    own, local = _adam(server.address, name, ours), torch.optim.Adam(theirs.parameters())
    for step in range(4):
        if step == 2:
            own.add_param_group({"params": more.parameters(), "lr": 0.01})
            local.add_param_group({"params": others.parameters(), "lr": 0.01})
            ours, theirs = nn.Sequential(ours, more), nn.Sequential(theirs, others)
        _plain(ours, own, step)
        _plain(theirs, local, step)
    own.remote.wait()
    twins.assert_same_parameters(ours.parameters(), theirs.parameters(), "after 4 steps")
    own.remote.close()


# Bad input.


def test_what_cannot_overlap_is_refused(server: ServerProcess, name: str) -> None:
    model = _model()
    own: Any = optim.SGD(model.parameters(), lr=0.1, remote=_remote(server.address, name))
    with pytest.raises(TypeError, match="takes modules, not int"):
        own.remote.overlap(3)
    with pytest.raises(ValueError, match="bucket_bytes must be positive, not 0"):
        own.remote.overlap(bucket_bytes=0)
    own.remote.close()
    driven: Any = optim.LBFGS(model.parameters(), remote=_remote(server.address, name + "-lbfgs"))
    with pytest.raises(errors.ConfigurationError, match="LBFGS asks its closure"):
        driven.remote.overlap()
    driven.remote.close()


@pytest.mark.parametrize(
    ("parameters", "nbytes", "word"),
    [
        ([2], 64, "parameter 2; there are 2"),
        ([0, 0], 128, "stands twice"),
        ([0, 1], 64, "64 bytes are declared"),
        ([1], 1 << 60, "bytes are declared"),
    ],
)
def test_stages_that_make_no_sense(
    server: ServerProcess, name: str, parameters: list[int], nbytes: int, word: str
) -> None:
    layout = flat_layout(16, 8)
    with RawSession(server.address) as session:
        session.attach(attach_message(name, policy=Sync(1)), layout_bytes(layout), bytes(layout.arena.nbytes))
        session.send_frame(request=9, stage=pb.Stage(parameters=parameters), total_bytes=nbytes, payload=b"")
        assert word in str(session.refusal())
    with RawSession(server.address) as session:
        attached = session.attach(attach_message(name + "-2", policy=Sync(1)), layout_bytes(layout), bytes(128))
        assert attached.version == 0, "the server goes on"


def test_a_contribution_whose_gradients_have_not_come(server: ServerProcess, name: str) -> None:
    layout = flat_layout(16, 8)
    with RawSession(server.address) as session:
        epoch = session.attach(attach_message(name, policy=Sync(1)), layout_bytes(layout), bytes(128)).epoch
        session.send(bytes(64), stage=pb.Stage(parameters=[0]))
        contribution = pb.Contribution(epoch=epoch, sequence=1, incarnation=1, staged=True)
        session.send(contribution=contribution)
        error = session.refusal()
        assert isinstance(error, errors.InvalidRequestError)
        assert "is said to have come before" in str(error)
        session.send(bytes(128), stage=pb.Stage(parameters=[1, 0]))
        contribution.sequence = 2
        frame, _ = session.ask(contribution=contribution)
        assert frame.stepped.version == 1
        contribution.sequence, contribution.version = 3, 1
        session.send(contribution=contribution)
        assert "is said to have come before" in str(session.refusal()), "once is once"
