"""Ray's parameter server as its documentation has it, with what costs it least: one array for all, one sum in place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable


def begin(tensors: int, elements: int, workers: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Start Ray here, with a server and workers; return a step of all, and the end."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_DISABLE_IMPORT_WARNING="1")
    import ray

    directory = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    ray.init(
        num_cpus=workers + 1, include_dashboard=False, configure_logging=False, log_to_driver=False,
        object_store_memory=max(80 << 20, tensors * elements * 4 * (workers + 2) * 2), _temp_dir=directory.name,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip

    class Server:
        def __init__(self) -> None:
            import torch

            self.flat = torch.zeros(tensors * elements)
            self.gradient = torch.zeros_like(self.flat)
            pieces = [torch.nn.Parameter(piece) for piece in self.flat.split(elements)]
            for piece, gradient in zip(pieces, self.gradient.split(elements), strict=True):
                piece.grad = gradient
            self.optimizer = torch.optim.Adam(pieces, lr=1e-3, fused=True)

        def weights(self):  # type: ignore[no-untyped-def]
            return self.flat.numpy()

        def apply(self, *gradients):  # type: ignore[no-untyped-def]
            import numpy as np

            total = self.gradient.numpy()
            np.copyto(total, gradients[0])
            for gradient in gradients[1:]:
                np.add(total, gradient, out=total)
            np.divide(total, len(gradients), out=total)
            self.optimizer.step()
            return self.flat.numpy()

    class Worker:
        def __init__(self) -> None:
            import torch

            self.parameters = torch.zeros(tensors * elements)
            self.gradient = torch.randn(tensors * elements)

        def gradients(self, weights):  # type: ignore[no-untyped-def]
            import numpy as np

            np.copyto(self.parameters.numpy(), weights)
            return self.gradient.numpy()

    server = ray.remote(Server).options(num_cpus=1).remote()
    own = [ray.remote(Worker).options(num_cpus=1).remote() for _ in range(workers)]
    weights = [server.weights.remote()]
    ray.get(weights[0])

    def step() -> None:
        weights[0] = server.apply.remote(*[worker.gradients.remote(weights[0]) for worker in own])
        ray.wait(weights)

    def close() -> None:
        weights.clear()
        ray.shutdown()
        directory.cleanup()

    return step, close
