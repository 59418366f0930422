"""What ``--json`` prints: the server's replies as plain dicts with stable keys. ``None`` means "there is none".

Keys are only ever added. The texts ``*_KEYS`` stand in ``--help``.
"""

from __future__ import annotations

from typing import Any

from farstep.cli._values import number, plain, plain_map
from farstep_wire.v1 import checkpoint_pb2 as cpb
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.v1 import inspection_pb2 as ipb

View = dict[str, Any]

SUMMARY_KEYS = """\
  summary:  name, optimizer, version, live_workers, parameters, elements, parameter_bytes, policy, ephemeral, device,
            lineage, incarnation
  policy:   kind ("sync": workers, min_workers, timeout_ms; "async": max_staleness,
            scale_lr)"""
LIST_KEYS = f"""\
--json prints one object: server, optimizers (a list of summary)
{SUMMARY_KEYS}"""
_WORKER_KEYS = """\
  workers:     id, standing ("computing", "waiting", "expired", "left"), version (of the parameters it was last sent),
               contributions, abstentions, stale (contributions refused as stale), epoch, lease_seconds, round_trip_seconds
               (as it measured it; null: not yet), staleness (of its last contribution)"""
WORKERS_KEYS = f"""\
--json prints one object: name, version, workers (a list, in worker order).
{_WORKER_KEYS}"""
HISTORY_KEYS = """\
A server remembers the last rounds of its life, some thousands of them. A worker in brackets abstained; staleness and ahead
are those of the worker with the most.
--json prints one object a line: number, version, incarnation, kind ("step", "load_state", "add_param_group", "restore"),
outcome ("committed", "skipped", "rolled_back", "refused"), parts, evaluations, seconds, reason (null: there is none).
  parts:       worker, sequence, abstained, num_samples, staleness (versions committed since its gradients were taken),
               ahead (steps ahead of the slowest live worker), evaluations"""
SETTINGS_KEYS = """\
settings; the others stay as they are, and "none" takes one away:
  clip_grad_norm   largest norm of all reduced gradients together
  norm_type        which p-norm that is; inf: the largest element
  clip_grad_value  largest magnitude of any element
  non_finite       an infinity or NaN in the gradients: allow it, raise an error, or skip the round
  ema_decay        keep an exponential moving average of the parameters with this decay
The change takes effect between two rounds.

--json prints one object: name, version (that they were changed at), settings (all as they stand, by name)"""
DESCRIPTION_KEYS = f"""\
--json prints one object: summary, workers, groups, parameters, state_bytes, arguments, last_step_seconds,
stale_contributions, settings (by name), schedules, averaged. Floats that are not finite are the texts "nan", "inf" and
"-inf"; null: there is none.
{SUMMARY_KEYS}
{_WORKER_KEYS}
  groups:      parameters (how many), options (by name)
  parameters:  key, group, shape, dtype, norm, gradient_norm, state (by name: value, shape, dtype, norm)
  schedules:   scheduler, every, last_epoch, ended, part"""
SNAPSHOT_KEYS = "snapshot: name, version, tag, created_unix, size_bytes, lineage, incarnation"


def policy(message: pb.Policy) -> View | None:
    """Return a policy; None where the server sent none."""
    match message.WhichOneof("kind"):
        case "sync":
            sync = message.sync
            least, timeout = sync.min_workers or None, sync.timeout_ms or None
            return {"kind": "sync", "workers": sync.workers, "min_workers": least, "timeout_ms": timeout}
        case "async":
            relaxed = getattr(message, "async")
            staleness = relaxed.max_staleness if relaxed.HasField("max_staleness") else None
            return {"kind": "async", "max_staleness": staleness, "scale_lr": relaxed.scale_lr}
    return None


def summary(message: ipb.Summary) -> View:
    """Return a hosted optimizer in a line."""
    return {
        "name": message.name,
        "optimizer": message.optimizer,
        "version": message.version,
        "live_workers": message.live_workers,
        "parameters": message.parameters,
        "elements": message.elements,
        "parameter_bytes": message.parameter_bytes,
        "policy": policy(message.policy),
        "ephemeral": message.ephemeral,
        "device": message.device,
        "lineage": message.lineage,
        "incarnation": message.incarnation,
    }


def worker(message: ipb.Worker) -> View:
    """Return a worker."""
    return {
        "id": message.id,
        "standing": _standing(message.standing),
        "version": message.version,
        "contributions": message.contributions,
        "abstentions": message.abstentions,
        "stale": message.stale,
        "epoch": message.epoch,
        "lease_seconds": number(message.lease_seconds),
        "round_trip_seconds": number(message.round_trip_seconds) if message.round_trip_seconds else None,
        "staleness": message.staleness,
    }


def _standing(value: ipb.Worker.Standing.ValueType) -> str:
    return _word(ipb.Worker.Standing, value, "STANDING_")


def _word(enum: Any, value: int, prefix: str) -> str:
    """Return an enum's value as a word; that of a newer server, as its number."""
    return str(enum.Name(value)).removeprefix(prefix).lower() if value in enum.values() else str(int(value))


def parameter(message: ipb.ParameterRow) -> View:
    """Return a parameter with its norms."""
    return {
        "key": message.key,
        "group": message.group,
        "shape": list(message.spec.shape),
        "dtype": message.spec.dtype,
        "norm": number(message.norm),
        "gradient_norm": number(message.gradient_norm) if message.HasField("gradient_norm") else None,
        "state": {row.name: _state(row) for row in message.state},
    }


def _state(row: ipb.StateRow) -> View:
    if row.HasField("spec"):
        return {"value": None, "shape": list(row.spec.shape), "dtype": row.spec.dtype, "norm": number(row.norm)}
    return {"value": plain(row.value), "shape": None, "dtype": None, "norm": None}


def description(message: ipb.Description) -> View:
    """Return a hosted optimizer in full."""
    sizes = list(message.group_sizes) + [0] * (len(message.groups) - len(message.group_sizes))
    return {
        "summary": summary(message.summary),
        "workers": [worker(item) for item in message.workers],
        "groups": [
            {"parameters": size, "options": plain_map(options)}
            for size, options in zip(sizes, message.groups, strict=False)
        ],
        "parameters": [parameter(item) for item in message.parameters],
        "state_bytes": message.state_bytes,
        "arguments": plain_map(message.arguments),
        "last_step_seconds": number(message.last_step_seconds),
        "stale_contributions": message.stale_contributions,
        "settings": plain_map(message.settings),
        "schedules": [schedule(item) for item in message.schedules],
        "averaged": message.averaged,
    }


def schedule(message: ipb.Schedule) -> View:
    """Return a learning-rate schedule."""
    return {
        "scheduler": message.scheduler,
        "every": message.every,
        "last_epoch": message.last_epoch,
        "ended": message.ended or None,
        "part": message.part,
    }


def history_round(message: ipb.Round) -> View:
    """Return a round of the history."""
    return {
        "number": message.number,
        "version": message.version,
        "incarnation": message.incarnation,
        "kind": _word(ipb.Round.Kind, message.kind, "KIND_"),
        "outcome": _word(ipb.Round.Outcome, message.outcome, "OUTCOME_"),
        "parts": [_part(part) for part in message.parts],
        "evaluations": message.evaluations,
        "seconds": number(message.seconds),
        "reason": message.reason or None,
    }


def _part(message: ipb.Part) -> View:
    return {
        "worker": message.worker,
        "sequence": message.sequence,
        "abstained": message.abstained,
        "num_samples": number(message.num_samples) if message.num_samples else None,
        "staleness": message.staleness,
        "ahead": message.ahead,
        "evaluations": message.evaluations,
    }


def snapshot(message: cpb.SnapshotInfo) -> View:
    """Return a snapshot."""
    return {
        "name": message.name,
        "version": message.version,
        "tag": message.tag or None,
        "created_unix": number(message.created_unix),
        "size_bytes": message.size_bytes,
        "lineage": message.lineage,
        "incarnation": message.incarnation,
    }


def server(message: ipb.ServerInfo) -> View:
    """Return what a server is."""
    return {
        "version": message.version,
        "protocol": message.protocol,
        "oldest_protocol": message.oldest_protocol,
        "device": message.device,
        "torch_version": message.torch_version,
        "uptime_seconds": number(message.uptime_seconds),
        "hosted": message.hosted,
        "optimizers": list(message.optimizers),
        "durable": message.durable,
        "limit_bytes": message.limit_bytes or None,
        "used_bytes": message.used_bytes,
        "draining": message.draining,
    }
