"""Hyperparameters and other values, from the wire to JSON and to text, without torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from farstep_wire.v1 import common_pb2 as pb

_FORMATS = {
    "float64": "<d",
    "float32": "<f",
    "float16": "<e",
    "int64": "<q",
    "int32": "<i",
    "int16": "<h",
    "int8": "<b",
}
_FORMATS |= {"uint8": "<B", "bool": "<?"}


def number(value: float) -> float | str:
    """Return a float as JSON can hold it: those that are not finite as "nan", "inf" or "-inf"."""
    return value if math.isfinite(value) else str(value)


def plain(value: pb.Value) -> Any:
    """Return a value as JSON: a tuple as a list, a complex number and a tensor as an object that says what it is."""
    match value.WhichOneof("kind"):
        case "boolean":
            return value.boolean
        case "integer":
            return value.integer
        case "real":
            return number(value.real)
        case "text":
            return value.text
        case "list":
            return [plain(item) for item in value.list.items]
        case "tuple":
            return [plain(item) for item in value.tuple.items]
        case "map":
            return plain_map(value.map)
        case "complex":
            return {"complex": [number(value.complex.real), number(value.complex.imaginary)]}
        case "tensor":
            return {"tensor": value.tensor.spec.dtype, "shape": list(value.tensor.spec.shape), "value": _item(value)}
        case "tensor_ref":
            return {"tensor": "", "shape": None, "value": None}
    return None


def plain_map(message: pb.ValueMap) -> dict[str, Any]:
    """Return a map as a JSON object; keys that are not text become text."""
    return {str(plain(entry.key)): plain(entry.value) for entry in message.entries}


def value(item: float | str | None) -> pb.Value:
    """Return a setting's value as the wire has it."""
    match item:
        case None:
            return pb.Value(none=True)
        case str():
            return pb.Value(text=item)
    return pb.Value(real=item)


def value_map(items: Mapping[str, float | str | None]) -> pb.ValueMap:
    """Return settings as the wire has them, in their own order."""
    return pb.ValueMap(entries=[pb.ValueEntry(key=value(key), value=value(item)) for key, item in items.items()])


def _item(value: pb.Value) -> Any:
    """Return the one element of a tensor; None where it has another number of elements, or a dtype without a format."""
    spec, data = value.tensor.spec, value.tensor.data
    if math.prod(spec.shape) != 1:
        return None
    if spec.dtype == "bfloat16" and len(data) == 2:
        return number(struct.unpack("<f", b"\0\0" + data)[0])
    form = _FORMATS.get(spec.dtype)
    if form is None or len(data) != struct.calcsize(form):
        return None
    item = struct.unpack(form, data)[0]
    return number(item) if isinstance(item, float) else item


def text(value: Any) -> str:
    """Return a value that ``plain`` made as a person would write it."""
    match value:
        case None | bool():
            return str(value)
        case float():
            return f"{value:.6g}"
        case str():
            return clean(value)
        case list():
            return f"({', '.join(text(item) for item in value)})"
        case {"complex": [real, imaginary]}:
            return f"{text(real)}+{text(imaginary)}j"
        case {"tensor": _, "shape": shape, "value": item}:
            return f"tensor{tuple(shape or ())}" if item is None else f"tensor({text(item)})"
        case dict():
            return ", ".join(f"{clean(key)}={text(item)}" for key, item in value.items())
    return str(value)


def clean(written: str) -> str:
    """Return a text from elsewhere with what could steer the terminal escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in written)
