"""Whole iterations: forward and backward of layers that take their time without taking the processor, as on a device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.contenders import Contender, Seat, remote_optimizer
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
        return outputs[0], ctx.saved_tensors[0].clone(), None, None


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
    """Forward, backward and step; without an address, forward and backward alone."""
    how = dict(options)
    layer_seconds, overlap = how.pop("layer_seconds"), how.pop("overlap", False)
    model = nn.Sequential(*[_Layer(size.elements, layer_seconds) for _ in range(size.tensors)])
    close = None
    optimizer: Any = None
    if "address" in how:
        optimizer, close = remote_optimizer(list(model.parameters()), seat, how)
        if overlap:
            optimizer.remote.overlap(model)

    def step() -> None:
        model.zero_grad()
        model(torch.zeros((), requires_grad=True)).backward()
        if optimizer is not None:
            optimizer.step()

    def prepare() -> None:
        if optimizer is not None:
            optimizer.remote.wait()

    return Contender(step, prepare, close or (lambda: None))
