"""A parameter server by torch.distributed.rpc: as a program it serves; its functions are what workers call.

It waits for the gradients of all workers, adds them, steps a fused Adam, and answers all.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch import Tensor

NAME = "server"


def join(name: str, rank: int, workers: int, store: str) -> None:
    """Become one of the workers and the server, which comes after them."""
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}", rpc_timeout=600)
    rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)


class _Server:
    def __init__(self, tensors: int, elements: int, workers: int) -> None:
        self.shape = (tensors, elements, workers)
        self._lock = threading.Lock()
        self._workers = workers
        self._parameters = torch.randn(tensors * elements)
        self._gradient = torch.zeros_like(self._parameters)
        pieces = [torch.nn.Parameter(piece) for piece in self._parameters.split(elements)]
        for piece, gradient in zip(pieces, self._gradient.split(elements), strict=True):
            piece.grad = gradient
        self._optimizer = torch.optim.Adam(pieces, lr=1e-3, fused=True)
        self._come = 0
        self._future: Any = torch.futures.Future()

    def take(self, gradient: Tensor) -> Any:
        with self._lock:
            if self._come:
                self._gradient.add_(gradient)
            else:
                self._gradient.copy_(gradient)
            self._come += 1
            future = self._future
            if self._come == self._workers:
                self._gradient.div_(self._workers)
                self._optimizer.step()
                self._come, self._future = 0, torch.futures.Future()
                future.set_result(self._parameters)
            return future


_server: _Server | None = None
_making = threading.Lock()


def begin(tensors: int, elements: int, workers: int) -> None:
    """Have a server of that size; the first worker to ask makes it."""
    global _server  # noqa: PLW0603 - a function that is called by name has nothing else
    with _making:
        if _server is None or _server.shape != (tensors, elements, workers):
            _server = _Server(tensors, elements, workers)


@rpc.functions.async_execution
def step(gradient: Tensor) -> Any:
    """Take a worker's gradients; the result is there when all workers' have come."""
    assert _server is not None
    return _server.take(gradient)


if __name__ == "__main__":
    count, path = int(sys.argv[1]), sys.argv[2]
    # With 0 for its threads the process would leave the step to one.
    join(NAME, count, count, path)
    sys.stdin.read()
    rpc.shutdown(graceful=False)
