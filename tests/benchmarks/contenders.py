"""What a worker process can step: this project, and its peers. Each imports what it needs when it is built.

``prepare`` is what comes between two steps and is not measured: gradients arrive, as from a backward pass, in tensors of their
own after ``zero_grad()``, or wherever a peer's users have them arrive. ``step`` is all from there to parameters that are new.
"""

from __future__ import annotations

import contextlib
import functools
import io
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.sizes import Size

LR = 1e-3


class RefusedError(Exception):
    """A contender that cannot be had here: its package is missing, or the installed farstep does not serve it."""


@dataclass(frozen=True)
class Seat:
    """Which worker of how many this is; ``directory`` is common to all."""

    rank: int
    workers: int
    directory: str


def _nothing() -> None:
    pass


@dataclass
class Contender:
    """What is measured, what comes before it, and its end."""

    step: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    close: Callable[[], object] = _nothing


Builder = Callable[[Size, Seat, dict[str, Any]], Contender]


def build(kind: str, size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """Return a contender; RefusedError says why there is none."""
    try:
        return _BUILDERS[kind](size, seat, options)
    except ModuleNotFoundError as error:
        raise RefusedError(f"{error.name} is not installed") from None


def parameters(size: Size) -> list[torch.nn.Parameter]:
    """Return parameters, each in memory of its own."""
    return [torch.nn.Parameter(torch.randn(size.elements)) for _ in range(size.tensors)]


@functools.lru_cache(maxsize=1)
def gradients(size: Size) -> list[Tensor]:
    """Return gradients, each in memory of its own; nobody writes to them."""
    return [torch.randn(size.elements) for _ in range(size.tensors)]


def _flat_parameters(size: Size, gradient: Tensor) -> list[torch.nn.Parameter]:
    """Return parameters whose gradients are pieces of one tensor."""
    own = parameters(size)
    for parameter, piece in zip(own, gradient.split(size.elements), strict=True):
        parameter.grad = piece
    return own


def _backward(optimizer: Any, own: list[torch.nn.Parameter], arriving: list[Tensor]) -> Callable[[], None]:
    def prepare() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(own, arriving)  # type: ignore[arg-type]

    return prepare


def _local(size: Size, _: Seat, options: dict[str, Any]) -> Contender:
    """torch.optim."""
    own = parameters(size)
    optimizer = getattr(torch.optim, options.get("optimizer", "Adam"))(own, lr=LR, **options.get("arguments", {}))
    return Contender(optimizer.step, _backward(optimizer, own, gradients(size)))


def _floor(size: Size, _: Seat, options: dict[str, Any]) -> Contender:
    """All workers' gradients added and a fused Adam, in one process's memory."""
    total = torch.randn(size.tensors * size.elements)
    others = [torch.randn_like(total) for _ in range(options["workers"] - 1)]
    optimizer = torch.optim.Adam(_flat_parameters(size, total), lr=LR, fused=True)

    def step() -> None:
        for other in others:
            total.add_(other)
        optimizer.step()

    return Contender(step)


def _farstep(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """This project, with one of its transports."""
    own = parameters(size)
    optimizer, close = remote_optimizer(own, seat, options)
    return Contender(optimizer.step, _backward(optimizer, own, gradients(size)), close)


def remote_optimizer(
    own: list[torch.nn.Parameter], seat: Seat, options: dict[str, Any]
) -> tuple[Any, Callable[[], None]]:
    """Return this project's optimizer, and what ends it; ``options`` are those of a Remote, and what is hosted."""
    from farstep import Remote, Sync, Timeouts, optim
    from farstep.cli import main
    from farstep_wire.errors import ConfigurationError

    how = dict(options)
    address, name = how.pop("address"), how.pop("hosted")
    optimizer_class, arguments = how.pop("optimizer", "Adam"), how.pop("arguments", {})
    timeouts = Timeouts(120, 600, 60)
    try:
        remote = Remote(address, name=name, worker=seat.rank, policy=Sync(seat.workers), timeouts=timeouts, **how)
        optimizer = getattr(optim, optimizer_class)(own, lr=LR, remote=remote, **arguments)
    except (ConfigurationError, TypeError) as error:
        raise RefusedError(str(error)) from None

    def close() -> None:
        optimizer.remote.close()
        if seat.rank == 0:
            with contextlib.redirect_stdout(io.StringIO()):
                main(["--server", address, "rm", name, "--yes"])

    return optimizer, close


def _join(seat: Seat, rank: int, count: int, store: str) -> Any:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    return dist


def _ddp(size: Size, seat: Seat, _: dict[str, Any]) -> Contender:
    """What DistributedDataParallel does between backward and the next forward: the mean by gloo, and everyone steps."""
    dist = _join(seat, seat.rank, seat.workers, f"{seat.directory}/gloo")
    flat, arriving = torch.empty(size.tensors * size.elements), torch.randn(size.tensors * size.elements)
    optimizer = torch.optim.Adam(_flat_parameters(size, flat), lr=LR, fused=True)

    def step() -> None:
        dist.all_reduce(flat)
        flat.div_(seat.workers)
        optimizer.step()

    return Contender(step, lambda: flat.copy_(arriving))


def _gloo_echo(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """The bytes of the gradients to another process by gloo, and as many back."""
    dist = _join(seat, 0, 2, options["store"])
    out, back = torch.randn(size.tensors * size.elements), torch.empty(size.tensors * size.elements)

    def step() -> None:
        dist.send(out, 1)
        dist.recv(back, 1)

    return Contender(step)


def _torch_rpc(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """A parameter server by torch.distributed.rpc: gradients as an argument, the new parameters as the result."""
    import torch.distributed.rpc as rpc

    from tests.benchmarks import rpc_peer

    rpc_peer.join(f"worker-{seat.rank}", seat.rank, seat.workers, options["store"])
    rpc.rpc_sync(rpc_peer.NAME, rpc_peer.begin, (size.tensors, size.elements, seat.workers))
    own, arriving = parameters(size), torch.randn(size.tensors * size.elements)

    def step() -> None:
        new = rpc.rpc_sync(rpc_peer.NAME, rpc_peer.step, (arriving,))
        with torch.no_grad():
            for parameter, piece in zip(own, new.split(size.elements), strict=True):
                parameter.copy_(piece)

    return Contender(step, close=lambda: rpc.shutdown(graceful=False))


def _bare_stream(size: Size, _: Seat, options: dict[str, Any]) -> Contender:
    """The bytes of the gradients through a gRPC stream in frames of farstep's size, and then as many back."""
    import grpc

    total, chunk = size.nbytes, options["chunk_bytes"]
    chunks = [bytes(min(chunk, total - start)) for start in range(0, total, chunk)]
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    limit = [("grpc.max_receive_message_length", 4 << 20)]
    channel = grpc.insecure_channel(options["address"], options=limit)
    replies = channel.stream_stream("/bench.Bytes/PushPull", None, None)(iter(outbox.get, None))

    def step() -> None:
        for piece in (*chunks, b""):
            outbox.put(piece)
        for _ in chunks:
            next(replies)

    def close() -> None:
        outbox.put(None)
        channel.close()

    return Contender(step, close=close)


def _echo(size: Size, _: Seat, options: dict[str, Any]) -> Contender:
    """One message through a gRPC stream and back."""
    import grpc

    message = bytes(size.nbytes)
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    channel = grpc.insecure_channel(options["address"])
    replies = channel.stream_stream("/bench.Bytes/Echo", None, None)(iter(outbox.get, None))

    def step() -> None:
        outbox.put(message)
        next(replies)

    def close() -> None:
        outbox.put(None)
        channel.close()

    return Contender(step, close=close)


def _flight(size: Size, _: Seat, options: dict[str, Any]) -> Contender:
    """The bytes of the gradients through an Arrow Flight exchange, a record batch per tensor, and then as many back."""
    import pyarrow as pa
    from pyarrow import flight

    batches = [pa.RecordBatch.from_arrays([pa.array(g.numpy())], ["gradient"]) for g in gradients(size)]
    client = flight.FlightClient(options["address"])
    descriptor = flight.FlightDescriptor.for_command(b"exchange")

    def step() -> None:
        writer, reader = client.do_exchange(descriptor)
        with writer:
            writer.begin(batches[0].schema)
            for batch in batches:
                writer.write_batch(batch)
            writer.done_writing()
            rows = sum(chunk.data.num_rows for chunk in reader)
        assert rows == size.tensors * size.elements

    return Contender(step, close=client.close)


def _ray(size: Size, _: Seat, options: dict[str, Any]) -> Contender:
    """Ray's parameter server: workers that compute gradients and a server that applies them, all actors."""
    from tests.benchmarks.ray_peer import begin

    step, close = begin(size.tensors, size.elements, options["workers"], documented=options["documented"])
    return Contender(step, close=close)


def _iteration(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    from tests.benchmarks.iterations import iteration

    return iteration(size, seat, options)


def _table(kind: str) -> Builder:
    def build_it(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
        from tests.benchmarks import tables

        builders = {"farstep": tables.farstep_table, "gloo": tables.gloo_table, "local": tables.local_table}
        return builders[kind](size, seat, options)

    return build_it


_BUILDERS: dict[str, Builder] = {
    "local": _local, "floor": _floor, "farstep": _farstep, "ddp": _ddp, "gloo echo": _gloo_echo, "torch rpc": _torch_rpc,
    "bare stream": _bare_stream, "echo": _echo, "flight": _flight, "ray": _ray, "iteration": _iteration,
    "farstep table": _table("farstep"), "gloo table": _table("gloo"), "local table": _table("local"),
}  # fmt: skip
