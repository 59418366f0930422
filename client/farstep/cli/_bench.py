"""``farstep bench``: what the link to a server can do by itself, and what steps over it take.

Every figure of a size comes from the same turns: bytes pushed, bytes pulled, both, a step of a hosted optimizer and a local one
follow each other until the time for the size is up. The hosted optimizers are ephemeral: they go when this command does,
however it ends. Only here does the command line import torch, and not before the server has answered.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from farstep.cli import _views as views
from farstep.cli._client import WRITE_SECONDS, Client
from farstep.cli._doctor import percentile
from farstep_wire.address import Address
from farstep_wire.errors import ConfigurationError

DEFAULT_SIZES = ("10KB", "1MB", "10MB", "100MB")
LARGEST_BYTES = 16 * 1000**3

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TENSOR_ELEMENTS = 256 * 1024
_SMALL_BYTES = 64
_WARM = 1
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 1000
_PATIENCE = 12.0
"""A size that was not asked for is left out when its fewest rounds would take this many times the time for a size."""

BENCH_KEYS = """\
push, pull:  bytes sent and dropped there; bytes asked for and received
exchange:    as many bytes as the model has pushed and then pulled through a bare stream, with nothing done to them
step:        of a hosted Adam (fused, one worker), gradients to parameters; local: the same step of torch.optim here
ratio:       step / (exchange + local)
The link is measured by gRPC, whatever the transport of the steps.

--json prints one object: address, server, transport and wire_dtype (as asked for), round_trip_ms, sizes, left_out (bytes of
sizes for which the link is too slow)
  server:         version, device, torch_version
  round_trip_ms:  count, min, p50, p99: a small message on an open stream and its answer
  sizes:          bytes, tensors, rounds, push_seconds, pull_seconds, exchange_seconds, step_seconds, local_seconds (medians),
                  push_bytes_per_second, pull_bytes_per_second, ratio, step_sent_bytes and step_received_bytes (in messages)"""


@dataclass(frozen=True)
class Plan:
    """What is measured. ``sizes`` None: the default ones, as far as the link is fast enough."""

    sizes: tuple[int, ...] | None
    seconds: float
    round_trips: int
    transport: str | None
    wire_dtype: str | None
    timeout: float | None


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "100MB" or "1.5 GiB", a whole number of float32; ValueError quotes another text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B|)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size such as 10KB, 100MB or 1GiB")
    count = float(match[1]) * unit
    if not 4 <= count <= LARGEST_BYTES:
        raise ValueError(f"{text!r} is not between 4 bytes and 16 GB")
    return int(count) // 4 * 4


def measure(client: Client, address: Address, plan: Plan) -> views.View:
    """Measure; return what ``--json`` prints. FarstepError: what went wrong between here and the server."""
    info = client.server()
    trips = _round_trips(client, plan.round_trips)
    found: list[views.View] = []
    left_out = []
    for nbytes in [parse_size(text) for text in DEFAULT_SIZES] if plan.sizes is None else plan.sizes:
        if plan.sizes is None and found and _expected_seconds(found[-1], nbytes) > _PATIENCE * plan.seconds:
            left_out.append(nbytes)
        else:
            found.append(_size(client, replace(address, name=None), plan, nbytes))
    return {
        "address": str(address),
        "server": {"version": info.version, "device": info.device, "torch_version": info.torch_version},
        "transport": plan.transport,
        "wire_dtype": plan.wire_dtype,
        "round_trip_ms": trips,
        "sizes": found,
        "left_out": left_out,
    }


def _round_trips(client: Client, count: int) -> views.View:
    with client.exchange() as exchange:
        exchange(_SMALL_BYTES, _SMALL_BYTES)
        times = sorted(1000 * _seconds(lambda: exchange(_SMALL_BYTES, _SMALL_BYTES)) for _ in range(count))
    return {"count": count, "min": times[0], "p50": percentile(times, 50), "p99": percentile(times, 99)}


def _expected_seconds(last: views.View, nbytes: int) -> float:
    """Return what the fewest rounds of a size should take at least, from those of a smaller one."""
    round_seconds = sum(last[f"{what}_seconds"] for what in ("push", "pull", "exchange", "step", "local"))
    return float((_LEAST_ROUNDS + _WARM) * round_seconds * nbytes / last["bytes"])


def _size(client: Client, address: Address, plan: Plan, nbytes: int) -> views.View:
    with client.exchange() as exchange, _steps(address, plan, nbytes) as (optimizer, local):
        acts: dict[str, Callable[[], object]] = {
            "push": lambda: exchange(nbytes, 1),
            "pull": lambda: exchange(0, nbytes),
            "exchange": lambda: exchange(nbytes, nbytes),
            "step": optimizer.step,
            "local": local,
        }
        times = _turns(acts, plan.seconds)
        traffic, tensors = optimizer.remote.step_traffic, len(optimizer.param_groups[0]["params"])
    medians = {what: statistics.median(values) for what, values in times.items()}
    return {
        "bytes": nbytes,
        "tensors": tensors,
        "rounds": len(times["step"]),
        **{f"{what}_seconds": seconds for what, seconds in medians.items()},
        "push_bytes_per_second": nbytes / medians["push"],
        "pull_bytes_per_second": nbytes / medians["pull"],
        "ratio": medians["step"] / (medians["exchange"] + medians["local"]),
        "step_sent_bytes": traffic.sent,
        "step_received_bytes": traffic.received,
    }


def _turns(acts: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {what: [] for what in acts}
    begun = time.monotonic()
    for number in range(_MOST_ROUNDS + _WARM):
        for what, act in acts.items():
            taken = _seconds(act)
            if number >= _WARM:
                times[what].append(taken)
        if number + 1 >= _LEAST_ROUNDS + _WARM and time.monotonic() - begun > seconds:
            break
    return times


def _seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


@contextmanager
def _steps(address: Address, plan: Plan, nbytes: int) -> Iterator[tuple[Any, Callable[[], object]]]:
    """Yield a hosted optimizer and a step of a local one."""
    import torch

    from farstep import Remote, Sync, Timeouts, optim

    seconds = plan.timeout or WRITE_SECONDS
    timeouts = Timeouts(connect=min(30.0, seconds), step=seconds, reconnect=min(10.0, seconds))
    remote = Remote(str(address), policy=Sync(1), worker="farstep-bench", timeouts=timeouts, **_ways(plan))
    count = math.ceil(nbytes / 4 / _TENSOR_ELEMENTS)
    own, locals_ = (
        [torch.nn.Parameter(part) for part in torch.zeros(nbytes // 4).tensor_split(count)] for _ in range(2)
    )
    for parameter, local in zip(own, locals_, strict=True):
        parameter.grad = local.grad = torch.full_like(parameter, 1e-3)
    optimizer: Any = optim.Adam(own, lr=1e-3, fused=True, remote=remote)
    try:
        yield optimizer, torch.optim.Adam(locals_, lr=1e-3, fused=True).step
    finally:
        optimizer.remote.close()


def _ways(plan: Plan) -> dict[str, Any]:
    """Return how the tensors are to travel, as a Remote takes it."""
    chosen = {"transport": plan.transport, "wire_dtype": plan.wire_dtype}
    return {name: value for name, value in chosen.items() if value is not None}


def plan_from(
    sizes: str | None,
    seconds: float,
    round_trips: int,
    transport: str | None,
    wire_dtype: str | None,
    timeout: float | None,
) -> Plan:
    """Return the plan that a command line means; ConfigurationError quotes what is none."""
    try:
        chosen = None if sizes is None else tuple(parse_size(text) for text in sizes.split(","))
    except ValueError as error:
        raise ConfigurationError(f"--sizes: {error}") from None
    plan = Plan(chosen, seconds, round_trips, transport, wire_dtype, timeout)
    if ways := _ways(plan):
        from farstep import Remote

        Remote(**ways)
    return plan
