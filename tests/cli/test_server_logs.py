"""The server's logs: one line per event in both formats, and nothing that a client sends can forge one."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from farstep_server.logs import configure_logging, log_event

LOGGER = logging.getLogger("farstep_server.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("farstep_server")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


def lines(style: str, *, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(level, style, stream)
    return stream


def test_text() -> None:
    out = lines("text")
    log_event(
        LOGGER, logging.INFO, "serving", address="unix:/a b", port=1, lease=timedelta(seconds=1.5), ok=True, no=None
    )
    pattern = (
        r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info  serving address="unix:/a b" port=1 lease=1.5 ok=true no=null\n'
    )
    assert re.fullmatch(pattern, out.getvalue())


def test_json() -> None:
    out = lines("json")
    log_event(LOGGER, logging.WARNING, "late", path=Path("/a"), many=(1, "x"), level="mine", time=3, nested={1: {2}})
    entry = json.loads(out.getvalue())
    assert re.fullmatch(r"[-0-9]{10}T[:.0-9]{12}Z", entry.pop("time"))
    assert entry == {
        "level": "warning",
        "logger": "farstep_server.test",
        "event": "late",
        "path": "/a",
        "many": [1, "x"],
        "level_": "mine",
        "time_": 3,
        "nested": {"1": [2]},
    }


@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.parametrize("forged", ["x\n2026-01-01 error boom", "a\rb", "a\u2028b", "\x1b[31m", 'q"uote', "k=v", ""])
def test_a_value_never_breaks_the_line(style, forged) -> None:
    out = lines(style)
    log_event(LOGGER, logging.INFO, "attached", worker=forged, after=1)
    logging.getLogger("elsewhere").warning(forged)
    first, second = out.getvalue().split("\n")[:-1]
    assert out.getvalue().splitlines() == [first, second]
    assert "\x1b" not in out.getvalue()
    if style == "text":
        assert first.endswith(f" attached worker={json.dumps(forged)} after=1")
        assert second.endswith(json.dumps(forged))
    else:
        assert json.loads(first)["worker"] == json.loads(second)["event"] == forged


def test_levels() -> None:
    out = lines("text", level="warning")
    log_event(LOGGER, logging.INFO, "quiet")
    log_event(LOGGER, logging.ERROR, "loud")
    assert "quiet" not in out.getvalue()
    assert "error loud" in out.getvalue()
    out = lines("text", level="debug")
    log_event(LOGGER, logging.DEBUG, "detail")
    logging.getLogger("elsewhere").info("chatter")
    assert "detail" in out.getvalue()
    assert "chatter" not in out.getvalue()


def test_configuring_twice_logs_once() -> None:
    first, second = lines("text"), lines("json")
    log_event(LOGGER, logging.INFO, "once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_tracebacks() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        out = lines("json")
        log_event(LOGGER, logging.ERROR, "defect", exc_info=error)
        assert "ValueError: broken" in json.loads(out.getvalue())["exception"]
        out = lines("text")
        log_event(LOGGER, logging.ERROR, "defect", exc_info=error)
    assert out.getvalue().endswith("ValueError: broken\n")
