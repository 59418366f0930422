"""The public surface, frozen: what changes here changes what users may rely on, and belongs in the changelog."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import pytest
import torch
from google.protobuf.descriptor import FileDescriptor
from torch.optim import Optimizer

import farstep
from farstep import lr_scheduler, optim
from farstep.cli._main import build_parser
from farstep.optim.handle import RemoteHandle
from farstep_server.config import FIELDS
from farstep_wire import errors
from farstep_wire.v1 import checkpoint_pb2, inspection_pb2, link_pb2, optimizer_pb2, steering_pb2

TORCH_CLASSES = {
    name
    for name, member in vars(torch.optim).items()
    if inspect.isclass(member) and issubclass(member, Optimizer) and member is not Optimizer
}


def test_farstep() -> None:
    assert sorted(farstep.__all__) == [
        "Async", "FarstepError", "LocalSGD", "Remote", "Retry", "Settings", "Sync", "Timeouts", "Wire", "__version__",
        "errors", "lr_scheduler", "optim", "remote_optimizer",
    ]  # fmt: skip
    for name in farstep.__all__:
        assert getattr(farstep, name) is not None
    assert dir(farstep) == sorted(farstep.__all__)
    assert farstep.remote_optimizer is optim.remote_optimizer
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        farstep.Adam  # noqa: B018 - the access is what is tested


def test_the_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", farstep.__version__)
    try:
        assert version("farstep") == farstep.__version__
    except PackageNotFoundError:
        pytest.skip("farstep runs from its sources here, not installed")


def test_optim_has_what_torch_has_and_conjugate_gradient() -> None:
    assert set(optim.__all__) == {*torch.optim.__all__, *TORCH_CLASSES, "ConjugateGradient", "remote_optimizer"}
    assert len(optim.__all__) == len(set(optim.__all__))
    assert {"Optimizer", "lr_scheduler", "swa_utils"} <= set(optim.__all__)
    assert {"Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam", "RAdam",
            "RMSprop", "Rprop", "SGD", "SparseAdam"} <= TORCH_CLASSES  # fmt: skip
    assert optim.Optimizer is Optimizer
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert optim.swa_utils is torch.optim.swa_utils
    with pytest.raises(AttributeError, match="no optimizer 'Adamm'; it has ASGD, Adadelta"):
        optim.Adamm  # noqa: B018 - the access is what is tested


def _local_class(name: str) -> type[Optimizer]:
    from farstep_wire.algorithms import ConjugateGradient

    return ConjugateGradient if name == "ConjugateGradient" else getattr(torch.optim, name)


@pytest.mark.parametrize("name", sorted([*TORCH_CLASSES, "ConjugateGradient"]))
def test_a_class_is_torchs_with_one_keyword_more(name: str) -> None:
    local, remote = _local_class(name), getattr(optim, name)
    assert issubclass(remote, local)
    assert remote.__doc__ == local.__doc__
    assert (remote.__name__, remote.__qualname__, remote.__module__) == (name, name, "farstep.optim")
    own, torchs = inspect.signature(remote), inspect.signature(local)
    added = own.parameters["remote"]
    assert added.kind is inspect.Parameter.KEYWORD_ONLY
    assert added.default is None
    assert [p for p in own.parameters.values() if p.name != "remote"] == list(torchs.parameters.values())
    step = list(inspect.signature(remote.step).parameters.values())
    assert [(p.name, p.default, p.kind.name) for p in step] == [
        ("self", inspect.Parameter.empty, "POSITIONAL_OR_KEYWORD"),
        ("closure", None, "POSITIONAL_OR_KEYWORD"),
        ("num_samples", None, "KEYWORD_ONLY"),
    ]
    for method in ("zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        mine, theirs = (list(inspect.signature(getattr(cls, method)).parameters) for cls in (remote, Optimizer))
        assert mine == theirs


def test_the_handle() -> None:
    members = {name for name in vars(RemoteHandle) if not name.startswith("_")}
    assert members == {
        "name", "address", "worker", "version", "lineage", "incarnation", "device", "traffic", "step_traffic", "transport",
        "wire", "staleness", "settings", "pull", "skip", "accumulate", "state", "describe", "history", "set", "checkpoint",
        "close", "overlap", "no_sync", "wait",
    }  # fmt: skip
    assert all(inspect.getdoc(getattr(RemoteHandle, name)) for name in members)


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_the_schedulers_are_torchs_but_for_those_that_need_a_function_or_a_metric() -> None:
    assert set(lr_scheduler.__all__) == {
        "ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR",
        "LinearLR", "MultiStepLR", "OneCycleLR", "PolynomialLR", "SequentialLR", "StepLR",
    }  # fmt: skip
    for name in lr_scheduler.__all__:
        own, torchs = getattr(lr_scheduler, name), getattr(torch.optim.lr_scheduler, name)
        assert issubclass(own, torchs)
        added = [p for p in inspect.signature(own).parameters.values() if p.name == "every"]
        assert [(p.kind.name, p.default) for p in added] == [("KEYWORD_ONLY", 1)]
    for name, reason in {"LambdaLR": "function", "MultiplicativeLR": "function", "ReduceLROnPlateau": "metric"}.items():
        with pytest.raises(errors.ConfigurationError, match=f"{name} cannot live on a server: .*{reason}"):
            getattr(lr_scheduler, name)(None)
    with pytest.raises(AttributeError, match="no scheduler 'StepRL'; it has ChainedScheduler"):
        lr_scheduler.StepRL  # noqa: B018 - the access is what is tested


def test_what_configures_a_client() -> None:
    assert _fields(farstep.Remote) == [
        "address", "name", "policy", "worker", "token", "tls", "transport", "wire_dtype", "on_existing", "timeouts",
        "retry", "detect_edits", "settings", "adopt_parameters", "overlap",
    ]  # fmt: skip
    assert _fields(farstep.Timeouts) == ["connect", "step", "reconnect"]
    assert _fields(farstep.Retry) == ["first", "longest"]
    assert _fields(farstep.Sync) == ["workers", "min_workers", "timeout"]
    assert _fields(farstep.Async) == ["max_staleness", "scale_lr"]
    assert _fields(farstep.Settings) == ["clip_grad_norm", "norm_type", "clip_grad_value", "non_finite", "ema_decay"]
    for kind in (farstep.Remote, farstep.Timeouts, farstep.Retry, farstep.Sync, farstep.Async, farstep.Settings):
        kind()
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_what_configures_a_server() -> None:
    assert [row.flag for row in FIELDS if not row.flag_only] == [
        "--listen", "--device", "--data-dir", "--snapshot-interval", "--snapshot-keep", "--optimizer", "--insecure", "--pg",
        "--lease", "--drain-grace", "--memory-limit", "--threads", "--max-sessions", "--log-level", "--log-format",
    ]  # fmt: skip


# Errors.


def _tree() -> dict[str, tuple[str, ...]]:
    """Read the tree drawn at the top of the errors' module: each class with its parents."""
    found: dict[str, tuple[str, ...]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([ │├└─]*)(\w+Error)(?: \((\w+)\))?(?: |$)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        above = [*above[:depth], match[2]]
        parents = above[depth - 1 : depth] if depth else ["Exception"]
        found[match[2]] = (*parents, *([match[3]] if match[3] else []))
    return found


def test_the_errors_are_those_that_are_drawn() -> None:
    drawn = _tree()
    classes = {
        name: member
        for name, member in vars(errors).items()
        if inspect.isclass(member) and issubclass(member, Exception)
    }
    assert drawn == {name: tuple(base.__name__ for base in member.__bases__) for name, member in classes.items()}
    assert len(drawn) > 20
    assert all(member.__doc__ for member in classes.values())


def test_every_error_has_a_code_of_its_own_in_the_table() -> None:
    leaves = {name for name in _tree() if name not in {"FarstepError", "RefusedError"}}
    assert {row.kind.__name__ for row in errors.ERROR_TABLE.values()} == leaves
    for code, row in errors.ERROR_TABLE.items():
        assert row.kind.code == code
        told = errors.error_for(code, "text", errors.Applied.NO)
        assert (type(told), str(told), told.applied) == (row.kind, "text", errors.Applied.NO)
    unknown = errors.error_for("NEWER", "text", errors.Applied.UNKNOWN)
    assert type(unknown) is errors.RefusedError
    assert "'NEWER'" in str(unknown)


# The wire and the commands.


def test_the_services() -> None:
    modules = (optimizer_pb2, inspection_pb2, checkpoint_pb2, steering_pb2, link_pb2)
    files: list[FileDescriptor] = [module.DESCRIPTOR for module in modules]
    found = {
        f"{file.package}.{service.name}": [method.name for method in service.methods]
        for file in files
        for service in file.services_by_name.values()
    }
    assert found == {
        "farstep.v1.OptimizerService": ["Session"],
        "farstep.v1.InspectionService": ["GetServer", "List", "Describe", "Watch", "History", "Remove"],
        "farstep.v1.CheckpointService": ["Save", "ListSnapshots", "Restore"],
        "farstep.v1.SteeringService": ["Configure", "DeclareSchedule", "GetSchedule", "LoadSchedule"],
        "farstep.v1.LinkService": ["Exchange"],
    }


def _verbs(parser: argparse.ArgumentParser) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, nested in action.choices.items():
                found[word] = _verbs(nested)
    return found


def test_the_verbs_of_the_command() -> None:
    assert _verbs(build_parser()) == {
        "ls": {}, "show": {}, "watch": {}, "workers": {}, "history": {}, "set": {}, "rm": {}, "doctor": {},
        "bench": {},
        "checkpoint": {"save": {}, "list": {}, "restore": {}},
    }  # fmt: skip


def test_the_commands() -> None:
    found = {point.name: point.value for point in entry_points(group="console_scripts") if "farstep" in point.value}
    if not found:
        pytest.skip("farstep runs from its sources here, not installed")
    assert found == {"farstep": "farstep.cli:main", "farstep-server": "farstep_server.cli:main"}
