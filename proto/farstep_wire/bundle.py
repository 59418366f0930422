"""Bundles: a tree of values and the tensors in it, as one body. Optimizer state and state dicts travel so."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from farstep_wire.frames import Body, padded
from farstep_wire.layout import TensorSpec, align
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.values import dense_cpu, from_value, memory, spec_from_proto, spec_to_proto, to_value


class BundleBody(Body):
    """A bundle ready to send; it keeps the tensors alive until it is."""

    def __init__(self, tree: object, where: str) -> None:
        tensors: list[Tensor] = []
        value = to_value(tree, where, tensors)
        self._tensors = [dense_cpu(tensor) for tensor in tensors]
        specs = [TensorSpec.of(tensor) for tensor in self._tensors]
        header = pb.Bundle(tree=value, tensors=[spec_to_proto(spec) for spec in specs]).SerializeToString()
        self.header_bytes = len(header)
        memories = [memory(tensor, spec.nbytes) for tensor, spec in zip(self._tensors, specs, strict=True)]
        super().__init__(padded([header, *memories]))


def read_bundle(buffer: Tensor, header_bytes: int, where: str) -> Any:
    """Decode a bundle from a uint8 CPU buffer; its tensors are views of the buffer. ValueError names what is wrong."""
    total = buffer.numel()
    if header_bytes > total:
        raise ValueError(f"{where}: a header of {header_bytes} bytes in a body of {total}")
    try:
        message = pb.Bundle.FromString(bytes(memory(buffer, total)[:header_bytes]))
    except DecodeError as error:
        raise ValueError(f"{where}: the header is no bundle: {error}") from None
    specs = [spec_from_proto(spec, f"{where}, tensor {index}") for index, spec in enumerate(message.tensors)]
    ends = list(accumulate((align(spec.nbytes) for spec in specs), initial=align(header_bytes)))
    if ends[-1] != total and not (not specs and header_bytes == total):
        raise ValueError(f"{where}: its tensors end at byte {ends[-1]}, the body has {total}")
    for index, spec in enumerate(specs):
        if not spec.is_dense:
            raise ValueError(f"{where}, tensor {index}: strides {spec.strides} are not dense")
    tensors = [spec.view(buffer, start) for spec, start in zip(specs, ends, strict=False)]
    return from_value(message.tree, where, tensors)


def empty_buffer(nbytes: int) -> Tensor:
    """Return an uninitialised uint8 CPU buffer; its pages cost no memory until they are written."""
    return torch.empty(nbytes, dtype=torch.uint8)
