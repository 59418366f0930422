"""A model that DistributedDataParallel has wrapped already is averaged once: rank 0 contributes, the others pull."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing

from tests.data_parallel import wrapped
from tests.support.servers import ServerProcess


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, shared_server: ServerProcess) -> list[dict[str, Any]]:
    """Run two ranks once; return what each found."""
    directory = tmp_path_factory.mktemp("ranks")
    arguments = (2, shared_server.address, "replicas", str(directory))
    torch.multiprocessing.spawn(wrapped.rank_main, arguments, nprocs=2)
    return [json.loads(Path(directory, f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_bits_are_those_of_torch_under_the_wrapper(found: list[dict[str, Any]], when: str) -> None:
    for rank in found:
        assert rank[when]["equal"] == [True] * wrapped.STEPS
        assert rank[when]["version"] == wrapped.STEPS


def test_rank_0_contributes_and_the_others_pull(found: list[dict[str, Any]]) -> None:
    assert found[0]["before"]["workers"] == {"0": [wrapped.STEPS, 0], "1": [0, wrapped.STEPS]}


def test_the_log_says_so_once(found: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(found):
        [line] = rank["before"]["log"]
        assert "wrapped in DistributedDataParallel" in line
        assert "rank 0 contributes" in line
        assert f"this is rank {number}" in line


def test_a_model_that_is_not_wrapped_is_averaged(found: list[dict[str, Any]]) -> None:
    assert found[0]["plain"]["workers"] == {"0": [wrapped.STEPS, 0], "1": [wrapped.STEPS, 0]}
    assert found[0]["plain"]["log"] == []


def test_async_is_refused_in_words(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "use farstep.Sync" in rank["async"]
