"""Shipped code neither reads nor writes pickles, by any of the doors that torch and numpy offer.

Imports of pickle itself and its like are refused by import-linter (pyproject.toml).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in ("proto", "client", "server") for path in (ROOT / folder).rglob("*.py"))
PICKLING = {
    *("all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list", "scatter_object_list"),
    "send_object_list",
}


def pickling_calls(source: str) -> list[str]:
    """What in `source` calls something that pickles, as `line: call`."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{call.lineno}: {ast.unparse(call)}" for call in calls if pickles(call)]


def pickles(call: ast.Call) -> bool:
    called = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if called == "torch.load":
        return given.get("weights_only") != "True"
    if called in {"np.load", "numpy.load", "np.save", "numpy.save"}:
        return given.get("allow_pickle") != "False"
    return called == "torch.save" or called.rpartition(".")[2] in PICKLING


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_code_does_not_pickle(path: Path) -> None:
    assert pickling_calls(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("torch.save(state, path)", 1),
        ("np.load(path)", 1),
        ("numpy.load(path, allow_pickle=False)", 0),
        ("dist.broadcast_object_list(objects)", 1),
        ("safetensors.torch.save(tensors)", 0),
        ("json.load(file)", 0),
    ],
)
def test_the_search_finds_what_pickles_and_nothing_else(source: str, found: int) -> None:
    assert len(pickling_calls(source)) == found
