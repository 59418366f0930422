"""What is changed from outside the rounds: settings and learning-rate schedules."""

from __future__ import annotations

from farstep_server.core import events as ev
from farstep_server.core.identity import Identity
from farstep_server.core.options import frozen_options
from farstep_server.core.pipeline import Pipeline
from farstep_wire.errors import RollbackError


def steer(event: ev.Steering, pipeline: Pipeline, identity: Identity, version: int) -> ev.Reply:
    """Carry out a steering event; return its reply."""
    match event:
        case ev.Configure():
            pipeline.configure(event.changes)
            return ev.SettingsReply(pipeline.settings, version)
        case ev.DeclareSchedule():
            if event.lineage != identity.lineage:
                raise RollbackError(f"{identity.name!r} was created anew; build the optimizer and its schedules again")
            edits = event.edits
            pipeline.schedules.declare(event.number, event.spec, lambda: pipeline.engine.edit_options(edits))
        case ev.LoadSchedule():
            pipeline.schedules.load(event.number, event.state)
        case ev.ReadSchedule():
            pass
    state, ended = pipeline.schedules.state(event.number)
    return ev.ScheduleReply(state, frozen_options(pipeline.engine.optimizer), version, ended)
