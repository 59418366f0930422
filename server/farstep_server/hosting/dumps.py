"""Dumps as snapshots: a JSON manifest and named tensors, and back, bit for bit.

The manifest, beside what the store itself keeps (name, version, lineage, incarnation)::

    {"dump": 1,
     "optimizer": registered name,  "arguments": ValueMap,  "policy": Policy,  "ephemeral": …,  "started": …,
     "scalar_dtype": torch's default dtype on the client,
     "layout": Layout: per group its parameters (key, shape, strides, dtype, storage) and its options,
     "state": Value: [[parameter index or other key, entries], …], its tensors by number,
     "settings": ValueMap,  "averaged": steps that the moving average has taken in,
     "schedules": [{"scheduler": …, "arguments": ValueMap, "parts": […], "every": …, "state": ValueMap, …}, …],
     "members": [{"worker": …, "instance": …, "epoch": …, "settled": …, …}, …]}

Capitalised words are messages of ``farstep.v1`` in protobuf's own JSON form: an int is no float there, a tuple no list, and a
float keeps its value, the infinities and NaN among them. Small tensors among options and arguments stand inline.

Tensors: ``param/KEY`` is a parameter, ``ema/KEY`` its moving average, where one is kept, ``state/N`` the N-th tensor of the
state, so that any reader of the snapshot's files finds a model's weights by name. The files keep dtypes and strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from google.protobuf import json_format
from google.protobuf.message import Message
from torch import Tensor

from farstep_server.core.records import Dump, Member, Outcome
from farstep_server.core.schedules import ScheduleDump, ScheduleSpec
from farstep_server.store import Json, Snapshot
from farstep_wire.convert import layout_from_proto, layout_to_proto, policy_from_proto, policy_to_proto
from farstep_wire.errors import StorageError
from farstep_wire.layout import Layout
from farstep_wire.settings import Settings
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.values import dense_cpu, from_map, from_value, to_map, to_value

DUMP_FORMAT = 1

_PARAMETER = "param/"
_STATE = "state/"
_AVERAGE = "ema/"
_NESTING = 1000  # each level of a Value is three of its JSON
_COUNTERS = ("epoch", "settled", "settled_version", "settled_contributions", "version", "contributions", "abstentions",
             "stale", "steps")  # fmt: skip

_Message = TypeVar("_Message", bound=Message)


def encode_dump(dump: Dump) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """Return the manifest and the tensors of a dump. The tensors share its memory.

    StorageError: it holds something that cannot be stored, the text names it.
    """
    tensors = dict(zip(_keys(dump.layout), dump.layout.views(dump.contents), strict=True))
    if dump.average is not None:
        tensors |= zip(_keys(dump.layout, _AVERAGE), dump.layout.views(dump.average), strict=True)
    table: list[Tensor] = []
    try:
        manifest: dict[str, Json] = {
            "dump": DUMP_FORMAT,
            "optimizer": dump.optimizer,
            "arguments": _to_json(to_map(dump.arguments, "arguments")),
            "policy": _to_json(policy_to_proto(dump.policy)),
            "ephemeral": dump.ephemeral,
            "started": dump.started,
            "scalar_dtype": dump.scalar_dtype,
            "layout": _to_json(layout_to_proto(dump.layout, dump.options)),
            "state": _to_json(to_value(dump.state, "state", table)),
            "members": [_member_to_json(member, table) for member in dump.members],
            "settings": _to_json(to_map(dump.settings.as_dict(), "settings")),
            "averaged": dump.averaged,
            "schedules": [_schedule_to_json(schedule) for schedule in dump.schedules],
        }
        tensors |= {f"{_STATE}{number}": dense_cpu(tensor) for number, tensor in enumerate(table)}
    except (TypeError, ValueError) as error:
        raise StorageError(f"{dump.name!r} at version {dump.version} cannot be stored: {error}") from error
    return manifest, tensors


def decode_dump(snapshot: Snapshot) -> Dump:
    """Return the dump that a snapshot holds. StorageError: it holds none, or one of another format."""
    info, manifest = snapshot.info, snapshot.manifest
    if manifest.get("dump") != DUMP_FORMAT:
        raise StorageError(
            f"the snapshot of {info.name!r} at version {info.version} holds a dump of format {manifest.get('dump')!r}; this "
            f"release reads {DUMP_FORMAT}"
        )
    try:
        return _decode(snapshot, manifest)
    except (ValueError, TypeError, LookupError, json_format.Error) as error:
        raise StorageError(
            f"the snapshot of {info.name!r} at version {info.version} cannot be understood: {error!r}"
        ) from error


def _decode(snapshot: Snapshot, manifest: Mapping[str, Any]) -> Dump:
    info, tensors = snapshot.info, snapshot.tensors
    table = [tensors[f"{_STATE}{number}"] for number in range(sum(key.startswith(_STATE) for key in tensors))]
    layout, options = layout_from_proto(_from_json(manifest["layout"], pb.Layout()))
    state = from_value(_from_json(manifest["state"], pb.Value()), "state", table)
    return Dump(
        name=info.name,
        optimizer=str(manifest["optimizer"]),
        arguments=from_map(_from_json(manifest["arguments"], pb.ValueMap()), "arguments"),
        layout=layout,
        options=options,
        policy=policy_from_proto(_from_json(manifest["policy"], pb.Policy())),
        ephemeral=bool(manifest["ephemeral"]),
        lineage=info.lineage,
        incarnation=info.incarnation,
        version=info.version,
        contents=_contents(layout, tensors, _PARAMETER),
        state=[[key, entries] for key, entries in state],
        members=[_member_from_json(fields, table) for fields in manifest["members"]],
        started=bool(manifest["started"]),
        scalar_dtype=str(manifest.get("scalar_dtype", "float32")),
        **_decode_surroundings(layout, manifest, tensors),
    )


def _decode_surroundings(layout: Layout, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    # What the first releases did not write.
    averaged = int(manifest.get("averaged", 0))
    return {
        "settings": Settings(**from_map(_from_json(manifest.get("settings", {}), pb.ValueMap()), "settings")),
        "averaged": averaged,
        "average": _contents(layout, tensors, _AVERAGE) if averaged else None,
        "schedules": [_schedule_from_json(fields) for fields in manifest.get("schedules", ())],
    }


def _schedule_to_json(schedule: ScheduleDump) -> dict[str, Json]:
    spec = schedule.spec
    return {
        "scheduler": spec.scheduler,
        "arguments": _to_json(to_map(spec.arguments, spec.scheduler)),
        "parts": list(spec.parts),
        "every": spec.every,
        "state": _to_json(to_map(schedule.state, f"the state of {spec.scheduler}")),
        "commits": schedule.commits,
        "ended": schedule.ended,
    }


def _schedule_from_json(fields: Mapping[str, Any]) -> ScheduleDump:
    name = str(fields["scheduler"])
    arguments = from_map(_from_json(fields["arguments"], pb.ValueMap()), name)
    parts = tuple(int(part) for part in fields["parts"])
    state = from_map(_from_json(fields["state"], pb.ValueMap()), name)
    spec = ScheduleSpec(name, arguments, parts, int(fields["every"]))
    return ScheduleDump(spec, state, int(fields["commits"]), str(fields["ended"]))


def _keys(layout: Layout, prefix: str = _PARAMETER) -> list[str]:
    return [prefix + parameter.key for parameter in layout.parameters]


def _contents(layout: Layout, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    contents = torch.zeros(layout.arena.nbytes, dtype=torch.uint8)
    for key, view in zip(_keys(layout, prefix), layout.views(contents), strict=True):
        stored = tensors[key]
        if (stored.dtype, stored.shape) != (view.dtype, view.shape):
            raise ValueError(
                f"{key!r} is {stored.dtype} {list(stored.shape)}, the layout has {view.dtype} {list(view.shape)}"
            )
        view.copy_(stored)
    return contents


def _member_to_json(member: Member, table: list[Tensor]) -> dict[str, Json]:
    counters: dict[str, Json] = {key: getattr(member, key) for key in _COUNTERS}
    return {
        "worker": member.worker,
        "instance": member.instance,
        "live": member.live,
        "settled_outcome": member.settled_outcome.name,
        "settled_loss": _to_json(to_value(member.settled_loss, f"loss of worker {member.worker}", table)),
        **counters,
    }


def _member_from_json(fields: Mapping[str, Any], table: list[Tensor]) -> Member:
    return Member(
        worker=str(fields["worker"]),
        instance=str(fields["instance"]),
        live=bool(fields["live"]),
        settled_outcome=Outcome[fields["settled_outcome"]],
        settled_loss=from_value(_from_json(fields["settled_loss"], pb.Value()), "loss", table),
        **{key: int(fields[key]) for key in _COUNTERS},
    )


def _to_json(message: Message) -> Json:
    fields: Json = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return fields


def _from_json(fields: Any, message: _Message) -> _Message:
    return json_format.ParseDict(fields, message, max_recursion_depth=_NESTING)
