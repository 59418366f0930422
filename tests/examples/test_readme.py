"""Every Python block of the README runs as it stands, against a real server in place of the one that it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from farstep.inspection import connect
from farstep_wire.address import parse_address
from tests.support.servers import ServerProcess, Servers, clean_environment

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NAMED = "gpu-box:50051"


@pytest.fixture(scope="module")
def readme_server(module_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    """A server that writes snapshots, for all blocks."""
    return module_servers("--data-dir", str(tmp_path_factory.mktemp("data")), listen="127.0.0.1:0")


def _run(block: str, server: ServerProcess) -> str:
    assert NAMED in block, "a block that names no server would start one"
    command = [sys.executable, "-W", "error", "-c", block.replace(NAMED, server.address)]
    result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=90, check=False)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    return result.stdout


def test_a_training_loop(readme_server: ServerProcess) -> None:
    assert _run(BLOCKS[0], readme_server) == "20\n"


def test_a_closure(readme_server: ServerProcess) -> None:
    losses = [float(line) for line in _run(BLOCKS[1], readme_server).splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_the_handle(readme_server: ServerProcess) -> None:
    lines = _run(BLOCKS[2], readme_server).splitlines()
    assert lines[0] == f"<'rnn' at {readme_server.address}, version 1, worker 0>"
    assert float(lines[-1]) > 0
    with connect(parse_address(readme_server.address), 30) as server:
        assert [(snapshot.version, snapshot.tag) for snapshot in server.snapshots("rnn")] == [(1, "first")]


def test_what_the_server_does_for_many_workers(readme_server: ServerProcess) -> None:
    assert _run(BLOCKS[3], readme_server) == "1 committed ['0']\n"


def test_local_sgd(readme_server: ServerProcess) -> None:
    assert re.fullmatch(r"3 Traffic\(sent=\d+, received=\d+\)\n", _run(BLOCKS[4], readme_server))


def test_shared_memory(readme_server: ServerProcess) -> None:
    assert _run(BLOCKS[5], readme_server) == "shm\n"


def test_overlap(readme_server: ServerProcess) -> None:
    assert _run(BLOCKS[6], readme_server) == ""


def test_fewer_bytes(readme_server: ServerProcess) -> None:
    output = _run(BLOCKS[7], readme_server)
    found = re.fullmatch(
        r"Wire\(gradients='int8', parameters='bfloat16', .*\) Traffic\(sent=(\d+), received=(\d+)\)\n", output
    )
    assert found, output
    assert int(found[1]) < 0.3 * 4 * 100_100
    assert int(found[2]) < 0.6 * 4 * 100_100


def test_rows(readme_server: ServerProcess) -> None:
    found = re.fullmatch(r"Traffic\(sent=(\d+), received=(\d+)\)\n", _run(BLOCKS[8], readme_server))
    assert found
    assert max(map(int, found.groups())) < 20_000


def test_process_groups(readme_server: ServerProcess) -> None:
    assert _run(BLOCKS[9], readme_server) == "pg\n"


def test_there_are_no_other_blocks() -> None:
    assert len(BLOCKS) == README.count("```python") == 10
