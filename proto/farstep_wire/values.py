"""Python values on the wire: hyperparameters, constructor arguments and trees of optimizer state.

Only plain data travels: None, bool, int, float, complex, str, list, tuple, dict and tensors. Anything else is a TypeError
that names where it stands. A float keeps its bits, a tuple stays a tuple, and a dict keeps its order.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from farstep_wire.layout import TensorSpec, contiguous_strides, dtype_from_name, dtype_name
from farstep_wire.limits import INLINE_TENSOR_BYTES, MAX_DIMENSIONS, VALUE_DEPTH
from farstep_wire.v1 import common_pb2 as pb

_INT64 = range(-(2**63), 2**63)


def memory(tensor: Tensor, nbytes: int) -> memoryview:
    """Return the bytes of a dense CPU tensor as a writable view. The caller keeps the tensor alive."""
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def uses(storage: torch.UntypedStorage) -> int:
    """Return how many tensors have a storage, which ``storage`` itself refers to once more."""
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def spec_to_proto(spec: TensorSpec) -> pb.TensorSpec:
    """Encode a spec; contiguous strides are left out."""
    strides = () if spec.strides == contiguous_strides(spec.shape) else spec.strides
    return pb.TensorSpec(dtype=dtype_name(spec.dtype), shape=spec.shape, strides=strides)


def spec_from_proto(message: pb.TensorSpec, where: str) -> TensorSpec:
    """Decode and check a spec; ValueError names ``where`` and the value."""
    if len(message.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{where} has {len(message.shape)} dimensions; at most {MAX_DIMENSIONS} are possible")
    shape = tuple(message.shape)
    strides = tuple(message.strides) or contiguous_strides(shape)
    try:
        spec = TensorSpec(dtype_from_name(message.dtype), shape, strides)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    extent = math.prod(max(size, 1) for size in shape) * spec.dtype.itemsize
    if max(spec.nbytes, extent, *strides, 0) >= 2**62:
        raise ValueError(f"{where}: shape {list(shape)} is too large")
    return spec


def dense_cpu(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU with dense strides, copied only where it must be."""
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        raise TypeError(f"a tensor of layout {plain.layout} cannot travel as a value")
    plain = plain.resolve_conj().resolve_neg().cpu()
    return plain if TensorSpec.of(plain).is_dense else torch.empty_like(plain).copy_(plain)


def tensor_to_proto(tensor: Tensor) -> pb.Tensor:
    """Encode a small tensor with its bytes."""
    plain = dense_cpu(tensor)
    spec = TensorSpec.of(plain)
    if spec.nbytes > INLINE_TENSOR_BYTES:
        raise ValueError(f"a tensor of {spec.nbytes} bytes is too large for an option; at most {INLINE_TENSOR_BYTES}")
    return pb.Tensor(spec=spec_to_proto(spec), data=bytes(memory(plain, spec.nbytes)))


def tensor_from_proto(message: pb.Tensor, where: str) -> Tensor:
    """Decode a small tensor; ValueError where the bytes do not fit the shape."""
    spec = spec_from_proto(message.spec, where)
    if len(message.data) != spec.nbytes or not spec.is_dense:
        raise ValueError(f"{where}: {spec} takes {spec.nbytes} bytes and dense strides, {len(message.data)} came")
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return spec.view(torch.frombuffer(bytearray(message.data), dtype=torch.uint8), 0)


def to_value(obj: object, where: str, tensors: list[Tensor] | None = None, depth: int = 0) -> pb.Value:
    """Encode a value.

    Tensors go inline, or, where ``tensors`` is given, are appended to it and referred to. TypeError names ``where``.
    """
    if obj is None:
        return pb.Value(none=True)
    if isinstance(obj, bool):
        return pb.Value(boolean=obj)
    if isinstance(obj, Tensor):
        return _tensor_value(obj, where, tensors)
    if isinstance(obj, float):
        return pb.Value(real=obj)
    if isinstance(obj, int):
        if obj not in _INT64:
            raise TypeError(f"{where} = {obj} does not fit 64 bits")
        return pb.Value(integer=obj)
    if isinstance(obj, str):
        try:
            return pb.Value(text=obj)
        except UnicodeEncodeError:
            raise TypeError(f"{where} = {obj!r} is text that UTF-8 has no bytes for") from None
    if isinstance(obj, complex):
        return pb.Value(complex=pb.Complex(real=obj.real, imaginary=obj.imag))
    if isinstance(obj, (Mapping, list, tuple)) and depth >= VALUE_DEPTH:
        raise TypeError(f"{where} is nested more than {VALUE_DEPTH} deep")
    if isinstance(obj, Mapping):
        return pb.Value(map=to_map(obj, where, tensors, depth + 1))
    if isinstance(obj, (list, tuple)):
        items = pb.ValueList(items=[to_value(item, f"{where}[{i}]", tensors, depth + 1) for i, item in enumerate(obj)])
        return pb.Value(tuple=items) if isinstance(obj, tuple) else pb.Value(list=items)
    scalar = _plain_scalar(obj)
    if scalar is None:
        raise TypeError(f"{where} is a {type(obj).__name__}, which cannot travel to the server: {obj!r}")
    return to_value(scalar, where)


def _tensor_value(tensor: Tensor, where: str, tensors: list[Tensor] | None) -> pb.Value:
    if tensor.layout is torch.sparse_coo:
        plain = tensor.detach()
        sparse = pb.Sparse(
            indices=_tensor_value(plain._indices(), where, tensors),
            values=_tensor_value(plain._values(), where, tensors),
            shape=plain.shape,
            coalesced=plain.is_coalesced(),
        )
        return pb.Value(sparse=sparse)
    if tensors is not None:
        tensors.append(tensor)
        return pb.Value(tensor_ref=len(tensors) - 1)
    try:
        return pb.Value(tensor=tensor_to_proto(tensor))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: {error}") from None


def _plain_scalar(obj: object) -> object:
    # NumPy's scalars reach hyperparameters through user arithmetic.
    item = getattr(obj, "item", None)
    value = item() if callable(item) and getattr(obj, "shape", None) == () else None
    return value if isinstance(value, (bool, int, float, complex, str)) else None


def to_map(obj: Mapping[Any, object], where: str, tensors: list[Tensor] | None = None, depth: int = 0) -> pb.ValueMap:
    """Encode a dict, in its own order."""
    return pb.ValueMap(
        entries=[
            pb.ValueEntry(key=to_value(key, f"{where} key"), value=to_value(value, f"{where}[{key!r}]", tensors, depth))
            for key, value in obj.items()
        ]
    )


def from_value(message: pb.Value, where: str, tensors: Sequence[Tensor] = (), depth: int = 0) -> Any:
    """Decode a value; ValueError names ``where``."""
    if depth > VALUE_DEPTH:
        raise ValueError(f"{where} is nested more than {VALUE_DEPTH} deep")
    match message.WhichOneof("kind"):
        case "none":
            return None
        case "boolean" | "integer" | "real" | "text" as kind:
            return getattr(message, kind)
        case "complex":
            return complex(message.complex.real, message.complex.imaginary)
        case "tensor":
            return tensor_from_proto(message.tensor, where)
        case "tensor_ref":
            if message.tensor_ref >= len(tensors):
                raise ValueError(f"{where} refers to tensor {message.tensor_ref} of {len(tensors)}")
            return tensors[message.tensor_ref]
        case "sparse":
            return _sparse_from_proto(message.sparse, where, tensors, depth)
        case "list":
            return [from_value(item, where, tensors, depth + 1) for item in message.list.items]
        case "tuple":
            return tuple(from_value(item, where, tensors, depth + 1) for item in message.tuple.items)
        case "map":
            return from_map(message.map, where, tensors, depth + 1)
    raise ValueError(f"{where} is an empty value")


def _sparse_from_proto(message: pb.Sparse, where: str, tensors: Sequence[Tensor], depth: int) -> Tensor:
    indices = from_value(message.indices, where, tensors, depth + 1)
    values = from_value(message.values, where, tensors, depth + 1)
    if not (isinstance(indices, Tensor) and isinstance(values, Tensor)):
        raise ValueError(f"{where}: a sparse tensor's indices and values must be tensors")
    if indices.dtype != torch.int64:
        raise ValueError(f"{where}: a sparse tensor's indices must be int64, not {indices.dtype}")
    try:
        return torch.sparse_coo_tensor(
            indices, values, tuple(message.shape), is_coalesced=message.coalesced, check_invariants=True
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def from_map(message: pb.ValueMap, where: str, tensors: Sequence[Tensor] = (), depth: int = 0) -> dict[Any, Any]:
    """Decode a dict; ValueError names the entry."""
    result: dict[Any, Any] = {}
    for entry in message.entries:
        key = from_value(entry.key, f"{where} key", (), depth)
        if not _is_key(key):
            raise ValueError(f"{where} has a key of type {type(key).__name__}: {key!r}")
        result[key] = from_value(entry.value, f"{where}[{key!r}]", tensors, depth)
    return result


def _is_key(key: object) -> bool:
    if isinstance(key, tuple):
        return all(_is_key(item) for item in key)
    return isinstance(key, (str, int, float, bool, type(None)))
