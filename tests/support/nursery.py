"""Worker processes that start at once: forked from one process that has imported everything and opened nothing.

Importing torch takes seconds, and tests that kill workers need many. Run as a module it is that process: line by line it is
told what to run, as JSON, and forks a child for it. Each child talks with the test over a unix socket of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from tests.support.servers import clean_environment

_SECONDS = 60.0


class Talk:
    """Messages over a socket, one JSON value a line. Either end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self.over = False

    def say(self, message: object) -> None:
        """Send a message; OSError where the other end is gone."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def heard(self, timeout_seconds: float = 0.0) -> list[Any]:
        """Return the messages that have come, waiting for the first one at most that long; ``over``: no more will."""
        lines: list[bytes] = []
        deadline = time.monotonic() + timeout_seconds
        while not self.over:
            wait = 0.0 if lines else max(0.0, deadline - time.monotonic())
            if not select.select([self._connection], [], [], wait)[0]:
                break
            try:
                data = self._connection.recv(65536)
            except ConnectionError:
                data = b""
            self.over = not data
            *whole, self._buffer = (self._buffer + data).split(b"\n")
            lines += whole
        return [json.loads(line) for line in lines]

    def hear(self, timeout_seconds: float = _SECONDS) -> Any:
        """Return the next message, where they come one at a time."""
        messages = self.heard(timeout_seconds)
        assert len(messages) == 1, f"{messages} where one message is due; over: {self.over}"
        return messages[0]

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


class Child:
    """A worker process, seen from the test."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.pid: int = talk.hear()

    def kill(self) -> None:
        """SIGKILL it."""
        os.kill(self.pid, signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP it, and wait until it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + _SECONDS
        while any(thread != "T" for thread in self._states()):
            assert time.monotonic() < deadline, f"process {self.pid} does not stop"
            time.sleep(0.001)

    def _states(self) -> list[str]:
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]

    def resume(self) -> None:
        """SIGCONT it."""
        os.kill(self.pid, signal.SIGCONT)

    def await_end(self) -> list[Any]:
        """Wait until it is gone; return what it said last."""
        said: list[Any] = []
        deadline = time.monotonic() + _SECONDS
        while not self.talk.over or psutil.pid_exists(self.pid):
            assert time.monotonic() < deadline, f"process {self.pid} does not end"
            said += self.talk.heard(0.05)
        return said


class Nursery:
    """Starts children that run ``act(talk, **arguments)``. A context manager: at its end all of them end.

    ``modules`` are imported before: those with the functions that children run, and what these import late.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = list(modules)
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        # Not pytest's own directories: the path of a unix socket must be short.
        self._directory = tempfile.TemporaryDirectory(prefix="fs-")
        path = f"{self._directory.name}/n"
        self._listening = socket.create_server(path, family=socket.AF_UNIX)
        self._listening.settimeout(_SECONDS)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nursery", path, *self._modules],
            stdin=subprocess.PIPE, env=clean_environment(), start_new_session=True,
        )  # fmt: skip
        return self

    def bear(self, act: Callable[..., None], **arguments: Any) -> Child:
        """Start a child; the arguments are what JSON can tell."""
        stream = self._process.stdin
        assert stream is not None
        order = {"module": act.__module__, "act": act.__name__, "arguments": arguments}
        stream.write(json.dumps(order).encode() + b"\n")
        stream.flush()
        child = Child(Talk(self._listening.accept()[0]))
        self._children.append(child)
        return child

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        for child in self._children:
            child.await_end()
            child.talk.close()
        self._listening.close()
        self._directory.cleanup()


# The process that forks, and the forked.


def _main() -> None:
    path, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _live(path, **json.loads(line))


def _live(path: str, module: str, act: str, arguments: dict[str, Any]) -> None:
    code = 1
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        talk = Talk(connection)
        talk.say(os.getpid())
        getattr(importlib.import_module(module), act)(talk, **arguments)
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        os._exit(code)


if __name__ == "__main__":
    _main()
