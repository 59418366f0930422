"""Steps with sparse gradients: replies bring the rows that changed, with the bits of replies that bring everything."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor, nn

from farstep import Async, Remote, Settings, Timeouts, errors, optim
from farstep_wire.frames import Body, decode, encode
from farstep_wire.v1 import optimizer_pb2 as pb
from tests.data_parallel.crew import Worker, crew, mean
from tests.parity import twins
from tests.support.proxy import Proxy
from tests.support.raw import METHOD
from tests.support.servers import ServerProcess, Servers

WAYS = ("grpc", "pipe", "pg", "shm")
ROWS, WIDTH = 4000, 16
TABLE_BYTES = ROWS * WIDTH * 4
OPTIMIZERS: dict[str, dict[str, Any]] = {"SparseAdam": {"lr": 0.1}, "SGD": {"lr": 0.1}, "Adagrad": {"lr": 0.1}}

each_way = pytest.mark.parametrize("way", WAYS)
each_optimizer = pytest.mark.parametrize("cls", sorted(OPTIMIZERS))


def _remote(address: str, name: str, way: str = "grpc", **more: Any) -> Remote:
    return Remote(address, name=name, transport=way, timeouts=Timeouts(30, 30, 20), **more)  # type: ignore[arg-type]


def table(width: int = WIDTH) -> list[Tensor]:
    """Return the weight of one table, and a small one beside it."""
    torch.manual_seed(5)
    return [
        nn.Embedding(ROWS, width, sparse=True).weight,
        nn.EmbeddingBag(7, 3, sparse=True, mode="sum").weight,
    ]


def given(params: Sequence[Tensor], step: int, worker: int = 0) -> list[Tensor | None]:
    """Return sparse gradients as an embedding gives them: rows come more than once, and not in order."""
    generator = torch.Generator().manual_seed(100 * step + worker)
    found: list[Tensor | None] = []
    for parameter in params:
        rows = torch.randint(0, parameter.shape[0], (1, 40), generator=generator)
        values = torch.randn(40, parameter.shape[1], generator=generator)
        found.append(torch.sparse_coo_tensor(rows, values, parameter.shape, check_invariants=True))
    return found


def give(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Set the gradients."""
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient


class Pair:
    """One worker's parameters beside those of local torch."""

    def __init__(self, remote: Remote, cls: str = "SGD", width: int = WIDTH, **options: Any) -> None:
        self.own, self.local = table(width), table(width)
        options = OPTIMIZERS[cls] | options
        self.optimizer: Any = getattr(optim, cls)(self.own, remote=remote, **options)
        self.torchs = getattr(torch.optim, cls)(self.local, **options)

    def step(self, number: int) -> int:
        """Make the same step on both; return the bytes that came back."""
        for params, optimizer in ((self.own, self.optimizer), (self.local, self.torchs)):
            give(params, given(params, number))
            optimizer.step()
        twins.assert_same_parameters(self.own, self.local, f"step {number}")
        received: int = self.optimizer.remote.step_traffic.received
        return received

    def close(self) -> None:
        """Leave."""
        self.optimizer.remote.close()


@each_way
@each_optimizer
def test_one_worker(server: ServerProcess, name: str, way: str, cls: str) -> None:
    pair = Pair(_remote(server.address, name, way), cls)
    for number in range(12):
        received = pair.step(number)
        assert received < TABLE_BYTES / 20, f"step {number}"
        assert pair.optimizer.remote.step_traffic.sent < TABLE_BYTES / 20
    twins.assert_same_state(pair.optimizer, pair.torchs, "after 12 steps")
    pair.close()


@pytest.mark.parametrize("width", [1, 3, 5])
def test_rows_of_any_width(server: ServerProcess, name: str, width: int) -> None:
    pair = Pair(_remote(server.address, name), width=width)
    for number in range(4):
        assert pair.step(number) < ROWS * width * 4 / 4
    pair.own[0].data[11].add_(1.0)
    pair.local[0].data[11].add_(1.0)
    assert pair.step(4) > ROWS * width * 4, "an edit brings the whole"
    assert pair.step(5) < ROWS * width * 4 / 4
    pair.close()


@each_way
@each_optimizer
def test_two_workers_with_other_rows(server: ServerProcess, name: str, way: str, cls: str) -> None:
    params = table()
    local = getattr(torch.optim, cls)(params, **OPTIMIZERS[cls])
    with crew(server.address, name, 2, table, cls, OPTIMIZERS[cls], transport=way) as own:
        for step in range(6):

            def act(worker: Worker, step: int = step) -> None:
                give(worker.params, given(worker.params, step, worker.number))
                worker.optimizer.step()

            own.arrive(random.Random(step).sample(range(2), 2), act)
            give(params, mean([given(params, step, number) for number in range(2)]))
            local.step()
            for worker in own.workers:
                twins.assert_same_parameters(worker.params, params, f"step {step}, worker {worker.number}")
                # The first worker to attach has uploaded them, and the others have pulled them.
                assert worker.optimizer.remote.step_traffic.received < TABLE_BYTES / 20


def test_steps_that_reach_all_rows(server: ServerProcess, name: str) -> None:
    pair = Pair(_remote(server.address, name), "SGD", momentum=0.9)
    for number in range(4):
        assert pair.step(number) > TABLE_BYTES, "momentum moves the rows of earlier steps too"
    for group in (*pair.optimizer.param_groups, *pair.torchs.param_groups):
        group["momentum"] = 0.0
    pair.step(4)
    assert pair.step(5) < TABLE_BYTES / 20
    pair.close()


def test_an_edit_and_an_exchange_of_rows(server: ServerProcess, name: str) -> None:
    pair = Pair(_remote(server.address, name))
    pair.step(0)
    with torch.no_grad():
        for params in (pair.own, pair.local):
            params[0][5:9].zero_()
    assert pair.step(1) > TABLE_BYTES
    assert pair.step(2) < TABLE_BYTES / 20
    with torch.no_grad():
        pair.own[0][[3, 4]] = pair.own[0][[4, 3]]
    pair.step(3)  # A sum does not see it, so that it is undone, as ever.
    pair.close()


def test_a_worker_that_is_late_and_one_that_skips(server: ServerProcess, name: str) -> None:
    first = Pair(_remote(server.address, name, policy=Async(), worker=0))
    first.step(0)
    late: Any
    params = table()
    late = optim.SGD(params, lr=0.1, remote=_remote(server.address, name, policy=Async(), worker=1))
    twins.assert_same_parameters(params, first.local, "attached")
    for number in range(1, 4):
        first.step(number)
    give(params, given(params, 9))
    late.step()
    give(first.local, given(first.local, 9))
    first.torchs.step()
    twins.assert_same_parameters(params, first.local, "four steps at once")
    assert late.remote.step_traffic.received < TABLE_BYTES / 10, "the rows of four steps"
    with torch.no_grad():
        params[0][:50].zero_()
    late.remote.skip()
    twins.assert_same_parameters(params, first.local, "what is skipped takes no edits")
    first.close()
    late.remote.close()


def test_what_others_do_between(server: ServerProcess, name: str) -> None:
    pair = Pair(_remote(server.address, name, settings=Settings(non_finite="skip")), "Adagrad")
    pair.step(0)
    pair.own[0].grad = given(pair.own, 1)[0]
    assert pair.own[0].grad is not None
    pair.own[0].grad._values()[0, 0] = float("inf")
    with torch.no_grad():
        pair.own[0][17].fill_(2.0)
    pair.optimizer.step()
    twins.assert_same_parameters(pair.own, pair.local, "no step was made, and the edit went with it")
    assert pair.step(2) < TABLE_BYTES / 20
    for optimizer in (pair.optimizer, pair.torchs):
        optimizer.load_state_dict(torch.optim.Adagrad(table(), lr=0.3).state_dict())
    pair.step(3)
    assert pair.step(4) < TABLE_BYTES / 20
    pair.close()


def test_parameters_without_gradients_stay_at_home(server: ServerProcess, name: str) -> None:
    def model() -> list[Tensor]:
        torch.manual_seed(1)
        return [torch.randn(300, 300, requires_grad=True), torch.randn(20, 20, requires_grad=True)]

    own, local = model(), model()
    optimizer: Any = optim.AdamW(own, remote=_remote(server.address, name))
    torchs = torch.optim.AdamW(local)
    for number in range(5):
        for params, one in ((own, optimizer), (local, torchs)):
            params[1].grad = torch.full_like(params[1], float(number))
            params[0].grad = torch.ones_like(params[0]) if number == 3 else None
            one.step()
        twins.assert_same_parameters(own, local, f"step {number}")
        assert (optimizer.remote.step_traffic.received > 360_000) == (number == 3)
    optimizer.remote.close()


@pytest.mark.parametrize("fault", ["cut reply", "drop reply", "cut request"])
def test_cut_in_the_middle(server: ServerProcess, name: str, fault: Any) -> None:
    with Proxy(server.address, message_bytes=2000) as proxy:
        pair = Pair(_remote(proxy.address, name), "SparseAdam")
        pair.step(0)
        for number in range(1, 4):
            proxy.arm(fault)
            pair.step(number)
        assert proxy.fired[fault] == 3
        assert pair.step(4) < TABLE_BYTES / 20
        pair.close()


def test_a_server_that_was_set_back(servers: Servers, tmp_path: Path, name: str) -> None:
    server = servers("--data-dir", str(tmp_path))
    first = Pair(_remote(server.address, name, policy=Async(), worker=0))
    first.step(0)
    first.optimizer.remote.checkpoint()
    first.step(1)
    server.process.kill()
    server.join()
    server.start()
    params = table()
    second: Any = optim.SGD(params, lr=0.1, remote=_remote(server.address, name, policy=Async(), worker=1))
    give(params, given(params, 2))
    second.step()
    assert second.remote.version == first.optimizer.remote.version == 2, "of other rows"
    give(first.own, given(first.own, 3))
    first.optimizer.step()
    second.remote.pull()
    twins.assert_same_parameters(first.own, params, "what the server has by now")
    first.close()
    second.remote.close()


def test_overlap(server: ServerProcess, name: str) -> None:
    pair = Pair(_remote(server.address, name, overlap=True), "SparseAdam")
    for number in range(4):
        received = pair.step(number)
        pair.optimizer.remote.wait()
        assert received < TABLE_BYTES / 20
    pair.close()


def test_without_a_look_at_all_bits(server: ServerProcess, name: str) -> None:
    pair = Pair(_remote(server.address, name, detect_edits=False))
    pair.step(0)
    with torch.no_grad():
        for params in (pair.own, pair.local):
            params[0][5:9].zero_()
    assert pair.step(1) > TABLE_BYTES
    assert pair.step(2) < TABLE_BYTES / 20
    pair.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrowed_parameters_come_whole(server: ServerProcess, name: str, dtype: str) -> None:
    own = table()
    optimizer: Any = optim.SGD(own, lr=0.1, remote=_remote(server.address, name, wire_dtype=dtype))
    for number in range(2):
        give(own, given(own, number))
        optimizer.step()
        assert optimizer.remote.step_traffic.received > TABLE_BYTES / 2
    optimizer.remote.close()


Forge = Callable[[pb.Changed, bytearray], None]


@contextmanager
def forger(target: str, forge: Forge) -> Iterator[str]:
    """Stand between a client and its server, and change the first reply that brings rows."""
    left = [forge]

    def session(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        replies = channel.stream_stream(METHOD, None, None)(messages)
        context.add_callback(replies.cancel)
        with suppress(grpc.RpcError):
            yield from forged(replies)

    def forged(replies: Iterator[bytes]) -> Iterator[bytes]:
        for data in replies:
            frame, payload = decode(pb.ServerFrame, data)
            if left and frame.stepped.HasField("changed"):
                body = bytearray(payload)
                left.pop()(frame.stepped.changed, body)
                frame.ClearField("payload")
                yield from encode(frame, Body([bytes(body)]))
            else:
                yield data

    service, _, method = METHOD[1:].partition("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(session)}
    pool = ThreadPoolExecutor(4)
    between = grpc.server(pool)
    between.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = between.add_insecure_port("127.0.0.1:0")
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        between.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            between.stop(None).wait()
            pool.shutdown()
    assert not left, "the reply was forged"


def _index(place: int, value: int) -> Forge:
    def forge(_: pb.Changed, body: bytearray) -> None:
        body[8 * place : 8 * place + 8] = value.to_bytes(8, "little", signed=True)

    return forge


def _declared(act: Callable[[pb.Changed], object]) -> Forge:
    def forge(changed: pb.Changed, _: bytearray) -> None:
        act(changed)

    return forge


def _shorter(_: pb.Changed, body: bytearray) -> None:
    del body[-64:]


FORGERIES: dict[str, Forge] = {
    "negative row": _index(0, -1),
    "row beyond the end": _index(1, 1 << 40),
    "rows that do not ascend": _index(1, 0),
    "a row less in the bytes": _shorter,
    "a row more": _declared(lambda changed: changed.rows.__setitem__(0, changed.rows[0] + 1)),
    "more rows than there are": _declared(lambda changed: changed.rows.__setitem__(0, 1 << 60)),
    "no rows": _declared(lambda changed: changed.rows.__setitem__(0, 0)),
    "a parameter that there is not": _declared(lambda changed: changed.in_rows.__setitem__(1, 7)),
    "a parameter twice": _declared(lambda changed: changed.in_rows.__setitem__(1, 0)),
    "a parameter whole as well": _declared(lambda changed: changed.whole.append(0)),
    "no counts": _declared(lambda changed: changed.rows.pop()),
    "another version": _declared(lambda changed: setattr(changed, "since", changed.since + 1)),
}


@pytest.mark.parametrize("forgery", sorted(FORGERIES))
def test_malformed_rows(server: ServerProcess, name: str, forgery: str) -> None:
    with forger(server.address, FORGERIES[forgery]) as address:
        pair = Pair(_remote(address, name))
        before = [parameter.detach().clone() for parameter in pair.own]
        give(pair.own, given(pair.own, 0))
        with pytest.raises(errors.InternalError):
            pair.optimizer.step()
        twins.assert_same_parameters(pair.own, before, "nothing was written")
        give(pair.local, given(pair.local, 0))
        pair.torchs.step()
        assert pair.optimizer.remote.pull() == 1, "the step was made"
        twins.assert_same_parameters(pair.own, pair.local, "pulled")
        assert pair.step(1) < TABLE_BYTES / 20
        pair.close()
