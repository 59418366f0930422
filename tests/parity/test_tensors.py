"""Parameters and gradients of every kind that torch's own optimizers take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farstep import Remote, optim
from tests.parity import twins

Make = Callable[..., Remote]
Gradients = Callable[[int, list[Tensor]], list[Tensor | None]]


def _dense(number: int, parameters: list[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(number)
    return [torch.empty_like(p).copy_(_random(p, generator)) for p in parameters]


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.complex64 if like.is_complex() else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=dtype).to(like.dtype)


def _compare(
    make_parameters: Callable[[], list[Tensor]],
    remote: Remote,
    *,
    name: str = "Adam",
    gradients: Gradients = _dense,
    edit: Callable[[int, list[Tensor]], None] = lambda number, parameters: None,
    groups: Callable[[list[Tensor]], Any] = lambda parameters: parameters,
    steps: int = 6,
    **options: Any,
) -> None:
    """Drive local torch and farstep by the same gradients and edits; both must hold the same bits after each step."""
    sides: list[tuple[list[Tensor], Any]] = []
    for cls, extra in ((getattr(torch.optim, name), {}), (getattr(optim, name), {"remote": remote})):
        torch.manual_seed(0)
        parameters = make_parameters()
        sides.append((parameters, cls(groups(parameters), **options, **extra)))
    for number in range(steps):
        for parameters, optimizer in sides:
            optimizer.zero_grad()
            for parameter, gradient in zip(parameters, gradients(number, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            edit(number, parameters)
        twins.assert_same_parameters(sides[0][0], sides[1][0], f"step {number}")
    twins.assert_same_state(sides[1][1], sides[0][1], "state_dict()")


def _parameters(*tensors: Tensor) -> list[Tensor]:
    return [nn.Parameter(tensor) for tensor in tensors]


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
CLASSES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_dtypes(name: str, dtype: torch.dtype, remote: Make, tally: Callable[..., None]) -> None:
    """Each class steps the dtypes that torch's own steps, to the same bits, and refuses the others as torch's own does."""
    shapes = [(3, 4)] if name == "Muon" else [(3, 4), (5,), (), *([] if name == "Adafactor" else [(0, 3)])]
    ends = []
    for cls, extra in ((getattr(torch.optim, name), {}), (getattr(optim, name), {"remote": remote()})):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape).to(dtype), dtype in DTYPES) for shape in shapes]
        ends.append((parameters, *_until_refused(cls, parameters, sparse=name == "SparseAdam", **extra)))
    (local_parameters, local, local_error), (remote_parameters, hosted, remote_error) = ends
    assert remote_error == local_error
    if local_error is None:
        twins.assert_same_parameters(local_parameters, remote_parameters, "after the steps")
        twins.assert_same_state(hosted, local, "state_dict()")
    tally(name, "refused alike" if local_error else "dtypes")


def _until_refused(cls: Any, parameters: list[Tensor], *, sparse: bool, **extra: Any) -> tuple[Any, str | None]:
    optimizer = None
    try:
        optimizer = cls(parameters, **extra)
        for number in range(4):
            gradients = [None if g is None else g.to_sparse(1) if g.dim() else None for g in _dense(number, parameters)]
            for parameter, gradient in zip(
                parameters, gradients if sparse else _dense(number, parameters), strict=True
            ):
                parameter.grad = gradient
            if cls.__name__ == "LBFGS":
                optimizer.step(lambda: sum(p.detach().abs().double().sum() for p in parameters))
            else:
                optimizer.step()
    except Exception as error:  # noqa: BLE001 - both sides must say the same
        return optimizer, f"{type(error).__name__}: {error}"
    return optimizer, None


def test_several_dtypes_in_one_optimizer(remote: Make) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.complex64, torch.float64, torch.bfloat16]
    _compare(lambda: _parameters(*(torch.randn(7).to(dtype) for dtype in dtypes)), remote())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 6).t(),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        lambda: torch.randn(8, 8)[:, :3],
        lambda: torch.randn(10)[::2],
        lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
        lambda: torch.randn(12)[4:],
        lambda: torch.randn(5, 1, 3).transpose(0, 1),
    ],
    ids=[
        "transposed",
        "channels_last",
        "channels_last_3d",
        "columns",
        "every_second",
        "permuted",
        "offset",
        "size_one",
    ],
)
def test_strides(make: Callable[[], Tensor], remote: Make) -> None:
    _compare(lambda: _parameters(make(), torch.randn(3)), remote())


def test_gradients_with_strides_of_their_own(remote: Make) -> None:
    def gradients(number: int, parameters: list[Tensor]) -> list[Tensor | None]:
        dense = _dense(number, parameters)
        assert dense[0] is not None
        return [
            dense[0].t().contiguous().t(),
            torch.ones(()).expand(4) * 0.5 if number % 2 else torch.ones(()).expand(4),
        ]

    _compare(lambda: _parameters(torch.randn(3, 5), torch.randn(4)), remote(), gradients=gradients)


def test_two_parameters_over_the_same_memory(remote: Make) -> None:
    def make() -> list[Tensor]:
        base = torch.randn(12)
        return _parameters(base.view(3, 4), base[:8], torch.randn(2))

    _compare(make, remote(), name="SGD", lr=0.1, momentum=0.9)


def test_parameters_side_by_side_in_one_storage(remote: Make) -> None:
    def make() -> list[Tensor]:
        base = torch.randn(4, 6)
        return _parameters(base[:2], base[2:], torch.randn(1))

    _compare(make, remote())


def test_interleaved_parameters_in_one_storage(remote: Make) -> None:
    def make() -> list[Tensor]:
        base = torch.randn(4, 6)
        return _parameters(base[:, :3], base[:, 3:])

    _compare(make, remote())


def test_gradients_that_come_and_go(remote: Make) -> None:
    def gradients(number: int, parameters: list[Tensor]) -> list[Tensor | None]:
        return [g if (number + i) % 3 else None for i, g in enumerate(_dense(number, parameters))]

    _compare(lambda: _parameters(*(torch.randn(4) for _ in range(5))), remote(), gradients=gradients, steps=9)


def test_no_gradient_at_all(remote: Make) -> None:
    _compare(lambda: _parameters(torch.randn(4)), remote(), gradients=lambda number, parameters: [None])


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {"lr": 0.1, "momentum": 0.9}), ("SparseAdam", {}), ("Adagrad", {})]
)
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients(name: str, options: dict[str, Any], coalesced: bool, remote: Make) -> None:
    def gradients(number: int, parameters: list[Tensor]) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(0, 20, (1, 7), generator=generator)
        sparse = torch.sparse_coo_tensor(rows, torch.randn(7, 3, generator=generator), (20, 3), check_invariants=True)
        return [sparse.coalesce() if coalesced else sparse]

    _compare(lambda: _parameters(torch.randn(20, 3)), remote(), name=name, gradients=gradients, **options)


def test_a_sparse_gradient_without_entries(remote: Make) -> None:
    def gradients(number: int, parameters: list[Tensor]) -> list[Tensor | None]:
        return [
            torch.sparse_coo_tensor(
                torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3), (20, 3), check_invariants=True
            )
        ]

    _compare(lambda: _parameters(torch.randn(20, 3)), remote(), name="SparseAdam", gradients=gradients)


def test_an_embedding_with_sparse_gradients(remote: Make) -> None:
    losses = []
    for cls, extra in ((torch.optim.SparseAdam, {}), (optim.SparseAdam, {"remote": remote()})):
        torch.manual_seed(0)
        model = nn.Embedding(50, 4, sparse=True)
        optimizer = cls(model.parameters(), lr=0.1, **extra)
        values = []
        for number in range(8):
            optimizer.zero_grad()
            loss = model(torch.tensor([number, 3, 3, 7])).square().sum()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        losses.append(values)
    assert losses[0] == losses[1]


def test_several_groups_with_options_of_their_own(remote: Make) -> None:
    def groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": parameters[:1], "lr": 0.1},
            {"params": parameters[1:3], "weight_decay": 0.3, "betas": (0.5, 0.6)},
            {"params": parameters[3:], "amsgrad": True, "note": "a key that torch does not know"},
        ]

    _compare(lambda: _parameters(*(torch.randn(4) for _ in range(5))), remote(), groups=groups)


def test_named_parameters(remote: Make) -> None:
    def groups(parameters: list[Tensor]) -> list[tuple[str, Tensor]]:
        return [(f"layer.{index}", parameter) for index, parameter in enumerate(parameters)]

    _compare(lambda: _parameters(torch.randn(4), torch.randn(2, 2)), remote(), groups=groups)


def _clamp_data(number: int, parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.data.clamp_(-0.1, 0.1)


def _scale(number: int, parameters: list[Tensor]) -> None:
    with torch.no_grad():
        parameters[number % 2].mul_(0.5)


def _swap_data(number: int, parameters: list[Tensor]) -> None:
    parameters[0].data = parameters[0].data.clone().add_(0.01)


def _large_entry(number: int, parameters: list[Tensor]) -> None:
    parameters[1].data[number, -1] += 1


@pytest.mark.parametrize("edit", [_clamp_data, _scale, _swap_data, _large_entry])
def test_parameters_that_the_user_changes_between_steps(edit: Callable[..., None], remote: Make) -> None:
    _compare(lambda: _parameters(torch.randn(9), torch.randn(300, 400)), remote(), edit=edit)


def test_a_model_that_is_loaded_and_moved_after_the_optimizer_was_built(remote: Make) -> None:
    models = []
    for cls, extra in ((torch.optim.Adam, {}), (optim.Adam, {"remote": remote()})):
        model = twins.small_model(seed=1)
        optimizer = cls(model.parameters(), **extra)
        for number in range(6):
            if number == 2:
                model.load_state_dict(twins.small_model(seed=2).state_dict())
            if number == 4:
                model.to(memory_format=torch.contiguous_format)
            twins.take_step(model, optimizer, number, needs_closure=False, calls=[])
        models.append(model)
    twins.assert_same_parameters(models[0].parameters(), models[1].parameters(), "after 6 steps")


def test_a_model_whose_dtype_changes_is_told_what_to_do(remote: Make) -> None:
    model = twins.small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, remote=remote())
    model.double()
    with pytest.raises(
        TypeError, match=r"parameter '0.0' was float32\[4, 2, 3, 3\].*is float64.*convert the model first"
    ):
        twins.take_step(model, optimizer, 0, needs_closure=False, calls=[])


def test_a_float64_default_dtype(remote: Make) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _compare(lambda: _parameters(torch.randn(4), torch.randn(3).float()), remote())
    finally:
        torch.set_default_dtype(before)


def test_parameters_keep_identity_device_and_strides(remote: Make) -> None:
    parameter = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    pointer, strides, version = parameter.data_ptr(), parameter.stride(), parameter._version
    optimizer = optim.SGD([parameter], lr=0.1, remote=remote())
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (parameter.data_ptr(), parameter.stride()) == (pointer, strides)
    assert parameter._version > version


def test_a_backward_through_parameters_from_before_the_step_is_refused_as_in_torch(remote: Make) -> None:
    parameter = nn.Parameter(torch.randn(3))
    optimizer = optim.SGD([parameter], lr=0.1, remote=remote())
    loss = parameter.square().sum()
    parameter.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
