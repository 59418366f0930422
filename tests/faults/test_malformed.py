"""Whatever a client sends that it should not: a clear refusal, no memory spent on it, and the others served on.

The table below is spoken by hand, frame by frame. Each row says what is sent, which error must come back and what its text
must name: the field and the value. One server takes all rows; its memory is measured after each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch

from farstep_wire.bundle import BundleBody
from farstep_wire.convert import policy_to_proto
from farstep_wire.errors import (
    AlreadyExistsError,
    Applied,
    ArgumentsError,
    ClosureError,
    FarstepError,
    FencedError,
    InvalidRequestError,
    LayoutMismatchError,
    MismatchError,
    ProtocolError,
    RemovedError,
    ResourceExhaustedError,
    RollbackError,
    StepFailedError,
    UnknownOptimizerError,
)
from farstep_wire.layout import Layout
from farstep_wire.limits import LAYOUT_BYTES
from farstep_wire.policy import Async, Sync
from farstep_wire.v1 import common_pb2 as cpb
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import to_map, to_value
from tests.support.raw import EndedError, RawSession, attach_message, flat_layout, layout_bytes
from tests.support.servers import ServerProcess, Servers

MIB = 2**20
ALLOWED_GROWTH_BYTES = 64 * MIB
LIMIT_BYTES = 4 * 2**30
LAYOUT = flat_layout(4, 3)


@pytest.fixture(scope="module")
def target(module_servers: Servers) -> ServerProcess:
    return module_servers("--memory-limit", str(LIMIT_BYTES))


@pytest.fixture(scope="module")
def neighbour(target: ServerProcess) -> Iterator[Neighbour]:
    """Another client of the same server; it must never notice."""
    with RawSession(target.address) as session:
        yield Neighbour(session)


@pytest.fixture(scope="module")
def baseline(target: ServerProcess, neighbour: Neighbour) -> int:
    for _ in range(20):
        neighbour.step()
    return target.rss_bytes()


@pytest.fixture(autouse=True)
def _served_on(target: ServerProcess, neighbour: Neighbour, baseline: int) -> Iterator[None]:
    yield
    neighbour.step()
    grown = target.rss_bytes() - baseline
    assert grown < ALLOWED_GROWTH_BYTES, f"the server grew by {grown / MIB:.0f} MiB"


class Neighbour:
    """Steps by hand, so that nothing of the client stands between."""

    def __init__(self, session: RawSession) -> None:
        self._session = session
        contents = bytes(LAYOUT.arena.nbytes)
        self._attached = session.attach(attach_message("neighbour"), layout_bytes(LAYOUT), contents)
        self.version = 0

    def step(self) -> None:
        message = contribution(self._attached, sequence=self.version + 1, version=self.version)
        frame, _ = self._session.ask(bytes(LAYOUT.gradients.nbytes), contribution=message)
        self.version += 1
        assert frame.stepped.version == self.version


def contribution(attached: pb.Attached, **fields: Any) -> pb.Contribution:
    """Return a contribution that the server takes, but for what the fields change."""
    usual = {"epoch": attached.epoch, "sequence": 1, "version": 0, "incarnation": attached.incarnation}
    return pb.Contribution(**{**usual, **fields})


@dataclass
class Stage:
    """A session of one row: its stream, the name that it uses, and where it is attached."""

    session: RawSession
    name: str
    attached: pb.Attached = field(default_factory=pb.Attached)

    def attach(self, *, layout: Layout = LAYOUT, contents: bytes | None = None, **fields: Any) -> None:
        """Attach under the row's name."""
        message = attach_message(self.name, **fields)
        zeros = bytes(layout.arena.nbytes) if contents is None else contents
        self.attached = self.session.attach(message, layout_bytes(layout, message.optimizer), zeros)

    def ask_attach(self, *, layout: bytes | None = None, **fields: Any) -> None:
        """Send an Attach that will be refused."""
        message = attach_message(fields.pop("name", self.name), **fields)
        self.session.send(layout_bytes(LAYOUT) if layout is None else layout, attach=message)

    def contribute(self, body: bytes | None = None, **fields: Any) -> None:
        """Send a contribution that will be refused."""
        gradients = bytes(LAYOUT.gradients.nbytes) if body is None else body
        self.session.send(gradients, contribution=contribution(self.attached, **fields))


@dataclass(frozen=True)
class Row:
    """What is sent, and the refusal that is due. ``hosted``: the row's session is attached before."""

    id: str
    act: Callable[[Stage], None]
    error: type[FarstepError]
    texts: tuple[str, ...]
    hosted: bool = False


def _clear(message: Any, *fields: str) -> Any:
    for name in fields:
        message.ClearField(name)
    return message


def _policy(**fields: int) -> Callable[[Stage], None]:
    def act(stage: Stage) -> None:
        message = attach_message(stage.name)
        message.policy.CopyFrom(cpb.Policy(sync=cpb.Sync(**fields)))
        stage.session.send(layout_bytes(LAYOUT), attach=message)

    return act


def _layout(*parameters: cpb.Parameter) -> Callable[[Stage], None]:
    data = cpb.Layout(groups=[cpb.ParamGroup(parameters=parameters, options=cpb.ValueMap())]).SerializeToString()
    return lambda stage: stage.ask_attach(layout=data)


def _parameter(*shape: int, key: str = "w", dtype: str = "float32", strides: tuple[int, ...] = (), **rest: int) -> Any:
    return cpb.Parameter(key=key, spec=cpb.TensorSpec(dtype=dtype, shape=shape, strides=strides), **rest)


def _arguments(arguments: cpb.ValueMap) -> Callable[[Stage], None]:
    def act(stage: Stage) -> None:
        message = attach_message(stage.name)
        message.arguments.CopyFrom(arguments)
        stage.session.send(layout_bytes(LAYOUT), attach=message)

    return act


def _one(value: cpb.Value, key: cpb.Value | None = None) -> cpb.ValueMap:
    return cpb.ValueMap(entries=[cpb.ValueEntry(key=key or cpb.Value(text="lr"), value=value)])


def _nested(depth: int) -> cpb.Value:
    value = cpb.Value(integer=1)
    for _ in range(depth):
        value = cpb.Value(list=cpb.ValueList(items=[value]))
    return value


def _bomb(stage: Stage) -> None:
    """Send arguments nested deeper than protobuf itself will write."""
    data = cpb.Value(integer=1).SerializeToString()
    path = [2, 1, 5, 2]  # value of the entry, entry of the map, arguments of Attach, attach of ClientFrame
    for number in [*[1, 6] * 500, *path]:
        data = _field(number, data)
    stage.session.send_bytes(data)


def _field(number: int, data: bytes) -> bytes:
    size, length = bytearray(), len(data)
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2]) + bytes(size) + bytes([length]) + data


def _patched(act: Callable[[pb.Attach], Any]) -> Callable[[Stage], None]:
    def send(stage: Stage) -> None:
        message = attach_message(stage.name)
        act(message)
        stage.session.send(layout_bytes(LAYOUT), attach=message)

    return send


def _second(**fields: Any) -> Callable[[Stage], None]:
    """Host by one stream, then attach by another."""
    layout = fields.pop("layout", LAYOUT)

    def act(stage: Stage) -> None:
        stage.attach()
        stage.session.close()
        stage.session.__init__(stage.session.address)  # type: ignore[misc]
        stage.ask_attach(layout=layout_bytes(layout), instance="another", **fields)

    return act


def _bad_argument(stage: Stage) -> None:
    message = attach_message(stage.name)
    message.arguments.CopyFrom(to_map({"lr": 0.1, "momentun": 0.9}, "arguments"))
    stage.session.ask(layout_bytes(LAYOUT), attach=message)
    stage.session.send(bytes(LAYOUT.arena.nbytes), upload=pb.Upload())


ATTACHING = [
    Row("unknown class", lambda s: s.ask_attach(optimizer="Adamm"), UnknownOptimizerError, ("'Adamm'", "AdamW")),
    Row("unknown option", _bad_argument, ArgumentsError, ("SGD", "momentun")),
    Row("other class", _second(optimizer="Adam"), MismatchError, ("SGD", "Adam")),
    Row("other shape", _second(layout=flat_layout(4, 5)), LayoutMismatchError, ("'0.1'", "float32[3]", "float32[5]")),
    Row("fewer", _second(layout=flat_layout(4)), LayoutMismatchError, ("2 parameters are hosted", "has 1")),
    Row(
        "other dtype",
        _second(layout=flat_layout(4, 3, dtype=torch.float64)),
        LayoutMismatchError,
        ("'0.0'", "float32[4]", "float64[4]"),
    ),
    Row("other policy", _second(policy=Sync(2)), MismatchError, ("workers=1", "workers=2")),
    Row("other kind of policy", _second(policy=Async()), MismatchError, ("Sync", "Async")),
    Row("must be new", _second(on_existing=pb.ON_EXISTING_ERROR), AlreadyExistsError, ("hosted already", "'error'")),
    Row("lineage of nothing", lambda s: s.ask_attach(lineage="gone"), RemovedError, ("not hosted here any more",)),
    Row("other lineage", _second(lineage="gone"), RollbackError, ("gone", "created anew")),
    Row(
        "protocol 99", _patched(lambda m: setattr(m, "protocol", 99)), ProtocolError, ("99", "serves 1 to 1", "Install")
    ),
    Row("protocol unset", _patched(lambda m: setattr(m, "protocol", 0)), ProtocolError, ("revision 0",)),
    Row("no name", lambda s: s.ask_attach(name=""), InvalidRequestError, ("name ''", "1 to 255 bytes")),
    Row("long name", lambda s: s.ask_attach(name="n" * 256), InvalidRequestError, ("nnn", "1 to 255 bytes")),
    Row("long name in UTF-8", lambda s: s.ask_attach(name="ü" * 128), InvalidRequestError, ("ü", "1 to 255 bytes")),
    Row("name with a line end", lambda s: s.ask_attach(name="a\nb"), InvalidRequestError, (r"'a\nb'", "printable")),
    Row("no worker", _patched(lambda m: setattr(m, "worker", "")), InvalidRequestError, ("worker ''", "1 to 64 bytes")),
    Row("long worker", _patched(lambda m: setattr(m, "worker", "w" * 65)), InvalidRequestError, ("www", "64 bytes")),
    Row("no instance", _patched(lambda m: setattr(m, "instance", "")), InvalidRequestError, ("instance",)),
    Row("no policy", _patched(lambda m: m.ClearField("policy")), InvalidRequestError, ("policy is not set",)),
    Row("no workers", _policy(workers=0), InvalidRequestError, ("workers", "at least 1", "not 0")),
    Row("min_workers", _policy(workers=2, min_workers=3), InvalidRequestError, ("min_workers", "workers=2", "not 3")),
    Row("endless timeout", _policy(workers=1, timeout_ms=2**64 - 1), InvalidRequestError, ("timeout", str(2**64 - 1))),
    Row("no parameters", lambda s: s.ask_attach(layout=b""), InvalidRequestError, ("no parameters",)),
    Row("garbage layout", lambda s: s.ask_attach(layout=b"\xff" * 99), InvalidRequestError, ("layout of 99 bytes",)),
    Row("key twice", _layout(_parameter(2), _parameter(3)), InvalidRequestError, ("'w'", "twice")),
    Row("strides that overlap", _layout(_parameter(4, strides=(0,))), InvalidRequestError, ("'w'", "(0,)", "[4]")),
    Row("strides with gaps", _layout(_parameter(4, strides=(2,))), InvalidRequestError, ("'w'", "(2,)", "gaps")),
    Row("too few strides", _layout(_parameter(4, 2, strides=(2,))), InvalidRequestError, ("'w'", "(4, 2)", "(2,)")),
    Row(
        "offset, no storage", _layout(_parameter(4, storage_offset=3)), InvalidRequestError, ("'w'", "storage_offset 3")
    ),
    Row(
        "offset past all",
        _layout(_parameter(4, storage=1, storage_offset=2**63)),
        InvalidRequestError,
        ("'w'", f"storage_offset {2**63}"),
    ),
    Row(
        "offset past memory",
        _layout(_parameter(4, storage=1, storage_offset=2**50)),
        ResourceExhaustedError,
        (str(2**52 + 64), f"of the server's {LIMIT_BYTES}"),
    ),
    Row("unknown dtype", _layout(_parameter(4, dtype="float33")), InvalidRequestError, ("'w'", "'float33'")),
    Row("dtype of a quantized", _layout(_parameter(4, dtype="qint8")), InvalidRequestError, ("'w'", "qint8")),
    Row("dtype bits", _layout(_parameter(4, dtype="bits8")), InvalidRequestError, ("'w'", "bits8")),
    Row("65 dimensions", _layout(_parameter(*[1] * 65)), InvalidRequestError, ("'w'", "65 dimensions", "64")),
    Row("2**63 elements", _layout(_parameter(2**63)), InvalidRequestError, ("'w'", str(2**63), "too large")),
    Row("no elements of 2**63", _layout(_parameter(0, 2**63)), InvalidRequestError, ("'w'", str(2**63), "too large")),
    Row("product past 64 bits", _layout(_parameter(2**40, 2**40)), InvalidRequestError, ("'w'", "too large")),
    Row("1 PiB", _layout(_parameter(2**48)), ResourceExhaustedError, (str(2**50), "are left", f"{LIMIT_BYTES}")),
    Row("value nested 40 deep", _arguments(_one(_nested(40))), InvalidRequestError, ("arguments['lr']", "32")),
    Row("value nested 500 deep", _bomb, InvalidRequestError, ("is not a ClientFrame",)),
    Row("empty value", _arguments(_one(cpb.Value())), InvalidRequestError, ("arguments['lr']", "empty value")),
    Row(
        "list as key",
        _arguments(_one(cpb.Value(none=True), cpb.Value(list=cpb.ValueList()))),
        InvalidRequestError,
        ("arguments", "key", "list"),
    ),
    Row(
        "unhashable key",
        _arguments(_one(cpb.Value(none=True), cpb.Value(tuple=cpb.ValueList(items=[cpb.Value(map=cpb.ValueMap())])))),
        InvalidRequestError,
        ("arguments", "key"),
    ),
    Row(
        "number as name of an argument",
        _arguments(_one(cpb.Value(none=True), cpb.Value(integer=3))),
        InvalidRequestError,
        ("arguments", "3"),
    ),
    Row(
        "tensor without its bytes",
        _arguments(_one(cpb.Value(tensor=cpb.Tensor(spec=cpb.TensorSpec(dtype="float32", shape=[5]), data=b"123")))),
        InvalidRequestError,
        ("arguments['lr']", "20 bytes", "3 came"),
    ),
    Row(
        "tensor of nowhere",
        _arguments(_one(cpb.Value(tensor_ref=7))),
        InvalidRequestError,
        ("arguments['lr']", "tensor 7 of 0"),
    ),
]


def _twice(stage: Stage) -> None:
    stage.ask_attach()


def _whole(stage: Stage, total: int, *frames: tuple[int, bytes], **first: Any) -> None:
    """Begin a contribution of a declared length, then send frames as given."""
    begin: dict[str, Any] = {"contribution": contribution(stage.attached), **first}
    for number, (offset, payload) in enumerate(frames):
        head = begin if number == 0 else {}
        declared = {"total_bytes": total} if number == 0 else {}
        stage.session.send_frame(request=9, offset=offset, payload=payload, **declared, **head)


def _cut(stage: Stage) -> None:
    _whole(stage, 128, (0, bytes(40)))
    stage.session.finish()


def _declared(size: int) -> Callable[[Stage], None]:
    return lambda stage: _whole(stage, size, (0, b"1"))


def _sparse(nnz: int, dims: int = 1, *, body: bytes = b"", declared: int | None = None) -> Callable[[Stage], None]:
    form = pb.GradientForm(parameter=0, sparse=pb.SparseForm(nnz=nnz, sparse_dims=dims))

    def act(stage: Stage) -> None:
        message = contribution(stage.attached, forms=[form, pb.GradientForm(parameter=1, absent=True)])
        if declared is None:
            stage.session.send(body, contribution=message)
        else:
            stage.session.send_frame(request=9, contribution=message, total_bytes=declared, payload=b"1")

    return act


def _sparse_out_of_range(stage: Stage) -> None:
    indices = torch.tensor([0, 99]).numpy().tobytes().ljust(64, b"\0")
    _sparse(2, body=indices + bytes(64))(stage)


def _form(**fields: Any) -> Callable[[Stage], None]:
    return lambda stage: stage.contribute(forms=[pb.GradientForm(**fields)])


def _edit(**fields: Any) -> Callable[[Stage], None]:
    return lambda stage: stage.contribute(edits=[pb.GroupEdit(**fields)])


def _load(tree: object, **fields: Any) -> Callable[[Stage], None]:
    def act(stage: Stage) -> None:
        body = BundleBody(tree, "test")
        usual = {"epoch": stage.attached.epoch, "sequence": 1, "header_bytes": body.header_bytes}
        message = pb.LoadState(**{**usual, **fields})
        stage.session.send(body.join((), 0, body.nbytes), load_state=message)

    return act


def _load_bytes(body: bytes, header: int) -> Callable[[Stage], None]:
    def act(stage: Stage) -> None:
        message = pb.LoadState(epoch=stage.attached.epoch, sequence=1, header_bytes=header)
        stage.session.send(body, load_state=message)

    return act


def _add_group(layout: bytes, contents: bytes, **fields: Any) -> Callable[[Stage], None]:
    def act(stage: Stage) -> None:
        usual = {"epoch": stage.attached.epoch, "sequence": 1, "layout_bytes": len(layout)}
        stage.session.send(layout + contents, add_param_group=pb.AddParamGroup(**{**usual, **fields}))

    return act


def _wrong_class(stage: Stage) -> None:
    stage.contribute(b"", closure=True)


def _evaluation(stage: Stage) -> None:
    message = pb.Evaluation(epoch=stage.attached.epoch, sequence=1, number=0, loss=to_value(1.0, "loss"))
    stage.session.send(bytes(LAYOUT.gradients.nbytes), evaluation=message)


PAST = 2**60
ATTACHED = [
    Row("attach again", _twice, InvalidRequestError, ("attach in a session that is attached",)),
    Row("upload", lambda s: s.session.send(upload=pb.Upload(), body=bytes(128)), InvalidRequestError, ("upload",)),
    Row("short of bytes", lambda s: s.contribute(bytes(64)), InvalidRequestError, ("64 bytes", "takes 128")),
    Row("too many bytes", lambda s: s.contribute(bytes(192)), InvalidRequestError, ("192 bytes", "takes 128")),
    Row("2 GiB declared", _declared(2 * 2**30), InvalidRequestError, (str(2 * 2**30), "takes 128")),
    Row("1 PiB declared", _declared(2**50), InvalidRequestError, (str(2**50), "takes 128")),
    Row("2**64 - 1 declared", _declared(2**64 - 1), InvalidRequestError, (str(2**64 - 1), "takes 128")),
    Row("stream ends early", _cut, InvalidRequestError, ("ended", "40 of 128 bytes")),
    Row(
        "gap",
        lambda s: _whole(s, 128, (0, bytes(32)), (64, bytes(64))),
        InvalidRequestError,
        ("offset 64", "gap", "byte 32 is next"),
    ),
    Row(
        "overlap",
        lambda s: _whole(s, 128, (0, bytes(64)), (32, bytes(64))),
        InvalidRequestError,
        ("offset 32", "overlap", "byte 64 is next"),
    ),
    Row(
        "past the arena",
        lambda s: _whole(s, 128, (0, bytes(64)), (64, bytes(65))),
        InvalidRequestError,
        ("64 to 129", "the declared 128"),
    ),
    Row("far past the arena", lambda s: _whole(s, 128, (2**63, bytes(64))), InvalidRequestError, (str(2**63), "gap")),
    Row("begins in the middle", lambda s: _whole(s, 128, (64, bytes(64))), InvalidRequestError, ("offset 64", "gap")),
    Row("empty frame", lambda s: _whole(s, 128, (0, b"")), InvalidRequestError, ("empty frame", "byte 0 of 128")),
    Row(
        "request inside a request",
        lambda s: (_whole(s, 128, (0, bytes(64))), s.session.send_frame(request=10, pull=pb.Pull())),
        InvalidRequestError,
        ("request 10", "before the last one is whole"),
    ),
    Row(
        "continues nothing",
        lambda s: s.session.send_frame(request=7, payload=b"123"),
        InvalidRequestError,
        ("request 7", "continues no request"),
    ),
    Row("garbage", lambda s: s.session.send_bytes(b"\xff" * 500), InvalidRequestError, ("500 bytes", "ClientFrame")),
    Row("empty message", lambda s: s.session.send_bytes(b""), InvalidRequestError, ("continues no request",)),
    Row(
        "text that is not UTF-8",
        lambda s: s.session.send_bytes(
            pb.ClientFrame(attach=pb.Attach(name="abc")).SerializeToString().replace(b"abc", b"a\xffc")
        ),
        InvalidRequestError,
        ("ClientFrame",),
    ),
    Row("pull with bytes", lambda s: s.session.send(bytes(99), pull=pb.Pull()), InvalidRequestError, ("pull", "99")),
    Row(
        "heartbeat with 2 GiB",
        lambda s: s.session.send_frame(request=9, heartbeat=pb.Heartbeat(), total_bytes=2**31, payload=b"1"),
        InvalidRequestError,
        ("heartbeat", str(2**31)),
    ),
    Row("sparse of 2**60", _sparse(PAST, body=bytes(64)), InvalidRequestError, ("64 bytes", str(12 * PAST))),
    Row("sparse of 2**60, declared", _sparse(PAST, declared=12 * PAST), ResourceExhaustedError, (str(12 * PAST),)),
    Row("sparse in no dimension", _sparse(2, 0), InvalidRequestError, ("'0.0'", "0 sparse dimensions", "float32[4]")),
    Row("sparse in 3 dimensions", _sparse(2, 3), InvalidRequestError, ("'0.0'", "3 sparse dimensions", "has 1")),
    Row("sparse out of range", _sparse_out_of_range, InvalidRequestError, ("'0.0'", "float32[4]", "index 99")),
    Row("form of nothing", _form(parameter=5, absent=True), InvalidRequestError, ("parameter 5", "has 2")),
    Row("form not set", _form(parameter=1), InvalidRequestError, ("parameter 1", "not set")),
    Row(
        "two forms",
        lambda s: s.contribute(forms=[pb.GradientForm(parameter=1, absent=True)] * 2),
        InvalidRequestError,
        ("two gradients of parameter 1",),
    ),
    Row(
        "gradient of another shape",
        _form(parameter=1, strided=cpb.TensorSpec(dtype="float32", shape=[9])),
        InvalidRequestError,
        ("'0.1'", "float32[9]", "float32[3]"),
    ),
    Row(
        "gradient of another dtype",
        _form(parameter=1, strided=cpb.TensorSpec(dtype="float64", shape=[3])),
        InvalidRequestError,
        ("'0.1'", "float64[3]", "float32[3]"),
    ),
    Row("edit of no group", _edit(group=3), InvalidRequestError, ("group 3", "1 groups")),
    Row("edit of params", _edit(set=to_map({"params": 1}, "x")), InvalidRequestError, ("param_groups[0]", "'params'")),
    Row("edit of a number", _edit(set=to_map({3: 1}, "x")), InvalidRequestError, ("param_groups[0]", "3")),
    Row(
        "two edits of a group",
        lambda s: s.contribute(edits=[pb.GroupEdit(), pb.GroupEdit()]),
        InvalidRequestError,
        ("group 0", "two"),
    ),
    Row("edited parameter 4", lambda s: s.contribute(edited_parameters=[4]), InvalidRequestError, ("4", "has 2")),
    Row("edited twice", lambda s: s.contribute(edited_parameters=[1, 1]), InvalidRequestError, ("twice",)),
    Row("weight below 0", lambda s: s.contribute(num_samples=-1.0), InvalidRequestError, ("num_samples", "-1.0")),
    Row("weight NaN", lambda s: s.contribute(num_samples=float("nan")), InvalidRequestError, ("num_samples", "nan")),
    Row(
        "weight infinite", lambda s: s.contribute(num_samples=float("inf")), InvalidRequestError, ("num_samples", "inf")
    ),
    Row("stale epoch", lambda s: s.contribute(epoch=99), FencedError, ("worker 0", "epoch 99", "epoch now: 1")),
    Row("version ahead", lambda s: s.contribute(version=5), RollbackError, ("at version 0", "version 5")),
    Row("sequence 0", lambda s: s.contribute(sequence=0), InvalidRequestError, ("sequence", "0")),
    Row("closure for a class that drives none", _wrong_class, InvalidRequestError, ("SGD", "closure")),
    Row("evaluation out of turn", _evaluation, ClosureError, ("evaluation", "ended")),
    Row(
        "zero_grad of another epoch",
        lambda s: s.session.send(zero_grad=pb.ZeroGrad(epoch=7)),
        FencedError,
        ("epoch 7",),
    ),
    Row(
        "state of no parameter",
        lambda s: s.session.send(get_state=pb.GetState(parameters=[6])),
        InvalidRequestError,
        ("parameter 6", "has 2"),
    ),
    Row("garbage bundle", _load_bytes(b"\xff" * 64, 64), InvalidRequestError, ("load_state", "no bundle")),
    Row("header past the bundle", _load_bytes(bytes(64), 65), InvalidRequestError, ("65 bytes", "body of 64")),
    Row("bundle of text", _load("x"), InvalidRequestError, ("load_state", "'state' and 'groups'")),
    Row("state without groups", _load({"state": [], "groups": []}), InvalidRequestError, ("'groups'", "1 groups")),
    Row("state that is no list", _load({"state": 3, "groups": [{}]}), InvalidRequestError, ("load_state",)),
    Row("groups of numbers", _load({"state": [], "groups": [3]}), InvalidRequestError, ("load_state", "groups")),
    Row("state of -1", _load({"state": [[-1, {}]], "groups": [{}]}), InvalidRequestError, ("parameter -1",)),
    Row("state of 2", _load({"state": [[2, {}]], "groups": [{}]}), InvalidRequestError, ("parameter 2", "are 2")),
    Row("state under a list", _load({"state": [[[], {}]], "groups": [{}]}), InvalidRequestError, ("load_state",)),
    Row("two groups at once", _add_group(layout_bytes(Layout((), (0, 0))), b""), InvalidRequestError, ("2 groups",)),
    Row("group that is there", _add_group(layout_bytes(LAYOUT), bytes(128)), InvalidRequestError, ("'0.0'", "twice")),
    Row(
        "group without contents",
        _add_group(layout_bytes(flat_layout(2)), b""),
        InvalidRequestError,
        ("64 bytes", "0 bytes"),
    ),
    Row("layout longer than all", _add_group(b"\xff", b"", layout_bytes=99), InvalidRequestError, ("99", "body of 1")),
    Row(
        "group of 1 PiB",
        _add_group(cpb.Layout(groups=[cpb.ParamGroup(parameters=[_parameter(2**48)])]).SerializeToString(), b""),
        InvalidRequestError,
        (str(2**50), "0 bytes came"),
    ),
]


BEFORE = [
    *(
        Row(f"{kind} before attach", lambda s, b=body: s.session.send(**b), InvalidRequestError, (kind, "attached"))
        for kind, body in {
            "contribution": {"contribution": pb.Contribution(epoch=1, sequence=1)},
            "evaluation": {"evaluation": pb.Evaluation(error="x")},
            "pull": {"pull": pb.Pull()},
            "zero_grad": {"zero_grad": pb.ZeroGrad()},
            "get_state": {"get_state": pb.GetState()},
            "load_state": {"load_state": pb.LoadState()},
            "add_param_group": {"add_param_group": pb.AddParamGroup()},
            "heartbeat": {"heartbeat": pb.Heartbeat()},
            "leave": {"leave": pb.Leave()},
        }.items()
    ),
    Row("upload before attach", lambda s: s.session.send(upload=pb.Upload()), InvalidRequestError, ("upload",)),
    Row(
        "attach of 2 GiB",
        lambda s: s.session.send_frame(request=1, attach=attach_message(s.name), total_bytes=2**31, payload=b"1"),
        InvalidRequestError,
        (str(2**31), "attach", str(LAYOUT_BYTES)),
    ),
    Row(
        "attach of 1 PiB",
        lambda s: s.session.send_frame(request=1, attach=attach_message(s.name), total_bytes=2**50, payload=b"1"),
        InvalidRequestError,
        (str(2**50), "attach"),
    ),
]


@pytest.mark.parametrize(
    "row",
    [*ATTACHING, *BEFORE, *(Row(r.id, r.act, r.error, r.texts, hosted=True) for r in ATTACHED)],
    ids=lambda row: row.id.replace(" ", "-"),
)
def test_a_clear_refusal(target: ServerProcess, name: str, row: Row) -> None:
    with RawSession(target.address) as session:
        stage = Stage(session, name)
        if row.hosted:
            stage.attach()
        row.act(stage)
        error = session.refusal()
    assert type(error) is row.error, f"{type(error).__name__}: {error}"
    assert [text for text in row.texts if text not in str(error)] == [], str(error)
    about_step = session.last_kind in {"contribution", "evaluation"}
    assert error.applied is Applied.NO or not about_step


# What ends the stream itself, or never becomes a request.


def test_a_message_over_4_mib_ends_the_stream(target: ServerProcess, name: str) -> None:
    with RawSession(target.address) as session:
        Stage(session, name).attach()
        session.send_bytes(bytes(5 * MIB))
        with pytest.raises(EndedError, match="larger than max") as ended:
            session.receive()
    assert ended.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_2_gib_declared_and_never_sent(target: ServerProcess, baseline: int, name: str) -> None:
    layout = flat_layout(2**29)
    with RawSession(target.address) as session:
        frame, _ = session.ask(layout_bytes(layout), attach=attach_message(name))
        assert frame.attached.outcome == pb.Attached.OUTCOME_UPLOAD
        session.send_frame(request=2, upload=pb.Upload(), total_bytes=2**31, payload=b"12345678")
        session.finish()
        error = session.refusal()
    assert isinstance(error, InvalidRequestError)
    assert f"8 of {2**31} bytes" in str(error)
    assert target.rss_bytes() - baseline < ALLOWED_GROWTH_BYTES
    # The name is free again.
    with RawSession(target.address) as session:
        Stage(session, name).attach()


def test_a_session_that_breaks_off_in_the_middle_of_an_upload_frees_the_name(target: ServerProcess, name: str) -> None:
    with RawSession(target.address) as session:
        session.ask(layout_bytes(LAYOUT), attach=attach_message(name))
        session.send_frame(request=2, upload=pb.Upload(), total_bytes=128, payload=b"12345678")
        session.cancel()
    with RawSession(target.address) as session:
        Stage(session, name).attach(worker="1")


def test_a_refused_request_leaves_the_session_usable(target: ServerProcess, name: str) -> None:
    with RawSession(target.address) as session:
        stage = Stage(session, name)
        stage.attach()
        # Its bytes are on their way already when it is refused: they must be read past.
        stage.contribute(bytes(5 * MIB))
        assert "takes 128" in str(session.refusal())
        frame, _ = session.ask(bytes(128), contribution=contribution(stage.attached))
        assert frame.stepped.version == 1


def test_a_step_that_raises_is_told_and_rolled_back(target: ServerProcess, name: str) -> None:
    with RawSession(target.address) as session:
        stage = Stage(session, name)
        stage.attach(optimizer="SparseAdam")
        stage.contribute()
        error = session.refusal()
        assert isinstance(error, StepFailedError)
        assert error.applied is Applied.NO
        assert "does not support dense gradients" in str(error)
        frame, body = session.ask(pull=pb.Pull())
        assert frame.parameters.version == 0
        assert body == bytes(128)


@pytest.mark.parametrize(
    "garbage", [os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(999)]
)
def test_garbage_on_the_socket(target: ServerProcess, garbage: bytes) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(target.address.removeprefix("unix:"))
            connection.settimeout(10)
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass


def test_a_method_that_is_none(target: ServerProcess) -> None:
    with grpc.insecure_channel(target.address) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/farstep.v1.OptimizerService/Steal", None, None)(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_policies_are_refused_in_every_way_they_can_be_wrong() -> None:
    for workers, least in [(1, 2), (3, 0)]:
        with pytest.raises(ValueError, match="min_workers"):
            policy_to_proto(Sync(workers, least))
