"""Draws for people what ``_views`` made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from farstep.cli._values import clean, number, text
from farstep.cli._views import View
from farstep_wire.settings import Settings

_GROUPS_PER_TABLE = 6
_PIPE_WIDTH = 1000
_DEFAULTS = {key: number(value) if isinstance(value, float) else value for key, value in Settings().as_dict().items()}


class _Console(Console):
    """Leaves it to the command what a closed pipe means; rich itself would end the process with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Return stdout. Where it is not a terminal a row is never folded, so that it can be searched line by line."""
    plain = _Console(markup=False, highlight=False, emoji=False)
    return plain if plain.is_terminal else _Console(markup=False, highlight=False, emoji=False, width=_PIPE_WIDTH)


def size(count: int) -> str:
    """Return a number of bytes such as "1.5 GiB"."""
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, tail: int = 0) -> Table:
    """Return a table whose first ``left`` and last ``tail`` columns are text, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        if index < left or index >= len(columns) - tail:
            table.add_column(Text(column), overflow="fold")
        else:
            table.add_column(Text(column), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def policy(view: View | None) -> str:
    """Return a policy as it is written in Python."""
    match view:
        case {"kind": "sync", "workers": workers, "min_workers": least, "timeout_ms": timeout}:
            words = [f"workers={workers}"]
            words += [f"min_workers={least}"] if least is not None else []
            words += [f"timeout={timeout / 1000:g}"] if timeout is not None else []
            return f"Sync({', '.join(words)})"
        case {"kind": "async", "max_staleness": staleness, "scale_lr": scaled}:
            words = [f"max_staleness={staleness}"] if staleness is not None else []
            words += ["scale_lr=True"] if scaled else []
            return f"Async({', '.join(words)})"
    return "-"


def _short_policy(view: View | None) -> str:
    """Return what a list that shows the workers beside it need say of a policy."""
    return "Sync" if view is not None and view["kind"] == "sync" else policy(view)


def _workers(view: View) -> str:
    wanted = (view["policy"] or {}).get("workers")
    return f"{view['live_workers']}/{wanted}" if wanted is not None else str(view["live_workers"])


def hosted(summaries: Sequence[View]) -> Table:
    """Draw the list of hosted optimizers."""
    columns = ("name", "class", "policy", "device", "kept", "version", "workers", "elements", "size")
    rows = (
        (
            clean(view["name"]),
            clean(view["optimizer"]),
            _short_policy(view["policy"]),
            clean(view["device"]),
            "no" if view["ephemeral"] else "yes",
            str(view["version"]),
            _workers(view),
            f"{view['elements']:,}",
            size(view["parameter_bytes"]),
        )
        for view in summaries
    )
    return _table(columns, rows, left=5)


def description(view: View, rate: float | None = None) -> Group:
    """Draw a hosted optimizer in full. ``rate``: steps per second, where it is known."""
    parts: list[RenderableType] = [_head(view, rate)]
    parts += [Text(), workers(view["workers"])] if view["workers"] else [Text("\nno workers")]
    parts += [Text(), _schedule_table(view["schedules"])] if view["schedules"] else []
    parts += [part for table in _group_tables(view["groups"]) for part in (Text(), table)]
    if view["parameters"]:
        parts += [Text(), _parameter_table(view["parameters"])]
    return Group(*parts)


def _head(view: View, rate: float | None) -> Text:
    line = view["summary"]
    step = f", last step {view['last_step_seconds'] * 1000:.3g} ms" if view["last_step_seconds"] else ""
    step += f", {rate:.3g} steps/s" if rate is not None else ""
    kept = "ephemeral" if line["ephemeral"] else "kept"
    head = Text(clean(line["name"]), style="bold")
    count = f"{line['parameters']} tensors, {line['elements']:,} elements"
    memory = f"{size(line['parameter_bytes'])} of parameters, {size(view['state_bytes'])} of state"
    rows = (
        f"  {clean(line['optimizer'])}  version {line['version']}  {policy(line['policy'])}",
        f"\n{kept} on {clean(line['device'])}; lineage {clean(line['lineage'])}, incarnation {line['incarnation']}",
        f"\n{count}, {memory}{step}",
        f"\n{view['stale_contributions']} stale contributions" if view["stale_contributions"] else "",
        *(f"\n{line}" for line in _around_steps(view)),
    )
    for row in rows:
        head.append(row, style="not bold")
    return head


def _around_steps(view: View) -> Iterator[str]:
    """Yield what is done on the server around each step, as far as it is not the default."""
    changed = {key: value for key, value in view["settings"].items() if value != _DEFAULTS.get(key)}
    if changed:
        yield f"settings: {text(changed)}"
    if changed.get("ema_decay") is not None or view["averaged"]:
        count = view["averaged"]
        yield (
            f"exponential moving average over {count} step{'s' * (count != 1)}"
            if count
            else "the moving average begins with the next step"
        )


def settings(view: View) -> Table:
    """Draw settings, each on a line."""
    return _table(("setting", "value"), ((clean(key), text(value)) for key, value in view.items()), left=2)


def one_line(view: View, rate: float | None) -> str:
    """Return a description in a line, for a watch that is piped."""
    line = view["summary"]
    words = [clean(line["name"]), f"version {line['version']}", f"workers {_workers(line)}"]
    words += [f"last step {view['last_step_seconds'] * 1000:.3g} ms"]
    words += [f"{rate:.3g} steps/s"] if rate is not None else []
    return "  ".join(words)


def workers(views: Sequence[View]) -> Table:
    """Draw the workers of a hosted optimizer."""
    columns = ("worker", "standing", "version", "contributions", "abstentions", "stale", "staleness", "epoch", "lease")
    rows = (
        (
            clean(view["id"]),
            view["standing"],
            str(view["version"]),
            str(view["contributions"]),
            str(view["abstentions"]),
            str(view["stale"]),
            str(view["staleness"]),
            str(view["epoch"]),
            f"{view['lease_seconds']:.1f} s" if isinstance(view["lease_seconds"], float) else view["lease_seconds"],
            _duration(view["round_trip_seconds"]),
        )
        for view in views
    )
    return _table((*columns, "round trip"), rows, left=2)


def _duration(seconds: float | str | None) -> str:
    match seconds:
        case None:
            return "-"
        case str():
            return seconds
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _schedule_table(schedules: Sequence[View]) -> Table:
    rows = (
        (
            clean(view["scheduler"]),
            str(view["every"]),
            str(view["last_epoch"]),
            f"ended: {clean(view['ended'])}" if view["ended"] else "part of another" if view["part"] else "runs",
        )
        for view in schedules
    )
    return _table(("schedule", "every", "steps", "standing"), rows, tail=1)


def rounds(views: Sequence[View]) -> Iterator[str]:
    """Yield the lines of a history. Not rich's table: that takes a millisecond a row, and there may be 20,000."""
    columns = ("round", "version", "kind", "outcome", "staleness", "ahead", "evaluations", "time", "workers", "reason")
    rows = [
        (
            str(view["number"]),
            str(view["version"]),
            view["kind"],
            view["outcome"],
            str(max((part["staleness"] for part in view["parts"]), default=0)),
            str(max((part["ahead"] for part in view["parts"]), default=0)),
            str(view["evaluations"]),
            _duration(view["seconds"]),
            " ".join(_taker_part(part) for part in view["parts"]) or "-",
            clean(view["reason"] or "-"),
        )
        for view in views
    ]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    texts = {"kind", "outcome", "workers", "reason"}
    for row in (columns, *rows):
        cells = zip(columns, row, widths, strict=True)
        yield "  ".join(
            cell.ljust(width) if name in texts else cell.rjust(width) for name, cell, width in cells
        ).rstrip()


def _taker_part(part: View) -> str:
    worker = clean(part["worker"])
    return f"({worker})" if part["abstained"] else worker


def _group_tables(groups: Sequence[View]) -> list[Table]:
    """Draw options down and groups across, a few groups to a table."""
    tables = []
    for start in range(0, len(groups), _GROUPS_PER_TABLE):
        part = groups[start : start + _GROUPS_PER_TABLE]
        names = list(dict.fromkeys(name for group in part for name in group["options"]))
        rows = [["tensors", *(str(group["parameters"]) for group in part)]]
        rows += [[clean(name), *(_option(group["options"], name) for group in part)] for name in names]
        tables.append(_table(["option", *(f"group {start + index}" for index in range(len(part)))], rows))
    return tables


def _option(options: View, name: str) -> str:
    return text(options[name]) if name in options else "-"


def _parameter_table(parameters: Sequence[View]) -> Table:
    names = list(dict.fromkeys(name for row in parameters for name in row["state"]))
    columns = ["parameter", "shape", "dtype", "group", "norm", "grad norm", *(clean(name) for name in names)]
    rows = (
        [
            clean(row["key"]),
            "×".join(map(str, row["shape"])) or "()",
            clean(row["dtype"]),
            str(row["group"]),
            _norm(row["norm"]),
            _norm(row["gradient_norm"]),
            *(_state(row["state"].get(name)) for name in names),
        ]
        for row in parameters
    )
    return _table(columns, rows, left=3)


def _norm(value: float | str | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _state(view: View | None) -> str:
    if view is None:
        return "-"
    return text(view["value"]) if view["norm"] is None else _norm(view["norm"])


def snapshots(views: Sequence[View]) -> Table:
    """Draw the list of snapshots."""
    rows = (
        (
            clean(view["tag"] or "-"),
            _when(view["created_unix"]),
            str(view["version"]),
            size(view["size_bytes"]),
            str(view["incarnation"]),
        )
        for view in views
    )
    return _table(("tag", "written", "version", "size", "incarnation"), rows, left=2)


def _when(seconds: float | str) -> str:
    if isinstance(seconds, str):
        return seconds
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def bench(view: View) -> Group:
    """Draw what was measured of a link."""
    server, trips = view["server"], view["round_trip_ms"]
    transport = f", transport {clean(view['transport'])}" if view["transport"] else ""
    narrow = f", wire_dtype {clean(view['wire_dtype'])}" if view["wire_dtype"] else ""
    about = (
        f"{clean(view['address'])}: farstep {clean(server['version'])} on {clean(server['device'])}{transport}{narrow}"
    )
    trip = f"round trip: p50 {trips['p50']:.3g} ms, p99 {trips['p99']:.3g} ms over {trips['count']}"
    columns = (
        "model",
        "push",
        "pull",
        "exchange",
        "step",
        "local",
        "step / (exchange + local)",
        "rounds",
        "sent, received",
    )
    rows = (
        (
            _decimal(own["bytes"]),
            f"{_decimal(own['push_bytes_per_second'])}/s",
            f"{_decimal(own['pull_bytes_per_second'])}/s",
            _duration(own["exchange_seconds"]),
            _duration(own["step_seconds"]),
            _duration(own["local_seconds"]),
            f"{own['ratio']:.2f}",
            str(own["rounds"]),
            f"{_decimal(own['step_sent_bytes'])}, {_decimal(own['step_received_bytes'])}",
        )
        for own in view["sizes"]
    )
    parts: list[RenderableType] = [Text(about), Text(trip), Text(), _table(columns, rows)]
    if view["left_out"]:
        left = ", ".join(map(_decimal, view["left_out"]))
        parts.append(Text(f"\nleft out, for the link is slow: {left}; --sizes has them measured all the same"))
    return Group(*parts)


def _decimal(count: float) -> str:
    """Return bytes as links are rated, such as "1.25 GB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def checks(views: Sequence[View]) -> Table:
    """Draw what the doctor found."""
    table = Table(box=None, show_header=False, pad_edge=False)
    styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    for view in views:
        advice = f"\n{clean(view['advice'])}" if view["advice"] else ""
        status = Text(view["status"], style=styles[view["status"]])
        table.add_row(status, Text(view["check"]), Text(clean(view["detail"]) + advice))
    return table
