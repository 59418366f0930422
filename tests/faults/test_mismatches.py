"""A script that does not fit what is hosted under its name: the error says how, and nothing changes on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from farstep import Async, Sync, optim, remote_optimizer
from farstep.config import Remote
from farstep_wire.errors import (
    AlreadyExistsError,
    FarstepError,
    LayoutMismatchError,
    MismatchError,
    UnknownOptimizerError,
)
from tests.support.servers import ServerProcess


def _build(
    cls: Any,
    address: str,
    name: str,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    lr: float = 0.1,
    **remote: Any,
) -> Any:
    params = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    return cls(params, lr=lr, remote=Remote(address, name=name, **remote))


class Unheard(torch.optim.SGD):
    """A class that the server does not know."""


SHAPES = [[2, 3], [4]]
CASES: list[tuple[str, dict[str, Any], type[FarstepError], tuple[str, ...]]] = [
    ("class", {"cls": optim.Adam}, MismatchError, ("SGD", "Adam")),
    ("shape", {"shapes": [[2, 3], [5]]}, LayoutMismatchError, ("'0.1'", "float32[4]", "float32[5]")),
    ("dtype", {"dtype": torch.float64}, LayoutMismatchError, ("'0.0'", "float32[2, 3]", "float64[2, 3]")),
    ("number", {"shapes": SHAPES[:1]}, LayoutMismatchError, ("2 parameters are hosted", "1")),
    ("learning rate", {"lr": 0.25}, MismatchError, ("param_groups[0]['lr'] is 0.1", "worker 7 has 0.25")),
    ("policy", {"policy": Async()}, MismatchError, ("Sync", "Async")),
    ("workers", {"policy": Sync(4)}, MismatchError, ("workers=1", "workers=4")),
    ("existing", {"on_existing": "error"}, AlreadyExistsError, ("hosted already",)),
    ("unknown", {"cls": remote_optimizer(Unheard)}, UnknownOptimizerError, ("'Unheard'", "SGD")),
]


@pytest.mark.parametrize(("change", "error", "texts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_does_not_fit(
    server: ServerProcess, name: str, change: dict[str, Any], error: type[FarstepError], texts: tuple[str, ...]
) -> None:
    usual: dict[str, Any] = {"cls": optim.SGD, "shapes": SHAPES, "dtype": torch.float32}
    hosted = _build(**usual, address=server.address, name=name)
    with pytest.raises(error) as raised:
        _build(**{**usual, **change}, address=server.address, name=name, worker="7")
    assert [text for text in (*texts, name if "cls" not in change else "") if text not in str(raised.value)] == []
    for parameter in hosted.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    hosted.step()
    assert hosted.remote.version == 1
    assert [worker.id for worker in hosted.remote.describe().workers] == ["0"]
    hosted.remote.close()


@pytest.mark.parametrize("worker", ["1", "0"], ids=["another worker", "as the same worker"])
def test_one_that_is_refused_at_the_door_is_no_member(server: ServerProcess, name: str, worker: str) -> None:
    """Nobody waits for it, and the worker whose id it has used is not fenced."""
    hosted = _build(optim.SGD, server.address, name, SHAPES, torch.float32)
    params = [Parameter(torch.zeros(shape)) for shape in SHAPES]
    with pytest.raises(MismatchError, match=r"\['lr'\] is 0\.1 on the server; worker . has 0\.2"):
        optim.SGD(params, lr=0.2, remote=Remote(server.address, name=name, worker=worker))
    for parameter in hosted.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    hosted.step()
    assert hosted.remote.version == 1
    [row] = hosted.remote.describe().workers
    assert (row.id, row.contributions, row.standing) == ("0", 1, "computing")
    hosted.remote.close()
