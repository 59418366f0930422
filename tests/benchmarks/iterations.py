"""Whole iterations: forward and backward of layers that take their time without taking the processor, as on a device.

Gradients stay where they are from one iteration to the next, since a device has no pages to fault in.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.contenders import LR, Contender, Seat, remote_optimizer
from tests.benchmarks.sizes import Size


class _Slowly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, gradient: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.seconds = seconds
        time.sleep(seconds)
        return x + parameter[0]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(2 * ctx.seconds)
        return outputs[0], ctx.saved_tensors[0], None, None


class _Layer(nn.Module):
    def __init__(self, elements: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(elements))
        self._gradient = torch.randn(elements)
        self._seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Take so long, and twice as long backward."""
        result: Tensor = _Slowly.apply(x, self.weight, self._gradient, self._seconds)
        return result


def iteration(size: Size, seat: Seat, options: dict[str, Any]) -> Contender:
    """Forward, backward and step; without an address, the step is that of a fused torch.optim.Adam."""
    how = dict(options)
    layer_seconds, overlap = how.pop("layer_seconds"), how.pop("overlap", False)
    model = nn.Sequential(*[_Layer(size.elements, layer_seconds) for _ in range(size.tensors)])
    remote = "address" in how
    optimizer: Any
    if remote:
        optimizer, close = remote_optimizer(list(model.parameters()), seat, how)
        if overlap:
            optimizer.remote.overlap(model)
    else:
        optimizer, close = torch.optim.Adam(model.parameters(), lr=LR, fused=True), lambda: None

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(torch.zeros((), requires_grad=True)).backward()
        optimizer.step()

    def prepare() -> None:
        if remote:
            optimizer.remote.wait()

    return Contender(step, prepare, close)
