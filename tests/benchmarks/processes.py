"""Server processes that benchmarks measure against: farstep's own, and a bare gRPC echo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ECHO = """
import sys
from concurrent.futures import ThreadPoolExecutor
import grpc

def echo(messages, context):
    yield from messages

server = grpc.server(ThreadPoolExecutor(4))
method = grpc.stream_stream_rpc_method_handler(echo)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Echo": method}),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
"""


@contextmanager
def farstep_server(*arguments: str) -> Iterator[str]:
    """Run a farstep-server on a loopback port; yield its address."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "farstep_server", "--listen", "127.0.0.1:0", "--ready-fd", str(write_end)]
    process = subprocess.Popen([*command, "--log-level", "warning", *arguments], pass_fds=(write_end,))
    os.close(write_end)
    try:
        with os.fdopen(read_end) as ready:
            yield json.loads(ready.readline())["address"]
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def echo_server() -> Iterator[str]:
    """Run a gRPC server that returns every message of a stream; yield its address."""
    process = subprocess.Popen([sys.executable, "-c", _ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()
