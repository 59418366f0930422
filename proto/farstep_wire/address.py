"""Addresses of servers and hosted optimizers, as users write them.

A name follows a host and port behind ``/``. A unix socket's path holds slashes itself, so there it follows behind ``#``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from farstep_wire.errors import ConfigurationError
from farstep_wire.limits import NAME_BYTES

DEFAULT_PORT = 50051

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")
_EXPECTED = '"[grpc://|grpcs://]host:port[/name]" or "unix:PATH[#name]"'


@dataclass(frozen=True)
class Address:
    """Where a server is, and which of its hosted optimizers is meant.

    ``target`` is what gRPC takes: ``host:port`` or ``unix:PATH``.
    """

    target: str
    name: str | None = None
    tls: bool = False

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket."""
        return self.target.startswith("unix:")

    @property
    def is_loopback(self) -> bool:
        """Whether nothing outside this machine can be meant."""
        host = self.target.rpartition(":")[0]
        return self.is_unix or host in {"localhost", "[::1]"} or host.startswith("127.")

    def __str__(self) -> str:
        scheme = "grpcs://" if self.tls else ""
        separator = "#" if self.is_unix else "/"
        return f"{scheme}{self.target}" + (f"{separator}{self.name}" if self.name else "")


def parse_address(text: str) -> Address:
    """Parse an address; ConfigurationError quotes it and says the form."""
    if not isinstance(text, str):
        raise ConfigurationError(f"an address is a string {_EXPECTED}, not {text!r}")
    if text.startswith("unix:"):
        return _unix(text)
    scheme, separator, rest = text.rpartition("://") if "://" in text else ("grpc", "", text)
    if separator and scheme not in {"grpc", "grpcs"}:
        raise ConfigurationError(f"address {text!r}: scheme {scheme!r} is not grpc or grpcs; expected {_EXPECTED}")
    place, slash, name = rest.partition("/")
    match = _HOST_PORT.fullmatch(place)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigurationError(f"address {text!r}: {place!r} is not host:port; expected {_EXPECTED}")
    if slash and not name:
        raise ConfigurationError(f"address {text!r} ends in '/' with no name behind it")
    return Address(f"{match['host']}:{int(match['port'])}", check_name(name) if name else None, scheme == "grpcs")


def _unix(text: str) -> Address:
    path, _, fragment = text.removeprefix("unix:").partition("#")
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path:
        raise ConfigurationError(f"address {text!r} has no path; expected {_EXPECTED}")
    if len(path.encode()) > 100:
        raise ConfigurationError(f"address {text!r}: a unix socket's path may be at most 100 bytes long")
    return Address(f"unix:{path}", check_name(fragment) if fragment else None)


def check_name(name: str) -> str:
    """Return a hosted optimizer's name if it can be one; ConfigurationError quotes it."""
    if not name or not name.isprintable() or len(name.encode()) > NAME_BYTES or name != name.strip():
        raise ConfigurationError(
            f"name {name!r} must be 1 to {NAME_BYTES} bytes of printable text without outer spaces"
        )
    return name
