"""The way from a round's contributions to its step, and what follows it.

In this order: what workers have accumulated, the reduction in worker order, the non-finite guard, clipping, options, the
step; and once it is committed the exponential moving average and the learning-rate schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from farstep_server.core.accumulation import Accumulators
from farstep_server.core.averages import ExponentialAverage
from farstep_server.core.engine import Engine
from farstep_server.core.events import Contribution
from farstep_server.core.gradients import Gradients, Staged, materialize
from farstep_server.core.non_finite import blame, blame_mean
from farstep_server.core.options import GroupEdits, difference, frozen_options
from farstep_server.core.records import Dump
from farstep_server.core.reduction import Part, Reducer
from farstep_server.core.rounds import weights
from farstep_server.core.schedules import Schedules
from farstep_server.core.sliced import is_fused, steps_each_alone
from farstep_wire.errors import Applied, InvalidRequestError, NonFiniteError, NotFoundError
from farstep_wire.layout import Layout
from farstep_wire.settings import Settings

_WORTHWHILE_BYTES = 1024 * 1024
"""Gradients below this size are added up in no time once the round is complete."""


class Pipeline:
    """What is done around the steps of one engine. The owner alone calls it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.accumulated = Accumulators()
        self.schedules = Schedules(engine.optimizer)
        self._average = self._new_average()
        self._reducer = Reducer(keep_last=not engine.entry.trusted)

    # Steps.

    def step(self, contributors: Sequence[Contribution], edits: GroupEdits, lr_divisor: int) -> GroupEdits:
        """Make one step of the contributions; return the options that the optimizer itself changed.

        NonFiniteError: the guard objects. StepFailedError: the optimizer raised. Nothing has changed.
        """
        parts: dict[str, Part] = {}
        edited: dict[int, Tensor] = {}
        for act in contributors:
            assert act.staged is not None, "a contribution without closure has gradients"
            part, changed = self.part(act.staged)
            if self.accumulated.count(act.worker):
                part = Part(self.accumulated.with_last(act.worker, part.gradients))
            parts[act.worker] = part
            edited = {**changed, **edited}
        shares = weights(contributors)
        slices = self._steps_in_slices and (len(parts) > 1 or is_fused(self.engine.optimizer))
        means = self._reducer.means(list(parts.values()), shares, self.engine.layout) if slices else None
        reduced = self.reduce(parts, shares) if means is None else means
        return self.engine.step(reduced, edits, edited, self.settings, lr_divisor)

    @property
    def _steps_in_slices(self) -> bool:
        """Whether the step needs no more than a few parameters' gradients at a time: nobody looks at all of them before."""
        settings, engine = self.settings, self.engine
        looks = settings.clip_grad_norm is not None or settings.clip_grad_value is not None
        looks = looks or settings.non_finite != "allow"
        return engine.entry.trusted and not looks and self.begins_early and steps_each_alone(engine.optimizer)

    @property
    def begins_early(self) -> bool:
        """Whether the gradients are so large that something is won by beginning with some of them."""
        return self.engine.store.nbytes >= _WORTHWHILE_BYTES

    def begin(self, acts: Sequence[Contribution]) -> None:
        """Begin to reduce what the first workers of a round have handed in, while it waits for the others."""
        contributors = [act for act in acts if not act.abstain]
        given = {act.num_samples is None for act in contributors}
        waits = any(self.accumulated.count(act.worker) for act in contributors)
        if len(contributors) < 2 or len(given) > 1 or waits:
            return
        parts = [self.part(act.staged)[0] for act in contributors if act.staged is not None]
        self._reducer.begin(parts, weights(contributors), self.engine.layout)

    def part(self, staged: Staged) -> tuple[Part, dict[int, Tensor]]:
        """Return a worker's part in a round and the parameters that were edited there."""
        gradients, edited = materialize(staged, self.engine.layout, self.engine.store.device)
        on_cpu = self.engine.store.device.type == "cpu"
        return Part(gradients, staged.borrowed and on_cpu, staged, staged.plan.is_dense and on_cpu), edited

    def reduce(self, parts: Mapping[str, Part], shares: Sequence[float] | None, *, guarded: bool = True) -> Gradients:
        """Return the mean of the workers' gradients, in the order given.

        NonFiniteError: the guard, where it is to look, blames somebody.
        """
        guarded = guarded and self.settings.non_finite != "allow"
        gradients = {worker: part.gradients for worker, part in parts.items()}
        blamed = blame(gradients, self.engine.layout) if guarded else ""
        reduced = self._reducer.mean(self._steppable(parts), shares, self.engine.layout)
        if guarded and not blamed and len(gradients) > 1:
            blamed = blame_mean(reduced, self.engine.layout)
        if blamed:
            raise NonFiniteError(
                f"the gradients have an infinity or NaN, and nobody stepped. To blame: {blamed}", applied=Applied.NO
            )
        return reduced

    def _steppable(self, parts: Mapping[str, Part]) -> list[Part]:
        # What only passes through must not be clipped in the worker's memory, nor kept there by a class that nobody knows.
        clips = self.settings.clip_grad_norm is not None or self.settings.clip_grad_value is not None
        if len(parts) == 1 and (clips or not self.engine.entry.trusted):
            return [Part(self._reducer.own(part, self.engine.layout)) for part in parts.values()]
        return list(parts.values())

    def committed(self) -> tuple[GroupEdits, str]:
        """Follow a committed step; return the options that schedules changed, and what the workers should be told."""
        if self._average is not None:
            self._average.update()
        if not len(self.schedules):
            return {}, ""
        before = frozen_options(self.engine.optimizer)
        told = self.schedules.follow()
        return difference(before, self.engine.optimizer.param_groups), "; ".join(told)

    # Settings and averages.

    def configure(self, changes: Mapping[str, object]) -> None:
        """Change settings; InvalidRequestError names a setting that there is not, or a value that cannot be."""
        try:
            self.settings = self.settings.changed(changes)
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from None
        if self.settings.ema_decay is None:
            self._average = None
        elif self._average is None:
            self._average = self._new_average()
        else:
            self._average.decay = self.settings.ema_decay

    def _new_average(self) -> ExponentialAverage | None:
        decay = self.settings.ema_decay
        return None if decay is None else ExponentialAverage(self.engine.store, decay)

    @property
    def averaged(self) -> int:
        """How many steps the average has taken in."""
        return 0 if self._average is None else self._average.count

    def average(self, kind: str) -> Tensor:
        """Return a copy of an average's bytes; NotFoundError where none is kept, or before its first step."""
        if kind != "ema":
            raise InvalidRequestError(f"there is no average {kind!r}; there is 'ema'")
        if self._average is None:
            raise NotFoundError("no average is kept here: set ema_decay, in farstep.Settings or by opt.remote.set")
        if not self._average.count:
            raise NotFoundError("the average begins with the next step; there was none since ema_decay was set")
        return self._average.contents()

    # Groups, dumps.

    def options_of_creation(self) -> list[dict[str, object]]:
        """Return the groups' options without what schedules have made of them: what a worker is built with."""
        own = frozen_options(self.engine.optimizer)
        before = self.schedules.options_before if len(self.schedules) else []
        return [*before, *own[len(before) :]]

    def add_group(self, group: Layout, options: Mapping[str, object], contents: Tensor) -> None:
        """Add a param group to the engine and to what follows it."""
        self.engine.add_group(group, options, contents)
        if self._average is not None:
            self._average = self._average.moved_to(self.engine.store)

    def dumped_average(self) -> Tensor | None:
        """Return what a dump keeps of the average."""
        return None if self._average is None or not self._average.count else self._average.contents()

    def take_over(self, dump: Dump) -> None:
        """Take over all that a dump has of state, options, parameters, settings, schedules and averages."""
        engine = self.engine
        engine.restore_state([(key, entries) for key, entries in dump.state], dump.options)
        engine.store.write(dump.contents)
        self.schedules.restore(dump.schedules)
        self.settings = dump.settings
        self._average = self._new_average()
        if self._average is not None and dump.average is not None:
            self._average.restore(dump.average, dump.averaged)
