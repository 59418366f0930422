"""Processes forked from a training script that has an optimizer: harmless where they leave it alone, refused where not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.servers import ServerProcess, clean_environment

_LOADER_WORKERS = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from farstep import Remote, optim

model = torch.nn.Linear(3, 1)
optimizer = optim.SGD(model.parameters(), lr=0.1, remote=Remote(sys.argv[1], transport=sys.argv[2]))
data = TensorDataset(torch.ones(8, 3))
for _ in range(6):
    for (batch,) in DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork"):
        optimizer.zero_grad()
        model(batch).mean().backward()
        optimizer.step()
print(optimizer.remote.version)
"""

_CHILD_STEPS = """
import os, sys, torch
from farstep import FarstepError, Remote, optim

def build():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    return optim.SGD([parameter], lr=0.1, remote=Remote(sys.argv[1], transport=sys.argv[2]))

def attempt(act):
    try:
        act()
    except FarstepError as error:
        print(type(error).__name__, error, flush=True)

before = "built before the fork" in sys.argv
if before:
    optimizer = build()
    optimizer.step()
pid = os.fork()
if pid == 0:
    attempt(lambda: (optimizer if before else build()).step())
    attempt(build)
    os._exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
if before:
    optimizer.step()
    print(optimizer.remote.version)
"""


_CHILD_ENDS = """
import os, sys, torch
from farstep import Remote, optim

parameters = [torch.nn.Parameter(torch.zeros(100_000))]
optimizer = optim.SGD(parameters, lr=0.1, remote=Remote(sys.argv[1], transport=sys.argv[2]))
parameters[0].sum().backward()
optimizer.step()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)  # torch's own threads are the parent's too
    if "close" in sys.argv:
        optimizer.remote.close()
        parameters[0].grad.fill_(7.0)
    sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
optimizer.step()
print(optimizer.remote.version, optimizer.remote.transport, parameters[0][0].item())
"""


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.parametrize("transport", ["grpc", "pg"])
def test_a_data_loader_may_fork_its_workers(server: ServerProcess, name: str, transport: str) -> None:
    run = _run(_LOADER_WORKERS, f"{server.address}#{name}", transport)
    assert (run.returncode, run.stdout) == (0, "24\n"), run.stderr
    assert "fork_posix" not in run.stderr


@pytest.mark.parametrize("transport", ["grpc", "pg"])
def test_a_forked_child_that_uses_the_optimizer_is_told_why_it_cannot(
    server: ServerProcess, name: str, transport: str
) -> None:
    run = _run(_CHILD_STEPS, f"{server.address}#{name}", transport, "built before the fork")
    assert run.returncode == 0, run.stderr
    *refusals, version = run.stdout.splitlines()
    assert version == "2"
    assert len(refusals) == 2
    for line in refusals:
        assert line.startswith("ConfigurationError this process")
        assert "'spawn'" in line


def test_a_child_that_was_forked_before_the_first_optimizer_has_its_own(server: ServerProcess, name: str) -> None:
    run = _run(_CHILD_STEPS, f"{server.address}#{name}", "grpc")
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


@pytest.mark.parametrize("transport", ["grpc", "pipe", "shm", "pg"])
@pytest.mark.parametrize("how", ["close", "exit"])
def test_a_forked_child_ends_alone(server: ServerProcess, name: str, transport: str, how: str) -> None:
    run = _run(_CHILD_ENDS, f"{server.address}#{name}", transport, how)
    assert run.returncode == 0, run.stderr
    version, way, value = run.stdout.split()
    assert (version, way) == ("2", transport)
    assert float(value) == pytest.approx(-0.2), "what the child does to its gradient is the child's"
