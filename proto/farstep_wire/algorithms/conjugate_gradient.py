"""Nonlinear conjugate gradient as a torch optimizer.

``ConjugateGradient.step`` works on flat vectors, as ``torch.optim.LBFGS`` does: the parameters one after the other,
complex ones as pairs of reals, half precision widened to float32. What must outlive a step is kept per parameter, in
the shape and dtype of that parameter: ``Optimizer.load_state_dict`` casts state to the dtype of the parameter it hangs
on, so a flat vector on the first parameter would lose bits as soon as dtypes are mixed.

Choices against SciPy's ``minimize(method="CG")``, which is the same algorithm:

* Both use PR+, and both ask of a direction ``d`` the sufficient descent ``g.d <= -0.01 |g|^2`` of Gilbert and Nocedal.
  SciPy asks it of every trial point and goes on searching where it fails; here the accepted point stands and the next
  direction is steepest descent.
* SciPy never restarts otherwise. Here ``restart_interval`` and ``restart_threshold`` do so too.
* SciPy's ``c2`` is 0.4; 0.1 is what Nocedal and Wright advise for conjugate gradients. On ill-conditioned problems it
  takes fewer iterations and fewer evaluations in total.
* SciPy's first trial step assumes that the loss falls as much as it did last time, and is at most 1. Here it assumes
  the same first-order change, and has no ceiling: where gradients are small, good steps are well above 1.
* SciPy stops on the gradient alone; here ``tolerance_change`` may also end a step, as in LBFGS. With it at 0 the two
  stop alike.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from farstep_wire.algorithms.line_search import SearchResult, Trial, strong_wolfe

_MAX_SEARCH_EVALS = 25
_SUFFICIENT_DESCENT = 0.01
_LEG_KEYS = ("direction", "prev_grad", "slope", "step_size", "since_restart")


class ConjugateGradient(Optimizer):
    r"""Nonlinear conjugate gradient: Polak-Ribière+ with automatic restart and a strong-Wolfe line search.

    .. math::
       \begin{aligned}
            & d_k = -g_k + \beta_k d_{k-1}, \qquad
              \beta_k = \max\left(0, \frac{g_k^\top (g_k - g_{k-1})}{g_{k-1}^\top g_{k-1}}\right)         \\
            & x_{k+1} = x_k + t_k d_k, \qquad t_k \text{ with }                                           \\
            & f(x_k + t_k d_k) \leq f(x_k) + c_1 t_k g_k^\top d_k, \qquad
              |\nabla f(x_k + t_k d_k)^\top d_k| \leq c_2 |g_k^\top d_k|
       \end{aligned}

    The direction is steepest descent, :math:`\beta_k = 0`, on the very first iteration and after each *restart*:

    * ``restart_interval`` iterations after the last one;
    * when successive gradients are far from orthogonal,
      :math:`|g_k^\top g_{k-1}| \geq` ``restart_threshold`` :math:`\|g_k\|^2` (Powell's test);
    * when :math:`d_k` is not a direction of sufficient descent;
    * after a line search that failed. A second failure in a row ends the step at the best point seen.

    Between steps it keeps two vectors of the size of the parameters, L-BFGS ``2 * history_size`` of them. It is meant
    for a loss that is the same function each time the closure is called: full-batch fits, physics-informed losses,
    inverse problems.

    .. warning::
        This optimizer doesn't support per-parameter options and parameter groups (there can be only one).

    .. warning::
        All parameters have to be on a single device.

    .. note::
        :meth:`step` calls the closure several times. It must clear the gradients, compute the loss, call
        ``backward`` and return the loss, and must not change the parameters. Afterwards ``.grad`` holds the gradients
        of the last evaluation, which need not be those at the new parameters.

    .. note::
        Given a closure that is a function of the parameters only, n steps of one iteration visit the same points, bit
        for bit, as one step of n iterations. (Half-precision parameters and mixed dtypes are excepted, since the
        direction is rounded to each parameter's dtype between steps.) A parameter whose ``.grad`` is None counts as
        having a zero gradient.

    .. note::
        A trial point with a non-finite loss or gradient is never accepted: the search backs off from it. When the
        current point itself is non-finite, the step leaves the parameters as they are and only counts the evaluation.
        If the closure raises, the state is that of before the step and the parameters are those of the failed
        evaluation.

    Args:
        params (iterable): iterable of parameters to optimize, real or complex
        lr (float, Tensor, optional): scales the first trial step of each line search; at least 0, and with 0 no step is
            taken (default: 1)
        max_iter (int, optional): maximal number of iterations per optimization step; at least 1 (default: 20)
        max_eval (int, optional): maximal number of closure calls per optimization step; never exceeded; at least 2, one
            for the current point and one for a trial (default: ``max_iter * 5 + 25``)
        tolerance_grad (float, optional): the step ends when no element of the gradient is larger in absolute value; at
            least 0 (default: 1e-7)
        tolerance_change (float, optional): the step ends when the loss changed by less, or no parameter changed by
            more; at least 0 (default: 1e-9)
        line_search_fn (str, optional): ``"strong_wolfe"``, the only one: conjugate gradients with inexact fixed steps
            need not descend at all (default: ``"strong_wolfe"``)
        c1 (float, optional): sufficient decrease, with ``0 < c1 < c2 < 1`` (default: 1e-4)
        c2 (float, optional): curvature; smaller values mean more exact line searches (default: 0.1)
        restart_interval (int, optional): iterations from one restart to the next; at least 1 (default: the number of
            elements, a complex one counted twice)
        restart_threshold (float, optional): threshold of Powell's test, above 0; None for no such test (default: 0.2)

    Example:
        >>> optimizer = ConjugateGradient(model.parameters())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = loss_fn(model(input), target)
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure)

    References:
        J. Nocedal, S. J. Wright: Numerical Optimization, 2nd edition, 2006. Chapter 5.2 (PR+, restarts), chapter 3.5
        (line search).

        E. Polak, G. Ribière: Note sur la convergence de méthodes de directions conjuguées. Revue Française
        d'Informatique et de Recherche Opérationnelle 3 (1969).

        J. C. Gilbert, J. Nocedal: Global Convergence Properties of Conjugate Gradient Methods for Optimization. SIAM
        Journal on Optimization 2 (1992). The "+" of PR+, and sufficient descent.

        M. J. D. Powell: Restart Procedures for the Conjugate Gradient Method. Mathematical Programming 12 (1977).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        line_search_fn: Literal["strong_wolfe"] = "strong_wolfe",
        c1: float = 1e-4,
        c2: float = 0.1,
        restart_interval: int | None = None,
        restart_threshold: float | None = 0.2,
    ) -> None:
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "line_search_fn": line_search_fn,
            "c1": c1,
            "c2": c2,
            "restart_interval": restart_interval,
            "restart_threshold": restart_threshold,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one param group. A second one raises ValueError and leaves the optimizer as it was."""
        if self.param_groups:
            raise ValueError("ConjugateGradient doesn't support per-parameter options (parameter groups)")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float]) -> Tensor | float:  # type: ignore[override]
        """Perform a single optimization step of up to ``max_iter`` iterations.

        Args:
            closure (Callable): A closure that reevaluates the model and returns the loss. It is called at least once
                and at most ``max_eval`` times, with gradients enabled.

        Returns:
            What the first call of the closure returned: the loss before the step.
        """
        if not callable(closure):
            raise TypeError(f"ConjugateGradient.step() needs a closure that can be called, got {closure!r}")
        group = self.param_groups[0]
        _check_options(group)
        params: list[Tensor] = group["params"]
        function = _Function(closure, params)
        original_loss, grad = function.evaluate()
        start = Trial(step=0.0, loss=float(original_loss), slope=-_dot(grad, grad), grad=grad)
        if start.finite and grad.numel() and float(group["lr"]) > 0.0:
            self._descend(function, start, group)
        self.state[params[0]]["func_evals"] = self.state[params[0]].get("func_evals", 0) + function.calls
        return original_loss

    def _descend(self, function: "_Function", point: Trial, group: dict[str, Any]) -> None:
        """Iterate from ``point`` until a tolerance or a limit is met, then save what the next step needs."""
        max_iter, max_eval = group["max_iter"], group["max_eval"]
        if max_eval is None:
            max_eval = 5 * max_iter + _MAX_SEARCH_EVALS
        last = self._load_leg(function.params)
        iterations = 0
        while iterations < max_iter and function.calls < max_eval:
            if _max_abs(point.grad) <= group["tolerance_grad"]:
                break
            leg = _next_leg(point.grad, last, group)
            if not (leg.slope < 0.0 and 0.0 < leg.step < math.inf):  # underflow or overflow: no numbers to search with
                last = None
                break
            iterations += 1
            result = function.search(point, leg, c1=group["c1"], c2=group["c2"], max_calls=max_eval - function.calls)
            change = abs(result.trial.loss - point.loss)
            moved = result.trial.step * _max_abs(leg.direction)
            point = result.trial
            if result.converged:
                last = replace(leg, step=point.step)
                if change < group["tolerance_change"] or moved <= group["tolerance_change"]:
                    break
            else:
                last = None
                if leg.since_restart == 1:
                    break
        self._save_leg(function.params, last, iterations)

    def _load_leg(self, params: list[Tensor]) -> "_Leg | None":
        """The leg that ended where this step begins; None before the first one and after a failed line search."""
        scalars = self.state[params[0]]
        if "direction" not in scalars:
            return None
        return _Leg(
            direction=_flatten([self.state[p]["direction"] for p in params]),
            grad=_flatten([self.state[p]["prev_grad"] for p in params]),
            slope=scalars["slope"],
            step=scalars["step_size"],
            since_restart=scalars["since_restart"],
        )

    def _save_leg(self, params: list[Tensor], leg: "_Leg | None", iterations: int) -> None:
        scalars = self.state[params[0]]
        scalars["n_iter"] = scalars.get("n_iter", 0) + iterations
        if leg is None:
            for p in params[1:]:
                self.state.pop(p, None)
            for key in _LEG_KEYS:
                scalars.pop(key, None)
            return
        scalars.update(slope=leg.slope, step_size=leg.step, since_restart=leg.since_restart)
        for key, flat in (("direction", leg.direction), ("prev_grad", leg.grad)):
            kept = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params]
            for real, values in _paired(kept, flat):
                real.copy_(values)
            for p, value in zip(params, kept, strict=True):
                self.state[p][key] = value


@dataclass(frozen=True, slots=True)
class _Leg:
    """One iteration: from a point with gradient ``grad`` along ``direction``, both flat, shape ``(n,)``.

    ``slope`` is their inner product. ``step`` is the first step to try while the leg is ahead, the accepted one once it
    is behind. ``since_restart`` counts the legs from the last restart on; a leg along steepest descent is number 1.
    """

    direction: Tensor
    grad: Tensor
    slope: float
    step: float
    since_restart: int


class _Function:
    """The closure as a function of one flat vector; counts its calls."""

    def __init__(self, closure: Callable[[], Tensor | float], params: list[Tensor]) -> None:
        self.params = params
        self.calls = 0
        self._closure = closure

    def evaluate(self) -> tuple[Tensor | float, Tensor]:
        """Call the closure at the current parameters; what it returned, and the gradient there."""
        self.calls += 1
        with torch.enable_grad():
            returned = self._closure()
        return returned, _flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])

    def search(self, point: Trial, leg: "_Leg", *, c1: float, c2: float, max_calls: int) -> SearchResult:
        """Search from ``point``, which is where the parameters are, along ``leg``; leave them where it ended."""
        origin = _flatten(self.params)

        def evaluate(step: float) -> Trial:
            self._move(origin, leg.direction, step)
            returned, grad = self.evaluate()
            return Trial(step, float(returned), _dot(grad, leg.direction), grad)

        start = replace(point, step=0.0, slope=leg.slope)
        max_evals = min(max_calls, _MAX_SEARCH_EVALS)
        resolution = torch.finfo(origin.dtype).eps
        result = strong_wolfe(evaluate, start, leg.step, c1=c1, c2=c2, max_evals=max_evals, resolution=resolution)
        self._move(origin, leg.direction, result.trial.step)
        return result

    def _move(self, origin: Tensor, direction: Tensor, step: float) -> None:
        """Put the parameters at ``origin + step * direction``; where two share memory, their directions add up."""
        for real, values in _paired(self.params, origin):
            real.copy_(values)
        if step:
            for real, values in _paired(self.params, direction):
                real.add_(values, alpha=step)


def _next_leg(grad: Tensor, last: _Leg | None, group: Mapping[str, Any]) -> _Leg:
    """The direction and the first trial step from a point with gradient ``grad``, after the leg ``last``."""
    squared, lr = _dot(grad, grad), float(group["lr"])
    if last is None:
        step = lr * min(1.0, 1.0 / float(grad.abs().sum()))
        return _Leg(direction=-grad, grad=grad, slope=-squared, step=step, since_restart=1)
    beta = _polak_ribiere_plus(grad, squared, last, group)
    direction = torch.add(-grad, last.direction, alpha=beta)
    slope = _dot(grad, direction)
    since_restart = last.since_restart + 1
    if beta == 0.0 or not slope <= -_SUFFICIENT_DESCENT * squared:
        direction, slope, since_restart = -grad, -squared, 1
    step = lr * last.step * last.slope / slope
    return _Leg(direction, grad, slope, step, since_restart)


def _polak_ribiere_plus(grad: Tensor, squared: float, last: _Leg, group: Mapping[str, Any]) -> float:
    """The weight of the last direction in the next one; 0 means restart. ``squared`` is ``grad.grad``."""
    interval, threshold = group["restart_interval"], group["restart_threshold"]
    if last.since_restart >= (grad.numel() if interval is None else interval):
        return 0.0
    overlap = _dot(grad, last.grad)
    if threshold is not None and abs(overlap) >= threshold * squared:
        return 0.0
    last_squared = _dot(last.grad, last.grad)
    return max(0.0, (squared - overlap) / last_squared) if last_squared > 0.0 else 0.0


def _flatten(tensors: list[Tensor]) -> Tensor:
    """A new vector of all elements in order, complex ones as pairs of reals, at least float32, shape ``(n,)``."""
    parts = []
    for tensor in tensors:
        dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
        real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
        parts.append(real.reshape(-1))
    flat = torch.cat(parts)
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _paired(tensors: list[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor, a complex one as its view of reals, with its part of ``flat`` in the same shape."""
    offset = 0
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        yield real, flat[offset : offset + real.numel()].view(real.shape)
        offset += real.numel()


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def _max_abs(vector: Tensor) -> float:
    return float(vector.abs().max())


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option outside its range. Each step checks its group too, since anyone may edit it."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    for key, least in (("max_iter", 1), ("max_eval", 2), ("restart_interval", 1)):
        value = options[key]
        if not (isinstance(value, int) and value >= least) and not (value is None and key != "max_iter"):
            raise ValueError(f"Invalid {key}: {value!r} (an integer of at least {least})")
    for key in ("tolerance_grad", "tolerance_change"):
        if not options[key] >= 0.0:
            raise ValueError(f"Invalid {key}: {options[key]}")
    if options["line_search_fn"] != "strong_wolfe":
        raise ValueError(f"Invalid line_search_fn: {options['line_search_fn']!r} (only 'strong_wolfe' is supported)")
    if not 0.0 < options["c1"] < options["c2"] < 1.0:
        raise ValueError(f"Invalid c1 and c2: {options['c1']}, {options['c2']} (0 < c1 < c2 < 1)")
    threshold = options["restart_threshold"]
    if threshold is not None and not threshold > 0.0:
        raise ValueError(f"Invalid restart_threshold: {threshold} (above 0, or None)")
