"""Every torch.optim class, over every option set and every error input of torch's own test table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from farstep import Remote, errors, optim
from tests.parity import twins

INFOS = {info.optim_cls.__name__: info for info in optim_db}


def _implementations(info: Any, options: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Return the option set with each implementation that the class offers there, as torch's own tests do."""
    chosen: list[dict[str, Any]] = [options]
    if "foreach" in info.supported_impls:
        chosen += [{**options, "foreach": True}, {**options, "foreach": False}]
    if "fused" in info.supported_impls and device in info.supports_fused_on and not _refuses_fused(options):
        chosen += [{**options, "fused": True}]
    return chosen


def _refuses_fused(options: dict[str, Any]) -> bool:
    return bool(options.get("differentiable") or options.get("foreach"))


def _cases() -> list[Any]:
    cases = []
    for name, info in INFOS.items():
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            marks = [pytest.mark.cuda] if device == "cuda" else []
            for number, given in enumerate(info.optim_inputs_func(device=device)):
                for options in _implementations(info, given.kwargs, device):
                    flags = "-".join(key for key in ("foreach", "fused") if key in options and key not in given.kwargs)
                    value = "" if not flags else str(options[flags])
                    label = f"{name}-{device}-{number}-{given.desc.replace(' ', '_')}-{flags}{value}"
                    cases.append(pytest.param(name, device, options, id=label, marks=marks))
    return cases


def _outcome(act: Callable[[], Any]) -> tuple[str, str] | None:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whatever it is, both sides must raise the same
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(("name", "device", "options"), _cases())
def test_twenty_steps_leave_the_same_bits(
    name: str, device: str, options: dict[str, Any], remote: Callable[..., Remote], tally: Callable[..., None]
) -> None:
    info = INFOS[name]
    local_model = twins.model_for(name, device)
    remote_model = twins.twin(local_model)
    # A tensor among the options must not be shared by the two.
    local = getattr(torch.optim, name)(local_model.parameters(), **copy.deepcopy(options))
    hosted = getattr(optim, name)(remote_model.parameters(), remote=remote(device), **copy.deepcopy(options))
    steps = 0
    for number in range(twins.STEPS):
        outcomes = []
        for model, optimizer in ((local_model, local), (remote_model, hosted)):
            calls: list[int] = []
            closure = twins.closure_for(model, optimizer, number, calls)
            if info.step_requires_closure:
                outcomes.append((_outcome(lambda o=optimizer, c=closure: o.step(c)), len(calls)))
                continue
            closure()
            if info.only_supports_sparse_grads:
                twins.sparsify(model)
            outcomes.append((_outcome(optimizer.step), 0))
        assert outcomes[0] == outcomes[1], f"step {number}: local torch {outcomes[0]}, farstep {outcomes[1]}"
        twins.assert_same_parameters(local_model.parameters(), remote_model.parameters(), f"step {number}")
        steps += 1
        if outcomes[0][0] is not None:
            break
    twins.assert_same_state(hosted, local, "state_dict()")
    hosted.remote.close()
    tally(name, "option sets")
    tally(name, "steps", steps)


def _error_cases() -> list[Any]:
    cases = []
    for name, info in INFOS.items():
        for number, case in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32)):
            cases.append(pytest.param(name, number, id=f"{name}-{number}-{case.optimizer_error_input.desc}"))
    return cases


@pytest.mark.parametrize(("name", "number"), _error_cases())
def test_error_inputs_raise_what_torch_raises(
    name: str, number: int, remote: Callable[..., Remote], tally: Callable[..., None]
) -> None:
    outcomes = []
    at_construction = False
    for hosted in (False, True):
        case = INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)[number]
        at_construction = case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        given = case.optimizer_error_input
        keywords = {**given.kwargs, **({"remote": remote()} if hosted else {})}
        cls = getattr(optim if hosted else torch.optim, name)
        outcomes.append(_outcome(lambda c=cls, g=given, k=keywords, a=at_construction: _provoke(c, g.params, k, a)))
    assert outcomes[0] is not None, "torch's own table says that this is an error"
    assert outcomes[0] == outcomes[1]
    tally(name, "constructor errors" if at_construction else "step errors")


@pytest.mark.parametrize("name", sorted(name for name, info in INFOS.items() if info.has_capturable_arg))
def test_options_that_torch_refuses_at_a_step_are_refused_alike(
    name: str, remote: Callable[..., Remote], tally: Callable[..., None]
) -> None:
    outcomes = []
    for cls, extra in ((getattr(torch.optim, name), {}), (getattr(optim, name), {"remote": remote()})):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = cls([parameter], capturable=True, foreach=False, **extra)
        parameter.grad = torch.ones(3)
        outcomes.append(_outcome(optimizer.step))
        assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert outcomes[0] is not None
    assert outcomes[0] == outcomes[1]
    tally(name, "refused alike")


@pytest.mark.parametrize("name", sorted(name for name, i in INFOS.items() if "differentiable" in i.supported_impls))
def test_a_step_that_autograd_is_to_record_is_refused_with_the_reason(name: str, remote: Callable[..., Remote]) -> None:
    parameters = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(errors.ConfigurationError, match=rf"no gradient flows back.*use torch\.optim\.{name}"):
        getattr(optim, name)(parameters, differentiable=True, remote=remote())
    hosted = getattr(optim, name)(parameters, remote=remote())
    with pytest.raises(errors.ConfigurationError, match="no gradient flows back"):
        hosted.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "differentiable": True})
    assert len(hosted.param_groups) == 1


def _provoke(cls: Any, params: Any, keywords: dict[str, Any], at_construction: bool) -> None:
    optimizer = cls(params, **keywords)
    if not at_construction:
        optimizer.step()
