"""Two copies of one problem, one stepped by local torch and one by a server, and how they are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Return a small convolutional model: 4-D, 2-D and 1-D parameters, one of them channels-last."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 5 * 5, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    return model.to(dtype).to(device).to(memory_format=torch.channels_last)


class Odds(nn.Module):
    """A last layer with a 0-dim parameter, one that never has a gradient and, where asked for, one without elements."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.randn(3, 2))
        self.nothing = nn.Parameter(torch.zeros(0, 3)) if empty else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Scale the inputs."""
        scaled = inputs * self.scale
        return scaled if self.nothing is None else scaled + self.nothing.sum()


def model_for(name: str, device: str = "cpu") -> nn.Module:
    """Return a small model with every kind of parameter that the class takes.

    Muon takes matrices alone, SparseAdam sparse gradients, which a 0-dim parameter cannot have; Adafactor divides by the
    number of elements, and L-BFGS wants gradients that can be viewed flat.
    """
    if name == "Muon":
        return matrix_model(device=device)
    model = small_model()
    assert isinstance(model, nn.Sequential)
    if name != "SparseAdam":
        model.append(Odds(empty=name != "Adafactor"))
    return model.to(memory_format=torch.contiguous_format).to(device) if name == "LBFGS" else model.to(device)


def matrix_model(seed: int = 0, device: str = "cpu") -> nn.Module:
    """Return a model of matrices alone, which is all that Muon takes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(50, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False)).to(device)


def batch(model: nn.Module, number: int) -> Tensor:
    """Return the input of a step; the same number gives the same bits."""
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(1000 + number)
    shape = (4, 50) if first.dim() == 2 else (4, 2, 5, 5)
    return torch.randn(shape, generator=generator).to(first.dtype).to(first.device)


def closure_for(model: nn.Module, optimizer: Any, number: int, calls: list[int]) -> Callable[[], Tensor]:
    """Return a closure as torch's documentation writes it; it counts its calls."""
    inputs = batch(model, number)

    def closure() -> Tensor:
        calls.append(number)
        optimizer.zero_grad()
        loss: Tensor = model(inputs).square().mean()
        loss.backward()
        return loss

    return closure


def take_step(model: nn.Module, optimizer: Any, number: int, *, needs_closure: bool, calls: list[int]) -> Any:
    """Do one training step; return what ``step`` returned."""
    closure = closure_for(model, optimizer, number, calls)
    if needs_closure:
        return optimizer.step(closure)
    closure()
    return optimizer.step()


def sparsify(model: nn.Module) -> None:
    """Make every gradient sparse, two rows of it dropped so that it is truly so."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dense = parameter.grad.clone().contiguous()
            dense[:1] = 0
            parameter.grad = dense.to_sparse(1)


def twin(model: nn.Module) -> nn.Module:
    """Return a copy with the same bits and strides."""
    return copy.deepcopy(model)


def assert_same_parameters(left: Iterable[Tensor], right: Iterable[Tensor], where: str) -> None:
    """Every parameter has the same bits."""
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert same_bits(a, b), f"{where}: parameter {index} differs"


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if (left.dtype, left.shape, left.layout) != (right.dtype, right.shape, right.layout):
        return False
    if left.layout is torch.sparse_coo:
        parts = ((left._indices(), right._indices()), (left._values(), right._values()))
        return left.is_coalesced() == right.is_coalesced() and all(same_bits(a, b) for a, b in parts)
    a, b = (tensor.detach().cpu().resolve_conj().contiguous() for tensor in (left, right))
    return bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)))


def assert_same_tree(left: Any, right: Any, where: str) -> None:
    """Two state dicts are the same in structure, types and bits."""
    assert type(left) is type(right), f"{where}: {type(left).__name__} and {type(right).__name__}"
    if isinstance(left, Tensor):
        assert same_bits(left, right), f"{where}: {left} and {right}"
    elif isinstance(left, dict):
        assert list(left) == list(right), f"{where}: keys {list(left)} and {list(right)}"
        for key in left:
            assert_same_tree(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), f"{where}: lengths {len(left)} and {len(right)}"
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same_tree(a, b, f"{where}[{index}]")
    else:
        assert left == right or (left != left and right != right), f"{where}: {left!r} and {right!r}"


def assert_same_state(remote: Any, local: Any, where: str) -> None:
    """The remote state dict is the local one and one key more."""
    fetched = remote.state_dict()
    stamp = fetched.pop("farstep")
    assert stamp.keys() == {"lineage", "incarnation", "version"}
    assert_same_tree(fetched, local.state_dict(), where)
