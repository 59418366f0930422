"""Server processes that benchmarks measure against: farstep's own, and the other ends of its peers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from tests.support.servers import clean_environment

_GRPC = """
import sys
from concurrent.futures import ThreadPoolExecutor
import grpc

def echo(messages, context):
    yield from messages

def push_then_pull(messages, context):
    kept = []
    for message in messages:
        if message:
            kept.append(message)
        else:
            yield from kept
            kept = []

server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 4 << 20)])
methods = {"Echo": grpc.stream_stream_rpc_method_handler(echo),
           "PushPull": grpc.stream_stream_rpc_method_handler(push_then_pull)}
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bytes", methods),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"127.0.0.1:{port}", flush=True)
sys.stdin.read()
"""

_GRPC_AIO = """
import asyncio
import sys
import grpc

async def echo(messages, context):
    async for message in messages:
        yield message

async def push_then_pull(messages, context):
    kept = []
    async for message in messages:
        if message:
            kept.append(message)
        else:
            for each in kept:
                yield each
            kept = []

async def main():
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 4 << 20)])
    methods = {"Echo": grpc.stream_stream_rpc_method_handler(echo),
               "PushPull": grpc.stream_stream_rpc_method_handler(push_then_pull)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bytes", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)

asyncio.run(main())
"""

_FLIGHT = """
import sys
import threading
from pyarrow import flight

class Exchange(flight.FlightServerBase):
    def do_exchange(self, context, descriptor, reader, writer):
        batches = [chunk.data for chunk in reader]
        writer.begin(reader.schema)
        for batch in batches:
            writer.write_batch(batch)

server = Exchange("grpc://127.0.0.1:0")
print(f"grpc://127.0.0.1:{server.port}", flush=True)
sys.stdin.read()
server.shutdown()
"""

_GLOO = """
import sys
import torch
import torch.distributed as dist

print("", flush=True)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=1, world_size=2)
kept = torch.empty(int(sys.argv[2]))
while True:
    dist.recv(kept, 0)
    dist.send(kept, 0)
"""


@dataclass(frozen=True)
class Server:
    """A farstep-server process."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """Return the processor time it has taken."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def farstep_server(*arguments: str) -> Iterator[Server]:
    """Run a farstep-server on a loopback port."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "farstep_server", "--listen", "127.0.0.1:0", "--ready-fd", str(write_end)]
    process = subprocess.Popen(
        [*command, "--log-level", "warning", *arguments], pass_fds=(write_end,), env=clean_environment()
    )
    os.close(write_end)
    try:
        with os.fdopen(read_end) as ready:
            yield Server(json.loads(ready.readline())["address"], process.pid)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def _program(*arguments: str) -> Iterator[str]:
    """Run a Python program that prints a line when it is ready; yield the line, empty where it ended instead."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment(), text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(30)
        process.stdout.close()


@contextmanager
def grpc_server(*, aio: bool = False) -> Iterator[str]:
    """Run a gRPC server with ``Echo``, and ``PushPull``, which returns what it was sent once an empty message comes.

    Its servicers run in threads, as farstep's do, or in an event loop (``aio``).
    """
    with _program("-c", _GRPC_AIO if aio else _GRPC) as address:
        yield address


@contextmanager
def flight_server() -> Iterator[str]:
    """Run an Arrow Flight server that returns what an exchange has brought; an empty address where pyarrow is missing."""
    with _program("-c", _FLIGHT) as address:
        yield address


@contextmanager
def gloo_peer(store: str, elements: int) -> Iterator[None]:
    """Run rank 1 of two, which sends back so many float32 each time it has received them."""
    with _program("-c", _GLOO, store, str(elements)):
        yield


@contextmanager
def rpc_server(workers: int, store: str) -> Iterator[int]:
    """Run the parameter server of torch.distributed.rpc; yield its process id."""
    environment = clean_environment() | {"TP_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.rpc_peer", str(workers), store]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        process.terminate()
        process.wait(30)
