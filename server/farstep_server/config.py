"""What the server is told: one frozen ``ServerConfig``, put together from four sources.

A flag wins over an environment variable, that over a key of the file, and that over the default. Each field has one
row in ``FIELDS``: its key in the file, from which its flag and variable follow, and the one parser that reads it from
any source. So ``snapshot_keep = 5`` in the file, ``FARSTEP_SNAPSHOT_KEEP=5`` and ``--snapshot-keep 5`` mean the same,
and an error always names the field, the value and where it came from.

A variable or flag is text. In the file a value may also stand in TOML's own type: ``lease = 30`` and ``lease = "30s"``.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from farstep_wire.address import DEFAULT_PORT, Address, parse_address
from farstep_wire.errors import ConfigurationError

DEFAULT_LISTEN = f"127.0.0.1:{DEFAULT_PORT}"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
MEMORY_SHARE = 0.9
"""The part of this machine's memory that hosted optimizers may take where no limit is set."""

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|min|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_CLASS = re.compile(r"([^\W\d]\w*=)?[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class ServerConfig:
    """How one server runs. Sizes are in bytes; every duration is a timedelta.

    ``listen`` holds gRPC targets, ``host:port`` (port 0: any free one) or ``unix:PATH``. ``data_dir`` None: nothing is
    written to disk. ``snapshot_keep`` counts untagged snapshots per hosted optimizer. ``memory_limit_bytes`` None: 90 %
    of this machine's memory, see ``memory_budget_bytes``. ``threads`` None: torch's own choice. ``exit_with_parent``:
    drain and end when stdin reaches its end. ``ready_fd``: where one JSON line with the address goes once the server
    serves. ``pg`` None: see ``serves_groups``.
    """

    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    device: str = "auto"
    data_dir: Path | None = None
    snapshot_interval: timedelta = timedelta(seconds=60)
    snapshot_keep: int = 3
    optimizer: tuple[str, ...] = ()
    insecure: bool = False
    pg: bool | None = None
    lease: timedelta = timedelta(seconds=30)
    drain_grace: timedelta = timedelta(seconds=10)
    memory_limit_bytes: int | None = None
    threads: int | None = None
    max_sessions: int = 512
    log_level: str = "info"
    log_format: str = "text"
    exit_with_parent: bool = False
    ready_fd: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Field name to where its value came from, for those that are not defaults."""

    @property
    def serves_groups(self) -> bool:
        """Whether workers may have process groups made: as ``pg`` says, else where only this machine can connect."""
        return all(Address(target).is_loopback for target in self.listen) if self.pg is None else self.pg

    def memory_budget_bytes(self) -> int:
        """Return the bytes that all hosted optimizers together may hold."""
        if self.memory_limit_bytes is not None:
            return self.memory_limit_bytes
        return int(machine_memory_bytes() * MEMORY_SHARE)


def machine_memory_bytes() -> int:
    """Return the memory that this process can have at most: the machine's, or less where its control group says so."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            physical = min(physical, int(text))
    return physical


# A parser takes text or TOML's own types and returns the field's value; its ValueError completes the sentence
# "FIELD 'VALUE' (from SOURCE) …".


def _number(value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("is not a whole number")
    try:
        number = int(value)
    except ValueError:
        raise ValueError("is not a whole number") from None
    if number < least:
        raise ValueError(f"must be at least {least}")
    return number


def _count(value: object) -> int:
    return _number(value, 1)


def _descriptor(value: object) -> int:
    return _number(value, 0)


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError('is not a duration; write seconds, or a number with ms, s, m, h or d, such as "90s"')
    return float(match[1]) * _SECONDS[match[2] or "s"]


def _duration_or_zero(value: object) -> timedelta:
    seconds = _seconds(value)
    if not 0 <= seconds <= 366 * 86400:
        raise ValueError("must be between 0 and a year")
    return timedelta(seconds=seconds)


def _duration(value: object) -> timedelta:
    duration = _duration_or_zero(value)
    if not duration:
        raise ValueError("must be longer than 0")
    return duration


def _size(value: object) -> int:
    match = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError('is not a size; write bytes, or a number with a unit, such as "8GiB" or "500MB"')
    unit = (1024 if match[3] else 1000) ** _POWERS[match[2].upper()] if match[2] else 1
    size = math.floor(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size < 1:
        raise ValueError("must be at least 1 byte")
    return size


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _SWITCH:
        return _SWITCH[value.strip().lower()]
    raise ValueError("is neither true nor false")


def _one_of(choices: tuple[str, ...]) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value.lower()

    return parse


def _device(value: object) -> str:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _directory(value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("is not the path of a directory")
    path = Path(value).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError("is there, but is not a directory")
    return path


def _items(value: object) -> list[str]:
    items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) and item for item in items):
        raise ValueError("must be text, or a list of texts, with nothing empty")
    if len(set(items)) < len(items):
        raise ValueError("says the same twice")
    return list(items)


def _listen(value: object) -> tuple[str, ...]:
    return tuple(_listen_address(item).target for item in _items(value))


def _listen_address(text: str) -> Address:
    """Parse a place to listen at. Unlike an address to connect to it may have port 0, and has neither name nor TLS."""
    any_port = not text.startswith("unix:") and text.endswith(":0")
    address = parse_address(text[:-1] + "1" if any_port else text)
    if address.tls:
        raise ValueError("asks for TLS, which this release does not serve yet")
    if address.name is not None:
        raise ValueError(f"names an optimizer, {address.name!r}; a listen address is host:port or unix:PATH alone")
    return Address(address.target[:-1] + "0") if any_port else address


def _classes(value: object) -> tuple[str, ...]:
    items = _items(value)
    for item in items:
        if not _CLASS.fullmatch(item):
            raise ValueError(f'has {item!r}, which is not "[NAME=]package.module:Class"')
    return tuple(items)


@dataclass(frozen=True)
class Field:
    """One field: where it may come from, and how it is read."""

    name: str
    parse: Callable[[object], Any]
    key: str = ""
    """Key in the file, from which flag and variable follow; empty: as the field's name."""
    flag_only: bool = False

    @property
    def file_key(self) -> str:
        """Its key in the file, which is also the name of its flag's value."""
        return self.key or self.name

    @property
    def flag(self) -> str:
        """Its flag."""
        return "--" + self.file_key.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return "FARSTEP_" + self.file_key.upper()


FIELDS = (
    Field("listen", _listen),
    Field("device", _device),
    Field("data_dir", _directory),
    Field("snapshot_interval", _duration),
    Field("snapshot_keep", _count),
    Field("optimizer", _classes),
    Field("insecure", _switch),
    Field("pg", _switch),
    Field("lease", _duration),
    Field("drain_grace", _duration_or_zero),
    Field("memory_limit_bytes", _size, key="memory_limit"),
    Field("threads", _count),
    Field("max_sessions", _count),
    Field("log_level", _one_of(LOG_LEVELS)),
    Field("log_format", _one_of(LOG_FORMATS)),
    Field("exit_with_parent", _switch, key="exit_with_stdin", flag_only=True),
    Field("ready_fd", _descriptor, flag_only=True),
)

CONFIG_VARIABLE = "FARSTEP_CONFIG"


def load_config(flags: Mapping[str, object], environ: Mapping[str, str]) -> ServerConfig:
    """Put a configuration together.

    Args:
        flags: the flags that were given, by file key; None stands for "not given". ``config`` is the file.
        environ: the environment. An empty variable counts as not set.

    Raises:
        ConfigurationError: a value is wrong (it names field, value and source), the file cannot be read or has a key
            that does not exist, or a listen address is open to the network without ``insecure``.
    """
    path = flags.get("config") or environ.get(CONFIG_VARIABLE)
    keys = _read_file(Path(str(path))) if path else {}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for row in FIELDS:
        found = _find(row, flags, environ, keys, str(path))
        if found is None:
            continue
        raw, source = found
        try:
            values[row.name] = row.parse(raw)
        except ConfigurationError as error:
            raise ConfigurationError(f"{row.file_key} (from {source}): {error}") from None
        except ValueError as error:
            raise ConfigurationError(f"{row.file_key} {_quoted(raw)} (from {source}) {error}") from None
        sources[row.name] = source
    config = ServerConfig(**values, sources=sources)
    _check_exposure(config)
    return config


def _quoted(raw: object) -> str:
    return repr(raw[0] if isinstance(raw, list) and len(raw) == 1 else raw)


def _find(
    row: Field, flags: Mapping[str, object], environ: Mapping[str, str], keys: Mapping[str, object], path: str
) -> tuple[object, str] | None:
    """Return the value that counts for a field and its source in words; None: the default."""
    given = flags.get(row.file_key)
    if given is not None:
        return given, f"the flag {row.flag}"
    if row.flag_only:
        return None
    if environ.get(row.variable):
        return environ[row.variable], f"the environment variable {row.variable}"
    if row.file_key in keys:
        return keys[row.file_key], f"the file {path}"
    return None


def _read_file(path: Path) -> dict[str, object]:
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"the configuration file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the configuration file {path} is not TOML: {error}") from None
    known = [row.file_key for row in FIELDS if not row.flag_only]
    for key in keys:
        if key not in known:
            raise ConfigurationError(f"the file {path} has the unknown key {key!r}; the keys are {', '.join(known)}")
    return keys


def _check_exposure(config: ServerConfig) -> None:
    if config.insecure:
        return
    for target in config.listen:
        if not Address(target).is_loopback:
            source = config.sources.get("listen", "the default")
            raise ConfigurationError(
                f"listen {target!r} (from {source}) can be reached from other machines, and anyone there could read "
                "and change what this server hosts: TLS and tokens come with a later release. Listen on 127.0.0.1 or a "
                "unix socket, or say --insecure if the network is trusted"
            )
