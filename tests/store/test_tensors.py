"""Tensors come back bit for bit, with their strides; any safetensors reader sees them; none is copied whole."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from farstep_server.store import Snapshot, SnapshotStore, _snapshot, _tensors
from tests.store.support import directories, save

DTYPES = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)} - {torch.float4_e2m1fn_x2}
FLOATING = sorted((dtype for dtype in DTYPES if dtype.is_floating_point), key=str)
COMPLEX = sorted((dtype for dtype in DTYPES if dtype.is_complex), key=str)
INTEGER = [
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool,
]  # fmt: skip
AS_THEMSELVES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, *INTEGER,
}  # fmt: skip

SHAPES: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "0-dim": lambda make: make(),
    "one element": lambda make: make(1, 1, 1),
    "empty": lambda make: make(3, 0, 2),
    "contiguous": lambda make: make(3, 5, 7),
    "transposed": lambda make: make(3, 5).t(),
    "permuted": lambda make: make(2, 3, 4, 5).permute(3, 1, 0, 2),
    "channels last": lambda make: make(2, 4, 5, 3).permute(0, 3, 1, 2),
    "channels last 3d": lambda make: make(2, 4, 5, 6, 3).permute(0, 4, 1, 2, 3),
    "offset in its storage": lambda make: make(6, 4)[2:5],
}
GAPS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "every other": lambda make: make(10)[::2],
    "a column": lambda make: make(4, 6)[:, 2:3],
    "inner box": lambda make: make(6, 6, 6)[1:4, 2:5, 0:3],
    "transposed with gaps": lambda make: make(8, 9)[:5, :4].t(),
    "expanded": lambda make: make(1, 4).expand(3, 4),
}


def maker(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function from sizes to a tensor of random bits, NaNs and their payloads included."""
    generator = torch.Generator().manual_seed(1)

    def make(*shape: int) -> Tensor:
        count = int(np.prod(shape, dtype=int))
        high = 2 if dtype == torch.bool else 256
        bits = torch.randint(0, high, (max(count, 1) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        return bits.view(dtype)[:count].reshape(shape)

    return make


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's elements in C order, as bytes."""
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = torch.view_as_real(tensor) if tensor.dtype.is_complex else tensor
    return plain.view(same_size[plain.itemsize]).contiguous().numpy().tobytes()


def round_trip(store: SnapshotStore, tensors: dict[str, Tensor]) -> Snapshot:
    save(store, 1, tensors=tensors)
    return store.load("resnet50")


@pytest.mark.parametrize("dtype", [*FLOATING, *COMPLEX, *INTEGER], ids=str)
def test_every_dtype_in_every_dense_shape_comes_back_as_it_was(store: SnapshotStore, dtype: torch.dtype) -> None:
    tensors = {name: build(maker(dtype)) for name, build in SHAPES.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = round_trip(store, tensors).tensors
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        found = loaded[name]
        assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert bits(found) == bits(tensor), name
        assert found.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex32, torch.complex128], ids=str)
def test_tensors_with_gaps_come_back_dense_as_empty_like_would_have_them(
    store: SnapshotStore, dtype: torch.dtype
) -> None:
    tensors = {name: build(maker(dtype)) for name, build in GAPS.items()}
    loaded = round_trip(store, tensors).tensors
    for name, tensor in tensors.items():
        like = torch.empty_like(torch.empty_strided(tensor.shape, tensor.stride(), device="meta"))
        assert (loaded[name].shape, loaded[name].stride()) == (tensor.shape, like.stride()), name
        assert bits(loaded[name]) == bits(tensor), name


def test_views_of_one_storage_come_back_whole_and_apart(store: SnapshotStore) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    loaded = round_trip(store, {"base": base, "row": base[1], "same": base, "columns": base.t()}).tensors
    assert torch.equal(loaded["base"], base)
    assert torch.equal(loaded["same"], base)
    assert torch.equal(loaded["row"], base[1])
    assert torch.equal(loaded["columns"], base.t())
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 4


def test_conjugated_and_negated_views_are_saved_as_what_they_show(store: SnapshotStore) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    loaded = round_trip(store, {"conjugate": values.conj(), "negative": values.conj().imag}).tensors
    assert loaded["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert loaded["negative"].tolist() == [-2.0, 4.0]


def test_a_parameter_comes_back_as_a_plain_tensor(store: SnapshotStore) -> None:
    found = round_trip(store, {"p": torch.nn.Parameter(torch.ones(3))}).tensors["p"]
    assert type(found) is Tensor
    assert not found.requires_grad


def test_no_tensors_at_all(store: SnapshotStore) -> None:
    assert round_trip(store, {}).tensors == {}


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), "without plain strided memory"),
        (torch.empty(3, dtype=vars(torch)["int4"]), "torch.int4"),
        (3.5, "float"),
    ],
    ids=["sparse", "meta", "int4", "no tensor"],
)
def test_what_cannot_be_stored_is_refused_by_its_key(store: SnapshotStore, tensor: object, said: str) -> None:
    with pytest.raises(TypeError, match=rf"'odd/1'.*{said}"):
        save(store, 1, tensors={"fine": torch.ones(1), "odd/1": tensor})
    assert [path.name for path in store.root.iterdir()] == ["LOCK"]


@pytest.mark.parametrize("key", ["__metadata__", "half a pair \ud800", 7])
def test_keys_that_safetensors_cannot_have_are_refused(store: SnapshotStore, key: object) -> None:
    with pytest.raises((ValueError, TypeError), match="key"):
        save(store, 1, tensors={key: torch.ones(1)})


# What other programs see.


def test_the_safetensors_library_reads_every_dtype(store: SnapshotStore) -> None:
    tensors = {str(dtype): SHAPES["permuted"](maker(dtype)) for dtype in [*FLOATING, *COMPLEX, *INTEGER]}
    save(store, 1, tensors=tensors)
    seen = load_file(directories(store)[0] / "tensors-00000.safetensors")
    assert set(seen) == set(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype.is_complex:
            expected = torch.view_as_real(tensor)
        else:
            expected = tensor if tensor.dtype in AS_THEMSELVES else tensor.view(torch.uint8)
        assert (seen[name].dtype, seen[name].shape) == (expected.dtype, expected.shape), name
        assert bits(seen[name]) == bits(tensor), name


def test_numpy_sees_a_channels_last_tensor_with_its_own_shape(store: SnapshotStore) -> None:
    tensor = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save(store, 1, tensors={"p": tensor})
    with safe_open(directories(store)[0] / "tensors-00000.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("p"), np.arange(120.0).reshape(2, 3, 4, 5))


def test_every_tensor_is_aligned_in_its_file(store: SnapshotStore) -> None:
    dtypes = {str(dtype): dtype for dtype in [*INTEGER, *FLOATING, *COMPLEX]}
    save(store, 1, tensors={name: maker(dtype)(7) for name, dtype in dtypes.items()})
    data = (directories(store)[0] / "tensors-00000.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 64 == 0
    header = json.loads(data[8:start])
    for name, dtype in dtypes.items():
        assert header[name]["data_offsets"][0] % dtype.itemsize == 0, name


def test_many_tensors_are_spread_over_files(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_snapshot, "_TENSORS_PER_FILE", 4)
    tensors = {f"state/{n}": torch.full((n,), float(n)) for n in range(10)}
    loaded = round_trip(store, tensors).tensors
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    files = sorted(path.name for path in directories(store)[0].iterdir())
    assert files == ["SHA256SUMS", "manifest.json", *(f"tensors-0000{n}.safetensors" for n in range(3))]


# Memory.


@pytest.mark.parametrize("name", ["transposed", "permuted", "channels last"])
def test_tensors_that_are_cut_into_blocks_come_back_the_same(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(_tensors, "_BLOCK_BYTES", 32)
    tensor = SHAPES[name](maker(torch.float32))
    found = round_trip(store, {"p": tensor}).tensors["p"]
    assert found.stride() == tensor.stride()
    assert bits(found) == bits(tensor)


@pytest.mark.parametrize("shape", [(64, 1024, 1024), (1, 64, 1024, 1024), (64 * 1024 * 1024, 1)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_are_contiguous_or_small(shape: tuple[int, ...], turned: bool) -> None:
    tensor = torch.empty(shape, device="meta")
    if turned:
        tensor = tensor.transpose(-1, -2)
    blocks = list(_tensors._blocks(tensor))
    assert sum(block.numel() for block in blocks) == tensor.numel()
    assert all(block.is_contiguous() or block.nbytes <= _tensors._BLOCK_BYTES for block in blocks)
    assert len(blocks) <= 128


MEMORY = """
import resource, sys, pathlib, torch
from farstep_server.store import SnapshotStore
torch.set_num_threads(1)
store = SnapshotStore(pathlib.Path(sys.argv[1]))
plain, turned = torch.ones(64, 1024, 1024 // 2), torch.ones(8, 512, 512, 16).permute(0, 3, 1, 2)
tensors = {"plain": plain, "turned": turned, "complex": torch.ones(4 << 20, dtype=torch.complex64)}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
keep = dict(name="n", lineage="", incarnation=0, manifest={}, created_unix=0.0)
store.save(**keep, version=0, tensors={"warm": torch.ones(2, 2).t()})
before = peak()
store.save(**keep, version=1, tensors=tensors)
saved = peak()
loaded = store.load("n").tensors
print(sum(tensor.nbytes for tensor in tensors.values()), saved - before, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_saving_takes_no_copy_of_the_tensors_and_loading_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "root")],
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=True,
    )
    total, saving, loading = map(int, done.stdout.split())
    assert total > 280e6
    assert saving < 16 * 2**20
    assert loading < total + 16 * 2**20
