"""Where the scripts' proxies go: to the server that all tests share, by the environment alone."""

from __future__ import annotations

import os

import pytest

from tests.support.servers import ServerProcess

# Before any of them is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _remote(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSTEP_REMOTE", server.address)
