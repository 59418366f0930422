"""``farstep doctor``: each thing that can be wrong is told apart, said in plain words, and has its exit code."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2

from farstep.cli import _probe, main
from farstep.cli._doctor import percentile
from farstep_wire.limits import PROTOCOL
from farstep_wire.v1 import inspection_pb2 as ipb

from .conftest import server_info


def examine(capsys, *argv: str) -> tuple[int, dict, dict]:
    """Return the exit code, the JSON, and its checks by name. The text must say the same."""
    code = main(["doctor", "--json", *argv])
    view = json.loads(capsys.readouterr().out)
    checks = {check["check"]: check for check in view["checks"]}
    assert main(["doctor", *argv]) == code
    text = " ".join(capsys.readouterr().out.split())
    for check in view["checks"]:
        if check["check"] not in {"round trip", "server"}:
            assert " ".join(f"{check['status']} {check['check']} {check['detail']} {check['advice']}".split()) in text
    return code, view, checks


def test_all_is_well(fake, capsys) -> None:
    code, view, checks = examine(capsys, "--count", "5")
    assert code == 0
    assert set(view) == {"address", "ok", "checks", "server", "round_trip_ms"}
    assert (view["address"], view["ok"]) == (fake.address, True)
    names = ["connection", "server", "protocol", "release", "health", "memory", "snapshots", "round trip"]
    assert list(checks) == names
    assert all(check["status"] == "ok" for check in view["checks"])
    assert set(view["server"]) == {*map(str, ipb.ServerInfo.DESCRIPTOR.fields_by_name)}
    times = view["round_trip_ms"]
    assert times["count"] == 5
    assert 0 < times["min"] <= times["p50"] <= times["p99"]
    assert len(fake.requests("GetServer")) == 2 * (1 + 5)


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99)) == (50.0, 99.0)
    assert (percentile([7.0], 50), percentile([7.0], 99)) == (7.0, 7.0)
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


@pytest.mark.parametrize(
    ("changes", "check", "status", "says", "code"),
    [
        ({"protocol": 0, "oldest_protocol": 0}, "protocol", "failed", "The server is too old", 1),
        ({"protocol": 99, "oldest_protocol": PROTOCOL + 1}, "protocol", "failed", "This side is too old", 1),
        ({"protocol": 99}, "protocol", "ok", "revisions 1 to 99", 0),
        ({"version": "9.9.9"}, "release", "warning", "9.9.9 on the server", 0),
        ({"torch_version": "1.0.0"}, "torch", "warning", "last bits", 0),
        ({"draining": True}, "sessions", "failed", "draining", 3),
        ({"used_bytes": 950}, "memory", "warning", "950 B of 1000 B", 0),
        ({"durable": False}, "snapshots", "warning", "--data-dir", 0),
    ],
)
def test_what_the_server_says_of_itself(fake, capsys, changes, check, status, says, code) -> None:
    fake.answers["GetServer"] = server_info(**changes)
    seen, view, checks = examine(capsys, "--count", "1")
    assert (seen, view["ok"], checks[check]["status"]) == (code, code == 0, status)
    assert says in checks[check]["detail"] + checks[check]["advice"]
    assert ("round trip" in checks) == (code == 0)


def test_a_server_without_a_limit_has_no_memory_check(fake, capsys) -> None:
    fake.answers["GetServer"] = server_info(limit_bytes=0)
    _, view, checks = examine(capsys, "--count", "1")
    assert "memory" not in checks
    assert view["server"]["limit_bytes"] is None


def test_an_unhealthy_server(fake, capsys) -> None:
    fake.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    code, _, checks = examine(capsys)
    assert (code, checks["health"]["status"]) == (3, "failed")
    assert "NOT_SERVING" in checks["health"]["detail"]


def test_a_server_that_stops_answering_in_between(fake, capsys) -> None:
    left = [3]

    def some(_, context):
        left[0] -= 1
        return server_info() if left[0] > 0 else context.abort(grpc.StatusCode.INTERNAL, "tired")

    fake.answers["GetServer"] = some
    assert main(["doctor", "--json"]) == 1
    check = json.loads(capsys.readouterr().out)["checks"][-1]
    assert check["check"] == "round trip"
    assert check["detail"].startswith("number 2 of 100: ")


def test_another_grpc_server(tmp_path, capsys) -> None:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_insecure_port(f"unix:{tmp_path}/other.sock")
        server.start()
        code, view, checks = examine(capsys, "--server", f"unix:{tmp_path}/other.sock")
        server.stop(None).wait()
    assert (code, view["server"]) == (1, None)
    assert "speaks gRPC, but is not a farstep server" in checks["server"]["detail"]


@contextmanager
def peer(says: bytes | None) -> Iterator[str]:
    """Serve one who reads a little, says something and hangs up; None: who stays silent. Yield the address."""
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            if says is None:
                done.wait(30)
                return
            connection.recv(4096)
            connection.sendall(says)
            # Read to the end, or closing would reset the connection before the peer has read.
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            pool.submit(serve, connection)

    with ThreadPoolExecutor(8) as pool, socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("says", "detail"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a gRPC server (it says 'HTTP/1.1 400 Bad Request')"),
        (b"SSH-2.0-OpenSSH_9\r\n", "is not a gRPC server (it says 'SSH-2.0-OpenSSH_9')"),
        (b"\x1b[2J", r"is not a gRPC server (it says '\x1b[2J')"),
        (b"", "is not a gRPC server (it hangs up)"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "speaks TLS, and this release of farstep does not"),
    ],
)
def test_the_wrong_port(capsys, says, detail) -> None:
    with peer(says) as address:
        code, _, checks = examine(capsys, "--server", address)
        assert main(["ls", "--server", address]) == 3
    assert code == 3
    assert detail in checks["connection"]["detail"]
    assert "Check the port" in checks["connection"]["advice"]
    assert detail in capsys.readouterr().err.replace("\\\\", "\\")


def test_a_silent_port(capsys, monkeypatch) -> None:
    monkeypatch.setattr(_probe, "PROBE_SECONDS", 0.2)
    with peer(None) as address:
        code, _, checks = examine(capsys, "--server", address)
    assert code == 3
    assert "stays silent" in checks["connection"]["detail"]


@pytest.fixture
def tls_peer(tmp_path) -> Iterator[str]:
    """Serve TLS that hangs up on anything else without an alert."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [openssl, *request, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(1, socket.MSG_PEEK) != b"\x16":
                    continue
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_tls_server_that_hangs_up(tls_peer, capsys) -> None:
    code, _, checks = examine(capsys, "--server", tls_peer)
    assert code == 3
    assert "speaks TLS" in checks["connection"]["detail"]


def test_asking_a_plain_server_for_tls(capsys) -> None:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        code, _, checks = examine(capsys, "--server", f"grpcs://127.0.0.1:{port}")
        server.stop(None).wait()
    assert code == 2
    assert checks["address"]["status"] == "failed"
    assert f"write 127.0.0.1:{port} without grpcs:// (something speaks plain gRPC there)" in checks["address"]["advice"]


def test_unix_sockets(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "stale"))
    cases = {
        "missing": "there is no unix socket",
        "file": "is not a unix socket",
        "stale": "no process serves it",
        "file/below": "cannot be opened",
    }
    for name, says in cases.items():
        code, _, checks = examine(capsys, "--server", f"unix:{tmp_path}/{name}")
        assert code == 3
        assert says in checks["connection"]["detail"]
        assert checks["connection"]["advice"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (socket.gaierror(-2, "Name or service not known"), "the host name 'gpu-box' cannot be resolved"),
        (TimeoutError("timed out"), "gpu-box does not answer on port 50051"),
        (OSError(113, "No route to host"), "gpu-box:50051 cannot be reached (No route to host)"),
    ],
)
def test_a_host_out_of_reach(capsys, monkeypatch, error, says) -> None:
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    code, _, checks = examine(capsys, "--server", "gpu-box:50051")
    assert code == 3
    assert says in checks["connection"]["detail"]
    assert checks["connection"]["advice"]


def test_permission(capsys, monkeypatch, tmp_path) -> None:
    def fail(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_probe, "_connect", fail)
    code, _, checks = examine(capsys, "--server", f"unix:{tmp_path}/a.sock")
    assert code == 3
    assert "this user may not open" in checks["connection"]["detail"]
