"""Parses the command line, runs a verb, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from farstep.cli import _verbs as verbs
from farstep.cli._bench import BENCH_KEYS, DEFAULT_SIZES
from farstep.cli._client import READ_SECONDS, WRITE_SECONDS
from farstep.cli._doctor import DOCTOR_KEYS
from farstep.cli._values import clean
from farstep.cli._views import (
    DESCRIPTION_KEYS,
    HISTORY_KEYS,
    LIST_KEYS,
    SETTINGS_KEYS,
    SNAPSHOT_KEYS,
    WORKERS_KEYS,
)
from farstep_wire import __version__
from farstep_wire.address import DEFAULT_PORT, Address, parse_address
from farstep_wire.errors import ERROR_TABLE, ConfigurationError, FarstepError
from farstep_wire.limits import PROTOCOL

SERVER_VARIABLE = "FARSTEP_REMOTE"
DEFAULT_SERVER = f"localhost:{DEFAULT_PORT}"

EXIT_OK, EXIT_REFUSED, EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

_EPILOG = f"""\
ADDRESS is host:port or unix:PATH; a name in it (host:port/NAME, unix:PATH#NAME) stands for NAME where none is given.
Every call has a deadline: {READ_SECONDS:g} s, or {WRITE_SECONDS:g} s if it writes, unless --timeout says otherwise.
`farstep VERB --help` lists the keys of what --json prints.

examples:
  farstep ls
  farstep --server gpu-box:50051 show resnet50
  farstep watch resnet50 --server gpu-box:50051
  farstep workers resnet50
  farstep history resnet50 --after 1000
  farstep set resnet50 clip_grad_norm=1.0 non_finite=skip
  farstep checkpoint save resnet50 --tag before-lr-drop
  farstep doctor --server unix:/run/farstep.sock
  farstep bench --server gpu-box:50051 --sizes 10KB,100MB

exit codes:
  0    ok
  1    the server answered and refused
  2    usage: a wrong flag, address, name or variable; nothing was sent
  3    the server is unavailable: nothing answers at the address, not in time, or it is draining
  4    not found: no hosted optimizer or snapshot of that name
  130  interrupted by Ctrl-C, or a question was answered with no
"""


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds between 0 and a day")
    return seconds


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return count


def _shared(*, top: bool) -> argparse.ArgumentParser:
    """Return the flags that may stand before and after the verb. After it they have no default, which would win."""
    shared = argparse.ArgumentParser(add_help=False)
    group = shared.add_argument_group("server")
    default = None if top else argparse.SUPPRESS
    text = f"(default: ${SERVER_VARIABLE}, else {DEFAULT_SERVER})"
    group.add_argument("--server", metavar="ADDRESS", default=default, help=text)
    group.add_argument("--timeout", metavar="SECONDS", type=_seconds, default=default, help="each call's deadline")
    return shared


def _verb(
    parsers: argparse._SubParsersAction[argparse.ArgumentParser],
    word: str,
    run: verbs.Verb,
    text: str,
    keys: str,
    *,
    named: bool = True,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parsers.add_parser(
        word,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=keys,
        parents=[_shared(top=False)],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    if named:
        parser.add_argument(
            "name", metavar="NAME", nargs="?", help="the hosted optimizer (default: the address's name)"
        )
    parser.add_argument("--json", action="store_true", help="print JSON; its keys are listed below")
    return parser


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser; a parsed line has the verb's function as ``run``."""
    parser = argparse.ArgumentParser(
        prog="farstep",
        description="Look into a farstep server and what it hosts.",
        epilog=_EPILOG,
        parents=[_shared(top=True)],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"farstep {__version__} (protocol {PROTOCOL})")
    parsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _verb(parsers, "ls", verbs.ls, "list the hosted optimizers", LIST_KEYS, named=False)
    show = _verb(parsers, "show", verbs.show, "show a hosted optimizer in full", DESCRIPTION_KEYS)
    text = "leave out the table of parameters, which reads every tensor once"
    show.add_argument("--no-parameters", dest="parameters", action="store_false", help=text)
    keys = "Without a terminal it prints a line for each change.\n" + DESCRIPTION_KEYS.replace(
        "one object", "one a line"
    )
    watch = _verb(parsers, "watch", verbs.watch, "show a hosted optimizer as it changes", keys)
    text = "shortest time between two updates (1)"
    watch.add_argument("--interval", metavar="SECONDS", type=_seconds, default=1.0, help=text)
    watch.add_argument("--count", metavar="N", type=_at_least(1), help="end after N updates; the first comes at once")
    _add_rounds(parsers)
    rm = _verb(
        parsers, "rm", verbs.rm, "remove a hosted optimizer", "--json prints one object: name, version, snapshots"
    )
    rm.add_argument("--snapshots", action="store_true", help="remove its snapshots as well")
    rm.add_argument("--yes", action="store_true", help="do not ask")
    doctor = _verb(parsers, "doctor", verbs.doctor, "say what is wrong with a connection", DOCTOR_KEYS, named=False)
    doctor.add_argument("--count", metavar="N", type=_at_least(1), default=100, help="round trips to time (100)")
    _add_bench(parsers)
    _add_checkpoint(parsers)
    return parser


def _add_bench(parsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = _verb(parsers, "bench", verbs.bench, "measure a link, and steps over it", BENCH_KEYS, named=False)
    text = f"of the models, with commas ({','.join(DEFAULT_SIZES)}, as far as the link is fast enough)"
    bench.add_argument("--sizes", metavar="SIZES", help=text)
    text = "time for each size (5); three rounds are taken in any case"
    bench.add_argument("--seconds", metavar="SECONDS", type=_seconds, default=5.0, help=text)
    bench.add_argument("--count", metavar="N", type=_at_least(1), default=200, help="round trips to time (200)")
    text = "of the steps, as in farstep.Remote (default: as training scripts have it)"
    bench.add_argument("--transport", metavar="NAME", help=text)
    text = "of the steps: bfloat16, float16, int8 or topk (default: float32 as it is)"
    bench.add_argument("--wire-dtype", metavar="NAME", help=text)


def _add_rounds(parsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _verb(parsers, "workers", verbs.workers, "list the workers of a hosted optimizer", WORKERS_KEYS)
    history = _verb(parsers, "history", verbs.history, "list the last rounds, oldest first", HISTORY_KEYS)
    text = "only rounds after number N (default: all that are remembered)"
    history.add_argument("--after", metavar="N", type=_at_least(0), default=0, help=text)
    text = "change what the server does around each step"
    change = _verb(parsers, "set", verbs.configure, text, SETTINGS_KEYS)
    text = "a setting and its new value; each is explained below"
    change.add_argument("settings", metavar="SETTING=VALUE", nargs="+", help=text)


def _add_checkpoint(parsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "save, list and restore snapshots"
    parser = parsers.add_parser("checkpoint", help=text, description=text[0].upper() + text[1:] + ".")
    nested = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    one = f"--json prints one {SNAPSHOT_KEYS}"
    save = _verb(nested, "save", verbs.checkpoint_save, "write a snapshot; returns once it is durable", one)
    save.add_argument("--tag", metavar="T", help="its tag; a tagged snapshot stays until it is removed")
    many = f"--json prints one object: name, snapshots (oldest first)\n  {SNAPSHOT_KEYS}"
    listing = _verb(nested, "list", verbs.checkpoint_list, "list the snapshots, oldest first", many)
    text = "roll back to a snapshot (the newest); workers go on from there"
    restore = _verb(nested, "restore", verbs.checkpoint_restore, text, one)
    for parser in (listing, restore):
        parser.add_argument("--tag", metavar="T", help="the snapshot with this tag")
        parser.add_argument("--version", metavar="V", type=_at_least(0), help="the snapshot of this version")


def server_address(flag: str | None, environ: Mapping[str, str]) -> Address:
    """Return the server that is meant; ConfigurationError says where a malformed address came from."""
    text = flag if flag is not None else environ.get(SERVER_VARIABLE) or DEFAULT_SERVER
    try:
        return parse_address(text)
    except ConfigurationError as error:
        source = "--server" if flag is not None else f"${SERVER_VARIABLE}"
        raise ConfigurationError(f"{error} (from {source})") from None


def exit_code(error: FarstepError) -> int:
    """Return the exit code of an error. The error table's status decides, so that a new error finds its place."""
    if isinstance(error, ConfigurationError):
        return EXIT_USAGE
    row = ERROR_TABLE.get(error.code)
    match row.grpc_status if row is not None else "":
        case "UNAVAILABLE":
            return EXIT_UNAVAILABLE
        case "NOT_FOUND":
            return EXIT_NOT_FOUND
        case "DEADLINE_EXCEEDED" if error.code == "DEADLINE":
            return EXIT_UNAVAILABLE
    return EXIT_REFUSED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``--help``, ``--version`` and usage errors raise SystemExit as ever."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments, server_address(arguments.server, os.environ))
        sys.stdout.flush()
        return code
    except FarstepError as error:
        return _fail(str(error), exit_code(error))
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe, such as head, has had enough. Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _fail(message: str, code: int) -> int:
    print(f"farstep: {clean(message)}", file=sys.stderr)
    return code
