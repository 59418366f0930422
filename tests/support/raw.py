"""A session spoken by hand: any bytes, any frames, in any order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Self

import grpc
import torch

from farstep_wire.convert import failure_from_proto, layout_to_proto, policy_to_proto
from farstep_wire.errors import FarstepError
from farstep_wire.frames import Body, decode, encode
from farstep_wire.layout import Layout, ParameterSpec, TensorSpec
from farstep_wire.limits import MESSAGE_BYTES, PROTOCOL
from farstep_wire.policy import Policy, Sync
from farstep_wire.v1 import optimizer_pb2 as pb
from farstep_wire.values import to_map

REPLY_SECONDS = 20.0
_KINDS = frozenset(field.name for field in pb.ClientFrame.DESCRIPTOR.oneofs_by_name["body"].fields)
METHOD = "/farstep.v1.OptimizerService/Session"


class EndedError(Exception):
    """The stream has ended; ``status`` is None where that was in good order."""

    def __init__(self, status: grpc.StatusCode | None, details: str) -> None:
        super().__init__(f"{status}: {details}")
        self.status = status


class RawSession:
    """One stream of OptimizerService.Session. A context manager."""

    def __init__(self, address: str) -> None:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.insecure_channel(address, options=options)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes | EndedError] = queue.SimpleQueue()
        self._call: Any = self._channel.stream_stream(METHOD, None, None)(self._messages())
        self._reader = threading.Thread(target=self._read, name="raw-session")
        self._reader.start()
        self.address = address
        self.requests = 0
        self.last_kind = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _messages(self) -> Iterator[bytes]:
        while (data := self._outbox.get()) is not None:
            yield data

    def _read(self) -> None:
        try:
            for data in self._call:
                self._replies.put(data)
            self._replies.put(EndedError(None, "in good order"))
        except grpc.RpcError:
            self._replies.put(EndedError(self._call.code(), self._call.details()))

    # Sending.

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as one gRPC message."""
        self._outbox.put(data)

    def send(self, body: bytes = b"", **fields: Any) -> None:
        """Send a whole request, framed as the client does; ``fields`` are those of ClientFrame."""
        self.requests += 1
        self.last_kind = next(iter(fields))
        for data in encode(pb.ClientFrame(request=self.requests, **fields), Body([body])):
            self.send_bytes(data)

    def send_frame(self, **fields: Any) -> None:
        """Send one frame exactly as told."""
        self.last_kind = next((name for name in fields if name in _KINDS), self.last_kind)
        self.send_bytes(pb.ClientFrame(**fields).SerializeToString())

    def finish(self) -> None:
        """End this side of the stream; replies may still come."""
        self._outbox.put(None)

    def cancel(self) -> None:
        """Break the stream off."""
        self._call.cancel()

    # Receiving.

    def receive_bytes(self) -> bytes:
        """Return the next gRPC message; EndedError where the stream has."""
        item = self._replies.get(timeout=REPLY_SECONDS)
        if isinstance(item, EndedError):
            raise item
        return item

    def receive(self) -> tuple[pb.ServerFrame, bytes]:
        """Return the next whole reply and its bytes."""
        frame, payload = decode(pb.ServerFrame, self.receive_bytes())
        body = bytes(payload)
        while len(body) < frame.total_bytes:
            body += bytes(decode(pb.ServerFrame, self.receive_bytes())[1])
        return frame, body

    def ask(self, body: bytes = b"", **fields: Any) -> tuple[pb.ServerFrame, bytes]:
        """Send a request and return its reply; a refusal is raised as the error it stands for."""
        self.send(body, **fields)
        return self.answer()

    def answer(self) -> tuple[pb.ServerFrame, bytes]:
        """Return the next reply; a refusal is raised as the error it stands for."""
        frame, body = self.receive()
        if frame.WhichOneof("body") == "failure":
            raise failure_from_proto(frame.failure)
        return frame, body

    def refusal(self) -> FarstepError:
        """Return the refusal that the next reply is."""
        frame, _ = self.receive()
        assert frame.WhichOneof("body") == "failure", f"{frame.WhichOneof('body')} where a refusal is due"
        return failure_from_proto(frame.failure)

    def attach(self, attach: pb.Attach, layout: bytes, contents: bytes) -> pb.Attached:
        """Attach, and upload the parameters where they are asked for."""
        frame, _ = self.ask(layout, attach=attach)
        if frame.attached.outcome == pb.Attached.OUTCOME_UPLOAD:
            frame, _ = self.ask(contents, upload=pb.Upload())
        return frame.attached

    def close(self) -> None:
        """Break off what is left and wait until it is."""
        self._outbox.put(None)
        self._call.cancel()
        self._reader.join()
        self._channel.close()


def flat_layout(*sizes: int, dtype: torch.dtype = torch.float32) -> Layout:
    """Return a layout of vectors in one group."""
    specs = [TensorSpec.contiguous(dtype, [size]) for size in sizes]
    parameters = tuple(ParameterSpec(f"0.{index}", spec, 0) for index, spec in enumerate(specs))
    return Layout(parameters, (len(sizes),))


def layout_bytes(layout: Layout, optimizer: str = "SGD") -> bytes:
    """Return a layout as the bytes of Attach, with the options that the class has by default and a rate of 0.1."""
    built = getattr(torch.optim, optimizer)([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    options = {key: value for key, value in built.param_groups[0].items() if key != "params"}
    return layout_to_proto(layout, [options for _ in layout.group_sizes]).SerializeToString()


def attach_message(name: str, *, optimizer: str = "SGD", policy: Policy | None = None, **fields: Any) -> pb.Attach:
    """Return an Attach that a server takes, but for what ``fields`` change."""
    message = pb.Attach(
        protocol=PROTOCOL,
        name=name,
        optimizer=optimizer,
        arguments=to_map({"lr": 0.1}, "arguments"),
        policy=policy_to_proto(policy or Sync(1)),
        worker="0",
        instance="raw",
        wait_ms=5000,
    )
    message.MergeFrom(pb.Attach(**fields))
    return message
