"""Comparing and copying option values. Stands on torch alone; the server's core uses it."""

from __future__ import annotations

import torch
from torch import Tensor


def same_value(left: object, right: object) -> bool:
    """Whether two option values are the same in type and bits; NaN equals NaN."""
    if left is right:
        return not isinstance(left, Tensor)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return _same_tensor(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(same_value(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_value(value, right[key]) for key, value in left.items())
    return bool(left == right) or (left != left and right != right)


def _same_tensor(left: object, right: object) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return False
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    a, b = (tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1) for tensor in (left, right))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def frozen_value(value: object) -> object:
    """Return a copy of an option value that later changes in place do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [frozen_value(item) for item in value]
    if isinstance(value, tuple):
        return tuple(frozen_value(item) for item in value)
    if isinstance(value, dict):
        return {key: frozen_value(item) for key, item in value.items()}
    return value
