"""What all tests share: farstep-server processes, and the check that a test leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.support import comparison
from tests.support.leaks import Holdings, left_behind
from tests.support.servers import ServerProcess, Servers

# The same examples in every run; a slow machine is no failure; nothing is written beside the tests.
hypothesis.settings.register_profile("farstep", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("farstep")

_numbers = itertools.count()
_scopes: list[Servers] = []
_outcomes = pytest.StashKey[bool]()


def pytest_configure() -> None:
    """Let Ctrl-C work in what the tests start: a run in the background of a shell hands on that it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # What is compared with must not meet MKL's race at a function's first call: github.com/pytorch/pytorch/issues/188792.
    for dtype in (torch.float32, torch.float64):
        torch.sqrt(torch.ones(1, dtype=dtype))


def pytest_collection_finish() -> None:
    """Set aside the objects of everything imported so far, so that collecting garbage after a test is quick."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand on what was counted here, where this process runs a part of the tests for another."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["compared"] = comparison.counted()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process has counted that ran a part of the tests."""
    comparison.add(getattr(node, "workeroutput", {}).get("compared", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how much was compared with local torch, class by class."""
    if lines := comparison.table():
        terminalreporter.section("compared with local torch, bit for bit")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to a failed test's report what the servers said since the test before."""
    report = yield
    if report.when in {"setup", "call"}:
        item.stash[_outcomes] = report.failed or item.stash.get(_outcomes, False)
    if report.failed:
        for server in [server for scope in _scopes for server in scope.all]:
            if text := server.news():
                report.sections.append((f"what the server at {server.address} said", text))
    return report


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves threads, descriptors, child processes or shared memory behind."""
    before = Holdings.now()
    yield
    if request.node.stash.get(_outcomes, False):
        return  # the traceback of a failed test keeps its objects alive
    found = left_behind(before)
    assert not found, "the test left behind:\n  " + "\n  ".join(found)


@pytest.fixture(autouse=True, scope="session")
def _outside_variables_do_not_count() -> Iterator[None]:
    """Take away variables that would send the tests' clients somewhere else."""
    taken = {
        key: os.environ.pop(key) for key in list(os.environ) if key.startswith("FARSTEP_") and key != "FARSTEP_SOAK"
    }
    yield
    os.environ.update(taken)


def _scope() -> Iterator[Servers]:
    # Not pytest's own directories: the path of a unix socket must be short.
    directory = Path(tempfile.mkdtemp(prefix="fs-"))
    servers = Servers(directory)
    _scopes.append(servers)
    try:
        yield servers
    finally:
        try:
            servers.end()
        finally:
            _scopes.remove(servers)
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def session_servers() -> Iterator[Servers]:
    """Start servers that live as long as the session."""
    yield from _scope()


@pytest.fixture(scope="module")
def module_servers() -> Iterator[Servers]:
    """Start servers that live as long as the module."""
    yield from _scope()


@pytest.fixture
def servers() -> Iterator[Servers]:
    """Start servers for one test: ``servers(*arguments, listen=…, environment=…, start=…)``."""
    yield from _scope()


@pytest.fixture(scope="session")
def shared_server(session_servers: Servers) -> ServerProcess:
    """The one server that all tests may use that do it no harm."""
    return session_servers("--log-level", "info")


@pytest.fixture
def server(shared_server: ServerProcess) -> ServerProcess:
    """The shared server, sure to be serving; what it said before this test is not this test's."""
    assert shared_server.process.poll() is None, f"the shared server has ended:\n{shared_server.said()}"
    shared_server.news()
    return shared_server


@pytest.fixture
def name() -> str:
    """A name for a hosted optimizer that no other test uses."""
    return f"test-{next(_numbers)}"
