"""Ray's parameter server: actors that compute gradients and one that applies them, by way of Ray's object store.

Twice: as Ray's documentation has it, which passes a list of arrays and a dict of tensors, stacks the arrays and sums them; and
with what costs Ray least, one array for all and one sum in place.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

# The directory of the one Ray that this process has, as often as it is in use.
_users: list[tempfile.TemporaryDirectory[str]] = []


def _start(workers: int, nbytes: int) -> Any:
    """Return ray, started once in this process, with room for both sorts of actors."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    import ray

    if not _users:
        directory = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        ray.init(
            num_cpus=2 * (workers + 1), include_dashboard=False, configure_logging=False, log_to_driver=False,
            object_store_memory=max(160 << 20, nbytes * (workers + 2) * 4), _temp_dir=directory.name,
            _node_ip_address="127.0.0.1",
        )  # fmt: skip
        _users.append(directory)
    else:
        _users.append(_users[0])
    return ray


def _end(ray: Any) -> None:
    directory = _users.pop()
    if not _users:
        ray.shutdown()
        directory.cleanup()


def begin(
    tensors: int, elements: int, workers: int, *, documented: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Start a server and workers; return a step of all, and the end."""
    ray = _start(workers, tensors * elements * 4)
    server_class, worker_class = _documented(tensors, elements) if documented else _least(tensors, elements)
    server = ray.remote(server_class).options(num_cpus=1).remote()
    own = [ray.remote(worker_class).options(num_cpus=1).remote() for _ in range(workers)]
    weights = [server.weights.remote()]
    ray.get(weights[0])

    def step() -> None:
        weights[0] = server.apply.remote(*[worker.gradients.remote(weights[0]) for worker in own])
        ray.wait(weights)

    def close() -> None:
        weights.clear()
        for actor in (server, *own):
            ray.kill(actor)
        _end(ray)

    return step, close


def _documented(tensors: int, elements: int) -> tuple[type, type]:
    class Server:
        def __init__(self) -> None:
            import torch

            self.parameters = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(tensors)]
            self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, fused=True)

        def weights(self):  # type: ignore[no-untyped-def]
            return {str(number): parameter.detach() for number, parameter in enumerate(self.parameters)}

        def apply(self, *gradients):  # type: ignore[no-untyped-def]
            import numpy as np
            import torch

            self.optimizer.zero_grad()
            for parameter, own in zip(self.parameters, zip(*gradients, strict=True), strict=True):
                parameter.grad = torch.from_numpy(np.stack(own).sum(axis=0))
            self.optimizer.step()
            return self.weights()

    class Worker:
        def __init__(self) -> None:
            import torch

            self.parameters = [torch.zeros(elements) for _ in range(tensors)]
            self.arriving = [torch.randn(elements) for _ in range(tensors)]

        def gradients(self, weights):  # type: ignore[no-untyped-def]
            for number, parameter in enumerate(self.parameters):
                parameter.copy_(weights[str(number)])
            return [gradient.numpy() for gradient in self.arriving]

    return Server, Worker


def _least(tensors: int, elements: int) -> tuple[type, type]:
    class Server:
        def __init__(self) -> None:
            import torch

            self.flat = torch.zeros(tensors * elements)
            self.total = torch.zeros_like(self.flat)
            pieces = [torch.nn.Parameter(piece) for piece in self.flat.split(elements)]
            for piece, gradient in zip(pieces, self.total.split(elements), strict=True):
                piece.grad = gradient
            self.optimizer = torch.optim.Adam(pieces, lr=1e-3, fused=True)

        def weights(self):  # type: ignore[no-untyped-def]
            return self.flat.numpy()

        def apply(self, *gradients):  # type: ignore[no-untyped-def]
            import numpy as np

            total = self.total.numpy()
            np.add(gradients[0], gradients[1], out=total)
            for gradient in gradients[2:]:
                np.add(total, gradient, out=total)
            self.optimizer.step()
            return self.flat.numpy()

    class Worker:
        def __init__(self) -> None:
            import torch

            self.parameters = torch.zeros(tensors * elements)
            self.arriving = torch.randn(tensors * elements)

        def gradients(self, weights):  # type: ignore[no-untyped-def]
            import numpy as np

            np.copyto(self.parameters.numpy(), weights)
            return self.arriving.numpy()

    return Server, Worker
