"""Real farstep-server processes: started, watched, struck down and always reaped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

START_SECONDS = 60.0
STOP_SECONDS = 30.0
# Logged only where an exception reached a place that none should.
DEFECTS = ("session_failed", "handler_failed", "Traceback (most recent call last)")


def clean_environment() -> dict[str, str]:
    """Return this process's environment without farstep's and torchrun's variables."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FARSTEP_") and key not in launcher}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return kept


class ServerProcess:
    """One ``python -m farstep_server``. ``start`` may be called again after its end: it is then back at its address."""

    def __init__(
        self,
        listen: str,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        *,
        defects_expected: bool = False,
    ) -> None:
        self.address = listen
        self.log = log
        self.defects_expected = defects_expected
        self._arguments = list(arguments)
        self._environment = {**clean_environment(), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = -1
        self._read_from = 0

    # Life.

    def launch(self) -> ServerProcess:
        """Start the process without waiting for it."""
        assert self._process is None, "one process at a time"
        self._ready, write_end = os.pipe()
        command = [sys.executable, "-m", "farstep_server", "--listen", self.address, "--ready-fd", str(write_end)]
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*command, *self._arguments],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment, pass_fds=(write_end,),
                    start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(write_end)
        return self

    def await_ready(self) -> ServerProcess:
        """Wait for the line that says where it serves."""
        deadline = time.monotonic() + START_SECONDS
        line = b""
        try:
            while not line.endswith(b"\n"):
                readable, _, _ = select.select([self._ready], [], [], max(0.0, deadline - time.monotonic()))
                part = os.read(self._ready, 4096) if readable else b""
                if not part:
                    raise AssertionError(f"the server did not become ready; it said:\n{self.said()}")
                line += part
        except BaseException:
            self.end()
            raise
        finally:
            os.close(self._ready)
            self._ready = -1
        self.address = json.loads(line)["address"]
        return self

    def start(self) -> ServerProcess:
        """Start the process and wait until it serves."""
        return self.launch().await_ready()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process while there is one."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self._process = None

    def pause(self) -> None:
        """SIGSTOP it, and wait until the kernel says that it is stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """SIGCONT it."""
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        """SIGTERM it, wait for its end and return its exit code."""
        self.process.terminate()
        return self.join()

    def join(self) -> int:
        """Wait for its end; return its exit code."""
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end within {STOP_SECONDS:g} s:\n{self.said()}") from None
        self._process = None
        return code

    def end(self) -> None:
        """End it whatever state it is in."""
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
        self.join()

    # What it says and holds.

    def said(self) -> str:
        """Return all that it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def news(self) -> str:
        """Return what it has logged since the last call."""
        text = self.said()
        start, self._read_from = self._read_from, len(text)
        return text[start:]

    def defects(self) -> list[str]:
        """Return the lines that only a defect of the server writes."""
        return [line for line in self.said().splitlines() if any(word in line for word in DEFECTS)]

    def rss_bytes(self) -> int:
        """Return its resident memory."""
        return int(psutil.Process(self.pid).memory_info().rss)


class Servers:
    """Starts servers for one scope, and ends all of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.all: list[ServerProcess] = []

    def __call__(
        self,
        *arguments: str,
        listen: str | None = None,
        environment: Mapping[str, str] | None = None,
        start: bool = True,
        defects_expected: bool = False,
    ) -> ServerProcess:
        """Return a server; by default on a unix socket of its own, started and ready."""
        number = len(self.all)
        address = listen or f"unix:{self._directory}/s{number}"
        log = self._directory / f"server-{number}.log"
        server = ServerProcess(address, log, arguments, environment, defects_expected=defects_expected)
        self.all.append(server)
        return server.start() if start else server

    def end(self) -> None:
        """End all; AssertionError where one logged what only a defect logs."""
        for server in self.all:
            server.end()
        found = [line for server in self.all if not server.defects_expected for line in server.defects()]
        assert not found, "the server logged defects of its own:\n" + "\n".join(found)
