"""Workers that load one state dict together agree on whether there is anything to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch

from farstep import Remote, Sync, Timeouts, optim
from tests.support.servers import ServerProcess


def _together(*acts: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(acts)) as pool:
        return [future.result() for future in [pool.submit(act) for act in acts]]


@pytest.fixture
def pair(server: ServerProcess, name: str) -> Any:
    def build(worker: int) -> Any:
        parameter = torch.nn.Parameter(torch.ones(3))
        timeouts = Timeouts(connect=20, step=20)
        remote = Remote(server.address, name=name, worker=worker, policy=Sync(2), timeouts=timeouts)
        return optim.Adam([parameter], lr=0.1, remote=remote)

    optimizers = _together(lambda: build(0), lambda: build(1))
    yield optimizers
    for optimizer in optimizers:
        optimizer.remote.close()


def _step(pair: Sequence[Any]) -> None:
    for worker, optimizer in enumerate(pair):
        optimizer.param_groups[0]["params"][0].grad = torch.full((3,), 1.0 + worker)
    _together(*(optimizer.step for optimizer in pair))


def test_what_one_worker_fetched_is_nothing_new_to_the_other(pair: Sequence[Any]) -> None:
    _step(pair)
    fetched = pair[0].state_dict()
    _together(*(lambda own=own: own.load_state_dict(deepcopy(fetched)) for own in pair))
    assert [own.remote.incarnation for own in pair] == [1, 1]
    _step(pair)
    assert [own.remote.version for own in pair] == [2, 2]


def test_what_one_worker_fetched_before_a_step_is_loaded_by_both(pair: Sequence[Any]) -> None:
    _step(pair)
    fetched = pair[0].state_dict()
    _step(pair)
    _together(*(lambda own=own: own.load_state_dict(deepcopy(fetched)) for own in pair))
    assert [own.remote.incarnation for own in pair] == [2, 2]
    parameter = pair[1].param_groups[0]["params"][0]
    assert torch.equal(pair[1].remote.state(parameter)["exp_avg"], fetched["state"][0]["exp_avg"])


def test_what_one_worker_fetched_and_nobody_can_tell_is_loaded_by_both(pair: Sequence[Any]) -> None:
    """Without its stamp it is any state dict, such as torch's own: the worker that had fetched it must not stand aside."""
    _step(pair)
    fetched = pair[0].state_dict()
    del fetched["farstep"]
    _together(*(lambda own=own: own.load_state_dict(deepcopy(fetched)) for own in pair))
    assert [own.remote.incarnation for own in pair] == [2, 2]
    _step(pair)
    assert [own.remote.version for own in pair] == [2, 2]
