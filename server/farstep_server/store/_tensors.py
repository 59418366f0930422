"""Tensors in safetensors files: which dtype is stored as what, and the bytes in C order, streamed both ways.

The format: the header's length (8 bytes, little-endian), the header (JSON: name to dtype, shape and byte range), then
the tensors' bytes without gaps. Here the header is padded with spaces so that the bytes begin at a multiple of 64, and
wider dtypes come first, so that a reader that maps the file finds every tensor aligned.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farstep_server.store._errors import SnapshotCorruptError
from farstep_server.store._files import HashingReader
from farstep_wire.layout import ALIGNMENT_BYTES, TensorSpec

# What readers in every language know.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_REAL_CODES = {torch.complex128: "F64", torch.complex64: "F32", torch.complex32: "F16"}
_BIT_CODES = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}

# Copies between strides move bits of these, since not every dtype has every kernel; complex128 has its own.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

_BLOCK_BYTES = 4 * 1024 * 1024
_HEADER_BYTES = 100_000_000  # the limit of the reference reader


@dataclass(frozen=True)
class _Stored:
    """How a tensor stands in a header."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def spec_of(key: str, tensor: Tensor) -> TensorSpec:
    """Return the spec that a tensor will have when it is loaded: its own where dense, else with dense strides.

    TypeError names the key where the tensor cannot be stored.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{key!r} is a {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        raise TypeError(f"{key!r} is a tensor without plain strided memory ({tensor.layout}, {tensor.dtype})")
    spec = TensorSpec.of(tensor)
    if not spec.is_dense:
        # By way of another dtype: memory for complex32, even if there is none behind it, warns.
        spec = replace(spec, strides=replace(spec, dtype=torch.uint8).densified().strides)
    _code_and_shape(key, spec)
    return spec


def _code_and_shape(key: str, spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    if spec.dtype in _CODES:
        return _CODES[spec.dtype], spec.shape
    if spec.dtype in _REAL_CODES:
        return _REAL_CODES[spec.dtype], (*spec.shape, 2)
    if spec.dtype.is_floating_point and spec.dtype.itemsize in _BIT_CODES:
        return _BIT_CODES[spec.dtype.itemsize], spec.shape
    raise TypeError(f"{key!r} has dtype {spec.dtype}, which cannot be stored")


def _places(specs: Mapping[str, TensorSpec]) -> dict[str, _Stored]:
    places = {}
    start = 0
    for key in sorted(specs, key=lambda key: -specs[key].dtype.itemsize):
        code, shape = _code_and_shape(key, specs[key])
        stop = start + specs[key].numel * specs[key].dtype.itemsize
        places[key] = _Stored(code, shape, start, stop)
        start = stop
    return places


def header_of(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the beginning of the file that holds these tensors, up to the first tensor's bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for key, place in _places(specs).items():
        header[key] = {"dtype": place.code, "shape": place.shape, "data_offsets": [place.start, place.stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def file_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Return the size of the file that holds these tensors."""
    return len(header_of(specs)) + sum(spec.numel * spec.dtype.itemsize for spec in specs.values())


def contents_of(specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the file that holds these tensors; a piece is valid until the next one is asked for."""
    yield header_of(specs)
    for key in _places(specs):
        plain = tensors[key].detach().resolve_conj().resolve_neg().cpu()
        words = plain.view(_BITS[plain.dtype.itemsize])
        scratch = _scratch(words)
        for block in _blocks(words):
            yield _memory(block if block.is_contiguous() else _room(scratch, block).copy_(block))


def read_tensors(reader: HashingReader, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Read the tensors from a file's start to its end, as new CPU tensors, in the order of the specs.

    SnapshotCorruptError where the header does not agree with the specs; the caller checks the hash.
    """
    offsets = _offsets(reader, specs)
    loaded = {}
    for key in sorted(specs, key=lambda key: offsets[key]):
        spec = specs[key]
        bits = torch.empty_strided(spec.shape, spec.strides, dtype=_BITS[spec.dtype.itemsize])
        scratch = _scratch(bits)
        for block in _blocks(bits):
            if block.is_contiguous():
                reader.read_into(_memory(block))
            else:
                dense = _room(scratch, block)
                reader.read_into(_memory(dense))
                block.copy_(dense)
        loaded[key] = bits.view(spec.dtype)  # not made as such: complex32 warns when memory is taken for it
    return {key: loaded[key] for key in specs}


def _offsets(reader: HashingReader, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Return each tensor's byte range, having made sure that they follow each other and have the sizes of the specs."""
    length = int.from_bytes(reader.read(8), "little")
    if length > _HEADER_BYTES:
        raise SnapshotCorruptError(f"{reader.path} has a header of {length} bytes")
    try:
        header = json.loads(reader.read(length))
        header.pop("__metadata__", None)
        offsets = {key: (int(item["data_offsets"][0]), int(item["data_offsets"][1])) for key, item in header.items()}
        stored = {key: (item["dtype"], tuple(item["shape"])) for key, item in header.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise SnapshotCorruptError(f"{reader.path} has a header that is not safetensors': {error!r}") from error
    if stored != {key: _code_and_shape(key, spec) for key, spec in specs.items()}:
        raise SnapshotCorruptError(f"{reader.path} holds other tensors than its manifest says")
    end = 0
    for key, (start, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        if start != end or stop - start != specs[key].numel * specs[key].dtype.itemsize:
            raise SnapshotCorruptError(f"{reader.path} has {key!r} at bytes {start} to {stop}, expected from {end}")
        end = stop
    return offsets


def _scratch(tensor: Tensor) -> Tensor:
    """Return memory for one block at a time; a new piece for each would fragment the heap."""
    return tensor.new_empty(0 if tensor.is_contiguous() else min(tensor.numel(), _BLOCK_BYTES // tensor.itemsize))


def _room(scratch: Tensor, block: Tensor) -> Tensor:
    return scratch[: block.numel()].view(block.shape)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor into views that follow each other in C order, each of them contiguous or at most 4 MiB large."""
    nbytes = tensor.numel() * tensor.itemsize
    if tensor.is_contiguous() or nbytes <= _BLOCK_BYTES:
        yield tensor
        return
    row_bytes = nbytes // tensor.shape[0]
    if row_bytes <= _BLOCK_BYTES:
        rows = _BLOCK_BYTES // row_bytes
        yield from (tensor[start : start + rows] for start in range(0, tensor.shape[0], rows))
    else:
        for row in tensor.unbind():
            yield from _blocks(row)


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as a writable view. The caller keeps the tensor alive."""
    nbytes = math.prod(tensor.shape) * tensor.itemsize
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
