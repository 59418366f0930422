"""The command ``farstep`` when things go wrong: exit codes, messages, deadlines, Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing

import grpc
import pytest

from farstep.cli import main
from farstep.cli._main import exit_code
from farstep_wire.address import parse_address
from farstep_wire.errors import ERROR_TABLE, Applied, NotFoundError, RefusedError

from .conftest import description, refuse

CODES = {
    "CONFIGURATION": 2,
    "UNAVAILABLE": 3,
    "DEADLINE": 3,
    "DRAINING": 3,
    "NOT_FOUND": 4,
    "REMOVED": 4,
}


@pytest.mark.parametrize("code", list(ERROR_TABLE))
def test_every_error_has_an_exit_code(fake, capsys, code) -> None:
    fake.answers["List"] = refuse(ERROR_TABLE[code].kind("what happened and what to do"))
    assert main(["ls"]) == CODES.get(code, 1)
    assert capsys.readouterr().err == "farstep: what happened and what to do\n"


def test_an_error_of_a_newer_server_is_a_refusal(fake, capsys) -> None:
    class NewerError(RefusedError):
        code = "NEWER"

    ERROR_TABLE["NEWER"] = ERROR_TABLE["FENCED"]
    try:
        fake.answers["List"] = refuse(NewerError("news", applied=Applied.NO))
        assert exit_code(NewerError("news")) == 1
    finally:
        del ERROR_TABLE["NEWER"]

    def newer(_, context):
        from farstep_wire.v1 import common_pb2 as pb

        failure = pb.Failure(code="NEWER", message="news")
        context.set_trailing_metadata((("farstep-failure-bin", failure.SerializeToString()),))
        context.abort(grpc.StatusCode.ABORTED, "news")

    fake.answers["List"] = newer
    assert main(["ls"]) == 1
    assert "news (the server's code 'NEWER' is unknown to this client)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        ("UNIMPLEMENTED", 1, "does not know this call (details)"),
        ("RESOURCE_EXHAUSTED", 1, "RESOURCE_EXHAUSTED: details"),
        ("INTERNAL", 1, "INTERNAL: details"),
        ("UNKNOWN", 1, "UNKNOWN: details"),
        ("PERMISSION_DENIED", 1, "PERMISSION_DENIED: details"),
        ("UNAVAILABLE", 3, "something speaks gRPC there"),
        ("DEADLINE_EXCEEDED", 3, "did not answer within"),
    ],
)
def test_a_status_without_a_failure_is_told_with_the_address(fake, capsys, status, code, says) -> None:
    fake.answers["List"] = lambda _, context: context.abort(getattr(grpc.StatusCode, status), "details")
    assert main(["ls"]) == code
    err = capsys.readouterr().err
    assert says in err
    assert fake.address in err
    assert err.count("\n") == 1


def test_a_garbled_failure_falls_back_to_the_status(fake, capsys) -> None:
    def garbled(_, context):
        context.set_trailing_metadata((("farstep-failure-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.INTERNAL, "details")

    fake.answers["List"] = garbled
    assert main(["ls"]) == 1
    assert "INTERNAL: details" in capsys.readouterr().err


ALL_VERBS = [
    ["ls"],
    ["show", "x"],
    ["watch", "x"],
    ["rm", "x", "--yes"],
    ["doctor"],
    ["bench"],
    ["checkpoint", "save", "x"],
    ["checkpoint", "list", "x"],
    ["checkpoint", "restore", "x"],
]


@pytest.mark.parametrize("argv", ALL_VERBS, ids=" ".join)
def test_every_verb_has_a_deadline(fake, capsys, argv) -> None:
    fake.answers = dict.fromkeys(fake.answers, fake.hang)
    assert main([*argv, "--timeout", "0.2"]) == 3
    out, err = capsys.readouterr()
    assert f"the server at {fake.address} did not answer within 0.2 s" in out + err
    if argv[0] in {"rm", "checkpoint"} and argv[1] != "list":
        assert "Whether it carried the request out is unknown" in err


@pytest.mark.parametrize("argv", ALL_VERBS, ids=" ".join)
def test_every_verb_says_that_nothing_listens(tmp_path, capsys, argv) -> None:
    path = tmp_path / "none.sock"
    assert main([*argv, "--server", f"unix:{path}"]) == 3
    out, err = capsys.readouterr()
    assert f"there is no unix socket {path}" in out + err
    assert "Check the path" in out + err


@pytest.mark.parametrize("argv", [argv for argv in ALL_VERBS if len(argv) > 1], ids=" ".join)
def test_what_is_not_there_ends_with_4(fake, capsys, argv) -> None:
    gone = refuse(NotFoundError("no hosted optimizer 'x'; hosted are: resnet50"))
    fake.answers = dict.fromkeys(fake.answers, gone)
    assert main(argv) == 4
    assert capsys.readouterr().err == "farstep: no hosted optimizer 'x'; hosted are: resnet50\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["checkpoint"],
        ["ls", "name"],
        ["ls", "--timeout", "0"],
        ["ls", "--timeout", "nan"],
        ["ls", "--timeout", "soon"],
        ["watch", "x", "--count", "0"],
        ["watch", "x", "--interval", "-1"],
        ["checkpoint", "restore", "x", "--version", "-1"],
        ["checkpoint", "restore", "x", "--version", "1.5"],
        ["--serv", "localhost:1", "ls"],
    ],
    ids=" ".join,
)
def test_usage(argv, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: farstep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        (["ls", "--server", "nowhere"], "", "'nowhere' is not host:port; expected"),
        (["ls", "--server", ""], "", "(from --server)"),
        (["ls"], "http://x:1", "(from $FARSTEP_REMOTE)"),
        (["ls", "--server", "grpcs://localhost:1"], "", "asks for TLS, which comes with a later release"),
        (["show"], "", "no NAME: give one"),
        (["show", "a\nb"], "", "printable"),
        (["show", ""], "", "printable"),
    ],
)
def test_a_wrong_address_or_name_ends_with_2(monkeypatch, capsys, argv, environ, says) -> None:
    monkeypatch.setenv("FARSTEP_REMOTE", environ)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_the_default_server(monkeypatch, capsys) -> None:
    from farstep.cli._main import server_address

    monkeypatch.delenv("FARSTEP_REMOTE", raising=False)
    assert server_address(None, {}) == parse_address("localhost:50051")
    assert server_address(None, {"FARSTEP_REMOTE": ""}) == parse_address("localhost:50051")
    assert server_address(None, {"FARSTEP_REMOTE": "a:1/b"}) == parse_address("a:1/b")
    assert server_address("c:2", {"FARSTEP_REMOTE": "a:1/b"}) == parse_address("c:2")


@pytest.mark.parametrize("argv", [[], *([word, *rest] for word, *rest in ALL_VERBS)], ids=" ".join)
def test_help(capsys, argv) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    if argv:
        assert "--json prints one" in out
        assert "--server ADDRESS" in out
    else:
        for line in (
            "0    ok",
            "1    the server answered",
            "2    usage",
            "3    the server is un",
            "4    not",
            "130  int",
        ):
            assert f"\n  {line}" in out


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("farstep ")


def command(*argv: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environ = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen([sys.executable, "-m", "farstep", *argv], stdout=pipe, stderr=pipe, text=True, env=environ)


def test_ctrl_c_ends_a_watch_with_one_line(fake) -> None:
    def one_then_silence(request, context):
        yield description(120)
        fake.hang()

    fake.answers["Watch"] = one_then_silence
    with command("watch", "resnet50") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("resnet50  version 120")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("", "farstep: interrupted\n", 130)


def test_ctrl_c_ends_a_call_that_waits_with_one_line(fake) -> None:
    asked = threading.Event()
    fake.answers["List"] = lambda *_: (asked.set(), fake.hang())
    with command("ls") as process:
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("", "farstep: interrupted\n", 130)


def test_a_reader_that_has_had_enough_ends_it_quietly(fake) -> None:
    asked, closed = threading.Event(), threading.Event()

    def answer(request, _):
        asked.set()
        closed.wait(30)
        return description(parameters=request.parameters)

    fake.answers["Describe"] = answer
    with command("show", "resnet50") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert asked.wait(30)
        process.stdout.close()
        closed.set()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


def test_a_refused_port_is_named(capsys) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as placeholder:
        port = placeholder.getsockname()[1]
    assert main(["ls", "--server", f"127.0.0.1:{port}"]) == 3
    err = capsys.readouterr().err
    assert f"no farstep server answers at 127.0.0.1:{port}: nothing listens on port {port} of 127.0.0.1" in err
    assert "Check that farstep-server runs there" in err
