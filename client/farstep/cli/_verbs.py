"""The verbs: each takes the parsed command line, talks to the server, prints, and returns its exit code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

from rich.live import Live

from farstep.cli import _tables as tables
from farstep.cli import _views as views
from farstep.cli._bench import measure, plan_from
from farstep.cli._client import Client
from farstep.cli._doctor import examine
from farstep.cli._values import clean, plain_map, value_map
from farstep_wire.address import Address, check_name
from farstep_wire.errors import ConfigurationError
from farstep_wire.settings import Settings

Verb = Callable[[argparse.Namespace, Address], int]
DECLINED = 130


def _emit(view: views.View) -> None:
    print(json.dumps(view, indent=2, allow_nan=False))


def _client(arguments: argparse.Namespace, address: Address) -> Client:
    if address.tls:
        text = f"address {str(address)!r} asks for TLS, which comes with a later release; write {address.target!r}"
        raise ConfigurationError(text)
    return Client(address, arguments.timeout)


def _name(arguments: argparse.Namespace, address: Address) -> str:
    """Return the hosted optimizer that is meant: the argument, else the name in the address."""
    name = arguments.name if arguments.name is not None else address.name
    if name is None:
        text = f"no NAME: give one, here or in the address ({address}/NAME); `farstep ls` lists what is hosted"
        raise ConfigurationError(text)
    return check_name(name)


def ls(arguments: argparse.Namespace, address: Address) -> int:
    """List what is hosted."""
    with _client(arguments, address) as client:
        summaries = [views.summary(item) for item in client.list().optimizers]
    if arguments.json:
        _emit({"server": address.target, "optimizers": summaries})
    elif summaries:
        tables.console().print(tables.hosted(summaries))
    else:
        print(f"nothing is hosted at {address.target}")
    return 0


def show(arguments: argparse.Namespace, address: Address) -> int:
    """Show one hosted optimizer in full."""
    name = _name(arguments, address)
    with _client(arguments, address) as client:
        view = views.description(client.describe(name, parameters=arguments.parameters))
    if arguments.json:
        _emit(view)
    else:
        tables.console().print(tables.description(view))
    return 0


def watch(arguments: argparse.Namespace, address: Address) -> int:
    """Show one hosted optimizer as it changes."""
    name = _name(arguments, address)
    console = tables.console()
    live = console.is_terminal and not arguments.json
    with _client(arguments, address) as client:
        # First a plain call, whose deadline is the user's: whether there is such an optimizer is known at once.
        client.describe(name, parameters=False)
        seen = _rated(views.description(item) for item in client.watch(name, arguments.interval, parameters=live))
        if live:
            with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as display:
                _each(
                    seen,
                    arguments.count,
                    lambda view, rate: display.update(tables.description(view, rate), refresh=True),
                )
        elif arguments.json:
            _each(seen, arguments.count, lambda view, _: print(json.dumps(view, allow_nan=False), flush=True))
        else:
            _each(seen, arguments.count, lambda view, rate: print(tables.one_line(view, rate), flush=True))
    return 0


def _rated(seen: Iterator[views.View]) -> Iterator[tuple[views.View, float | None]]:
    """Yield each description with the steps per second since the one before; None for the first."""
    last: tuple[float, int] | None = None
    for view in seen:
        now, version = time.monotonic(), view["summary"]["version"]
        rate = None if last is None or now <= last[0] else max(0, version - last[1]) / (now - last[0])
        last = now, version
        yield view, rate


def _each(
    seen: Iterator[tuple[views.View, float | None]], count: int | None, draw: Callable[[views.View, float | None], None]
) -> None:
    for number, (view, rate) in enumerate(seen, 1):
        draw(view, rate)
        if number == count:
            return


def workers(arguments: argparse.Namespace, address: Address) -> int:
    """List the workers of a hosted optimizer."""
    name = _name(arguments, address)
    with _client(arguments, address) as client:
        view = views.description(client.describe(name, parameters=False))
    if arguments.json:
        _emit({"name": name, "version": view["summary"]["version"], "workers": view["workers"]})
    elif view["workers"]:
        tables.console().print(tables.workers(view["workers"]))
    else:
        print(f"{clean(name)} has had no workers in this life of the server")
    return 0


def history(arguments: argparse.Namespace, address: Address) -> int:
    """List the last rounds of a hosted optimizer."""
    name = _name(arguments, address)
    with _client(arguments, address) as client:
        rounds = (views.history_round(item) for item in client.history(name, arguments.after))
        if arguments.json:
            for view in rounds:
                print(json.dumps(view, allow_nan=False))
        elif found := list(rounds):
            for line in tables.rounds(found):
                print(line)
        else:
            after = f" after round {arguments.after}" if arguments.after else ""
            print(f"no rounds of {clean(name)}{after} are remembered")
    return 0


def configure(arguments: argparse.Namespace, address: Address) -> int:
    """Change settings of a hosted optimizer."""
    name, changes = _named_settings(arguments, address)
    with _client(arguments, address) as client:
        reply = client.configure(name, value_map(changes))
    settings = plain_map(reply.settings)
    if arguments.json:
        _emit({"name": name, "version": reply.version, "settings": settings})
    else:
        print(f"{clean(name)} from version {reply.version} on:")
        tables.console().print(tables.settings(settings))
    return 0


def _named_settings(arguments: argparse.Namespace, address: Address) -> tuple[str, dict[str, float | str | None]]:
    """Return the name that is meant and the settings; ConfigurationError names the field and the value that cannot be."""
    words = list(arguments.settings)
    first, equals, _ = (arguments.name or "").partition("=")
    if equals and first in Settings().as_dict():
        # The name is left out, which argparse cannot see. A name may have a "=" of its own.
        words.insert(0, arguments.name)
        arguments.name = None
    changes: dict[str, float | str | None] = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals:
            raise ConfigurationError(f"{word!r} is no setting; write SETTING=VALUE, such as clip_grad_norm=1.0")
        if field in changes:
            raise ConfigurationError(f"{field} is set twice, to {text!r} in the end")
        changes[field] = _setting(text)
    try:
        Settings().changed(changes)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return _name(arguments, address), changes


def _setting(text: str) -> float | str | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def rm(arguments: argparse.Namespace, address: Address) -> int:
    """Remove a hosted optimizer, after a question."""
    name = _name(arguments, address)
    with _client(arguments, address) as client:
        if not arguments.yes:
            line = client.describe(name, parameters=False).summary
            what = f"{clean(name)} ({line.optimizer}, version {line.version}, {line.live_workers} live workers)"
            if not _agreed(f"Remove {what}{' and all its snapshots' if arguments.snapshots else ''}?"):
                print("farstep: nothing was removed", file=sys.stderr)
                return DECLINED
        reply = client.remove(name, snapshots=arguments.snapshots)
    if arguments.json:
        _emit({"name": name, "version": reply.version, "snapshots": reply.snapshots})
    else:
        print(f"removed {clean(name)} at version {reply.version}, and {reply.snapshots} snapshots")
    return 0


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigurationError("stdin is no terminal to ask at: say --yes to remove without a question")
    # On stderr, so that stdout holds the result alone.
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def doctor(arguments: argparse.Namespace, address: Address) -> int:
    """Say what is wrong between here and the server."""
    report = examine(address, arguments.timeout, arguments.count)
    view = report.view()
    if arguments.json:
        _emit(view)
    else:
        tables.console().print(tables.checks(view["checks"]))
    return report.code


def bench(arguments: argparse.Namespace, address: Address) -> int:
    """Measure the link to the server, and steps over it."""
    plan = plan_from(
        arguments.sizes,
        arguments.seconds,
        arguments.count,
        arguments.transport,
        arguments.wire_dtype,
        arguments.timeout,
    )
    with _client(arguments, address) as client:
        view = measure(client, address, plan)
    if arguments.json:
        _emit(view)
    else:
        tables.console().print(tables.bench(view))
    return 0


def checkpoint_save(arguments: argparse.Namespace, address: Address) -> int:
    """Write a snapshot."""
    name = _name(arguments, address)
    with _client(arguments, address) as client:
        view = views.snapshot(client.save(name, arguments.tag or ""))
    if arguments.json:
        _emit(view)
    else:
        print(f"saved {clean(name)} at version {view['version']}{_tagged(view)}, {tables.size(view['size_bytes'])}")
    return 0


def checkpoint_list(arguments: argparse.Namespace, address: Address) -> int:
    """List the snapshots of a hosted optimizer."""
    name = _name(arguments, address)
    with _client(arguments, address) as client:
        found = [views.snapshot(item) for item in client.snapshots(name).snapshots]
    if arguments.tag is not None:
        found = [view for view in found if view["tag"] == arguments.tag]
    if arguments.version is not None:
        found = [view for view in found if view["version"] == arguments.version]
    if arguments.json:
        _emit({"name": name, "snapshots": found})
    elif found:
        tables.console().print(tables.snapshots(found))
    else:
        print(f"no snapshots of {clean(name)}")
    return 0


def checkpoint_restore(arguments: argparse.Namespace, address: Address) -> int:
    """Roll a hosted optimizer back to a snapshot."""
    name = _name(arguments, address)
    with _client(arguments, address) as client:
        view = views.snapshot(client.restore(name, arguments.tag or "", arguments.version))
    if arguments.json:
        _emit(view)
    else:
        print(
            f"restored {clean(name)} to version {view['version']}{_tagged(view)}; "
            f"incarnation {view['incarnation']} began"
        )
    return 0


def _tagged(view: views.View) -> str:
    return f" (tag {clean(view['tag'])})" if view["tag"] else ""
