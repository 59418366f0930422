"""Finds out, with plain sockets, what is at an address: gRPC's own status does not tell these cases apart reliably."""

from __future__ import annotations

import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from farstep_wire.address import Address

PROBE_SECONDS = 2.0
"""How long one probe may wait at most for a connection, and again for a first word."""

# What opens an HTTP/2 connection, then an empty SETTINGS frame. Whoever speaks HTTP/2 answers with SETTINGS of its own.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_FRAME_HEADER_BYTES = 9
_SETTINGS = 4
_TLS_ALERT = b"\x15\x03"


@dataclass(frozen=True)
class Finding:
    """What is at an address. ``problem`` is empty where something speaks HTTP/2, so may be a gRPC server."""

    problem: str = ""
    advice: str = ""


def explain(address: Address, seconds: float = PROBE_SECONDS) -> str:
    """Return in a sentence or two why no server answers at the address, and what to check."""
    finding = probe(address, seconds)
    if finding.problem:
        return f"{finding.problem}. {finding.advice}"
    return (
        "something speaks gRPC there, but it broke the call off or is too busy. Check the server's log, then try again"
    )


def probe(address: Address, seconds: float = PROBE_SECONDS) -> Finding:
    """Connect and see who answers. Takes twice ``seconds`` (at most PROBE_SECONDS each) in the worst case."""
    seconds = min(seconds, PROBE_SECONDS)
    try:
        with _connect(address, seconds) as connection:
            return _judge(address, _greet(connection), seconds)
    except OSError as error:
        return _unreachable(address, error)


def _connect(address: Address, seconds: float) -> socket.socket:
    if not address.is_unix:
        host, _, port = address.target.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(seconds)
        connection.connect(address.target.removeprefix("unix:"))
    except OSError:
        connection.close()
        raise
    return connection


def _greet(connection: socket.socket) -> bytes | None:
    """Return the first bytes of the answer; nothing where the peer hung up; None where it stayed silent."""
    answer = b""
    try:
        connection.sendall(_GREETING)
        while len(answer) < _FRAME_HEADER_BYTES:
            part = connection.recv(256)
            if not part:
                break
            answer += part
    except TimeoutError:
        return answer or None
    except OSError:
        pass
    return answer


def _judge(address: Address, answer: bytes | None, seconds: float) -> Finding:
    if answer is None:
        return Finding(
            f"something accepts connections at {address.target}, but stays silent: it is no gRPC server, or it hangs",
            "Check the port, and the server's log",
        )
    if len(answer) >= _FRAME_HEADER_BYTES and answer[3] == _SETTINGS:
        return Finding()
    if answer.startswith(_TLS_ALERT) or (not answer and _speaks_tls(address, seconds)):
        return Finding(
            f"what listens at {address.target} speaks TLS, and this release of farstep does not",
            "Check the port; a farstep server of this release speaks plain gRPC",
        )
    said = f"it says {_printable(answer)}" if answer else "it hangs up"
    return Finding(
        f"what listens at {address.target} is not a gRPC server ({said})",
        "Check the port: farstep-server logs the address that it serves at when it starts",
    )


def _speaks_tls(address: Address, seconds: float) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: only whether there is TLS is asked
    try:
        with _connect(address, seconds) as connection, context.wrap_socket(connection):
            return True
    except ssl.SSLError as error:
        # An alert or a certificate problem comes from a TLS peer; only these two mean that there is none.
        return error.reason not in {None, "WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING"}
    except OSError:
        return False


def _printable(answer: bytes) -> str:
    first = answer.splitlines()[0][:40]
    return ascii(first.decode("latin-1"))


def _unreachable(address: Address, error: OSError) -> Finding:
    if address.is_unix:
        return _unix_unreachable(Path(address.target.removeprefix("unix:")), error)
    host, _, port = address.target.rpartition(":")
    match error:
        case socket.gaierror():
            return Finding(f"the host name {host!r} cannot be resolved ({error.strerror})", "Check its spelling")
        case ConnectionRefusedError():
            return Finding(
                f"nothing listens on port {port} of {host}",
                "Check that farstep-server runs there, its --listen address (127.0.0.1 serves its own machine alone), "
                "and the port",
            )
        case TimeoutError():
            return Finding(
                f"{host} does not answer on port {port}",
                "Check the host name, that the host is up, and firewalls between",
            )
    return Finding(
        f"{address.target} cannot be reached ({error.strerror or error})", "Check the address and the network"
    )


def _unix_unreachable(path: Path, error: OSError) -> Finding:
    match error:
        case FileNotFoundError():
            return Finding(
                f"there is no unix socket {path}",
                f"Check the path, and that farstep-server runs with --listen unix:{path}",
            )
        case PermissionError():
            return Finding(
                f"this user may not open the unix socket {path}",
                "Check its permissions, and those of the folders above",
            )
        case ConnectionRefusedError() if not _is_socket(path):
            return Finding(f"{path} is there, but is not a unix socket", "Check the path")
        case ConnectionRefusedError():
            return Finding(
                f"the unix socket {path} is there, but no process serves it (its server has ended)",
                f"Start farstep-server with --listen unix:{path}",
            )
    return Finding(f"the unix socket {path} cannot be opened ({error.strerror or error})", "Check the path")


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False
