"""int8 and top-k: what arrives is what the formulas say, and what did not arrive comes with the next gradient.

The reference below is written from the documentation of ``farstep.Wire`` alone, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import Remote, Settings, Sync, Timeouts, Wire, errors, optim
from tests.data_parallel import problems
from tests.data_parallel.crew import Gradients, Worker, crew, mean
from tests.parity import twins
from tests.support.proxy import Proxy
from tests.support.servers import ServerProcess

WIRES = {
    "int8": Wire(gradients="int8"),
    "topk": Wire(gradients="topk", density=0.3),
    "int8, bfloat16 back": Wire(gradients="int8", parameters="bfloat16"),
}
SHAPES = [(9, 6), (17,), (), (5, 500), (5000,)]


@pytest.fixture(params=sorted(WIRES))
def wire(request: pytest.FixtureRequest) -> Wire:
    return WIRES[request.param]


def int8(values: Tensor) -> Tensor:
    """Return what values arrive as: blocks of 64, a scale each."""
    arrived = []
    for block in values.split(64):
        scale = block.abs().max() / 127
        codes = (block / scale).round().clamp(-127, 127) if scale > 0 else torch.zeros_like(block)
        arrived.append(codes * scale)
    return torch.cat(arrived)


def topk(values: Tensor, density: float) -> Tensor:
    """Return what values arrive as: the greatest of them, and zeros; all of them where half would be sent."""
    count = max(1024, math.ceil(density * values.numel()))
    if 2 * count >= values.numel():
        return values
    arrived = torch.zeros_like(values)
    kept = sorted(range(values.numel()), key=lambda index: -abs(values[index].item()))[:count]
    arrived[kept] = values[kept]
    return arrived


class Reference:
    """One worker's error feedback. ``arrives`` says what a server gets of gradients; ``used`` that it used them."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._left: dict[int, Tensor] = {}
        self._after: dict[int, Tensor] = {}

    def arrives(self, gradients: Sequence[Tensor | None]) -> Gradients:
        """Return what arrives, float32 tensors of the gradients' shapes and strides."""
        self._after = dict(self._left)
        return [None if gradient is None else self._one(number, gradient) for number, gradient in enumerate(gradients)]

    def _one(self, number: int, gradient: Tensor) -> Tensor:
        if gradient.dtype != torch.float32 or gradient.is_sparse or not gradient.numel():
            return gradient
        order = gradient.as_strided((gradient.numel(),), (1,))
        values = order + self._left[number] if number in self._left else order.clone()
        arrived = int8(values) if self._wire.gradients == "int8" else topk(values, self._wire.density)
        self._after[number] = values - arrived
        return arrived.as_strided(gradient.shape, gradient.stride())

    def used(self) -> None:
        """What was left out of the last gradients is kept."""
        self._left = self._after


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def held(masters: Sequence[Tensor], wire: Wire) -> list[Tensor]:
    """Return what a worker holds of the server's parameters."""
    plain = [master.detach() for master in masters]
    if wire.parameters is None:
        return plain
    return [master.bfloat16().float() if master.dtype == torch.float32 else master for master in plain]


def take(optimizer: Any, params: Sequence[Tensor], gradients: Gradients) -> None:
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    optimizer.step()


def _remote(address: str, name: str, wire: Wire, **more: Any) -> Remote:
    return Remote(address, name=name, wire_dtype=wire, **{"timeouts": Timeouts(30, 30, 20), **more})


@pytest.mark.parametrize("cls", ["SGD", "Adam", "Adagrad"])
@pytest.mark.parametrize("rule", [problems.dense, problems.gaps], ids=lambda rule: rule.__name__)
def test_one_worker(server: ServerProcess, name: str, wire: Wire, cls: str, rule: Any) -> None:
    ours, masters = parameters(), parameters()
    own = getattr(optim, cls)(ours, lr=0.1, remote=_remote(server.address, name, wire))
    local, reference = getattr(torch.optim, cls)(masters, lr=0.1), Reference(wire)
    for step in range(5):
        gradients = rule(masters, step, 0)
        take(own, ours, gradients)
        take(local, masters, reference.arrives(gradients))
        reference.used()
        twins.assert_same_parameters(ours, held(masters, wire), f"step {step}")
        for parameter, gradient in zip(ours, gradients, strict=True):
            if gradient is not None:
                assert parameter.grad is not None
                assert twins.same_bits(parameter.grad, gradient), "a step leaves the gradients alone"
    twins.assert_same_state(own, local, "after 5 steps")
    own.remote.close()


def test_layouts_and_dtypes(server: ServerProcess, name: str, wire: Wire) -> None:
    """Only dense float32 gradients are compressed, in the order of the parameter's memory whatever their own strides."""

    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [
            nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64)),
            nn.Parameter(torch.randn(4, 6, 11, 11, generator=generator).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.complex64)),
            nn.Parameter(torch.empty(0)),
            nn.Parameter(torch.randn(60, 60, generator=generator)),
        ]

    ours, masters = make(), make()
    own = optim.SGD(ours, lr=0.1, remote=_remote(server.address, name, wire))
    local, reference = torch.optim.SGD(masters, lr=0.1), Reference(wire)
    for step in range(4):
        gradients = problems.dense(masters, step, 0)
        gradients[1] = gradients[1].to(memory_format=torch.channels_last)  # type: ignore[union-attr]
        if step % 2:
            gradients[4] = gradients[4].to_sparse(1)  # type: ignore[union-attr]
        given = list(gradients)
        given[1] = gradients[1].contiguous()  # type: ignore[union-attr]
        take(own, ours, given)
        take(local, masters, reference.arrives(gradients))
        reference.used()
        twins.assert_same_parameters(ours, held(masters, wire), f"step {step}")
    twins.assert_same_state(own, local, "after 4 steps")
    own.remote.close()


def test_three_workers(server: ServerProcess, name: str, wire: Wire) -> None:
    """Each worker has an error of its own; the mean is that of what arrived."""
    masters = parameters()
    local = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    references = [Reference(wire) for _ in range(3)]
    with crew(server.address, name, 3, parameters, "SGD", {"lr": 0.1, "momentum": 0.9}, wire_dtype=wire) as own:
        for step in range(4):

            def act(worker: Worker, step: int = step) -> None:
                worker.give(problems.gaps(worker.params, step, worker.number))
                worker.optimizer.step()

            own.together(act)
            parts = [
                reference.arrives(problems.gaps(masters, step, number)) for number, reference in enumerate(references)
            ]
            for parameter, gradient in zip(masters, mean(parts), strict=True):
                parameter.grad = gradient
            local.step()
            for reference in references:
                reference.used()
            for worker in own.workers:
                twins.assert_same_parameters(worker.params, held(masters, wire), f"step {step}")


@pytest.mark.parametrize("fault", ["drop request", "drop reply", "cut request", "cut reply", "repeat request"])
def test_it_survives_reconnects(server: ServerProcess, name: str, wire: Wire, fault: Any) -> None:
    """The same bits as without the fault: what is sent again is what was sent, and it counts once."""
    ours, masters = parameters(), parameters()
    local, reference = torch.optim.SGD(masters, lr=0.1), Reference(wire)
    with Proxy(server.address) as proxy:
        own = optim.SGD(ours, lr=0.1, remote=_remote(proxy.address, name, wire))
        for step in range(4):
            if step % 2:
                proxy.arm(fault)
            take(own, ours, problems.dense(masters, step, 0))
            take(local, masters, reference.arrives(problems.dense(masters, step, 0)))
            reference.used()
            twins.assert_same_parameters(ours, held(masters, wire), f"step {step}")
        assert proxy.fired[fault] == 2
        assert own.remote.version == 4
        own.remote.close()


def test_an_answer_that_never_came(server: ServerProcess, name: str, wire: Wire) -> None:
    """The step was applied, though nobody could say so: what it left out is known once the server is heard again."""
    ours, masters = parameters(), parameters()
    local, reference = torch.optim.SGD(masters, lr=0.1), Reference(wire)
    with Proxy(server.address, measure=True) as proxy:
        own = optim.SGD(ours, lr=0.1, remote=_remote(proxy.address, name, wire, timeouts=Timeouts(30, 1.0, 20)))
        for step in range(4):
            gradients = problems.dense(masters, step, 0)
            if step == 2:
                proxy.blackhole_at_reply(proxy.replies + 1)
                with pytest.raises(errors.DeadlineError) as caught:
                    take(own, ours, gradients)
                assert caught.value.applied is errors.Applied.UNKNOWN
                proxy.heal()
                own.zero_grad()
                assert own.remote.pull() == 3
            else:
                take(own, ours, gradients)
            take(local, masters, reference.arrives(gradients))
            reference.used()
            twins.assert_same_parameters(ours, held(masters, wire), f"step {step}")
        own.remote.close()


def test_what_was_not_used_leaves_nothing_behind(server: ServerProcess, name: str, wire: Wire) -> None:
    """A NaN is seen by the guard, and neither it nor what came with it is kept; nor is what came too late."""
    masters = parameters()
    local, references = torch.optim.SGD(masters, lr=0.1), [Reference(wire), Reference(wire)]
    how: dict[str, Any] = {"wire_dtype": wire, "settings": Settings(non_finite="skip")}
    policy = Sync(2, min_workers=1, timeout=0.2)
    with crew(server.address, name, 2, parameters, "SGD", {"lr": 0.1}, policy, **how) as own:

        def act(worker: Worker, gradients: Gradients) -> None:
            worker.give(gradients)
            worker.optimizer.step()

        def use(step: int, *numbers: int) -> None:
            """Have these workers take part in a round, which goes on without the others."""
            rows = [(number, problems.dense(masters, step, number)) for number in numbers]
            for future in [own.workers[number].do(act, gradients) for number, gradients in rows]:
                future.result(30)
            parts = [references[number].arrives(gradients) for number, gradients in rows]
            for parameter, gradient in zip(masters, mean(parts), strict=True):
                parameter.grad = gradient
            local.step()
            for number in numbers:
                references[number].used()
                twins.assert_same_parameters(own.workers[number].params, held(masters, wire), f"step {step}")

        use(0, 0, 1)
        use(1, 0)
        own.workers[1].do(act, problems.dense(masters, 1, 1)).result(30)
        poisoned = problems.dense(masters, 2, 0)
        poisoned[0][3, 2] = math.nan  # type: ignore[index]
        poisoned[1][4] = math.inf  # type: ignore[index]
        own.workers[0].do(act, poisoned).result(30)
        remote = own.workers[0].optimizer.remote
        assert remote.version == 2
        assert remote.describe().stale_contributions == 1
        assert remote.history()[-1].outcome == "skipped"
        use(3, 0, 1)
        use(4, 0, 1)


def test_a_nan_that_is_used_is_not_kept(server: ServerProcess, name: str, wire: Wire) -> None:
    """Without the guard it does what it does in torch: to the parameters, not to the gradients that follow."""
    ours = [nn.Parameter(torch.zeros(3000)), nn.Parameter(torch.zeros(5))]
    own = optim.SGD(ours, lr=1.0, remote=_remote(server.address, name, wire))
    gradients = [torch.ones(3000), torch.ones(5)]
    gradients[0][70] = math.nan
    take(own, ours, gradients)  # type: ignore[arg-type]
    assert ours[0][70].isnan()
    with torch.no_grad():
        for parameter in ours:
            parameter.zero_()
    for _ in range(10):
        take(own, ours, [torch.zeros(3000), torch.zeros(5)])
    assert all(bool(parameter.isfinite().all()) for parameter in ours)
    own.remote.close()


def test_accumulated_gradients_and_a_group_that_is_added(server: ServerProcess, name: str, wire: Wire) -> None:
    ours, masters = parameters(), parameters()
    own: Any = optim.SGD(ours, lr=0.1, remote=_remote(server.address, name, wire))
    local, reference = torch.optim.SGD(masters, lr=0.1), Reference(wire)
    for step in range(4):
        if step == 2:
            for params, optimizer in ((ours, own), (masters, local)):
                more = nn.Parameter(torch.ones(2600))
                optimizer.add_param_group({"params": [more], "lr": 0.5})
                params.append(more)
        early, last = problems.dense(masters, step, 0), problems.dense(masters, 10 + step, 0)
        for parameter, gradient in zip(ours, early, strict=True):
            parameter.grad = gradient
        own.remote.accumulate()
        first = reference.arrives(early)
        reference.used()
        take(own, ours, last)
        take(local, masters, [a + b for a, b in zip(first, reference.arrives(last), strict=True)])  # type: ignore[operator]
        reference.used()
        twins.assert_same_parameters(ours, held(masters, wire), f"step {step}")
    own.remote.close()


def test_bytes_of_a_step(server: ServerProcess, name: str) -> None:
    """A byte and a sixteenth for each element; eight bytes for one in fifty."""
    count = 640_000
    for number, (wire, sent) in enumerate([(Wire("int8"), count * 17 // 16), (Wire("topk"), 8 * count // 50)]):
        ours = [nn.Parameter(torch.ones(count // 2)) for _ in range(2)]
        own = optim.SGD(ours, lr=0.1, remote=_remote(server.address, f"{name}-{number}", wire))
        take(own, ours, problems.dense(ours, 0, 0))
        assert sent < own.remote.step_traffic.sent < sent + 500
        assert own.remote.step_traffic.received > 4 * count
        own.remote.close()


def test_a_model_too_small_for_it(server: ServerProcess, name: str) -> None:
    """Tensors of up to 2,048 elements travel as they are."""
    ours, masters = (problems.parameters() for _ in range(2))
    own = optim.SGD(ours, lr=0.1, remote=_remote(server.address, name, Wire("topk")))
    local = torch.optim.SGD(masters, lr=0.1)
    for step in range(2):
        take(own, ours, problems.dense(ours, step, 0))
        take(local, masters, problems.dense(ours, step, 0))
        twins.assert_same_parameters(ours, masters, f"step {step}")
    own.remote.close()
