"""A closure-driven step that its worker does not see through: rolled back, and the next one works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from farstep import Sync
from farstep_wire.convert import policy_to_proto
from farstep_wire.errors import Applied, ClosureError, InvalidRequestError
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import to_value
from tests.faults.models import await_standing, remote_optimizer, same_bits
from tests.support.raw import RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess

TARGET = torch.linspace(-1, 2, 6)
OPTIONS = {"max_iter": 5, "line_search_fn": "strong_wolfe"}


class Problem:
    """A model of its own for each worker; ``act`` is called within the numbered evaluation."""

    def __init__(self, act: Callable[[], Any] = lambda: None, at: int = -1) -> None:
        self.params = [Parameter(torch.zeros(6))]
        self.optimizer: Any = None
        self.evaluations = 0
        self._act = act
        self._at = at

    def closure(self) -> object:
        self.evaluations += 1
        instead = self._act() if self.evaluations == self._at else None
        self.optimizer.zero_grad()
        loss = ((self.params[0] - TARGET) ** 4).sum() + (self.params[0].diff() ** 2).sum()
        loss.backward()
        return loss if instead is None else instead

    def attach(self, address: str, name: str, **remote: Any) -> Problem:
        self.optimizer = remote_optimizer(self.params, address, name, "LBFGS", options=OPTIONS, **remote)
        return self

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.step(self.closure)


def local(steps: int) -> list[Parameter]:
    problem = Problem()
    problem.optimizer = torch.optim.LBFGS(problem.params, lr=0.1, **OPTIONS)  # type: ignore[arg-type]
    problem.step(steps)
    return problem.params


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (_raise(RuntimeError("boom")), RuntimeError),
        (_raise(KeyboardInterrupt()), KeyboardInterrupt),
        (_raise(SystemExit(3)), SystemExit),
        (object, TypeError),  # a loss that cannot travel
        (lambda: torch.zeros(100_000), TypeError),  # too large for a loss
    ],
    ids=["error", "ctrl-c", "exit", "no loss", "large loss"],
)
def test_an_evaluation_that_ends_badly_undoes_the_step(
    server: ServerProcess, name: str, act: Callable[[], Any], error: type[BaseException]
) -> None:
    problem = Problem(act, at=9).attach(server.address, name)
    problem.step()
    assert problem.evaluations < 8
    with pytest.raises(error):
        problem.step()
    assert same_bits(problem.params, local(1)), "the parameters are those of before the step"
    assert problem.optimizer.remote.version == 1
    problem.step(2)
    assert same_bits(problem.params, local(3))
    problem.optimizer.remote.close()


def _pair(address: str, name: str, first: Problem, second: Problem) -> tuple[Problem, Problem]:
    with ThreadPoolExecutor(1) as pool:
        attaching = pool.submit(second.attach, address, name, policy=Sync(2), worker=1)
        first.attach(address, name, policy=Sync(2), worker=0)
        attaching.result()
    return first, second


def _both_step(first: Problem, second: Problem) -> None:
    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(second.step)
        first.step()
        stepping.result()


def test_a_closure_that_raises_while_another_worker_is_still_at_its_own(server: ServerProcess, name: str) -> None:
    told = threading.Event()
    first, second = _pair(
        server.address, name, Problem(lambda: told.wait(20) and None, at=3), Problem(_raise(ValueError("boom")), at=3)
    )
    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(first.step)
        with pytest.raises(ValueError, match="boom"):
            second.step()
        told.set()
        with pytest.raises(
            ClosureError, match=r"rolled back: the closure raised on worker 1: ValueError\('boom'\)"
        ) as raised:
            stepping.result()
        assert raised.value.applied is Applied.NO
    assert same_bits(first.params, local(0))
    for _ in range(3):
        _both_step(first, second)
    assert same_bits(first.params, second.params)
    assert same_bits(first.params, local(3))
    first.optimizer.remote.close()
    second.optimizer.remote.close()


def test_a_worker_interrupted_between_two_evaluations_gives_the_step_up(server: ServerProcess, name: str) -> None:
    given_up = threading.Event()
    first, second = _pair(server.address, name, Problem(), Problem(lambda: given_up.wait(20) and None, at=3))
    link = first.optimizer._farstep.link
    replies = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal replies
        replies += 1
        if replies == 4:
            raise KeyboardInterrupt
        return type(link).receive(link, *arguments)

    link.receive = interrupted
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(second.step)
        with pytest.raises(KeyboardInterrupt):
            first.step()
        # It begins the next step while the other worker is still at the last one's evaluation.
        again = pool.submit(first.step)
        await_standing(server.address, name, ["waiting", "computing"])
        given_up.set()
        with pytest.raises(ClosureError, match="worker 0 gave the step up") as raised:
            other.result()
        assert raised.value.applied is Applied.NO
        second.step()
        again.result()
    assert same_bits(first.params, second.params)
    assert same_bits(first.params, local(1))
    first.optimizer.remote.close()
    second.optimizer.remote.close()


def test_a_refused_evaluation_leaves_the_step_to_be_answered_or_given_up(server: ServerProcess, name: str) -> None:
    layout = flat_layout(4)
    attach = attach_message(name, optimizer="LBFGS")
    attach.policy.CopyFrom(policy_to_proto(Sync(1)))
    with RawSession(server.address) as session:
        attached = session.attach(attach, layout_bytes(layout, "LBFGS"), bytes(layout.arena.nbytes))

        def begin(sequence: int) -> pb.ServerFrame:
            message = pb.Contribution(
                epoch=attached.epoch, sequence=sequence, version=0, incarnation=attached.incarnation, closure=True
            )
            return session.ask(contribution=message)[0]

        def answer(number: int, body: bytes) -> None:
            message = pb.Evaluation(
                epoch=attached.epoch, sequence=1, number=number, loss=to_value(torch.tensor(1.0), "")
            )
            session.send(body, evaluation=message)

        assert begin(1).evaluate.number == 0
        answer(0, bytes(8))
        assert isinstance(session.refusal(), InvalidRequestError)
        answer(7, bytes(layout.gradients.nbytes))
        error = session.refusal()
        assert isinstance(error, InvalidRequestError)
        assert "evaluation 7 where 0 is awaited" in str(error)
        # The next contribution is not kept waiting behind the step that nobody will end.
        assert begin(2).evaluate.number == 0
        frame, _ = session.ask(
            bytes(layout.gradients.nbytes),
            evaluation=pb.Evaluation(epoch=attached.epoch, sequence=2, loss=_loss(), number=0),
        )
        assert frame.stepped.version == 1


def _loss() -> Any:
    return to_value(torch.tensor(0.0), "loss")
