"""The command ``farstep-server`` up to where it hands over to the app."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from types import ModuleType

import pytest

from farstep_server import cli
from farstep_server.config import FIELDS, ServerConfig

ANYWHERE = ["--listen", "127.0.0.1:0"]


@pytest.fixture
def serve(monkeypatch):
    """Stand in for the app: record the configuration; raise or return what the test says."""
    seen: list[ServerConfig] = []
    outcome: list[object] = [0]

    def fake(config: ServerConfig) -> int:
        seen.append(config)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    module = ModuleType("farstep_server.app")
    module.serve = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "farstep_server.app", module)
    monkeypatch.setattr(cli, "configure_logging", lambda level, style: None)
    for row in FIELDS:
        monkeypatch.delenv(row.variable, raising=False)
    fake.seen = seen  # type: ignore[attr-defined]
    fake.outcome = outcome  # type: ignore[attr-defined]
    return fake


def test_flags_reach_the_app(serve, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FARSTEP_THREADS", "4")
    flags = (
        f"--listen unix:{tmp_path}/a --listen localhost:0 --optimizer a:B --exit-with-stdin --ready-fd 7 --no-insecure"
    )
    assert cli.main([*flags.split(), "--memory-limit", "8GiB", "--no-insecure"]) == 0
    (config,) = serve.seen
    assert config.listen == (f"unix:{tmp_path}/a", "localhost:0")
    assert (config.optimizer, config.exit_with_parent, config.ready_fd) == (("a:B",), True, 7)
    assert (config.memory_limit_bytes, config.threads, config.insecure) == (8 * 2**30, 4, False)


def test_the_apps_exit_code_is_the_commands(serve) -> None:
    serve.outcome[0] = 5
    assert cli.main(ANYWHERE) == 5


def test_a_wrong_value_ends_with_2_and_one_line(serve, capsys) -> None:
    assert cli.main(["--lease", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("farstep-server: lease 'x' (from the flag --lease) is not a duration")
    assert err.count("\n") == 1
    assert serve.seen == []


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EADDRINUSE, "choose another --listen"),
        (errno.EADDRNOTAVAIL, "no such address"),
        (errno.EACCES, "this user may write"),
        (errno.ENOSPC, "make room"),
        (errno.EIO, "some text"),
    ],
)
def test_the_systems_refusal_ends_with_3_and_says_what_to_do(serve, capsys, number, says) -> None:
    serve.outcome[0] = OSError(number, "some text at 127.0.0.1:1")
    assert cli.main(ANYWHERE) == 3
    err = capsys.readouterr().err
    assert "some text at 127.0.0.1:1" in err
    assert says in err
    assert err.count("\n") == 1


def test_a_bound_port_is_seen_before_torch_is_imported(serve, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main(["--listen", "127.0.0.1:0", "--listen", address]) == 3
    assert f"cannot listen on {address}: Address already in use; something listens" in capsys.readouterr().err
    assert serve.seen == []
    assert cli.main(["--listen", address]) == 0


def test_a_unix_socket_that_is_served_is_not_taken_over(serve, capsys, tmp_path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        assert cli.main(["--listen", f"unix:{path}"]) == 3
        assert f"cannot listen on unix:{path}: Address already in use; something" in capsys.readouterr().err
        assert serve.seen == []
    assert cli.main(["--listen", f"unix:{path}"]) == 0


def test_a_unix_socket_needs_its_directory_and_replaces_no_file(serve, capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("precious")
    assert cli.main(["--listen", f"unix:{tmp_path}/file"]) == 3
    assert "no socket" in capsys.readouterr().err
    assert cli.main(["--listen", f"unix:{tmp_path}/none/a.sock"]) == 3
    assert "its directory does not exist" in capsys.readouterr().err
    assert serve.seen == []


def test_a_host_that_is_not_this_machine_is_named(serve, capsys) -> None:
    assert cli.main(["--listen", "192.0.2.1:50051", "--insecure"]) == 3
    err = capsys.readouterr().err
    assert "cannot listen on 192.0.2.1:50051: Cannot assign requested address; this machine has no such address" in err


def test_an_interrupt_ends_with_130(serve, capsys) -> None:
    serve.outcome[0] = KeyboardInterrupt()
    assert cli.main(ANYWHERE) == 130
    assert capsys.readouterr().err == "farstep-server: interrupted\n"


def test_help_names_every_flag_and_variable_but_the_hidden(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for row in FIELDS:
        assert (row.flag in text) != row.flag_only
        assert (row.variable in text) != row.flag_only
    assert "examples:" in text


@pytest.mark.parametrize("flags", [["--lea", "3"], ["--nonsense"], ["name"], ["--lease"]])
def test_usage_errors_end_with_2(flags) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(flags)
    assert caught.value.code == 2


def test_it_runs_as_a_module_without_importing_torch() -> None:
    script = """import runpy, sys
sys.argv = ["x", "--version"]
try:
    runpy.run_module("farstep_server", run_name="__main__")
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env={"PYTHONPATH": path}
    )
    version, ended = done.stdout.splitlines()
    assert version.startswith("farstep-server ")
    assert ended == "0 False"
