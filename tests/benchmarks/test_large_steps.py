"""A step of 102 MB with a fused Adam, beside what bounds it and what a user would pick instead; one run, medians, ratios.

The floor is what has to be done in any case: two gradients added and a fused Adam, all in one process's memory. The bare stream
pushes the same bytes over gRPC in frames of farstep's size and then pulls as many, with nothing done to them. gloo with a
replicated fused Adam is what DistributedDataParallel does between backward and the next forward; it takes turns with farstep
in the same processes.
"""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from farstep_wire.limits import CHUNK_BYTES
from tests.benchmarks import large
from tests.benchmarks.processes import farstep_server

pytestmark = pytest.mark.bench

_PUSH_PULL = """
import sys
from concurrent.futures import ThreadPoolExecutor
import grpc

def push_then_pull(messages, context):
    kept = []
    for message in messages:
        if message:
            kept.append(message)
        else:
            yield from kept
            kept = []

options = [("grpc.max_receive_message_length", 4 << 20)]
server = grpc.server(ThreadPoolExecutor(4), options=options)
method = grpc.stream_stream_rpc_method_handler(push_then_pull)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bytes", {"PushPull": method}),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
"""


@contextmanager
def _push_pull() -> Iterator[Callable[[], None]]:
    """Yield a call that pushes 102 MB through a bare gRPC stream and then pulls them."""
    process = subprocess.Popen([sys.executable, "-c", _PUSH_PULL], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    total = large.TENSORS * large.ELEMENTS * 4
    chunks = [bytes(min(CHUNK_BYTES, total - start)) for start in range(0, total, CHUNK_BYTES)]
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    options = [("grpc.max_receive_message_length", 4 << 20)]
    with grpc.insecure_channel(f"127.0.0.1:{int(process.stdout.readline())}", options=options) as channel:
        replies = channel.stream_stream("/bench.Bytes/PushPull", None, None)(iter(outbox.get, None))

        def call() -> None:
            for chunk in (*chunks, b""):
                outbox.put(chunk)
            for _ in chunks:
                next(replies)

        yield call
        outbox.put(None)
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def _medians(acts: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(large.ROUNDS + large.WARM):
        for name, act in acts.items():
            taken = large.seconds(act)
            if number >= large.WARM:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def test_102_megabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gradients, other = large.arena(), large.arena()
    local = torch.optim.Adam(large.parameters(large.arena(), gradients), lr=1e-3, fused=True)

    def floor() -> None:
        gradients.add_(other)
        local.step()

    with farstep_server() as address, _push_pull() as push_pull:
        own = large.parameters(large.arena(), other)
        seen = large.hosted(own, address, "edits-seen", 0, 1)
        unseen = large.hosted(
            large.parameters(large.arena(), other), address, "edits-recorded", 0, 1, detect_edits=False
        )
        times = _medians({
            "local fused Adam": local.step,
            "floor for 2 workers": floor,
            "bare gRPC stream": push_pull,
            "farstep, 1 worker": seen.step,
            "farstep, 1 worker, detect_edits=False": unseen.step,
        })  # fmt: skip
        seen.remote.close()
        unseen.remote.close()
        for count in (2, 4):
            directory = tmp_path / str(count)
            directory.mkdir()
            torch.multiprocessing.spawn(large.rank_main, (count, address, str(directory)), nprocs=count)
            found = [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(count)]
            times[f"gloo + replicated fused Adam, {count} workers"] = max(rank["gloo"] for rank in found)
            times[f"farstep, {count} workers"] = max(rank["farstep"] for rank in found)
    least = times["bare gRPC stream"] + times["local fused Adam"]
    with capsys.disabled():
        print(f"\n102 MB, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {large.ROUNDS}")
        for name, taken in times.items():
            print(f"  {name:44} {taken * 1e3:7.0f} ms   {taken / times['floor for 2 workers']:5.1f} x the floor")
        print(f"  farstep / (bare stream + local step), 1 worker: {times['farstep, 1 worker'] / least:.2f}")
        for count in (2, 4):
            ratio = times[f"farstep, {count} workers"] / times[f"gloo + replicated fused Adam, {count} workers"]
            print(f"  farstep / gloo, {count} workers: {ratio:.2f}")
    assert all(taken > 0 for taken in times.values())
