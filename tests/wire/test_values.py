"""Values, layouts, policies and failures: golden bytes, round trips of anything that may travel, and what may not."""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farstep_wire.bundle import BundleBody, empty_buffer, read_bundle
from farstep_wire.convert import (
    edits_from_proto,
    edits_to_proto,
    failure_from_proto,
    failure_to_proto,
    forms_from_proto,
    forms_to_proto,
    layout_from_proto,
    layout_to_proto,
    policy_from_proto,
    policy_to_proto,
)
from farstep_wire.errors import ERROR_TABLE, Applied, InternalError
from farstep_wire.layout import DTYPES, Layout, ParameterSpec, SparseForm, TensorSpec, dtype_from_name, dtype_name
from farstep_wire.policy import Async, Sync
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.values import from_map, from_value, memory, spec_from_proto, spec_to_proto, to_map, to_value

GOLDEN: list[tuple[Any, str]] = [
    (None, "0801"),
    (True, "1001"),
    (False, "1000"),
    (0, "1800"),
    (-1, "1801"),
    (2**63 - 1, "18feffffffffffffffff01"),
    (-(2**63), "18ffffffffffffffffff01"),
    (0.1, "219a9999999999b93f"),
    (-0.0, "210000000000000080"),
    (math.inf, "21000000000000f07f"),
    ("lr", "2a026c72"),
    ("", "2a00"),
    ([], "3200"),
    ((), "3a00"),
    ([1, "a"], "32090a0218020a032a0161"),
    ((0.9, None), "3a0f0a0921cdccccccccccec3f0a020801"),
    ({}, "4200"),
    ({"lr": 1}, "420c0a0a0a042a026c7212021802"),
    (1 + 2j, "5a1209000000000000f03f110000000000000040"),
    (torch.tensor([1, 2], dtype=torch.int16), "4a120a0a0a05696e7431361201021204" + "01000200"),
    (torch.tensor(0.5), "4a110a090a07666c6f6174333212040000003f"),
]


@pytest.mark.parametrize(("value", "expected"), GOLDEN, ids=[repr(value) for value, _ in GOLDEN])
def test_golden_bytes(value: Any, expected: str) -> None:
    assert to_value(value, "x").SerializeToString().hex() == expected
    assert _same(from_value(pb.Value.FromString(bytes.fromhex(expected)), "x"), value)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return _same_tensor(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return list(left) == list(right) and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, (float, complex)):
        pack = struct.Struct("dd").pack
        return pack(complex(left).real, complex(left).imag) == pack(complex(right).real, complex(right).imag)
    return bool(left == right)


def _same_tensor(left: Any, right: Any) -> bool:
    spec = TensorSpec.of(left)
    if not spec.numel:
        return left.shape == right.shape and left.dtype == right.dtype
    return spec == TensorSpec.of(right) and bytes(memory(left, spec.nbytes)) == bytes(memory(right, spec.nbytes))


FLOATS = st.floats(width=64)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    FLOATS,
    st.complex_numbers(),
    st.text(max_size=20),
)
KEYS = st.one_of(st.text(max_size=8), st.integers(-9, 9).filter(lambda n: n not in (0, 1)))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=20,
)


@given(VALUES)
def test_any_value_comes_back_as_it_was(value: Any) -> None:
    message = pb.Value.FromString(to_value(value, "x").SerializeToString())
    assert _same(from_value(message, "x"), value)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=6))
def test_a_dict_keeps_its_order(options: dict[str, Any]) -> None:
    decoded = from_map(to_map(options, "x"), "x")
    assert list(decoded) == list(options)
    assert _same(decoded, options)


def test_numpys_scalars_travel_as_pythons() -> None:
    scalars = [np.float64(0.25), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a")]
    assert from_value(to_value(scalars, "x"), "x") == [0.25, 0.5, 3, True, "a"]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (object(), ("x is a object", "cannot travel")),
        ({"a": [1, object()]}, ("x['a'][1] is a object",)),
        (2**63, (f"x = {2**63}", "64 bits")),
        (len, ("builtin_function_or_method",)),
        (b"bytes", ("x is a bytes",)),
        ({1, 2}, ("x is a set",)),
        ({"a": torch.zeros(65537, dtype=torch.uint8)}, ("x['a']", "65537 bytes", "at most 65536")),
        (np.zeros(3), ("x is a ndarray",)),
        ({"name": ["\ud800"]}, (r"x['name'][0] = '\ud800' is text that UTF-8 has no bytes for",)),
        ({"\udfff": 1}, (r"x key = '\udfff'",)),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, tuple) else "",
)
def test_what_may_not_travel_is_named(value: Any, texts: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as raised:
        to_value(value, "x")
    assert [text for text in texts if text not in str(raised.value)] == []


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="nested more than 32 deep"):
        to_value(endless, "x")


# Tensors.

FAITHFUL = sorted({dtype_name(dtype) for dtype in DTYPES.values()})


def test_the_dtypes_are_those_of_numbers() -> None:
    assert {"float32", "float64", "float16", "bfloat16", "complex64", "complex128", "int64", "bool"} <= set(FAITHFUL)
    assert {dtype_from_name(name) for name in FAITHFUL} == set(DTYPES.values())
    for name in ("qint8", "quint4x2", "bits8", "float33", "", "Tensor"):
        with pytest.raises(ValueError, match=repr(name)):
            dtype_from_name(name)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("name", FAITHFUL)
def test_a_tensor_of_every_dtype(name: str) -> None:
    dtype = dtype_from_name(name)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (3 * 2 * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).view(3, 2)
    for each in (tensor, tensor.t(), tensor[0, 0], tensor[:0]):
        assert _same_tensor(from_value(to_value(each, "x"), "x"), each)


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(["float32", "complex64", "int8", "bfloat16"]),
)
def test_a_tensor_of_any_strides(shape: list[int], order: Any, dtype: str) -> None:
    dimensions = list(range(len(shape)))
    order.shuffle(dimensions)
    tensor = torch.zeros(shape, dtype=dtype_from_name(dtype)).permute(dimensions)
    spec = TensorSpec.of(tensor)
    assert spec_from_proto(spec_to_proto(spec), "x") == spec
    assert spec.is_dense
    assert spec.nbytes == tensor.numel() * tensor.itemsize
    assert _same_tensor(from_value(to_value(tensor, "x"), "x"), tensor)


def test_a_view_with_gaps_travels_dense() -> None:
    tensor = torch.arange(12.0).view(3, 4)[:, ::2]
    read = from_value(to_value(tensor, "x"), "x")
    assert torch.equal(read, tensor)
    assert TensorSpec.of(read).is_dense


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_tensor(coalesced: bool) -> None:
    tensor = torch.sparse_coo_tensor([[0, 2, 2]], [1.0, 2.0, 3.0], (4,), is_coalesced=None)
    tensor = tensor.coalesce() if coalesced else tensor
    read = from_value(to_value(tensor, "x"), "x")
    assert read.is_coalesced() is coalesced
    assert torch.equal(read._indices(), tensor._indices())
    assert torch.equal(read._values(), tensor._values())


@pytest.mark.parametrize(
    ("shape", "index", "problem"),
    [((4,), 9, "index"), ((2**63,), 0, "x: "), ((4, 4), 0, "x: ")],
    ids=["index", "size", "dimensions"],
)
def test_a_sparse_tensor_that_is_none(shape: tuple[int, ...], index: int, problem: str) -> None:
    sparse = pb.Sparse(
        indices=to_value(torch.tensor([[index]]), "i"), values=to_value(torch.tensor([1.0]), "v"), shape=shape
    )
    with pytest.raises(ValueError, match=problem):
        from_value(pb.Value(sparse=sparse), "x")


MALFORMED = {
    "nothing": (pb.Value(), "x is an empty value"),
    "nothing in a list": (pb.Value(list=pb.ValueList(items=[pb.Value()])), "x is an empty value"),
    "reference": (pb.Value(tensor_ref=0), "x refers to tensor 0 of 0"),
    "key": (pb.Value(map=pb.ValueMap(entries=[pb.ValueEntry(value=pb.Value(none=True))])), "x key is an empty value"),
    "short tensor": (pb.Value(tensor=pb.Tensor(spec=pb.TensorSpec(dtype="int8", shape=[3]), data=b"ab")), "2 came"),
    "gaps": (
        pb.Value(tensor=pb.Tensor(spec=pb.TensorSpec(dtype="int8", shape=[2], strides=[2]), data=b"abc")),
        "dense strides",
    ),
    "no dtype": (pb.Value(tensor=pb.Tensor()), "x: unknown dtype ''"),
    "sparse of numbers": (
        pb.Value(sparse=pb.Sparse(indices=pb.Value(integer=1), values=pb.Value(integer=1))),
        "must be tensors",
    ),
    "sparse of nothing": (pb.Value(sparse=pb.Sparse()), "x is an empty value"),
    "sparse with real indices": (
        pb.Value(
            sparse=pb.Sparse(
                indices=to_value(torch.tensor([[1.0]]), "i"), values=to_value(torch.tensor([1.0]), "v"), shape=[4]
            )
        ),
        "x: .* indices must be int64, not torch.float32",
    ),
    "huge and empty": (
        pb.Value(tensor=pb.Tensor(spec=pb.TensorSpec(dtype="int8", shape=[0, 2**63]))),
        "too large",
    ),
    "huge stride": (
        pb.Value(tensor=pb.Tensor(spec=pb.TensorSpec(dtype="int8", shape=[1], strides=[2**63]), data=b"a")),
        "too large",
    ),
}


@pytest.mark.parametrize(("message", "problem"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_value(message: pb.Value, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        from_value(message, "x")


@given(st.binary(max_size=120))
def test_no_bytes_of_a_value_raise_anything_but_valueerror(data: bytes) -> None:
    try:
        message = pb.Value.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf's own refusal
        return
    with contextlib.suppress(ValueError):
        from_value(message, "x")


# Bundles.


def _sent(body: BundleBody) -> torch.Tensor:
    buffer = empty_buffer(body.nbytes)
    memory(buffer, body.nbytes)[:] = body.join((), 0, body.nbytes)
    return buffer


def test_a_bundle_carries_a_tree_with_its_tensors() -> None:
    tree = {
        "state": [[0, {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 3).t()}], ["x", {"n": (1, None)}]],
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        "empty": torch.zeros(0, 3),
        "large": torch.zeros(100_000),
    }
    body = BundleBody(tree, "test")
    read = read_bundle(_sent(body), body.header_bytes, "test")
    assert _same(read, tree)


@pytest.mark.parametrize("cut", [0, 64, -64])
def test_a_bundle_of_another_length(cut: int) -> None:
    body = BundleBody({"a": torch.zeros(64)}, "test")
    buffer = _sent(body)
    changed = torch.cat([buffer, torch.zeros(64, dtype=torch.uint8)]) if cut == 64 else buffer[: cut or None]
    if cut == 0:
        assert read_bundle(changed, body.header_bytes, "test")["a"].shape == (64,)
        return
    with pytest.raises(ValueError, match="its tensors end at byte"):
        read_bundle(changed, body.header_bytes, "test")


# Layouts, forms, edits.


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=12, max_size=12),
)
def test_a_layout_comes_back_as_it_was(sizes: list[int], shapes: list[list[int]]) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.complex128]
    parameters = []
    for group, size in enumerate(sizes):
        for index in range(size):
            number = len(parameters)
            spec = TensorSpec.contiguous(dtypes[number % 3], shapes[number])
            parameters.append(ParameterSpec(f"{group}.{index}", spec, group))
    layout = Layout(tuple(parameters), tuple(sizes))
    options = [{"lr": 0.1 * group, "betas": (0.9, 0.99)} for group in range(len(sizes))]
    data = layout_to_proto(layout, options).SerializeToString()
    assert layout_from_proto(pb.Layout.FromString(data)) == (layout, options)
    assert layout.difference(layout) is None
    spans = sorted(zip(layout.arena.offsets, (p.spec.nbytes for p in parameters), strict=True))
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start % 64 == 0
        assert start + size <= following
    assert layout.arena.nbytes % 64 == 0


def test_a_layout_whose_parameters_share_a_storage() -> None:
    whole = TensorSpec.contiguous(torch.float32, [10])
    part = TensorSpec.contiguous(torch.float32, [4])
    layout = Layout((ParameterSpec("a", whole, 0, 1, 0), ParameterSpec("b", part, 0, 1, 6)), (2,))
    assert layout_from_proto(layout_to_proto(layout, [{}]))[0] == layout
    assert layout.arena.offsets == (0, 24)
    assert layout.arena.nbytes == 64
    first, second = layout.views(torch.zeros(64, dtype=torch.uint8))
    second.fill_(1)
    assert first.tolist() == [0.0] * 6 + [1.0] * 4


def test_forms_and_edits_come_back_as_they_were() -> None:
    spec = TensorSpec(torch.float32, (3, 4), (4, 1))
    layout = Layout(tuple(ParameterSpec(str(n), spec, 0) for n in range(4)), (4,))
    forms = {0: None, 2: TensorSpec(torch.float32, (3, 4), (1, 3)), 3: SparseForm(5, 1, coalesced=True)}
    assert forms_from_proto(forms_to_proto(forms), layout) == forms
    edits = {0: ({"lr": 0.5, "foreach": None}, ("capturable",)), 1: ({}, ("x", "y"))}
    assert edits_from_proto(edits_to_proto(edits), 2) == edits


# Policies and failures.


@pytest.mark.parametrize(
    "policy",
    [Sync(1), Sync(8, 3, timedelta(seconds=2.5)), Sync(2, timeout=0.001), Async(), Async(0), Async(7)],
    ids=str,
)
def test_a_policy_comes_back_as_it_was(policy: Sync | Async) -> None:
    assert policy_from_proto(pb.Policy.FromString(policy_to_proto(policy).SerializeToString())) == policy


@pytest.mark.parametrize("code", sorted(ERROR_TABLE))
@pytest.mark.parametrize("applied", list(Applied))
def test_a_failure_comes_back_as_it_was(code: str, applied: Applied) -> None:
    error = ERROR_TABLE[code].kind("what happened", applied=applied)
    read = failure_from_proto(pb.Failure.FromString(failure_to_proto(error).SerializeToString()))
    assert (type(read), str(read), read.applied) == (type(error), "what happened", applied)


def test_any_other_exception_is_told_as_a_defect() -> None:
    read = failure_from_proto(failure_to_proto(KeyError("x")))
    assert type(read) is InternalError
    assert "KeyError" in str(read)
    error = ERROR_TABLE["STEP_FAILED"].kind("bad")
    error.__cause__ = ZeroDivisionError("bad")
    assert failure_to_proto(error).exception_type == "ZeroDivisionError"
