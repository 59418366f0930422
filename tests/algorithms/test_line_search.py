"""The strong-Wolfe line search on functions of one number."""

import math
from collections.abc import Callable

import pytest
import torch

from farstep_wire.algorithms.line_search import SearchResult, Trial, strong_wolfe

Phi = Callable[[float], tuple[float, float]]


def valley(t: float) -> tuple[float, float]:
    """A long shallow slope with its minimum at sqrt(2) (Moré and Thuente, function 1)."""
    return -t / (t * t + 2.0), (t * t - 2.0) / (t * t + 2.0) ** 2


def wiggly(t: float) -> tuple[float, float]:
    """Many local minima around a quadratic with its minimum at 5."""
    return (t - 5.0) ** 2 + 2.0 * math.sin(4.0 * t), 2.0 * (t - 5.0) + 8.0 * math.cos(4.0 * t)


def quartic(t: float) -> tuple[float, float]:
    return (t - 3.0) ** 4, 4.0 * (t - 3.0) ** 3


def search(
    phi: Phi, first_step: float, c1: float = 1e-4, c2: float = 0.1, max_evals: int = 30
) -> tuple[SearchResult, int]:
    calls = 0

    def evaluate(step: float) -> Trial:
        nonlocal calls
        calls += 1
        return Trial(step, *phi(step), torch.empty(0))

    start = Trial(0.0, *phi(0.0), torch.empty(0))
    result = strong_wolfe(evaluate, start, first_step, c1=c1, c2=c2, max_evals=max_evals, resolution=1e-16)
    return result, calls


@pytest.mark.parametrize("first_step", [1e-6, 1e-2, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("phi", [valley, quartic, wiggly], ids=lambda f: f.__name__)
def test_ends_at_a_strong_wolfe_point(phi: Phi, first_step: float) -> None:
    result, calls = search(phi, first_step)
    loss, slope = phi(0.0)
    assert result.converged
    assert result.trial.loss <= loss + 1e-4 * result.trial.step * slope
    assert abs(result.trial.slope) <= 0.1 * abs(slope)
    assert (result.trial.loss, result.trial.slope) == phi(result.trial.step)
    assert calls <= 20


def test_a_quadratic_takes_two_evaluations() -> None:
    result, calls = search(lambda t: ((t - 2.0) ** 2, 2.0 * (t - 2.0)), first_step=3.5, c2=1e-9)
    assert result.trial.step == pytest.approx(2.0)
    assert calls == 2


@pytest.mark.parametrize("bad", [(math.nan, 0.0), (math.inf, 1.0), (-math.inf, -1.0), (-1.0, math.nan)])
def test_never_accepts_what_is_not_finite(bad: tuple[float, float]) -> None:
    def walled(t: float) -> tuple[float, float]:
        return quartic(t) if t < 4.0 else bad

    result, calls = search(walled, first_step=1e3)
    assert result.converged
    assert result.trial.step < 4.0
    assert calls < 15


@pytest.mark.parametrize("max_evals", [1, 2, 5])
@pytest.mark.parametrize("first_step", [1e-6, 1e6])
def test_ends_at_the_lowest_point_seen_when_evaluations_run_out(max_evals: int, first_step: float) -> None:
    result, calls = search(quartic, first_step, c2=1e-3, max_evals=max_evals)
    assert calls == max_evals
    assert not result.converged
    assert result.trial.loss <= quartic(0.0)[0]
    assert (result.trial.loss, result.trial.slope) == quartic(result.trial.step)


def test_stays_at_the_start_where_nothing_is_lower() -> None:
    result, _ = search(lambda t: (abs(t), -1.0), first_step=1.0)
    assert not result.converged
    assert result.trial.step == 0.0


def test_a_function_without_a_floor_ends() -> None:
    result, calls = search(lambda t: (-t, -1.0), first_step=1.0, max_evals=10)
    assert calls == 10
    assert not result.converged
    assert result.trial.step > 1.0
