"""``farstep doctor``: what is wrong between here and a server, in plain words, and how long a round trip takes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from farstep.cli import _views as views
from farstep.cli._client import Client
from farstep.cli._probe import probe
from farstep.cli._tables import size
from farstep_wire import __version__
from farstep_wire.address import Address
from farstep_wire.errors import FarstepError, ProtocolError, UnavailableError
from farstep_wire.limits import OLDEST_PROTOCOL, PROTOCOL
from farstep_wire.v1 import inspection_pb2 as ipb

_FULL = 0.9
_REFUSED, _USAGE, _UNAVAILABLE = 1, 2, 3

DOCTOR_KEYS = """\
--json prints one object: address, ok, checks, server, round_trip_ms
  checks:         check, status ("ok", "warning", "failed"), detail, advice; those after a failed one may be missing
  server:         version, protocol, oldest_protocol, device, torch_version, uptime_seconds, hosted, optimizers,
                  durable, limit_bytes, used_bytes, draining; null where it did not answer
  round_trip_ms:  count, min, p50, p99; null where none was timed"""


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``advice`` says what to do, where there is something."""

    check: str
    status: Literal["ok", "warning", "failed"]
    detail: str
    advice: str = ""


@dataclass
class Report:
    """All that was found. ``code`` is the exit code of the first failure."""

    address: str
    checks: list[Check] = field(default_factory=list)
    server: views.View | None = None
    round_trip_ms: views.View | None = None
    code: int = 0

    def fine(self, check: str, detail: str) -> None:
        """Note that something is as it should be."""
        self.checks.append(Check(check, "ok", detail))

    def warn(self, check: str, detail: str, advice: str) -> None:
        """Note something that may surprise."""
        self.checks.append(Check(check, "warning", detail, advice))

    def fail(self, check: str, detail: str, advice: str, code: int) -> None:
        """Note something that must be put right."""
        self.checks.append(Check(check, "failed", detail, advice))
        self.code = self.code or code

    def view(self) -> views.View:
        """Return it as ``--json`` prints it."""
        return {
            "address": self.address,
            "ok": self.code == 0,
            "checks": [asdict(check) for check in self.checks],
            "server": self.server,
            "round_trip_ms": self.round_trip_ms,
        }


def examine(address: Address, timeout: float | None, count: int) -> Report:
    """Look at everything from the address to ``count`` round trips, and stop where going on makes no sense."""
    report = Report(str(address))
    if not _reach(report, address):
        return report
    with Client(address, timeout) as client:
        try:
            info = client.server()
        except FarstepError as error:
            _no_answer(report, error)
            return report
        report.server = views.server(info)
        uptime = f"up for {info.uptime_seconds:.0f} s, hosts {info.hosted} on {info.device}"
        report.fine("server", f"farstep {info.version} with torch {info.torch_version}, {uptime}")
        _versions(report, info)
        _service(report, client, info)
        if not report.code:
            _round_trips(report, client, count)
    return report


def _reach(report: Report, address: Address) -> bool:
    finding = probe(address)
    if address.tls:
        plain = "something speaks plain gRPC there" if not finding.problem else finding.problem
        advice = f"This release has no TLS yet: write {address.target} without grpcs:// ({plain})"
        report.fail("address", f"{address} asks for TLS", advice, _USAGE)
        return False
    if finding.problem:
        report.fail("connection", finding.problem, finding.advice, _UNAVAILABLE)
        return False
    report.fine("connection", f"something speaks gRPC's protocol at {address.target}")
    return True


def _no_answer(report: Report, error: FarstepError) -> None:
    if isinstance(error, ProtocolError):
        report.fail(
            "server",
            f"what listens at {report.address} speaks gRPC, but is not a farstep server",
            "Check the port: farstep-server logs the address that it serves at when it starts",
            _REFUSED,
        )
    else:
        report.fail("server", str(error), "", _code(error))


def _code(error: FarstepError) -> int:
    return _UNAVAILABLE if isinstance(error, UnavailableError) else _REFUSED


def _versions(report: Report, info: ipb.ServerInfo) -> None:
    ours, theirs = _revisions(OLDEST_PROTOCOL, PROTOCOL), _revisions(info.oldest_protocol, info.protocol)
    detail = f"this command speaks {ours}, the server {theirs}"
    if info.protocol < OLDEST_PROTOCOL:
        report.fail("protocol", detail, f"The server is too old: install farstep {__version__} there", _REFUSED)
    elif info.oldest_protocol > PROTOCOL:
        report.fail("protocol", detail, f"This side is too old: install farstep {info.version} here", _REFUSED)
    else:
        report.fine("protocol", detail)
    if info.version == __version__:
        report.fine("release", f"farstep {__version__} on both sides")
    else:
        advice = "They work together as long as the protocol does; the same release on both sides is the safe choice"
        report.warn("release", f"farstep {__version__} here, {info.version} on the server", advice)
    here = _torch_release()
    if here and here.partition("+")[0] != info.torch_version.partition("+")[0]:
        advice = "Classes may differ in arguments and results in their last bits; install the same torch on both sides"
        report.warn("torch", f"torch {here} here, {info.torch_version} on the server", advice)


def _revisions(oldest: int, newest: int) -> str:
    return f"revision {newest}" if oldest == newest else f"revisions {oldest} to {newest}"


def _torch_release() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _service(report: Report, client: Client, info: ipb.ServerInfo) -> None:
    if info.draining:
        advice = "It is shutting down: wait for it to be started again, or start another"
        report.fail("sessions", "the server is draining and takes no new sessions", advice, _UNAVAILABLE)
    try:
        status = client.health()
    except ProtocolError:
        report.warn("health", "the server has no health service", "Load balancers and orchestrators cannot ask it")
    except FarstepError as error:
        report.fail("health", str(error), "", _code(error))
    else:
        if status == "SERVING":
            report.fine("health", "the health service says SERVING")
        elif not info.draining:
            advice = "Check the server's log; it may be starting or shutting down"
            report.fail("health", f"the health service says {status}", advice, _UNAVAILABLE)
    _capacity(report, info)


def _capacity(report: Report, info: ipb.ServerInfo) -> None:
    if info.limit_bytes:
        detail = f"{size(info.used_bytes)} of {size(info.limit_bytes)} taken by parameters"
        if info.used_bytes >= _FULL * info.limit_bytes:
            advice = "Remove what is no longer needed (farstep ls, farstep rm), or raise --memory-limit there"
            report.warn("memory", detail, advice)
        else:
            report.fine("memory", detail)
    if info.durable:
        report.fine("snapshots", "the server keeps snapshots")
    else:
        advice = "What it hosts is gone when it ends; start it with --data-dir to keep it"
        report.warn("snapshots", "the server keeps everything in memory only", advice)


def _round_trips(report: Report, client: Client, count: int) -> None:
    times = []
    try:
        for _ in range(count):
            begin = time.perf_counter()
            client.server()
            times.append((time.perf_counter() - begin) * 1000)
    except FarstepError as error:
        report.fail("round trip", f"number {len(times) + 1} of {count}: {error}", "", _code(error))
        return
    times.sort()
    p50, p99 = percentile(times, 50), percentile(times, 99)
    report.round_trip_ms = {"count": count, "min": times[0], "p50": p50, "p99": p99}
    report.fine("round trip", f"min {times[0]:.2f} ms, p50 {p50:.2f} ms, p99 {p99:.2f} ms over {count}")


def percentile(ordered: list[float], percent: int) -> float:
    """Return the smallest value that at least ``percent`` of the (ordered, not empty) values do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
