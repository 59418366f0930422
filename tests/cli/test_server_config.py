"""The server's configuration: which source wins, what every field takes, what is refused and how it is said."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from farstep_server import config as config_module
from farstep_server.config import FIELDS, ServerConfig, load_config, machine_memory_bytes
from farstep_wire.errors import ConfigurationError

# Field, its key, and one value in each source with what it becomes: file (TOML), variable, flag.
PRECEDENCE = [
    (
        "listen",
        "listen",
        ('"127.0.0.1:1"', ("127.0.0.1:1",)),
        ("127.0.0.1:2", ("127.0.0.1:2",)),
        ["unix:/3", "[::1]:4"],
    ),
    ("device", "device", ('"cpu"', "cpu"), ("cuda", "cuda"), "cuda:1"),
    ("data_dir", "data_dir", ('"/a"', Path("/a")), ("/b", Path("/b")), "/c"),
    ("snapshot_interval", "snapshot_interval", ("5", timedelta(seconds=5)), ("2m", timedelta(minutes=2)), "1h"),
    ("snapshot_keep", "snapshot_keep", ("5", 5), ("6", 6), "7"),
    ("optimizer", "optimizer", ('["a:B", "c.d:E"]', ("a:B", "c.d:E")), ("f:G,Mine=h:I", ("f:G", "Mine=h:I")), ["j:K"]),
    ("insecure", "insecure", ("true", True), ("no", False), True),
    ("pg", "pg", ("true", True), ("no", False), True),
    ("lease", "lease", ('"1.5s"', timedelta(seconds=1.5)), ("250ms", timedelta(milliseconds=250)), "3"),
    ("drain_grace", "drain_grace", ("0", timedelta(0)), ("1d", timedelta(days=1)), "3s"),
    ("memory_limit_bytes", "memory_limit", ("1000", 1000), ("8GiB", 8 * 2**30), "1.5MB"),
    ("threads", "threads", ("1", 1), ("2", 2), "3"),
    ("max_sessions", "max_sessions", ("1", 1), ("2", 2), "3"),
    ("log_level", "log_level", ('"debug"', "debug"), ("WARNING", "warning"), "error"),
    ("log_format", "log_format", ('"json"', "json"), ("text", "text"), "json"),
]
FROM_FLAG = {
    "listen": ("unix:/3", "[::1]:4"),
    "device": "cuda:1",
    "data_dir": Path("/c"),
    "snapshot_interval": timedelta(hours=1),
    "snapshot_keep": 7,
    "optimizer": ("j:K",),
    "insecure": True,
    "pg": True,
    "lease": timedelta(seconds=3),
    "drain_grace": timedelta(seconds=3),
    "memory_limit_bytes": 1_500_000,
    "threads": 3,
    "max_sessions": 3,
    "log_level": "error",
    "log_format": "json",
}


def test_the_table_covers_every_field() -> None:
    assert [row[0] for row in PRECEDENCE] == [row.name for row in FIELDS if not row.flag_only]


@pytest.mark.parametrize(("name", "key", "in_file", "in_env", "flag"), PRECEDENCE, ids=[row[0] for row in PRECEDENCE])
def test_flag_over_env_over_file_over_default(tmp_path, name, key, in_file, in_env, flag) -> None:
    path = tmp_path / "farstep.toml"
    path.write_text(f"{key} = {in_file[0]}\n")
    variable = {"FARSTEP_" + key.upper(): in_env[0]}
    config = {"config": str(path)}
    assert getattr(load_config({}, {}), name) == getattr(ServerConfig(), name)
    assert getattr(load_config(config, {}), name) == in_file[1]
    assert getattr(load_config({}, {"FARSTEP_CONFIG": str(path)}), name) == in_file[1]
    assert getattr(load_config(config, variable), name) == in_env[1]
    result = load_config(config | {key: flag}, variable)
    assert getattr(result, name) == FROM_FLAG[name]
    assert result.sources[name] == "the flag --" + key.replace("_", "-")


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load_config({}, {"FARSTEP_LEASE": ""}).lease == timedelta(seconds=30)


def test_defaults() -> None:
    config = load_config({}, {})
    assert config == ServerConfig()
    assert (config.listen, config.device, config.data_dir) == (("127.0.0.1:50051",), "auto", None)
    assert (config.lease, config.drain_grace) == (timedelta(seconds=30), timedelta(seconds=10))
    assert (config.snapshot_interval, config.snapshot_keep) == (timedelta(seconds=60), 3)
    assert (config.max_sessions, config.exit_with_parent, config.ready_fd) == (512, False, None)


BAD = [
    ("listen", "nonsense", "host:port"),
    ("listen", "127.0.0.1:70000", "host:port"),
    ("listen", "127.0.0.1:50051/name", "names an optimizer"),
    ("listen", "unix:/a#name", "names an optimizer"),
    ("listen", "grpcs://127.0.0.1:1", "TLS"),
    ("listen", "http://127.0.0.1:1", "'http'"),
    ("listen", "127.0.0.1:1,127.0.0.1:1", "twice"),
    ("listen", "127.0.0.1:1,,127.0.0.1:2", "empty"),
    ("listen", "unix:/" + "x" * 120, "100 bytes"),
    ("device", "tpu", "cuda:N"),
    ("device", "cuda:x", "cuda:N"),
    ("data_dir", __file__, "not a directory"),
    ("snapshot_interval", "0", "longer than 0"),
    ("snapshot_interval", "soon", "duration"),
    ("snapshot_interval", "-1", "duration"),
    ("lease", "5 years", "duration"),
    ("lease", "1e9999", "duration"),
    ("lease", "9" * 400 + "d", "year"),
    ("drain_grace", "400d", "year"),
    ("snapshot_keep", "0", "at least 1"),
    ("snapshot_keep", "2.5", "whole number"),
    ("threads", "0", "at least 1"),
    ("threads", "many", "whole number"),
    ("threads", "9" * 5000, "whole number"),
    ("max_sessions", "-3", "at least 1"),
    ("memory_limit", "8XB", "size"),
    ("memory_limit", "0", "at least 1 byte"),
    ("memory_limit", "-1GiB", "size"),
    ("optimizer", "torch.optim.SGD", "package.module:Class"),
    ("optimizer", "a:b;import os", "package.module:Class"),
    ("insecure", "perhaps", "true nor false"),
    ("log_level", "loud", "debug, info, warning, error"),
    ("log_format", "xml", "text, json"),
]


@pytest.mark.parametrize(("key", "value", "says"), BAD, ids=[f"{row[0]}-{row[2]}" for row in BAD])
@pytest.mark.parametrize("source", ["flag", "env", "file"])
def test_a_bad_value_names_field_value_and_source(tmp_path, key, value, says, source) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"{key} = '{value}'\n")
    flags, environ, where = {
        "flag": ({key: value}, {}, "the flag --" + key.replace("_", "-")),
        "env": ({}, {"FARSTEP_" + key.upper(): value}, "the environment variable FARSTEP_" + key.upper()),
        "file": ({"config": str(path)}, {}, f"the file {path}"),
    }[source]
    with pytest.raises(ConfigurationError) as caught:
        load_config(flags, environ)
    text = str(caught.value)
    assert text.startswith(key)
    assert value.split(",")[0] in text
    assert f"(from {where})" in text
    assert says in text


TOML_TYPES = [
    ("lease = true", "lease True"),
    ("lease = []", "lease []"),
    ("lease = nan", "between 0 and a year"),
    ("lease = 1979-05-27", "duration"),
    ("snapshot_keep = 1.0", "whole number"),
    ("snapshot_keep = true", "whole number"),
    ("memory_limit = true", "size"),
    ("memory_limit = 0.25", "at least 1 byte"),
    ("insecure = 1", "true nor false"),
    ("device = 0", "cuda:N"),
    ("data_dir = 1", "path"),
    ("listen = []", "empty"),
    ("listen = [1]", "list of texts"),
    ("optimizer = ['']", "empty"),
    ("log_level = 10", "one of"),
    ("lesae = 3", "unknown key 'lesae'"),
    ("ready_fd = 3", "unknown key 'ready_fd'"),
    ("[server]\nlease = 3", "unknown key 'server'"),
    ("lease =", "not TOML"),
    ("lease = 1\nlease = 2", "not TOML"),
]


@pytest.mark.parametrize(("text", "says"), TOML_TYPES, ids=[row[0].splitlines()[0] for row in TOML_TYPES])
def test_a_bad_file_is_named(tmp_path, text, says) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_config({"config": str(path)}, {})
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml cannot be read: No such file"):
        load_config({"config": str(tmp_path / "none.toml")}, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"binary\.toml is not TOML"):
        load_config({}, {"FARSTEP_CONFIG": str(tmp_path / "binary.toml")})


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "gpu-box:50051", "10.0.0.1:0"])
def test_an_open_address_needs_insecure(listen) -> None:
    with pytest.raises(ConfigurationError, match=r"later release.*--insecure") as caught:
        load_config({"listen": ["127.0.0.1:1", listen]}, {})
    assert repr(listen) in str(caught.value)
    assert load_config({"listen": [listen], "insecure": True}, {}).listen == (listen,)
    with pytest.raises(ConfigurationError, match="--insecure"):
        load_config({"listen": [listen], "insecure": False}, {"FARSTEP_INSECURE": "1"})


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:0", "127.5.5.5:1", "unix:/tmp/a:0"])
def test_this_machine_needs_no_insecure(listen) -> None:
    assert load_config({"listen": [listen]}, {}).listen == (listen,)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1B", 1), ("1k", 1000), ("1KiB", 1024), ("2 MB", 2_000_000), ("0.5GiB", 2**29), ("1tib", 2**40)],
)
def test_sizes(text, size) -> None:
    assert load_config({"memory_limit": text}, {}).memory_limit_bytes == size


def test_the_memory_budget_is_a_share_of_the_machine_unless_set(monkeypatch) -> None:
    assert load_config({"memory_limit": "1GiB"}, {}).memory_budget_bytes() == 2**30
    assert 2**20 < machine_memory_bytes() < 2**60
    monkeypatch.setattr(config_module, "machine_memory_bytes", lambda: 1000)
    assert ServerConfig().memory_budget_bytes() == 900


def test_the_home_directory_is_found(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config({"data_dir": "~/state"}, {}).data_dir == tmp_path / "state"


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ServerConfig().lease = timedelta(1)
