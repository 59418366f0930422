"""``wire_dtype``: local torch, bit for bit, fed with gradients that are rounded, with its parameters rounded for the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from farstep import Async, LocalSGD, Remote, Settings, Sync, Timeouts, Wire, errors, optim
from tests.data_parallel import problems
from tests.data_parallel.crew import Worker, crew, mean
from tests.parity import twins
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", sorted(DTYPES))


def rounded(tensor: Tensor | None, dtype: str | None) -> Tensor | None:
    """Return a tensor as it arrives: float32 rounded, all else as it is."""
    if tensor is None or dtype is None or tensor.dtype != torch.float32:
        return tensor
    if tensor.is_sparse:
        values = tensor._values().to(DTYPES[dtype]).float()
        return torch.sparse_coo_tensor(
            tensor._indices(), values, tensor.shape, is_coalesced=tensor.is_coalesced(), check_invariants=True
        )
    return tensor.detach().to(DTYPES[dtype]).float()


def round_gradients(params: Sequence[Tensor], dtype: str | None) -> None:
    """Round the gradients where they are."""
    for parameter in params:
        parameter.grad = rounded(parameter.grad, dtype)


def assert_rounded(held: Sequence[Tensor], masters: Sequence[Tensor], dtype: str | None, where: str) -> None:
    """A worker holds the server's parameters, rounded."""
    twins.assert_same_parameters(held, [rounded(master, dtype) for master in masters], where)  # type: ignore[misc]


def _remote(address: str, name: str, wire: Any, **more: Any) -> Remote:
    return Remote(address, name=name, wire_dtype=wire, timeouts=Timeouts(30, 30, 20), **more)


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


def _give(params: Sequence[Tensor], step: int, worker: int = 0) -> None:
    for parameter, gradient in zip(params, problems.dense(list(params), step, worker), strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize("cls", [cls for cls in problems.classes() if cls not in problems.DRIVEN])
def test_one_worker(server: ServerProcess, name: str, cls: str) -> None:
    """The server's own parameters stay float32: each step is one of them, not of what the worker holds."""
    ours, masters = (problems.parameters(cls) for _ in range(2))
    options = problems.OPTIONS.get(cls, {})
    local = problems.local_class(cls)(masters, **options)
    own = getattr(optim, cls)(ours, remote=_remote(server.address, name, torch.bfloat16), **options)
    assert own.remote.wire == Wire(gradients="bfloat16", parameters="bfloat16")
    assert own.remote.transport == "grpc"
    assert_rounded(ours, masters, "bfloat16", "before the first step")
    rule = problems.sparse if cls in problems.SPARSE_ONLY else problems.dense
    for step in range(4):
        for params in (ours, masters):
            for parameter, gradient in zip(params, rule(params, step, 0), strict=True):
                parameter.grad = gradient
        given = [None if parameter.grad is None else parameter.grad.clone() for parameter in ours]
        round_gradients(masters, "bfloat16")
        local.step()
        own.step()
        assert_rounded(ours, masters, "bfloat16", f"step {step}")
        for parameter, before in zip(ours, given, strict=True):
            assert parameter.grad is not None
            assert before is not None
            assert twins.same_bits(parameter.grad, before), "a step leaves the gradients alone"
    twins.assert_same_state(own, local, "after 4 steps")
    own.remote.close()


@pytest.mark.parametrize("wire", [Wire(gradients="float16"), Wire(parameters="bfloat16"), Wire("float16", "bfloat16")])
@pytest.mark.parametrize("rule", [problems.gaps, problems.mixed], ids=lambda rule: rule.__name__)
def test_three_workers(server: ServerProcess, name: str, rule: Any, wire: Wire) -> None:
    """Rounded where it leaves a worker, and where it comes to one; in between the mean is that of float32."""

    def make() -> list[Tensor]:
        return problems.parameters("Adagrad", tables=rule is problems.mixed)

    masters = make()
    local = torch.optim.Adagrad(masters, lr=0.1)
    with crew(server.address, name, 3, make, "Adagrad", {"lr": 0.1}, wire_dtype=wire) as own:
        for step in range(4):

            def act(worker: Worker, step: int = step) -> None:
                worker.give(rule(worker.params, step, worker.number))
                worker.optimizer.step()

            own.arrive(random.Random(step).sample(range(3), 3), act)
            parts = [
                [rounded(gradient, wire.gradients) for gradient in rule(masters, step, number)]  # type: ignore[arg-type]
                for number in range(3)
            ]
            for parameter, gradient in zip(masters, mean(parts), strict=True):
                parameter.grad = gradient
            local.step()
            for worker in own.workers:
                assert_rounded(worker.params, masters, wire.parameters, f"step {step}, worker {worker.number}")  # type: ignore[arg-type]


def test_workers_that_differ(server: ServerProcess, name: str) -> None:
    """Each session has a wire format of its own, also under Async; state and masters are float32 for all."""
    formats: list[Any] = ["bfloat16", None, Wire(gradients="float16")]
    masters = problems.parameters("Adam")
    local = torch.optim.Adam(masters, lr=0.01)
    ours = [problems.parameters("Adam") for _ in formats]
    own = [
        optim.Adam(params, lr=0.01, remote=_remote(server.address, name, wire, worker=number, policy=Async()))
        for number, (params, wire) in enumerate(zip(ours, formats, strict=True))
    ]
    for step in range(6):
        turn = step % 3
        wire = own[turn].remote.wire
        for params in (ours[turn], masters):
            _give(params, step, turn)
        round_gradients(masters, wire.gradients)
        local.step()
        own[turn].step()
        assert_rounded(ours[turn], masters, wire.parameters, f"step {step}")
    twins.assert_same_state(own[0], local, "in the end")
    for optimizer in own:
        optimizer.remote.close()


@each_dtype
def test_layouts_and_dtypes(server: ServerProcess, name: str, dtype: str) -> None:
    """What is not float32 travels as it is, and so do parameters that share memory."""

    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        base, store = torch.randn(6, 8, generator=generator), torch.randn(60, generator=generator)
        return [
            nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64)),
            nn.Parameter(torch.randn(5, 5, generator=generator).bfloat16()),
            nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.complex64)),
            nn.Parameter(base[:, ::2]),
            nn.Parameter(torch.empty(0)),
            nn.Parameter(store[:40]),
            nn.Parameter(store[30:]),
            nn.Parameter(torch.randn(70_001, generator=generator)),
            nn.Parameter(torch.randn(2, generator=generator).t()),
        ]

    ours, masters = make(), make()
    shared = {6, 7}
    own = optim.SGD(ours, lr=0.1, momentum=0.9, remote=_remote(server.address, name, dtype))
    local = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    for step in range(3):
        for params in (ours, masters):
            _give(params, step)
            params[0].grad = params[0].grad.contiguous()  # type: ignore[union-attr] # strides other than the parameter's
            params[8].grad = None if step == 1 else params[8].grad
        round_gradients(masters, dtype)
        own.step()
        local.step()
        for index, (held, master) in enumerate(zip(ours, masters, strict=True)):
            expected = master if index in shared else rounded(master, dtype)
            assert expected is not None
            assert twins.same_bits(held, expected), f"step {step}: parameter {index}"
    own.remote.close()


@each_dtype
def test_a_large_model_takes_half_the_bytes(server: ServerProcess, name: str, dtype: str) -> None:
    """Over several frames, with gaps between the tensors; what a step takes is told."""

    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [nn.Parameter(torch.randn(size, generator=generator)) for size in (700_001, 3, 400_007, 33)]

    ours, masters = make(), make()
    own = optim.Adam(ours, fused=True, remote=_remote(server.address, name, dtype))
    local = torch.optim.Adam(masters, fused=True)
    for step in range(2):
        for params in (ours, masters):
            _give(params, step)
        round_gradients(masters, dtype)
        own.step()
        local.step()
        assert_rounded(ours, masters, dtype, f"step {step}")
    half = 2 * sum(parameter.numel() for parameter in ours)
    for count in (own.remote.step_traffic.sent, own.remote.step_traffic.received):
        assert half < count < 1.001 * half
    own.remote.close()


def test_edits_reach_the_server_as_they_are(server: ServerProcess, name: str) -> None:
    """What this side changed replaces the master with every bit; what it did not change leaves the master alone."""
    ours, masters = problems.parameters(), problems.parameters()
    own = optim.SGD(ours, lr=0.1, momentum=0.9, remote=_remote(server.address, name, "bfloat16"))
    local = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    for step in range(4):
        for params in (ours, masters):
            _give(params, step)
        if step % 2:
            value = torch.full((17,), 1.0 + 2.0**-20 * step)
            ours[1].data.copy_(value)
            with torch.no_grad():
                masters[1].copy_(value)
        round_gradients(masters, "bfloat16")
        own.step()
        local.step()
        assert_rounded(ours, masters, "bfloat16", f"step {step}")
    own.remote.close()


def test_groups_averages_and_what_waits_on_the_server(server: ServerProcess, name: str) -> None:
    ours, masters = problems.parameters(), problems.parameters()
    settings = Settings(ema_decay=0.5)
    own = optim.SGD(ours, lr=0.1, remote=_remote(server.address, name, "bfloat16", settings=settings))
    local = torch.optim.SGD(masters, lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        nn.ParameterList(masters), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for step in range(3):
        _give(ours, step)
        own.remote.accumulate()
        for params in (ours, masters):
            _give(params, 10 + step)
        for parameter, early in zip(masters, problems.dense(masters, step, 0), strict=True):
            parameter.grad = rounded(early, "bfloat16") + rounded(parameter.grad, "bfloat16")  # type: ignore[operator]
        own.step()
        local.step()
        average.update_parameters(nn.ParameterList(masters))
        assert_rounded(ours, masters, "bfloat16", f"step {step}")
    own.remote.pull(average="ema")
    assert_rounded(ours, list(average.parameters()), "bfloat16", "the average")
    own.remote.pull()
    more = [nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(9))) for _ in range(1)]
    theirs = [nn.Parameter(more[0].detach().clone())]
    own.add_param_group({"params": more, "lr": 0.5})
    local.add_param_group({"params": theirs, "lr": 0.5})
    for params in ([*ours, *more], [*masters, *theirs]):
        _give(params, 50)
    round_gradients([*masters, *theirs], "bfloat16")
    own.step()
    local.step()
    assert_rounded([*ours, *more], [*masters, *theirs], "bfloat16", "with a group more")
    own.remote.close()


def test_a_closure_that_the_server_drives(server: ServerProcess, name: str) -> None:
    """Every trial comes rounded, and every gradient goes rounded."""
    ours, masters = problems.parameters(), problems.parameters()
    options = {"lr": 0.1, "max_iter": 3}
    own = optim.LBFGS(ours, remote=_remote(server.address, name, "bfloat16"), **options)
    local = torch.optim.LBFGS(masters, **options)

    def closure() -> Tensor:
        trial = [nn.Parameter(parameter.detach().to(torch.bfloat16).float()) for parameter in masters]
        loss = problems.evaluated(trial, 0)
        for parameter, own_trial in zip(masters, trial, strict=True):
            parameter.grad = rounded(own_trial.grad, "bfloat16")
        return loss

    for step in range(2):
        left = own.step(lambda: problems.evaluated(ours, 0))
        right = local.step(closure)
        assert twins.same_bits(left, right)  # type: ignore[arg-type]
        assert_rounded(ours, masters, "bfloat16", f"step {step}")
    own.remote.close()


def test_local_sgd(server: ServerProcess, name: str) -> None:
    """The outer parameters come rounded, and the distances go rounded."""
    ours, theirs = problems.parameters(), problems.parameters()
    inner, local = torch.optim.SGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    remote = _remote(server.address, name, Wire(gradients="bfloat16"), policy=Sync(1))
    own = LocalSGD(inner, remote, sync_every=2, outer=lambda groups, remote: optim.SGD(groups, lr=0.5, remote=remote))
    outer = [parameter.detach().clone() for parameter in theirs]
    for step in range(4):
        for params, optimizer in ((ours, own), (theirs, local)):
            _give(params, step)
            optimizer.step()
        if step % 2:
            for held, parameter in zip(outer, theirs, strict=True):
                distance = rounded(held - parameter.detach(), "bfloat16")
                assert distance is not None
                held.sub_(distance, alpha=0.5)
                parameter.data.copy_(held)
            twins.assert_same_parameters(ours, theirs, f"step {step}")
    own.remote.close()


@pytest.mark.parametrize("fault", ["drop request", "drop reply", "cut request", "cut reply", "repeat request"])
def test_a_broken_connection(server: ServerProcess, name: str, fault: Any) -> None:
    ours, masters = _model(), _model()
    local = torch.optim.AdamW(masters.parameters())
    with Proxy(server.address) as proxy:
        own = optim.AdamW(ours.parameters(), remote=_remote(proxy.address, name, "bfloat16"))
        for step in range(4):
            for params in (list(ours.parameters()), list(masters.parameters())):
                _give(params, step)
            if step % 2:
                proxy.arm(fault)
            round_gradients(list(masters.parameters()), "bfloat16")
            own.step()
            local.step()
            assert_rounded(list(ours.parameters()), list(masters.parameters()), "bfloat16", f"step {step}")
        assert proxy.fired[fault] == 2
        assert own.remote.version == 4
        own.remote.close()


def test_a_restarted_server_and_a_worker_that_comes_without(servers: Any, name: str, tmp_path: Any) -> None:
    """A snapshot has the masters; who attaches without wire_dtype gets them with every bit."""
    server = servers("--data-dir", str(tmp_path))
    ours, masters = problems.parameters(), problems.parameters()
    own = optim.Adam(ours, remote=_remote(server.address, name, "float16"))
    local = torch.optim.Adam(masters)
    for step in range(4):
        if step == 2:
            assert server.terminate() == 0
            server.start()
        for params in (ours, masters):
            _give(params, step)
        round_gradients(masters, "float16")
        own.step()
        local.step()
    assert_rounded(ours, masters, "float16", "in the end")
    own.remote.close()
    exact = problems.parameters()
    other = optim.Adam(exact, remote=_remote(server.address, name, None))
    twins.assert_same_parameters(exact, masters, "without wire_dtype")
    other.remote.close()


def test_an_overflow_in_float16_is_seen_by_the_guard(server: ServerProcess, name: str) -> None:
    params = [nn.Parameter(torch.zeros(3))]
    settings = Settings(non_finite="raise")
    own = optim.SGD(params, lr=1.0, remote=_remote(server.address, name, "float16", settings=settings))
    params[0].grad = torch.tensor([1.0, 70_000.0, 1.0])
    with pytest.raises(errors.NonFiniteError, match=r"worker 0: '0\.0'"):
        own.step()
    params[0].grad = torch.ones(3)
    own.step()
    assert twins.same_bits(params[0], torch.full((3,), -1.0))
    own.remote.close()


def _lbfgs(remote: Remote) -> Callable[[], object]:
    return lambda: optim.LBFGS(problems.parameters(), remote=remote)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Remote(wire_dtype="bf16"), r"wire_dtype: 'bf16' is none of bfloat16, float16, int8, topk"),
        (lambda: Remote(wire_dtype=torch.float64), r"wire_dtype: torch\.float64 is none of"),
        (lambda: Remote(wire_dtype="bfloat16", transport="shm"), r"'bfloat16' with transport='shm'"),
        (lambda: Remote(wire_dtype="topk", transport="pg"), r"'topk' with transport='pg'"),
        (lambda: Remote(wire_dtype="int8", adopt_parameters=True), r"'int8' with adopt_parameters=True"),
        (lambda: Wire(parameters="int8"), r"parameters must be None or one of bfloat16, float16, not 'int8'"),
        (lambda: Wire(gradients=3), r"gradients must be None or one of .*, not 3"),
        (lambda: Wire(gradients="topk", density=0.0), r"density must be above 0 and at most 1, not 0\.0"),
        (lambda: Wire(gradients="topk", density=float("nan")), r"density must be .*, not nan"),
        (_lbfgs(Remote("127.0.0.1:1", wire_dtype="topk")), r"gradients='topk': LBFGS evaluates its closure many times"),
    ],
)
def test_what_cannot_be(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_half_as_many_bytes_train_a_model(server: ServerProcess, name: str) -> None:
    """Gradients of a model's own, taken at the rounded parameters."""
    ours, masters = _model(), _model()
    held = _model()
    own = optim.AdamW(ours.parameters(), lr=1e-2, remote=_remote(server.address, name, "bfloat16"))
    local = torch.optim.AdamW(masters.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    data, goal = torch.randn(16, 40, generator=generator), torch.randn(16, 5, generator=generator)
    losses = []
    for step in range(20):
        own.zero_grad()
        loss = functional.mse_loss(ours(data), goal)
        loss.backward()
        own.step()
        losses.append(loss.item())
        for copy, master in zip(held.parameters(), masters.parameters(), strict=True):
            copy.data.copy_(rounded(master, "bfloat16"))  # type: ignore[arg-type]
            copy.grad = None
        functional.mse_loss(held(data), goal).backward()
        for copy, master in zip(held.parameters(), masters.parameters(), strict=True):
            master.grad = rounded(copy.grad, "bfloat16")
        local.step()
        assert_rounded(list(ours.parameters()), list(masters.parameters()), "bfloat16", f"step {step}")
    assert losses[-1] < losses[0] / 2
    own.remote.close()
