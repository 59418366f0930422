"""Local SGD and DiLoCo: workers train on their own for a while, then the server steps on how far they have come.

Local SGD (McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"; Stich 2019,
"Local SGD Converges Fast and Communicates Little") averages the workers' parameters every H steps. DiLoCo (Douillard et al.
2023, "DiLoCo: Distributed Low-Communication Training of Language Models") takes the mean distance that they have covered
since they last agreed for a gradient, the pseudo-gradient, and gives it to an outer optimizer: SGD with Nesterov momentum.
Averaging is the special case of SGD with a learning rate of 1 and no momentum.

The outer optimizer is an ordinary hosted one. Its parameters on this side are copies of the model's in CPU memory, which
stay where the workers last agreed while the inner optimizer moves the model's own; so a round between syncs moves nothing
and nothing that the inner steps do looks like an edit by the user. ``sync_every`` is an option of the hosted param groups,
so that the server compares it between workers as it does a learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farstep.config import Remote
from farstep.optim.handle import RemoteHandle
from farstep.optim.proxy import RemoteOptimizer
from farstep.outer import OPTION, OuterFactory, build_outer, diloco, outer_group, pseudo_gradient
from farstep_wire.errors import ConfigurationError, MismatchError

STATE_DICT_KEY = "local_sgd"
"""The extra top-level key of a state dict: the outer optimizer's state, the outer parameters, and the open interval."""


@dataclass
class _Interval:
    """What was done since the last sync. ``calls`` of step; the ``steps`` among them that no GradScaler skipped."""

    calls: int = 0
    steps: int = 0
    samples: float | None = None


class LocalSGD(Optimizer):
    """Runs an optimizer of this worker's own, and every ``sync_every`` steps brings the workers together.

    A ``torch.optim.Optimizer`` over the inner one: ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's, so
    that schedulers, GradScaler and training scripts drive that. A sync hands in the outer parameters less the model's as the
    gradient of the hosted outer optimizer, weighted by the samples seen where ``step`` is told of them, and puts the
    parameters that come of it into the model. The inner optimizer keeps its state through it, as in DiLoCo.

    Where the hosted optimizer exists already, building this copies its parameters into the model. What the user changes in
    the parameters right after a sync (a checkpoint loaded, say) becomes the outer parameters too; what is changed between
    two inner steps is part of the distance covered.

    Args:
        inner_optimizer: a local one that holds the model's parameters.
        remote: where the outer optimizer is hosted, as for every class of ``farstep.optim``. Under ``Sync`` a sync waits for
            the other workers, under ``Async`` for nobody.
        sync_every: H, the number of inner steps between syncs; the same on each worker. DiLoCo's is 500.
        outer: makes the outer optimizer: called as ``outer(groups, remote=remote)``, it returns an optimizer of
            ``farstep.optim`` over these groups. By default DiLoCo's, SGD(lr=0.7, momentum=0.9, nesterov=True);
            ``functools.partial(farstep.optim.SGD, lr=1.0)`` averages parameters.

    MismatchError: the hosted optimizer was built with another ``sync_every``, or without; names both.
    """

    # A worker whose GradScaler overflowed takes part in the syncs as the others do: the scaler then always calls step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        inner_optimizer: Optimizer,
        remote: str | Remote | None = None,
        sync_every: int = 500,
        outer: OuterFactory = diloco,
    ) -> None:
        _check_arguments(inner_optimizer, sync_every)
        self.inner = inner = inner_optimizer
        groups, state = inner.param_groups, inner.state
        super().__init__(groups, inner.defaults)
        # The constructor sets these anew, and here they are the inner optimizer's.
        inner.param_groups, inner.state = groups, state
        self._interval = _Interval()
        self._marks: list[tuple[int, int]] = []
        self._holds_average = False
        self.outer = build_outer(outer, [outer_group(group, sync_every) for group in groups], remote)
        try:
            self._check_hosted(sync_every)
        except BaseException:
            self.outer.remote.close()
            raise
        self._take_over()

    def _check_hosted(self, sync_every: int) -> None:
        remote = self.outer.remote
        if not remote.version:
            return  # the server has compared the options when this worker joined
        for number, group in enumerate(remote.describe().groups):
            hosted = group.get(OPTION)
            if hosted != sync_every:
                found = "it is not hosted for LocalSGD" if hosted is None else f"it has {OPTION}={hosted}"
                raise MismatchError(
                    f"{remote.name!r}: param_groups[{number}] on the server: {found}; worker {remote.worker} has "
                    f"{OPTION}={sync_every}. Give each worker the same"
                )

    # What is the inner optimizer's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's param groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the inner steps; nothing of it concerns the server."""
        self.inner.zero_grad(set_to_none=set_to_none)

    # What is the outer one's.

    @property
    def remote(self) -> LocalSGDHandle:
        """The handle on the hosted outer optimizer."""
        return LocalSGDHandle(self)

    @property
    def sync_every(self) -> int:
        """The number of inner steps between syncs, as the outer optimizer's param groups have it."""
        return int(self.outer.param_groups[0][OPTION])

    def close(self) -> None:
        """Leave the hosted optimizer. Inner steps since the last sync are not handed in: call ``sync`` for that before."""
        self.remote.close()

    # Steps.

    def step(self, closure: Callable[[], Any] | None = None, *, num_samples: float | None = None) -> Any:
        """Perform a single step of the inner optimizer, and a sync where it is due.

        Args:
            closure: as for the inner optimizer.
            num_samples: how many samples the gradients are of. Their sum since the last sync weighs this worker's
                contribution to the next; all steps give it, and all workers, or none.

        A sync that fails leaves the model as it stands; the next call of ``step``, or of ``sync``, tries again.
        """
        interval = self._interval
        _check_samples(interval, num_samples)
        if self._holds_average:
            raise ConfigurationError(
                "the model holds an average, taken by opt.remote.pull(average=...), and training goes on from the "
                "parameters themselves: call opt.remote.pull() before"
            )
        if not interval.calls:
            self._take_over_edits()
        loss = None
        if not self._overflowed():
            loss = self.inner.step() if closure is None else self.inner.step(closure)
            interval.steps += 1
            if num_samples is not None:
                interval.samples = (interval.samples or 0.0) + num_samples
        interval.calls += 1
        if interval.calls >= self.sync_every:
            self.sync()
        return loss

    def _overflowed(self) -> bool:
        """Do what torch's fused optimizers do for a GradScaler: see whether it overflowed, and unscale where it has not."""
        given = self.__dict__
        if "found_inf" not in given:
            return False
        if bool(given["found_inf"]):
            return True
        scale = given.get("grad_scale")
        if scale is not None:
            inverse = scale.double().reciprocal().float()
            for gradient in (p.grad for group in self.param_groups for p in group["params"] if p.grad is not None):
                (gradient._values() if gradient.is_sparse else gradient).mul_(inverse.to(gradient.device))
        return False

    @torch.no_grad()
    def sync(self) -> None:
        """Hand in what was learnt since the last sync and take over what has become of it, early where none is due.

        Under ``Sync`` all workers must call it the same number of times. One that made no inner step since the last abstains.
        """
        edited = not self._interval.calls and self._take_over_edits()
        if self._interval.steps or edited:
            for parameter, outer in self._pairs():
                outer.grad = pseudo_gradient(parameter, outer) if self._interval.steps else None
            samples = self._interval.samples
            self.outer.step(num_samples=samples)
            self.outer.zero_grad()
        else:
            self.outer.remote.skip()
        self._take_over()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its outer one."""
        self._follow()
        for mine, outer in zip(self.param_groups, self.outer.param_groups, strict=True):
            for parameter, copy in zip(mine["params"], outer["params"], strict=True):
                if parameter.dtype != copy.dtype or parameter.shape != copy.shape:
                    raise TypeError(
                        f"a parameter was {copy.dtype} {list(copy.shape)} when the optimizer was built and is "
                        f"{parameter.dtype} {list(parameter.shape)} now: convert the model first, then build the optimizer"
                    )
                yield parameter, copy

    def _follow(self) -> None:
        """Add the groups that the outer optimizer does not have yet to it."""
        for group in self.param_groups[len(self.outer.param_groups) :]:
            self.outer.add_param_group(outer_group(group, self.sync_every))

    @torch.no_grad()
    def _take_over(self) -> None:
        """Put the outer parameters into the model, and begin a new interval from there."""
        marks = []
        for parameter, outer in self._pairs():
            parameter.copy_(outer)
            marks.append((parameter._version, parameter.data_ptr()))
        self._marks, self._interval, self._holds_average = marks, _Interval(), False

    @torch.no_grad()
    def _take_over_edits(self) -> bool:
        """Put what the user changed since the last sync into the outer parameters; return whether there was anything."""
        pairs = list(self._pairs())
        marks = [(parameter._version, parameter.data_ptr()) for parameter, _ in pairs]
        known = self._marks if len(self._marks) == len(marks) else [None] * len(marks)
        edited = False
        for (parameter, outer), mark, old in zip(pairs, marks, known, strict=True):
            if mark != old and not torch.equal(parameter.to(outer.device), outer):
                outer.copy_(parameter)
                edited = True
        return edited

    # Groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the inner optimizer and the outer one; under ``Sync`` one act of all workers."""
        if "outer" not in self.__dict__:  # called by the constructor, with what the inner optimizer has already
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)
        try:
            self._follow()
        except BaseException:
            self.inner.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict with one top-level key more, ``"local_sgd"``; the outer state is fetched.

        It holds the outer optimizer's state dict, the outer parameters (tensors on the CPU, in order), and what was done
        since the last sync. Each worker's inner state is its own.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        result = self.inner.state_dict()
        result[STATE_DICT_KEY] = {
            "outer": self.outer.state_dict(),
            "parameters": [outer.detach().clone() for _, outer in self._pairs()],
            "interval": asdict(self._interval),
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict: restores the inner optimizer, the hosted one and the outer parameters.

        The model's parameters, which may stand between two syncs, are restored by the model's own ``load_state_dict``. A
        state dict of the inner optimizer's class restores that one alone. What the server has already is not sent again;
        under ``Sync`` loading is one act of all workers otherwise.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = state_dict.pop(STATE_DICT_KEY, None)
        pairs = list(self._pairs())
        if own is not None:
            _check_parameters(own["parameters"], [outer for _, outer in pairs])
        self.inner.load_state_dict(state_dict)
        if own is not None:
            self.outer.load_state_dict(own["outer"])
            with torch.no_grad():
                for (_, outer), saved in zip(pairs, own["parameters"], strict=True):
                    if not torch.equal(outer, saved.to(outer.device)):
                        outer.copy_(saved)
            self._interval = _Interval(**own["interval"])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("inner", "outer", "_interval", "_marks", "_holds_average")}


class LocalSGDHandle(RemoteHandle):
    """``opt.remote`` of a LocalSGD: the handle on its outer optimizer, with the model in the place of the copies."""

    def __init__(self, optimizer: LocalSGD) -> None:
        super().__init__(optimizer.outer)
        self._local = optimizer

    def pull(self, average: str | None = None) -> int:
        """Overwrite the model's parameters with the server's; return their version. Steps since the last sync are dropped.

        Args:
            average: as for any handle; the model then holds the average of the outer parameters, and ``step`` refuses
                until a plain ``pull()``.
        """
        version = super().pull(average)
        self._local._take_over()
        self._local._holds_average = average is not None
        return version

    def skip(self) -> bool:
        """Abstain from the next round of the outer optimizer, and take it over; steps since the last sync are dropped.

        Returns whether a step was applied: False where all workers of the round skipped it.
        """
        applied = super().skip()
        self._local._take_over()
        return applied

    def accumulate(self) -> None:
        """Refused: the inner steps are what accumulates between two syncs."""
        raise ConfigurationError("LocalSGD: gradients are the inner optimizer's, and there is nothing to accumulate")

    def state(self, parameter: Tensor) -> dict[str, Any]:
        """Return the outer optimizer's state of one of the model's parameters, tensors on the CPU.

        LookupError: the parameter is in no param group.
        """
        outer = next((outer for own, outer in self._local._pairs() if own is parameter), parameter)
        return super().state(outer)


def _check_arguments(inner: object, sync_every: object) -> None:
    if not isinstance(inner, Optimizer):
        raise TypeError(f"LocalSGD takes a torch.optim.Optimizer that holds the model's parameters, not {inner!r}")
    if isinstance(inner, (RemoteOptimizer, LocalSGD)):
        raise TypeError(
            f"LocalSGD takes a local optimizer, such as torch.optim.AdamW, and hosts the outer one itself; "
            f"{type(inner).__name__} here is a farstep optimizer"
        )
    if not isinstance(sync_every, int) or isinstance(sync_every, bool):
        raise TypeError(f"sync_every must be an int, not {sync_every!r}")
    if sync_every < 1:
        raise ValueError(f"sync_every must be at least 1, not {sync_every}")


def _check_samples(interval: _Interval, num_samples: float | None) -> None:
    if num_samples is not None and not num_samples > 0:
        raise ValueError(f"num_samples must be positive, not {num_samples!r}")
    if interval.steps and (interval.samples is None) != (num_samples is None):
        given = "given now and was not" if num_samples is not None else "not given now and was"
        raise ValueError(
            f"num_samples is {given} in earlier steps since the last sync; give it in all steps, or in none"
        )


def _check_parameters(saved: list[Tensor], own: list[Tensor]) -> None:
    theirs, mine = ([tuple(tensor.shape) for tensor in tensors] for tensors in (saved, own))
    if theirs != mine:
        raise ValueError(f"loaded state dict has outer parameters of the shapes {theirs}; this optimizer has {mine}")
