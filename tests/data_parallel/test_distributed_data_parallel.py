"""farstep workers take the steps that DistributedDataParallel takes with the same shards in as many processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from tests.data_parallel import ranks
from tests.support.servers import ServerProcess


@pytest.mark.parametrize("count", [2, 3])
def test_as_distributed_data_parallel(server: ServerProcess, name: str, tmp_path: Path, count: int) -> None:
    """The parameters stay within one rounding of float32 per step of each other, in units of the largest parameter.

    The two differ only in how the mean is rounded: DistributedDataParallel divides each gradient before it adds them, farstep
    divides their sum in worker order. By two that is exact, and the two agree to the bit unless a gradient underflows; by
    three each gradient is some units in the last place apart, of which a step takes over the part that its rate lets through.
    """
    torch.multiprocessing.spawn(ranks.rank_main, (count, server.address, name, str(tmp_path)), nprocs=count)
    bound = ranks.STEPS * torch.finfo(torch.float32).eps
    for rank in range(count):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found.keys() == ranks.CLASSES.keys()
        for cls, result in found.items():
            assert result["version"] == ranks.STEPS
            assert len(result["apart"]) == ranks.STEPS
            print(f"rank {rank}, {cls}: at most {max(result['apart']):.2e} apart, bound {bound:.2e}")
            assert max(result["apart"]) <= bound, f"rank {rank}, {cls}: {result['apart']}"
            theirs, ours = result["losses"][-1]
            assert ours < 0.8 * result["losses"][0][1], "it learns"
            assert abs(theirs - ours) <= bound * max(1.0, theirs)
