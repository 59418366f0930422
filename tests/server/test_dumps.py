"""A dump comes back from disk as it was: every bit, type, stride and order."""

from __future__ import annotations

import math
import struct
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep_server.core.records import Dump, Member, Outcome
from farstep_server.hosting.dumps import decode_dump, encode_dump
from farstep_server.store import SnapshotStore
from farstep_wire.errors import StorageError
from farstep_wire.layout import Layout, ParameterSpec, TensorSpec
from farstep_wire.policy import Async, Sync
from tests.server.harness import LAYOUT, arena

AWKWARD = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 3e22, math.nan, math.inf, -math.inf, 1.0]


def dump(**changes: Any) -> Dump:
    plain = Dump(
        name="net", optimizer="SGD", arguments={"lr": 0.5}, layout=LAYOUT, options=[{"lr": 0.5}], policy=Sync(1),
        ephemeral=False, lineage="feed", incarnation=3, version=7, contents=arena(LAYOUT, torch.tensor([1.5, -2.0])),
        state=[], members=[], started=True,
    )  # fmt: skip
    return replace(plain, **changes)


def through_disk(root: Path, original: Dump) -> Dump:
    manifest, tensors = encode_dump(original)
    store = SnapshotStore(root)
    store.save(
        name=original.name, version=original.version, lineage=original.lineage, incarnation=original.incarnation,
        manifest=manifest, tensors=tensors, created_unix=0.0,
    )  # fmt: skip
    store.close()
    store = SnapshotStore(root)
    try:
        return decode_dump(store.load(original.name))
    finally:
        store.close()


def assert_same(left: object, right: object, where: str = "dump") -> None:
    """The same in type and bits."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor) and isinstance(right, Tensor) and left.is_sparse:
        assert (left.shape, left.is_coalesced()) == (right.shape, right.is_coalesced()), where
        assert_same([left._indices(), left._values()], [right._indices(), right._values()], where)
    elif isinstance(left, Tensor) and isinstance(right, Tensor):
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride()), where
        assert torch.equal(
            left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
        ), where
    elif isinstance(left, dict) and isinstance(right, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, float) and isinstance(right, float):
        assert struct.pack("<d", left) == struct.pack("<d", right), where
    elif isinstance(left, (Dump, Member)):
        for field in fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name), f"{where}.{field.name}")
    else:
        assert left == right, where


def test_values_of_every_kind(tmp_path: Path) -> None:
    arguments = {
        "none": None, "true": True, "zero": 0, "int": -(2**63), "text": "\u2028 é 😀 \x00", "complex": complex(-0.0, math.inf),
        "floats": AWKWARD, "betas": (0.9, 0.999), "nested": {"a": [(), [], {}, (1, 1.0)], 3: "int key"},
        "lr": torch.tensor(0.1, dtype=torch.float64), "empty": torch.empty(0, 3),
    }  # fmt: skip
    original = dump(arguments=arguments, options=[{"z": 1, "a": (1, 2), "lr": torch.tensor([[1.0, math.nan]])}])
    assert_same(original, through_disk(tmp_path, original))


def test_state_with_tensors_deep_inside(tmp_path: Path) -> None:
    momentum = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = [
        [0, {"step": torch.tensor(3.0), "momentum_buffer": momentum, "none": None, "mu": 1, "d": math.nan}],
        [1, {"old_dirs": [torch.randn(3, dtype=torch.bfloat16), torch.randn(2, dtype=torch.complex64)], "t": 0.5}],
        [2, {"rows": torch.sparse_coo_tensor([[2, 0, 2]], [[1.0], [2.0], [3.0]], (3, 1))}],
        ["global", {"history": ({"x": torch.arange(3)}, [torch.tensor(True)])}],
    ]
    original = dump(state=state)
    assert_same(original, through_disk(tmp_path, original))


def test_layouts_with_strides_dtypes_groups_and_shared_memory(tmp_path: Path) -> None:
    channels_last = TensorSpec(torch.float32, (2, 3, 4, 4), (48, 1, 12, 3))
    layout = Layout(
        (
            ParameterSpec("conv/weight\n", channels_last, 0),
            ParameterSpec("0-dim", TensorSpec.contiguous(torch.float64, ()), 0),
            ParameterSpec("empty", TensorSpec.contiguous(torch.bfloat16, (0, 2)), 0),
            ParameterSpec("whole", TensorSpec.contiguous(torch.complex64, (4,)), 1, storage=1),
            ParameterSpec("part", TensorSpec.contiguous(torch.complex64, (2,)), 1, storage=1, storage_offset=1),
        ),
        (3, 2),
    )
    contents = torch.zeros(layout.arena.nbytes, dtype=torch.uint8)
    for view in layout.views(contents):
        if view.numel():
            view.copy_(torch.randn(view.shape, dtype=view.dtype))
    options = [{"lr": 0.1}, {"lr": 0.2, "nesterov": False}]
    original = dump(layout=layout, contents=contents, options=options)
    loaded = through_disk(tmp_path, original)
    assert_same(original, loaded)
    weights = [spec.key for spec in loaded.layout.parameters]
    assert weights == ["conv/weight\n", "0-dim", "empty", "whole", "part"]


def test_members_with_the_answers_that_they_are_owed(tmp_path: Path) -> None:
    members = [
        Member("0", "aa", 4, live=True, settled=9, settled_outcome=Outcome.ROLLED_BACK, settled_version=7,
               settled_contributions=2, settled_loss=torch.tensor(math.nan), version=7, contributions=5, abstentions=1,
               stale=2, steps=6),
        Member("w-ü", "bb", 1, live=False, settled_loss=0.1),
    ]  # fmt: skip
    original = dump(members=members, started=False, ephemeral=True)
    assert_same(original, through_disk(tmp_path, original))


@pytest.mark.parametrize(
    "policy",
    [Sync(3), Sync(4, min_workers=2, timeout=timedelta(seconds=1.5)), Async(), Async(max_staleness=0)],
    ids=str,
)
def test_policies(tmp_path: Path, policy: Sync | Async) -> None:
    assert through_disk(tmp_path, dump(policy=policy)).policy == policy


def test_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(
        StorageError, match=r"'net' at version 7 cannot be stored: state\[0\]\[1\]\['clock'\] is a object"
    ):
        encode_dump(dump(state=[[0, {"clock": object()}]]))
    with pytest.raises(StorageError, match=r"param_groups\[0\]\['clock'\] is a type"):
        encode_dump(dump(options=[{"clock": int}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dump": 2}, "holds a dump of format 2; this release reads 1"),
        (
            {"layout": {"groups": [{"parameters": [{"key": "w", "spec": {"dtype": "float64", "shape": ["2"]}}]}]}},
            "'param/w' is",
        ),
        ({"state": {"tensor_ref": 0}}, "refers to tensor 0 of 0"),
        ({"policy": {"async": {}, "sync": {"workers": 1}}}, "cannot be understood"),
        ({"members": [{"worker": "0"}]}, "cannot be understood"),
        ({"arguments": {"entries": [{"nonsense": 1}]}}, "cannot be understood"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_manifest_that_makes_no_sense_is_an_error_in_words(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    manifest, tensors = encode_dump(dump())
    store = SnapshotStore(tmp_path)
    store.save(name="net", version=7, lineage="feed", incarnation=3, manifest={**manifest, **change}, tensors=tensors,
               created_unix=0.0)  # fmt: skip
    with pytest.raises(StorageError, match=message):
        decode_dump(store.load("net"))
    store.close()
