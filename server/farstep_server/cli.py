"""The command ``farstep-server``: read the configuration, set up the logs, serve.

Exit codes: 0 drained and ended, 1 a defect, 2 the configuration is wrong, 3 the operating system refused (an address in
use, a directory that cannot be written), 130 interrupted before it served.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from farstep_server.config import (
    CONFIG_VARIABLE,
    DEFAULT_LISTEN,
    FIELDS,
    LOG_FORMATS,
    LOG_LEVELS,
    Field,
    load_config,
)
from farstep_server.logs import configure_logging
from farstep_wire import __version__
from farstep_wire.errors import ConfigurationError
from farstep_wire.limits import PROTOCOL

EXIT_CONFIGURATION = 2
EXIT_SYSTEM = 3
EXIT_INTERRUPTED = 130

_EXAMPLES = f"""\
A flag wins over its environment variable (in brackets), that over the same key in the file, that over the default.
In the file, the keys are the flags' names with underscores: data_dir = "/var/lib/farstep".
Durations are seconds or a number with ms, s, m, h or d; sizes are bytes or a number with a unit such as MiB or GB.

examples:
  farstep-server                                         serve on {DEFAULT_LISTEN}, in memory only
  farstep-server --data-dir /var/lib/farstep             keep snapshots, and serve them again after a restart
  farstep-server --listen unix:/run/farstep.sock         serve this machine's users over a unix socket
  farstep-server --listen 0.0.0.0:50051 --insecure       serve a trusted network
  farstep-server --optimizer my_package:MyOptimizer      also host a class of your own

exit codes: 0 drained and ended, 2 the configuration is wrong, 3 the system refused (address in use), 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser. Values stay text here: ``load_config`` reads them from whatever source."""
    parser = argparse.ArgumentParser(
        prog="farstep-server",
        description="Host optimizers and step them for remote workers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"farstep-server {__version__} (protocol {PROTOCOL})")
    parser.add_argument("--config", metavar="FILE", help=f"read a TOML file [{CONFIG_VARIABLE}]")
    rows = {row.file_key: row for row in FIELDS}
    _add_serving(parser, rows)
    _add_lasting(parser, rows)
    _add_limits(parser, rows)
    logs = parser.add_argument_group("logs, on stderr")
    _add(logs, rows["log_level"], "LEVEL", f"{', '.join(LOG_LEVELS)} (info)")
    _add(logs, rows["log_format"], "FORMAT", f"{' or '.join(LOG_FORMATS)} (text)")
    # For the embedded server, whose owner starts it: not for people.
    parser.add_argument("--exit-with-stdin", action="store_const", const=True, help=argparse.SUPPRESS)
    parser.add_argument("--ready-fd", metavar="N", help=argparse.SUPPRESS)
    return parser


def _add(group: argparse._ArgumentGroup, row: Field, metavar: str, text: str, *, repeat: bool = False) -> None:
    action = "append" if repeat else "store"
    group.add_argument(row.flag, action=action, metavar=metavar, help=f"{text} [{row.variable}]".replace("%", "%%"))


def _add_serving(parser: argparse.ArgumentParser, rows: dict[str, Field]) -> None:
    group = parser.add_argument_group("serving")
    text = f"host:port or unix:PATH; repeat it for several, separate them by commas in the variable ({DEFAULT_LISTEN})"
    _add(group, rows["listen"], "ADDRESS", text, repeat=True)
    group.add_argument(
        "--insecure",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="listen beyond this machine without TLS and tokens [FARSTEP_INSECURE]",
    )
    group.add_argument(
        "--pg",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="serve workers that ask for transport='pg': process groups, whose ports check nobody, for trusted networks "
        "(only where --listen is this machine alone) [FARSTEP_PG]",
    )
    _add(group, rows["device"], "DEVICE", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one (auto)")
    _add(group, rows["threads"], "N", "torch's threads within one operation (torch's own choice)")
    text = "[NAME=]package.module:Class, a class of yours that clients may ask for; repeat it for several"
    _add(group, rows["optimizer"], "CLASS", text, repeat=True)
    _add(group, rows["drain_grace"], "DURATION", "on SIGTERM, how long open rounds may take to finish (10s)")


def _add_lasting(parser: argparse.ArgumentParser, rows: dict[str, Field]) -> None:
    group = parser.add_argument_group("state that lasts")
    _add(group, rows["data_dir"], "DIR", "keep snapshots here, and serve them again (none: in memory only)")
    _add(group, rows["snapshot_interval"], "DURATION", "time between snapshots of what has changed (60s)")
    _add(group, rows["snapshot_keep"], "N", "untagged snapshots kept of each hosted optimizer (3)")


def _add_limits(parser: argparse.ArgumentParser, rows: dict[str, Field]) -> None:
    group = parser.add_argument_group("limits")
    _add(group, rows["lease"], "DURATION", "how long a silent worker stays a member (30s)")
    _add(group, rows["memory_limit"], "SIZE", "all that is hosted together (90 % of this machine's memory)")
    _add(group, rows["max_sessions"], "N", "workers connected at once (512)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``--help``, ``--version`` and usage errors raise SystemExit as ever."""
    arguments = build_parser().parse_args(argv)
    try:
        config = load_config(vars(arguments), os.environ)
        configure_logging(config.log_level, config.log_format)
        for target in config.listen:
            check_free(target)
        # Threads of a parallel region that spin for long take the cores from workers on the same host, and a step among busy
        # processes then takes five times as long; where they sleep at once, waking them takes as long as a step among idle
        # ones. GNU's library is told to spin for a moment. OpenMP reads this once, when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        # Only now: it imports torch, and a wrong flag should not wait for that.
        from farstep_server.app import serve

        return serve(config)
    except ConfigurationError as error:
        return _fail(str(error), EXIT_CONFIGURATION)
    except OSError as error:
        return _fail(_explain(error), EXIT_SYSTEM)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def check_free(target: str) -> None:
    """Raise the OSError that says why nobody can listen at ``host:port`` or ``unix:PATH``.

    gRPC itself tells a bound port from a missing host only in a log line, and at a unix socket it takes the place of a
    server that is still serving.
    """
    try:
        if target.startswith("unix:"):
            _check_unix(target.removeprefix("unix:"))
        else:
            _check_port(target)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {target}: {error.strerror}") from None


def _check_unix(path: str) -> None:
    if Path(path).exists() and not Path(path).is_socket():
        raise FileExistsError(errno.EEXIST, "there is a file at this path that is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if not Path(path).absolute().parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "its directory does not exist") from None
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _check_port(target: str) -> None:
    host, _, port = target.rpartition(":")
    family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(place)


def _fail(message: str, code: int) -> int:
    print(f"farstep-server: {' '.join(message.split())}", file=sys.stderr)
    return code


def _explain(error: OSError) -> str:
    text = error.strerror or str(error)
    match error.errno:
        case errno.EADDRINUSE:
            return f"{text}; something listens there already: stop it, or choose another --listen"
        case errno.EADDRNOTAVAIL:
            return f"{text}; this machine has no such address: choose another --listen"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{text}; choose a port above 1023, or a path that this user may write"
        case errno.ENOSPC | errno.EDQUOT:
            return f"{text}; make room there, or choose another --data-dir"
    return text
