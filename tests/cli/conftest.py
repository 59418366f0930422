"""A real gRPC server with servicers whose answers a test sets, so that every answer a server can give is at hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from farstep_wire import __version__
from farstep_wire.convert import failure_to_proto
from farstep_wire.errors import ERROR_TABLE, FarstepError
from farstep_wire.limits import OLDEST_PROTOCOL, PROTOCOL
from farstep_wire.v1 import checkpoint_pb2 as cpb
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.v1 import inspection_pb2 as ipb
from farstep_wire.v1 import steering_pb2 as spb
from farstep_wire.v1.checkpoint_pb2_grpc import CheckpointServiceServicer, add_CheckpointServiceServicer_to_server
from farstep_wire.v1.inspection_pb2_grpc import InspectionServiceServicer, add_InspectionServiceServicer_to_server
from farstep_wire.v1.steering_pb2_grpc import SteeringServiceServicer, add_SteeringServiceServicer_to_server

Answer = Callable[[Any, grpc.ServicerContext], Any]


def refuse(error: FarstepError) -> Answer:
    """Answer with a failure, as the server's interceptor does."""

    def answer(_: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("farstep-failure-bin", failure_to_proto(error).SerializeToString()),))
        context.abort(getattr(grpc.StatusCode, ERROR_TABLE[error.code].grpc_status), str(error))

    return answer


def summary(name: str = "resnet50", version: int = 120) -> ipb.Summary:
    return ipb.Summary(
        name=name,
        optimizer="AdamW",
        version=version,
        live_workers=1,
        parameters=2,
        elements=1234567,
        parameter_bytes=4938268,
        policy=pb.Policy(sync=pb.Sync(workers=2, timeout_ms=1500)),
        device="cuda:0",
        lineage="1f3a",
        incarnation=2,
    )


def options(**values: pb.Value) -> pb.ValueMap:
    return pb.ValueMap(
        entries=[pb.ValueEntry(key=pb.Value(text=key), value=value) for key, value in values.items()],
    )


def settings(**changes: pb.Value) -> pb.ValueMap:
    """Return the settings, those that are not given at their defaults."""
    none = pb.Value(none=True)
    defaults = {"clip_grad_norm": none, "norm_type": pb.Value(real=2.0), "clip_grad_value": none}
    return options(**{**defaults, "non_finite": pb.Value(text="allow"), "ema_decay": none, **changes})


def description(version: int = 120, *, parameters: bool = True) -> ipb.Description:
    betas = pb.Value(tuple=pb.ValueList(items=[pb.Value(real=0.9), pb.Value(real=0.999)]))
    tensor = pb.Value(tensor=pb.Tensor(spec=pb.TensorSpec(dtype="float32"), data=b"\x00\x00\x00\x3f"))
    step = ipb.StateRow(name="step", value=pb.Value(real=120.0))
    moment = ipb.StateRow(name="exp_avg", spec=pb.TensorSpec(dtype="float32", shape=[3, 4]), norm=0.25)
    return ipb.Description(
        summary=summary(version=version),
        workers=[
            ipb.Worker(
                id="0",
                standing=ipb.Worker.STANDING_WAITING,
                version=120,
                contributions=119,
                epoch=1,
                round_trip_seconds=0.00025,
            ),
            ipb.Worker(
                id="1",
                standing=ipb.Worker.STANDING_EXPIRED,
                abstentions=3,
                stale=2,
                lease_seconds=-4.5,
                staleness=4,
            ),
        ],
        groups=[
            options(lr=pb.Value(real=0.0003), betas=betas, foreach=pb.Value(none=True)),
            options(lr=tensor, betas=betas, fused=pb.Value(boolean=True)),
        ],
        group_sizes=[1, 1],
        parameters=[
            ipb.ParameterRow(
                key="conv.weight",
                spec=pb.TensorSpec(dtype="float32", shape=[3, 4]),
                norm=1.5,
                gradient_norm=0.125,
                state=[step, moment],
            ),
            ipb.ParameterRow(key="scale", group=1, spec=pb.TensorSpec(dtype="bfloat16"), norm=float("nan")),
        ]
        if parameters
        else [],
        state_bytes=2048,
        arguments=options(lr=pb.Value(real=0.001)),
        last_step_seconds=0.0031,
        stale_contributions=2,
        settings=settings(
            clip_grad_norm=pb.Value(real=1.0), norm_type=pb.Value(real=math.inf), non_finite=pb.Value(text="skip"),
            ema_decay=pb.Value(real=0.99),
        ),
        schedules=[
            ipb.Schedule(scheduler="OneCycleLR", every=2, last_epoch=60, ended="it was given 60 steps"),
            ipb.Schedule(scheduler="ConstantLR", every=1, last_epoch=3, part=True),
        ],
        averaged=119,
    )  # fmt: skip


def history() -> list[ipb.Round]:
    """Return a step that both workers pushed to, one that was rolled back, and a state that was loaded."""
    step, load = ipb.Round.KIND_STEP, ipb.Round.KIND_LOAD_STATE
    return [
        ipb.Round(
            number=1,
            version=119,
            incarnation=2,
            kind=step,
            outcome=ipb.Round.OUTCOME_COMMITTED,
            parts=[
                ipb.Part(worker="0", sequence=7, num_samples=32.0, staleness=1, ahead=3, evaluations=5),
                ipb.Part(worker="1", sequence=9, abstained=True, staleness=4),
            ],
            evaluations=5,
            seconds=0.0025,
        ),
        ipb.Round(
            number=2,
            version=119,
            incarnation=2,
            kind=step,
            outcome=ipb.Round.OUTCOME_ROLLED_BACK,
            reason="worker 1 left",
        ),
        ipb.Round(number=3, version=120, incarnation=2, kind=load, outcome=ipb.Round.OUTCOME_COMMITTED, seconds=12.0),
    ]


def server_info(**changes: Any) -> ipb.ServerInfo:
    from importlib.metadata import version

    return ipb.ServerInfo(
        **{
            "version": __version__,
            "protocol": PROTOCOL,
            "oldest_protocol": OLDEST_PROTOCOL,
            "device": "cpu",
            "torch_version": version("torch"),
            "uptime_seconds": 5.0,
            "hosted": 1,
            "optimizers": ["Adam", "SGD"],
            "durable": True,
            "limit_bytes": 1000,
            "used_bytes": 10,
            **changes,
        }
    )


def snapshot(version: int = 120, tag: str = "") -> cpb.SnapshotInfo:
    return cpb.SnapshotInfo(
        name="resnet50",
        version=version,
        tag=tag,
        created_unix=1.7e9 + version,
        size_bytes=3 * 2**20,
        lineage="1f3a",
        incarnation=2,
    )


@dataclass
class Fake(InspectionServiceServicer, CheckpointServiceServicer, SteeringServiceServicer):
    """Answers as told, and notes what it was asked."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    address: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    """Set at the end of the test: what hangs on purpose ends then."""

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append((method, request))
        answer = self.answers[method]
        return answer(request, context) if callable(answer) else answer

    def requests(self, method: str) -> list[Any]:
        return [request for asked, request in self.asked if asked == method]

    def hang(self, *_: Any) -> None:
        self.released.wait(60)

    def GetServer(self, request, context):
        return self._answer("GetServer", request, context)

    def List(self, request, context):
        return self._answer("List", request, context)

    def Describe(self, request, context):
        return self._answer("Describe", request, context)

    def Watch(self, request, context):
        yield from self._answer("Watch", request, context)

    def History(self, request, context):
        yield from self._answer("History", request, context)

    def Configure(self, request, context):
        return self._answer("Configure", request, context)

    def Remove(self, request, context):
        return self._answer("Remove", request, context)

    def Save(self, request, context):
        return self._answer("Save", request, context)

    def ListSnapshots(self, request, context):
        return self._answer("ListSnapshots", request, context)

    def Restore(self, request, context):
        return self._answer("Restore", request, context)


def defaults() -> dict[str, Any]:
    return {
        "GetServer": server_info(),
        "List": ipb.ListReply(optimizers=[summary()]),
        "Describe": lambda request, _: description(parameters=request.parameters),
        "Watch": lambda request, _: [description(120 + n, parameters=request.parameters) for n in range(3)],
        "History": lambda request, _: history()[request.after :],
        "Configure": spb.Configured(settings=settings(clip_grad_norm=pb.Value(real=0.5)), version=120),
        "Remove": ipb.RemoveReply(version=120, snapshots=3),
        "Save": lambda request, _: snapshot(tag=request.tag),
        "ListSnapshots": cpb.ListSnapshotsReply(snapshots=[snapshot(100), snapshot(120, "best")]),
        "Restore": lambda request, _: snapshot(request.version if request.HasField("version") else 120, request.tag),
    }


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Iterator[Fake]:
    """Serve a fake on a unix socket, and point $FARSTEP_REMOTE at it."""
    pool = ThreadPoolExecutor(8, thread_name_prefix="fake-server")
    server = grpc.server(pool)
    service = Fake(defaults(), address=f"unix:{tmp_path}/fake.sock")
    add_InspectionServiceServicer_to_server(service, server)
    add_CheckpointServiceServicer_to_server(service, server)
    add_SteeringServiceServicer_to_server(service, server)
    state = health.HealthServicer()
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    service.health = state  # type: ignore[attr-defined]
    server.add_insecure_port(service.address)
    server.start()
    monkeypatch.setenv("FARSTEP_REMOTE", service.address)
    monkeypatch.setenv("COLUMNS", "200")
    yield service
    service.released.set()
    server.stop(None).wait()
    pool.shutdown()
