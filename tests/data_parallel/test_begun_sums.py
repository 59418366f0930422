"""A round of large gradients is added up while it waits: the same bits, whoever comes late, drops out or comes again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import Sync, inspection
from farstep_wire.address import parse_address
from farstep_wire.v1 import optimizer_pb2 as pb
from tests.data_parallel.crew import Gradients, Worker, crew, mean
from tests.parity import twins
from tests.support.raw import RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess

# Enough for the server to begin early, and to add in several blocks of which the last is smaller.
SIZES = (600_000, 7)
WORKERS = 4


def _gradients(step: int, worker: int, *, gaps: bool = False) -> Gradients:
    generator = torch.Generator().manual_seed(100 * step + worker)
    own: Gradients = [torch.randn(size, generator=generator) for size in SIZES]
    if gaps and (step + worker) % 2:
        own[worker % 2] = None
    return own


@pytest.mark.parametrize("how", ["grpc", "shm"])
@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_whatever_the_order_of_arrival(server: ServerProcess, name: str, how: Any, gaps: bool, weighted: bool) -> None:
    def make() -> list[Tensor]:
        return [nn.Parameter(torch.zeros(size)) for size in SIZES]

    params = make()
    local = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    options = {"lr": 0.1, "momentum": 0.9}
    weights = [2.0, 0.5, 3.0, 1.0] if weighted else None
    with crew(server.address, name, WORKERS, make, "SGD", options, transport=how) as own:
        orders = [list(range(WORKERS)), list(range(WORKERS))[::-1], random.Random(0).sample(range(WORKERS), WORKERS)]
        for step, order in enumerate(orders):

            def act(worker: Worker, step: int = step) -> None:
                worker.give(_gradients(step, worker.number, gaps=gaps))
                worker.optimizer.step(num_samples=None if weights is None else weights[worker.number])

            own.arrive(order, act)
            everyone = [_gradients(step, worker, gaps=gaps) for worker in range(WORKERS)]
            for parameter, gradient in zip(params, mean(everyone, weights), strict=True):
                parameter.grad = gradient
            local.step()
            for worker in own.workers:
                twins.assert_same_parameters(worker.params, params, f"step {step}, worker {worker.number}")


@pytest.fixture
def sessions(server: ServerProcess, name: str) -> Iterator[list[RawSession]]:
    layout = flat_layout(*SIZES)
    with ExitStack() as stack:
        own = [stack.enter_context(RawSession(server.address)) for _ in range(WORKERS)]
        for number, session in enumerate(own):
            message = attach_message(name, policy=Sync(WORKERS), worker=str(number))
            session.epoch = session.attach(message, layout_bytes(layout), bytes(layout.arena.nbytes)).epoch  # type: ignore[attr-defined]
        yield own


def _send(session: Any, worker: int, step: int, sequence: int = 1, version: int = 0) -> None:
    layout = flat_layout(*SIZES)
    body = bytearray(layout.gradients.nbytes)
    for spec, offset, gradient in zip(layout.specs, layout.gradients.offsets, _gradients(step, worker), strict=True):
        assert gradient is not None
        body[offset : offset + spec.nbytes] = gradient.numpy().tobytes()
    message = pb.Contribution(epoch=session.epoch, sequence=sequence, incarnation=1, version=version)
    session.send(bytes(body), contribution=message)


def _check(session: RawSession, version: int, rounds: Sequence[Sequence[Gradients]]) -> None:
    """Compare a reply's parameters with those after the steps of these rounds."""
    layout = flat_layout(*SIZES)
    frame, body = session.answer()
    assert frame.stepped.version == version
    own = layout.views(torch.frombuffer(bytearray(body), dtype=torch.uint8))
    params = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    local = torch.optim.SGD(params, lr=0.1)
    for contributions in rounds:
        for parameter, gradient in zip(params, mean(contributions), strict=True):
            parameter.grad = gradient
        local.step()
    for left, right in zip(own, params, strict=True):
        assert twins.same_bits(left, right)


def _wait_for(server: ServerProcess, name: str, numbers: set[str]) -> None:
    with inspection.connect(parse_address(server.address), 30) as own:
        while {row.id for row in own.describe(name).workers if row.standing == "waiting"} != numbers:
            pass


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_a_worker_that_drops_out_is_not_in_the_sum(
    server: ServerProcess, name: str, sessions: list[RawSession], leaves: int
) -> None:
    first = [_gradients(0, number) for number in range(WORKERS)]
    for number, session in enumerate(sessions):
        _send(session, number, 0)
    for session in sessions:
        _check(session, 1, [first])
    for number in range(3):
        _send(sessions[number], number, 1, sequence=2, version=1)
        _wait_for(server, name, {str(other) for other in range(number + 1)})
    sessions[leaves].send(leave=pb.Leave())
    _wait_for(server, name, {str(other) for other in range(3) if other != leaves})
    _send(sessions[3], 3, 1, sequence=2, version=1)
    rest = [number for number in range(WORKERS) if number != leaves]
    for number in rest:
        _check(sessions[number], 2, [first, [_gradients(1, other) for other in rest]])


def test_a_worker_that_thinks_again_counts_with_its_last_word(
    server: ServerProcess, name: str, sessions: list[RawSession]
) -> None:
    for number in range(3):
        _send(sessions[number], number, 0)
        _wait_for(server, name, {str(other) for other in range(number + 1)})
    sessions[1].send(zero_grad=pb.ZeroGrad(epoch=sessions[1].epoch))  # type: ignore[attr-defined]
    _wait_for(server, name, {"0", "2"})
    _send(sessions[1], 1, step=5, sequence=2)
    _wait_for(server, name, {"0", "1", "2"})
    _send(sessions[3], 3, 0)
    assert sessions[1].answer()[0].WhichOneof("body") == "done"
    contributions = [_gradients(0, 0), _gradients(5, 1), _gradients(0, 2), _gradients(0, 3)]
    for session in sessions:
        _check(session, 1, [contributions])
