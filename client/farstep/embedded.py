"""The embedded server: a private ``farstep-server`` process on a unix socket, for as long as its owner lives.

It reads the owner's end of a pipe as its stdin and drains when that reaches its end, which the kernel sees to even where the
owner is killed. Under torchrun rank 0 starts it and publishes its address.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from datetime import timedelta

from farstep.launch import agree, current_launch
from farstep_wire.errors import ConfigurationError, UnavailableError

_STOP_SECONDS = 20.0


class EmbeddedServer:
    """A server process of this process's own."""

    def __init__(self, timeout: timedelta) -> None:
        self._directory = tempfile.mkdtemp(prefix="farstep-")
        self.address = f"unix:{self._directory}/server"
        self.owner = os.getpid()
        read_end, write_end = os.pipe()
        command = [
            *(sys.executable, "-m", "farstep_server", "--listen", self.address),
            *("--exit-with-stdin", "--ready-fd", str(write_end), "--log-level", "warning"),
        ]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=(write_end,), env=_environment(), start_new_session=True
            )
        finally:
            os.close(write_end)
        try:
            self._await_ready(read_end, timeout.total_seconds())
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(read_end)

    def _await_ready(self, read_end: int, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([read_end], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(read_end, 4096) if readable else b""
            if not part:
                state = f"exited with code {self._process.poll()}" if readable else "is not ready"
                raise UnavailableError(
                    f"the embedded server {state} after {timeout_seconds:g} s at most; see its messages above"
                )
            line += part
        json.loads(line)

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it in good order; kill it where that takes too long. Only the process that started it can."""
        if os.getpid() != self.owner:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _environment() -> dict[str, str]:
    # The server is no worker: torchrun's variables and the client's remote must not reach it.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FARSTEP_")}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return kept


class _ProcessLifetime:
    """Lives as long as the process, so that a finalizer on it runs at exit."""


_lifetime = _ProcessLifetime()
_lock = threading.Lock()
_server: EmbeddedServer | None = None


def embedded_address(timeout: timedelta) -> str:
    """Return the address of this run's embedded server; starts it, or waits for rank 0 to have done so."""
    launch = current_launch()
    if launch.world_size != launch.local_world_size:
        raise ConfigurationError(
            f"{launch.world_size} workers run on more than one host, and an embedded server serves one: start a "
            f"farstep-server that all can reach and give its address by remote= or $FARSTEP_REMOTE"
        )
    own = _own_server(timeout).address if launch.rank == 0 else None
    return agree("embedded-server", launch, own, timeout)


def _own_server(timeout: timedelta) -> EmbeddedServer:
    global _server  # noqa: PLW0603 - one server per process is the point
    with _lock:
        if _server is None or _server.owner != os.getpid() or not _server.alive:
            _server = EmbeddedServer(timeout)
            # Finalizers run in reverse at exit: the sessions, which come later, take their leave first.
            weakref.finalize(_lifetime, _server.stop)
        return _server


def embedded_server_ended(address: str) -> bool:
    """Whether the address is this process's embedded server and its process has ended."""
    return _server is not None and _server.address == address and _server.owner == os.getpid() and not _server.alive
