"""The numbers of the model: tensors, a plain ``torch.optim`` object, and the mean of gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.state_machine.words import Gradients, bits_of


@dataclass
class SavedNumbers:
    """What a checkpoint keeps of them."""

    tensors: list[Tensor]
    state: dict[str, Any]
    clipping: dict[str, float | None]


class Numbers:
    """Parameters and optimizer."""

    def __init__(self, make: Callable[[list[Tensor]], Optimizer], initial: Iterable[Tensor]) -> None:
        self.make = make
        self.tensors = [tensor.clone().requires_grad_() for tensor in initial]
        self.optimizer = make(self.tensors)
        self.clipping: dict[str, float | None] = {"clip_grad_norm": None, "clip_grad_value": None}

    @property
    def lr(self) -> float:
        """The learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    def bits(self) -> bytes:
        """Return the bytes of the parameters."""
        return bits_of(self.tensors)

    def step(self, gradients: Gradients) -> None:
        """Clip and step."""
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            tensor.grad = gradient
        norm, value = self.clipping["clip_grad_norm"], self.clipping["clip_grad_value"]
        if norm is not None:
            torch.nn.utils.clip_grad_norm_(self.tensors, norm)
        if value is not None:
            torch.nn.utils.clip_grad_value_(self.tensors, value)
        self.optimizer.step()

    def load(self, state: dict[int, dict[str, Any]], options: dict[str, Any]) -> None:
        """load_state_dict."""
        group = {**options, "params": list(range(len(self.tensors)))}
        self.optimizer.load_state_dict(copy.deepcopy({"state": state, "param_groups": [group]}))

    def save(self) -> SavedNumbers:
        """Return copies."""
        tensors = [tensor.detach().clone() for tensor in self.tensors]
        return SavedNumbers(tensors, copy.deepcopy(self.optimizer.state_dict()), dict(self.clipping))

    def restore(self, saved: SavedNumbers) -> None:
        """Take over what was saved."""
        with torch.no_grad():
            for tensor, old in zip(self.tensors, saved.tensors, strict=True):
                tensor.copy_(old)
        self.optimizer.load_state_dict(copy.deepcopy(saved.state))
        self.clipping = dict(saved.clipping)


def total(calls: Sequence[Gradients]) -> Gradients:
    """Return gradients as ``backward`` would have added them, call by call."""
    result: Gradients = [None] * len(calls[0])
    for gradients in calls:
        for index, gradient in enumerate(gradients):
            before = result[index]
            if gradient is not None:
                result[index] = gradient.clone() if before is None else before + gradient
    return result


def weighted_mean(contributions: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Return the mean, added up in the order given; one contribution is taken as it is."""
    if len(contributions) == 1:
        return contributions[0]
    mean: Gradients = []
    for gradients in zip(*contributions, strict=True):
        added: Tensor | None = None
        for gradient, weight in zip(gradients, weights, strict=True):
            if gradient is not None:
                added = gradient * weight if added is None else torch.add(added, gradient, alpha=weight)
        mean.append(None if added is None else added / sum(weights))
    return mean


def same_state(left: dict[int, dict[str, Any]], right: dict[int, dict[str, Any]]) -> bool:
    """Whether two optimizer states are the same to the bit."""
    return left.keys() == right.keys() and all(
        left[index].keys() == right[index].keys()
        and all(same_value(value, right[index][key]) for key, value in left[index].items())
        for index in left
    )


def same_value(left: Any, right: Any) -> bool:
    """Whether two entries are the same to the bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)
