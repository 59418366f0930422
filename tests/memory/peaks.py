"""The peak memory of a process that steps 102 MB and does nothing else, and of the server that it steps at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.servers import ServerProcess, clean_environment

TENSORS, ELEMENTS, STEPS = 100, 256_000, 3
MODEL = TENSORS * ELEMENTS * 4
ALLOWED = 64 * 2**20
SERVER_MOST = 4 * MODEL + ALLOWED
"""Of a server: parameters, two moments, one contribution in flight, and what is allowed for the rest."""

# argv: JSON of the optimizer's module, class, number of tensors and keywords of Remote, None for a local one.
_WORKER = """
import json, sys
from importlib import import_module
from pathlib import Path
import torch

module, name, tensors, elements, steps, how = json.loads(sys.argv[1])
options = {}
if how is not None:
    from farstep import Remote
    options["remote"] = Remote(**how)
parameters = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(tensors)]
# Without memory of their own: autograd makes the gradients, as it does at the end of any backward pass.
arriving = [torch.tensor(1e-3).expand(elements) for _ in range(tensors)]
optimizer = getattr(import_module(module), name)(parameters, lr=1e-3, **options)
for number in range(steps):
    optimizer.zero_grad()
    torch.autograd.backward(parameters, arriving)
    optimizer.step()
    if number == 0:
        print("stepped", flush=True)
        sys.stdin.readline()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(sum(sign * int(status[key].split()[0]) for key, sign in (("VmHWM", 1), ("RssShmem", -1))) * 1024)
"""


def peak(
    module: str, name: str, tensors: int, how: dict[str, Any] | None, after_first: Callable[[], None] = lambda: None
) -> int:
    """Return the peak of a process that takes a few steps, in bytes; after the first it waits for ``after_first``.

    Shared memory is left out: the server maps it too, and it counts there.
    """
    orders = json.dumps([module, name, tensors, ELEMENTS, STEPS, how])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _WORKER, orders], env=clean_environment(), text=True, **pipes) as own:
        assert own.stdout is not None
        if own.stdout.readline():
            after_first()
        out, err = own.communicate("\n", timeout=100)
    assert own.returncode == 0, err
    return int(out)


def server_peak(server: ServerProcess) -> int:
    """Return the server's peak so far, in bytes."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM"].split()[0]) * 1024


def forget_peak(server: ServerProcess) -> None:
    """Have the server's peak begin anew with what it holds now."""
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")


@dataclass(frozen=True)
class Peaks:
    """In bytes, for an Adam of 102 MB with one worker.

    The server's are what it takes beyond what a process needs anyway (Python, torch, gRPC): beyond its peak before the model
    came, and after a small one had been hosted.
    """

    server_first: int
    server_later: int
    worker: int


def peaks(server: ServerProcess, how: dict[str, Any]) -> Peaks:
    """Return the peaks of a server of nothing else and of its worker; ``how``: keywords of Remote."""
    how = {**how, "address": server.address}
    peak("farstep.optim", "Adam", 1, {**how, "name": "small"})
    idle = server_peak(server)
    first = []

    def after_first() -> None:
        first.append(server_peak(server) - idle)
        forget_peak(server)

    worker = peak("farstep.optim", "Adam", TENSORS, {**how, "name": "large"}, after_first)
    return Peaks(first[0], server_peak(server) - idle, worker)


def mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"
