"""The strong-Wolfe line search, on plain numbers: it knows a one-dimensional function and no parameters.

Bracketing and zoom follow algorithms 3.5 and 3.6 of Nocedal and Wright, "Numerical Optimization", 2nd edition. Three
safeguards are added. The cubic minimiser is kept inside the bracket; a bracket that shrinks too slowly is cut; and the
number of evaluations is bounded, so that a function that is noisy, flat or not a number cannot hold the caller.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Extrapolation goes on between these multiples of the last increment.
_GROWTH_MIN = 0.1
_GROWTH_MAX = 9.0
# A zoom trial keeps this share of the bracket away from either end.
_MARGIN = 0.1
# How far a zoom goes towards an end whose loss or slope is not finite.
_BACKTRACK = 0.2
# Two zoom trials must together shrink the bracket to this share; otherwise the next one bisects.
_SLOW_SHRINK = 0.66


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation of ``phi(step) = f(x + step * direction)``.

    ``step``: how far along the direction. ``loss``: phi there. ``slope``: its derivative there. ``grad``: the gradient
    of f there, flat, shape ``(n,)``; owned by the trial and never changed.
    """

    step: float
    loss: float
    slope: float
    grad: Tensor

    @property
    def finite(self) -> bool:
        """Whether the point can be compared with others at all."""
        return math.isfinite(self.loss) and math.isfinite(self.slope)


@dataclass(frozen=True, slots=True)
class WolfeConditions:
    """Sufficient decrease with ``c1`` and strong curvature with ``c2``, both relative to the start of the search."""

    loss: float
    slope: float
    c1: float
    c2: float

    def decreases(self, trial: Trial) -> bool:
        """Whether ``trial`` is finite and lies on or below the line of sufficient decrease."""
        return trial.finite and trial.loss <= self.loss + self.c1 * trial.step * self.slope

    def flat_enough(self, trial: Trial) -> bool:
        """Whether the slope at ``trial`` is small enough in absolute value."""
        return abs(trial.slope) <= -self.c2 * self.slope


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Where a search ended.

    ``trial``: the accepted point, or, when ``converged`` is false, the lowest point seen that has sufficient decrease;
    that is the start of the search when there was none. ``converged``: both Wolfe conditions hold at ``trial``.
    """

    trial: Trial
    converged: bool


def strong_wolfe(
    evaluate: Callable[[float], Trial],
    start: Trial,
    first_step: float,
    *,
    c1: float,
    c2: float,
    max_evals: int,
    resolution: float,
) -> SearchResult:
    """Find a step along a descent direction that meets the strong Wolfe conditions.

    Args:
        evaluate: gives the trial at a step; called at most ``max_evals`` times, always with a finite step above 0.
        start: the trial at step 0; its slope must be negative.
        first_step: the first step to try, above 0.
        c1: sufficient decrease, ``phi(t) <= phi(0) + c1 * t * phi'(0)``.
        c2: curvature, ``|phi'(t)| <= c2 * |phi'(0)|``.
        max_evals: the most evaluations, at least 1.
        resolution: relative rounding error of the loss; no bracket is refined below what it can show.
    """
    assert start.slope < 0.0, start.slope
    assert 0.0 < first_step < math.inf, first_step
    assert max_evals >= 1, max_evals
    wolfe = WolfeConditions(start.loss, start.slope, c1, c2)
    previous, step = start, first_step
    for used in range(1, max_evals + 1):
        current = evaluate(step)
        if not wolfe.decreases(current) or (used > 1 and current.loss >= previous.loss):
            return _zoom(evaluate, wolfe, previous, current, max_evals - used, resolution)
        if wolfe.flat_enough(current):
            return SearchResult(current, converged=True)
        if current.slope >= 0.0:
            return _zoom(evaluate, wolfe, current, previous, max_evals - used, resolution)
        step = _extrapolate(previous, current)
        previous = current
        if not math.isfinite(step):
            break
    return SearchResult(previous, converged=False)


def _extrapolate(previous: Trial, current: Trial) -> float:
    """The next step beyond ``current``, where the function still falls too steeply."""
    increment = current.step - previous.step
    near, far = current.step + _GROWTH_MIN * increment, current.step + _GROWTH_MAX * increment
    guess = _cubic_minimum(previous, current)
    if not math.isfinite(guess) or guess <= current.step:
        return far
    return min(max(guess, near), far)


def _zoom(
    evaluate: Callable[[float], Trial],
    wolfe: WolfeConditions,
    low: Trial,
    high: Trial,
    max_evals: int,
    resolution: float,
) -> SearchResult:
    """Shrink a bracket that holds an acceptable step.

    ``low`` is the lowest point so far with sufficient decrease, and its slope points to ``high``, which may lie on
    either side of it and need not be finite.
    """
    widths = [math.inf, math.inf]
    for _ in range(max_evals):
        width = abs(high.step - low.step)
        if width * abs(low.slope) <= resolution * abs(low.loss) or width <= resolution * low.step:
            break
        step = _interpolate(low, high, bisect=width > _SLOW_SHRINK * widths[-2])
        if step in (low.step, high.step):
            break
        widths.append(width)
        current = evaluate(step)
        if not wolfe.decreases(current) or current.loss >= low.loss:
            high = current
            continue
        if wolfe.flat_enough(current):
            return SearchResult(current, converged=True)
        if current.slope * (high.step - low.step) >= 0.0:
            high = low
        low = current
    return SearchResult(low, converged=False)


def _interpolate(low: Trial, high: Trial, *, bisect: bool) -> float:
    """A step strictly inside the bracket, unless the two ends are neighbouring numbers."""
    span = high.step - low.step
    if not high.finite:
        return low.step + _BACKTRACK * span
    guess = math.nan if bisect else _cubic_minimum(low, high)
    if not math.isfinite(guess):
        return low.step + 0.5 * span
    share = (guess - low.step) / span
    return low.step + min(max(share, _MARGIN), 1.0 - _MARGIN) * span


def _cubic_minimum(a: Trial, b: Trial) -> float:
    """The minimiser of the cubic through both points and slopes (equation 3.59); NaN where it has none."""
    if not (a.finite and b.finite):
        return math.nan
    d1 = a.slope + b.slope - 3.0 * (a.loss - b.loss) / (a.step - b.step)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0.0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), b.step - a.step)
    denominator = b.slope - a.slope + 2.0 * d2
    if denominator == 0.0:
        return math.nan
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / denominator
