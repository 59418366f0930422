"""Every transport does the same: the bits of local torch, whatever the gradients, the workers and the faults."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from farstep import Remote, Settings, Timeouts, optim
from tests.data_parallel import problems
from tests.data_parallel.crew import Worker, crew, mean
from tests.parity import twins
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess
from tests.transports.ways import WAYS, transport_of

# A control message of shared memory is hardly larger than a ping.
_CONTROL_BYTES = 26


@pytest.fixture(params=sorted(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _remote(address: str, name: str, way: str, **more: Any) -> Remote:
    return Remote(address, name=name, timeouts=Timeouts(30, 30, 20), **WAYS[way], **more)


def _pair(
    server: ServerProcess, name: str, way: str, make: Callable[[], nn.Module], cls: str = "AdamW", **options: Any
) -> tuple[nn.Module, Any, nn.Module, Any]:
    ours, torchs = make(), make()
    local = getattr(torch.optim, cls)(torchs.parameters(), **options)
    own = getattr(optim, cls)(ours.parameters(), remote=_remote(server.address, name, way), **options)
    assert own.remote.transport == transport_of(way)
    return ours, own, torchs, local


@pytest.mark.parametrize("cls", [cls for cls in problems.classes() if cls not in problems.SPARSE_ONLY])
def test_one_worker(server: ServerProcess, name: str, way: str, cls: str) -> None:
    driven = cls in problems.DRIVEN
    ours = twins.model_for(cls)
    torchs = twins.twin(ours)
    options = problems.OPTIONS.get(cls, {})
    local = problems.local_class(cls)(torchs.parameters(), **options)
    own = getattr(optim, cls)(ours.parameters(), remote=_remote(server.address, name, way), **copy.deepcopy(options))
    for number in range(4):
        for model, optimizer in ((ours, own), (torchs, local)):
            twins.take_step(model, optimizer, number, needs_closure=driven, calls=[])
        twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {number}")
        for left, right in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert (left.grad is None) == (right.grad is None)
            if left.grad is not None and right.grad is not None and not left.grad.is_sparse:
                assert twins.same_bits(left.grad, right.grad), "a step leaves the gradients alone"
    twins.assert_same_state(own, local, "after 4 steps")
    own.remote.close()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rule", [problems.dense, problems.gaps, problems.mixed], ids=lambda rule: rule.__name__)
def test_three_workers(server: ServerProcess, name: str, way: str, rule: Any, weighted: bool) -> None:
    def make() -> list[Tensor]:
        return problems.parameters("Adagrad", tables=rule is problems.mixed)

    params = make()
    local = torch.optim.Adagrad(params, lr=0.1)
    weigh = random.Random(5)
    with crew(server.address, name, 3, make, "Adagrad", {"lr": 0.1}, **WAYS[way]) as own:
        assert {worker.optimizer.remote.transport for worker in own.workers} == {transport_of(way)}
        for step in range(5):
            weights = [weigh.choice([0.5, 1.0, 3.0, 17.0]) for _ in range(3)] if weighted else None

            def act(worker: Worker, step: int = step, weights: list[float] | None = weights) -> None:
                worker.give(rule(worker.params, step, worker.number))
                worker.optimizer.step(num_samples=None if weights is None else weights[worker.number])
                for parameter, given in zip(worker.params, rule(worker.params, step, worker.number), strict=True):
                    if given is not None and not given.is_sparse:
                        assert parameter.grad is not None
                        assert twins.same_bits(parameter.grad, given), "the mean is made elsewhere"

            own.arrive(random.Random(step).sample(range(3), 3), act)
            for parameter, gradient in zip(
                params, mean([rule(params, step, number) for number in range(3)], weights), strict=True
            ):
                parameter.grad = gradient
            local.step()
            for worker in own.workers:
                twins.assert_same_parameters(worker.params, params, f"step {step}, worker {worker.number}")


def test_a_closure_over_two_workers(server: ServerProcess, name: str, way: str) -> None:
    options = {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    params = problems.parameters()
    local = torch.optim.LBFGS(params, **options)
    closure = problems.averaging_closure(params, 2, [])
    with crew(server.address, name, 2, problems.parameters, "LBFGS", options, **WAYS[way]) as own:
        for step in range(3):
            own.together(lambda worker: worker.optimizer.step(lambda: problems.evaluated(worker.params, worker.number)))
            local.step(closure)
            for worker in own.workers:
                twins.assert_same_parameters(worker.params, params, f"step {step}, worker {worker.number}")


def _wide() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


def _loss(model: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return functional.mse_loss(model(torch.randn(8, 40, generator=generator)), torch.randn(8, 5, generator=generator))


def test_gradients_accumulate_here_and_there(server: ServerProcess, name: str, way: str) -> None:
    ours, own, torchs, local = _pair(server, name, way, _wide)
    for step in range(3):
        waiting: list[Tensor] = []
        for part in range(4):
            _loss(torchs, 10 * step + part).backward()
            _loss(ours, 10 * step + part).backward()
            if part == 1:
                own.remote.accumulate()
                waiting = [parameter.grad for parameter in torchs.parameters() if parameter.grad is not None]
                torchs.zero_grad()
        for parameter, before in zip(torchs.parameters(), waiting, strict=True):
            parameter.grad = before + parameter.grad
        local.step()
        own.step()
        local.zero_grad(set_to_none=step == 1)
        own.zero_grad(set_to_none=step == 1)
        twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {step}")
    own.remote.close()


def test_a_gradient_that_is_kept_is_left_alone(server: ServerProcess, name: str, way: str) -> None:
    ours, own, torchs, local = _pair(server, name, way, _wide, "SGD", lr=0.1)
    kept: list[list[Tensor]] = [[], []]
    for step in range(4):
        for model, optimizer, own_kept in ((ours, own, kept[0]), (torchs, local, kept[1])):
            optimizer.zero_grad()
            _loss(model, step).backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                own_kept.append(parameter.grad if step % 2 else parameter.grad.view(-1)[:3])
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.data.mul_(0.5)
            optimizer.step()
        twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {step}")
    for left, right in zip(*kept, strict=True):
        assert twins.same_bits(left, right)
    own.remote.close()


def test_gradients_in_a_buffer_of_the_users(server: ServerProcess, name: str, way: str) -> None:
    """A flat buffer whose views are the gradients, zeroed in place: backward adds to it, and nothing else may."""
    ours, own, torchs, local = _pair(server, name, way, _wide, "SGD", lr=0.1, momentum=0.9)
    flats = []
    for model in (ours, torchs):
        flat = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
        flats.append(flat)
        pieces = flat.split([parameter.numel() for parameter in model.parameters()])
        for parameter, piece in zip(model.parameters(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
    for step in range(3):
        for model, optimizer, flat in ((ours, own, flats[0]), (torchs, local, flats[1])):
            flat.zero_()
            _loss(model, step).backward()
            flat.clamp_(-0.01, 0.01)
            optimizer.step()
        assert twins.same_bits(*flats)
        twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {step}")
    own.remote.close()


def test_layouts_dtypes_and_memory_formats(server: ServerProcess, name: str, way: str) -> None:
    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        base = torch.randn(6, 8, generator=generator)
        return [
            nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64)),
            nn.Parameter(torch.randn(5, 5, generator=generator).bfloat16()),
            nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.complex64)),
            nn.Parameter(base[:, ::2]),
            nn.Parameter(torch.empty(0)),
            nn.Parameter(torch.randn(2, generator=generator).t()),
        ]

    ours, torchs = make(), make()
    own = optim.SGD(ours, lr=0.1, momentum=0.9, remote=_remote(server.address, name, way))
    local = torch.optim.SGD(torchs, lr=0.1, momentum=0.9)
    for step in range(4):
        for params, optimizer in ((ours, own), (torchs, local)):
            optimizer.zero_grad()
            sum((p * p.conj() * (step + 1)).real.float().sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
        twins.assert_same_parameters(ours, torchs, f"step {step}")
    own.remote.close()


def test_a_group_that_is_added(server: ServerProcess, name: str, way: str) -> None:
    ours, own, torchs, local = _pair(server, name, way, _wide)
    extra = [nn.Parameter(torch.ones(50)) for _ in range(2)]
    for step in range(4):
        if step == 2:
            own.add_param_group({"params": [extra[0]], "lr": 0.5})
            local.add_param_group({"params": [extra[1]], "lr": 0.5})
        for model, optimizer, more in ((ours, own, extra[0]), (torchs, local, extra[1])):
            optimizer.zero_grad()
            (_loss(model, step) + (more**2).sum()).backward()
            optimizer.step()
        twins.assert_same_parameters([*ours.parameters(), extra[0]], [*torchs.parameters(), extra[1]], f"step {step}")
    assert own.remote.transport == transport_of(way)
    own.remote.close()


def test_edits_on_this_side_reach_the_server(server: ServerProcess, name: str, way: str) -> None:
    ours, own, torchs, local = _pair(server, name, way, _wide)
    for step in range(4):
        for model, optimizer in ((ours, own), (torchs, local)):
            optimizer.zero_grad()
            _loss(model, step).backward()
            optimizer.step()
            for parameter in list(model.parameters())[: 1 + step % 2]:
                parameter.data.clamp_(-0.1, 0.1)
        twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {step}")
    own.remote.pull()
    own.remote.close()


def test_what_the_server_clips_it_clips_for_itself(server: ServerProcess, name: str, way: str) -> None:
    ours, torchs = _wide(), _wide()
    settings = Settings(clip_grad_norm=0.01)
    own = optim.SGD(ours.parameters(), lr=0.5, remote=_remote(server.address, name, way, settings=settings))
    local = torch.optim.SGD(torchs.parameters(), lr=0.5)
    for step in range(3):
        for model, optimizer in ((ours, own), (torchs, local)):
            optimizer.zero_grad()
            _loss(model, step).backward()
        given = [parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None]
        nn.utils.clip_grad_norm_(torchs.parameters(), 0.01)
        own.step()
        local.step()
        twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {step}")
        for parameter, before in zip(ours.parameters(), given, strict=True):
            assert parameter.grad is not None
            assert twins.same_bits(parameter.grad, before)
    own.remote.close()


@pytest.mark.parametrize("fault", ["drop request", "drop reply", "cut request", "cut reply", "repeat request"])
def test_a_broken_connection(server: ServerProcess, name: str, way: str, fault: Any) -> None:
    ours, torchs = _wide(), _wide()
    local = torch.optim.AdamW(torchs.parameters())
    with Proxy(server.address, message_bytes=_CONTROL_BYTES) as proxy:
        own = optim.AdamW(ours.parameters(), remote=_remote(proxy.address, name, way))
        for step in range(6):
            for model, optimizer in ((ours, own), (torchs, local)):
                optimizer.zero_grad()
                _loss(model, step).backward()
                if step % 2 and optimizer is own:
                    proxy.arm(fault)
                optimizer.step()
            twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {step}")
        assert proxy.fired[fault] == 3
        assert own.remote.version == 6
        # Pipes leave it to the proxy to carry the messages.
        assert own.remote.transport == ("grpc" if way == "pipe" else transport_of(way))
        own.remote.close()


def test_a_server_that_is_started_again(servers: Any, name: str, way: str, tmp_path: Any) -> None:
    server = servers("--data-dir", str(tmp_path))
    ours, own, torchs, local = _pair(server, name, way, _wide)
    for step in range(6):
        if step == 3:
            assert server.terminate() == 0
            server.start()
        for model, optimizer in ((ours, own), (torchs, local)):
            optimizer.zero_grad()
            _loss(model, step).backward()
            optimizer.step()
        twins.assert_same_parameters(ours.parameters(), torchs.parameters(), f"step {step}")
    assert own.remote.transport == transport_of(way)
    own.remote.close()
