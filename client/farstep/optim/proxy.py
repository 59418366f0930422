"""The proxy: one mixin over each ``torch.optim`` class.

The torch class keeps what it is good at: it checks arguments, keeps ``param_groups`` and ``defaults``, fires hooks, and packs
and unpacks state dicts. The mixin replaces what must happen elsewhere: ``step`` sends gradients and takes parameters, and
state is fetched when it is asked for. All that changes lives in one Session, so that frameworks may copy ``__dict__`` into a
subclass of their own.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from farstep.config import Remote, resolve_remote
from farstep.optim.handle import RemoteHandle
from farstep.session.attachment import Subject
from farstep.session.session import Session, StepResult
from farstep.session.snapshot import FetchedState
from farstep_wire.errors import Applied, ConfigurationError, FarstepError, StepFailedError

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object

STATE_DICT_KEY = "farstep"
"""The extra top-level key of a state dict: lineage, incarnation and version."""


class RemoteOptimizer(_Base):
    """What every farstep optimizer has in common; mixed in before the torch class.

    Subclasses are made by ``proxy_class``. The methods are torch's own, with ``step`` taking one keyword more:
    ``num_samples``, the weight of this worker's gradients in the mean of the round.
    """

    _farstep_torch_class: type[Optimizer]
    _farstep_registered_name: str
    _farstep_drives_closure: bool

    def __init__(self, *args: Any, remote: str | Remote | None = None, **kwargs: Any) -> None:
        torch_init = cast(Callable[..., None], super().__init__)
        torch_init(*args, **kwargs)
        self._farstep_refuse_differentiable()
        # Some classes make their state at once; it belongs on the server.
        self.state.clear()
        config = resolve_remote(remote)
        arguments = _constructor_arguments(self._farstep_torch_class, args, kwargs)
        required = frozenset(self.defaults)
        subject = Subject(self._farstep_registered_name, arguments, required, self._farstep_drives_closure)
        self._farstep = Session(config, subject)
        if self._farstep.expects_several_workers:
            # An overflow on one worker must not leave the others waiting: the scaler then always calls step.
            self._step_supports_amp_scaling = True
        self._farstep_session()

    @property
    def remote(self) -> RemoteHandle:
        """The handle on the hosted optimizer: its version, parameters, state, description and checkpoints."""
        return RemoteHandle(self)

    def _farstep_session(self) -> Session:
        session = self._farstep
        if not session.attached:
            session.attach(self.param_groups)
            weakref.finalize(self, session.close)
        return session

    def _farstep_refuse_differentiable(self) -> None:
        if any(group.get("differentiable") for group in self.param_groups):
            name = type(self).__name__
            raise ConfigurationError(
                f"differentiable=True asks autograd to record the step, and no gradient flows back through a server: use "
                f"torch.optim.{name} for a step that is to be differentiated"
            )

    # Steps.

    def step(self, closure: Callable[[], Any] | None = None, *, num_samples: float | None = None) -> Any:
        """Perform a single optimization step on the server and take over the new parameters.

        ValueError: ``num_samples`` is not positive and finite; nothing has happened.

        Args:
            closure: reevaluates the model and returns the loss, as for the torch class. Optimizers that evaluate it once
                do so here, before the gradients are sent; those that evaluate it many times are driven by the server.
            num_samples: weight of these gradients in the mean over the workers; all of a round give it, or none.
        """
        if num_samples is not None and not 0 < num_samples < math.inf:
            raise ValueError(
                f"num_samples must be positive and finite, not {num_samples!r}; a worker without samples calls "
                f"opt.remote.skip()"
            )
        session = self._farstep_session()
        if session.subject.drives_closure:
            return self._farstep_driven_step(session, closure, num_samples)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        session.follow(self.param_groups)
        abstain = self._farstep_found_inf(session) if "found_inf" in self.__dict__ else False
        abstain = abstain or session.only_takes(self.param_groups)
        if not abstain:
            self._farstep_reset_state(session)
        result = _as_torch_raises(lambda: session.step(self.param_groups, num_samples=num_samples, abstain=abstain))
        self._farstep_count(result)
        return loss

    def _farstep_driven_step(
        self, session: Session, closure: Callable[[], Any] | None, num_samples: float | None
    ) -> Any:
        if closure is None:
            name = type(self).__name__
            raise TypeError(f"{name}.step() missing 1 required positional argument: 'closure'")
        session.follow(self.param_groups)
        self._farstep_reset_state(session)
        result = _as_torch_raises(lambda: session.driven_step(self.param_groups, closure, num_samples=num_samples))
        self._farstep_count(result)
        return result.loss

    def _farstep_found_inf(self, session: Session) -> bool:
        """Do what torch's fused optimizers do for a GradScaler: see whether it overflowed, and unscale where it has not."""
        if bool(self.__dict__["found_inf"]):
            return True
        scale = self.__dict__.get("grad_scale")
        if scale is not None:
            if session.accumulated:
                raise ConfigurationError(
                    "the gradients that wait on the server are scaled: call scaler.unscale_(optimizer) before each "
                    "opt.remote.accumulate() and before scaler.step(optimizer)"
                )
            inverse = scale.double().reciprocal().float()
            for gradient in self._farstep_gradients():
                gradient.mul_(inverse.to(gradient.device))
        return False

    def _farstep_gradients(self) -> Iterable[Tensor]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter.grad._values() if parameter.grad.is_sparse else parameter.grad

    def _farstep_count(self, result: StepResult) -> None:
        """Keep the local state that frameworks look for: a step count per parameter."""
        if not result.applied:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None or self._farstep_drives_closure or result.accumulated:
                    entries = self.state[parameter]
                    entries["step"] = entries.get("step", 0) + 1
        self._farstep.kept = len(self.state)

    def _farstep_reset_state(self, session: Session) -> None:
        """Drop on the server the state that the user has dropped from ``state`` here, as is done to begin afresh."""
        if len(self.state) >= session.kept:
            return
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        pairs, _ = session.get_state()
        left = [(key, entries) for key, entries in pairs if isinstance(key, int) and parameters[key] in self.state]
        session.load_state(left, self.param_groups)
        session.kept = len(self.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients here, and drop what this worker has staged on the server."""
        super().zero_grad(set_to_none=set_to_none)
        self._farstep.zero_grad()

    # Groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, here and on the server; see the torch class. Under Sync one act of all workers."""
        super().add_param_group(param_group)
        session = self.__dict__.get("_farstep")
        if session is None or not session.attached:
            return
        try:
            self._farstep_refuse_differentiable()
            session.follow(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, fetched from the server, tensors on the CPU.

        One top-level key more, ``"farstep"``, has lineage, incarnation and version; torch's own classes ignore it.
        """
        session = self._farstep_session()
        session.follow(self.param_groups)
        self._farstep_reset_state(session)
        pairs, info = session.get_state()
        session.fetched = FetchedState.of(pairs, info.incarnation, info.version)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        local = dict(self.state)
        self.state.clear()
        try:
            for key, entries in pairs:
                self.state[parameters[key] if isinstance(key, int) else key] = entries
            result = super().state_dict()
        finally:
            self.state.clear()
            self.state.update(local)
        result[STATE_DICT_KEY] = {
            "lineage": session.link.standing.lineage,
            "incarnation": info.incarnation,
            "version": info.version,
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the server's state and options from a state dict of this class, torch's or farstep's.

        A state dict that was fetched at the version that this worker holds, unchanged, changes nothing on the server. Under
        Sync loading is one act of all workers.
        """
        session = self._farstep_session()
        session.follow(self.param_groups)
        local, groups = dict(self.state), self.param_groups

        def load() -> None:
            try:
                session.load_state(pairs, self.param_groups)
            except FarstepError as error:
                if error.applied is Applied.NO:
                    # The server's are as they were, and so must these be.
                    self.param_groups = groups
                    self.state.update(local)
                raise

        super().load_state_dict(state_dict)
        numbers = {
            id(parameter): index
            for index, parameter in enumerate(p for group in self.param_groups for p in group["params"])
        }
        pairs = [
            (
                numbers[id(key)] if isinstance(key, Tensor) else key,
                dict(entries) if isinstance(entries, dict) else entries,
            )
            for key, entries in self.state.items()
        ]
        self.state.clear()
        if session.is_current(pairs, state_dict.get(STATE_DICT_KEY)):
            self.state.update(local)
        else:
            _as_torch_raises(load)
        session.kept = len(self.state)

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_farstep": self._farstep}


def _constructor_arguments(cls: type[Optimizer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(cls).bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def _as_torch_raises(act: Callable[[], Any]) -> Any:
    """Run the act; what the optimizer itself raised on the server is raised here as the type that it was there."""
    try:
        return act()
    except StepFailedError as error:
        cause, error.__cause__ = error.__cause__, None
        if cause is None:
            raise
        cause.add_note(f"farstep: raised by the hosted optimizer on the server; {error.applied.value}")
        raise cause from error


def proxy_class(cls: type[Optimizer], registered_name: str, *, drives_closure: bool) -> type[Optimizer]:
    """Return the farstep class over an optimizer class: the same arguments and ``remote``."""
    signature = inspect.signature(cls)
    remote = inspect.Parameter("remote", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | Remote | None")
    parameters = list(signature.parameters.values())
    variadic = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    plain = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    namespace = {
        "__doc__": cls.__doc__,
        "__module__": "farstep.optim",
        "__qualname__": cls.__name__,
        "__signature__": signature.replace(parameters=[*plain, remote, *variadic]),
        "_farstep_torch_class": cls,
        "_farstep_registered_name": registered_name,
        "_farstep_drives_closure": drives_closure,
    }
    return cast(type[Optimizer], type(cls.__name__, (RemoteOptimizer, cls), namespace))
