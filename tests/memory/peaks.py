"""The peak memory of a process that steps 102 MB and does nothing else, and of the server that it steps at."""

from __future__ import annotations

import json
import subprocess
import sys
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
for _ in range(steps):
    optimizer.zero_grad()
    torch.autograd.backward(parameters, arriving)
    optimizer.step()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(sum(sign * int(status[key].split()[0]) for key, sign in (("VmHWM", 1), ("RssShmem", -1))) * 1024)
"""


def peak(module: str, name: str, tensors: int, how: dict[str, Any] | None) -> int:
    """Return the peak of a process that takes a few steps, in bytes.

    Shared memory is left out: the server maps it too, and it counts there.
    """
    orders = json.dumps([module, name, tensors, ELEMENTS, STEPS, how])
    command = [sys.executable, "-c", _WORKER, orders]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def server_peak(server: ServerProcess) -> int:
    """Return the server's peak so far, in bytes."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM"].split()[0]) * 1024


def peaks(server: ServerProcess, name: str, how: dict[str, Any]) -> tuple[int, int]:
    """Return what a server of nothing else takes for an Adam of 102 MB at its peak, and the peak of the one worker.

    What a process needs anyway (Python, torch, gRPC) is left out of the server's: what it has taken before the model came, and
    after a small one had been hosted.
    """
    peak("farstep.optim", "Adam", 1, {**how, "address": server.address, "name": f"{name}-small"})
    before = server_peak(server)
    worker = peak("farstep.optim", "Adam", TENSORS, {**how, "address": server.address, "name": name})
    return server_peak(server) - before, worker


def mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"
