"""Structured logs on the standard library's logging: an event is a name and fields, written as one line.

``text`` is for people, ``time level event key=value …``; ``json`` is one object per line. Time is UTC. Nothing that a
client sends can forge a line: whatever is not a plain word is quoted and escaped.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TextIO

PACKAGE = "farstep_server"
_ATTRIBUTE = "farstep_fields"
_RESERVED = {"time", "level", "logger", "event", "exception"}
_BARE = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def log_event(
    logger: logging.Logger,
    level: int,
    event: str,
    /,
    **fields: object,
) -> None:
    """Log one event.

    Args:
        logger: a logger named ``farstep_server.*``.
        level: a level of the logging package, such as ``logging.INFO``.
        event: the event's name, in lower case with underscores.
        fields: plain values. A timedelta is written in seconds; what is no number, bool, text or None as its ``str``.
            ``exc_info`` is special: an exception, or True for the one being handled, whose traceback goes with it.
    """
    error: Any = fields.pop("exc_info", None)
    logger.log(level, event, exc_info=error, extra={_ATTRIBUTE: fields}, stacklevel=2)


def configure_logging(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send this process's logs to a stream (stderr) as ``text`` or ``json``.

    ``level`` ("debug", "info", "warning", "error") is for farstep's own loggers; other packages speak from warning on.
    Calling it again replaces what the last call set up.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, JsonFormatter | TextFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(level.upper())
    logging.captureWarnings(capture=True)


class TextFormatter(logging.Formatter):
    """Lines for people: ``2026-01-31T12:00:00.000Z info  event key=value``. A traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        words = [_time(record), record.levelname.lower().ljust(5), _word(record.getMessage())]
        words += [f"{key}={_word(value)}" for key, value in _fields(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if _has_error(record) and record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line with time, level, logger, event and the fields; ``exception`` holds a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry |= {f"{key}_" if key in _RESERVED else key: value for key, value in _fields(record).items()}
        if _has_error(record) and record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _has_error(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and record.exc_info[0] is not None


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: Mapping[str, object] = getattr(record, _ATTRIBUTE, {})
    return {key: _plain(value) for key, value in fields.items()}


def _plain(value: object) -> object:
    match value:
        case None | bool() | int() | float():
            return value
        case timedelta():
            return value.total_seconds()
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
    return str(value)


def _word(value: object) -> str:
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value)
