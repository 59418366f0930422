"""What a hosted optimizer does with the reduced gradients before a step, and with the parameters after it. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

NON_FINITE = ("allow", "raise", "skip")


@dataclass(frozen=True)
class Settings:
    """What the server does around each step, since it alone sees the mean of the workers' gradients.

    In this order: the non-finite guard, the clipping, the step, the average.

    Args:
        clip_grad_norm: largest norm of all reduced gradients together, as in ``torch.nn.utils.clip_grad_norm_``.
        norm_type: which p-norm that is; ``inf`` for the largest element.
        clip_grad_value: largest magnitude of any element, as in ``torch.nn.utils.clip_grad_value_``.
        non_finite: what a gradient with an infinity or NaN does: ``"allow"`` nothing, as in torch; ``"skip"`` drops the round
            without a step and says so; ``"raise"`` refuses it with a NonFiniteError that names the worker and the parameters.
        ema_decay: keep an exponential moving average of the parameters with this decay, as
            ``torch.optim.swa_utils.get_ema_multi_avg_fn`` does; ``opt.remote.pull(average="ema")`` fetches it.

    ValueError names the field and the value that cannot be.
    """

    clip_grad_norm: float | None = None
    norm_type: float = 2.0
    clip_grad_value: float | None = None
    non_finite: Literal["allow", "raise", "skip"] = "allow"
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip_grad_norm", "clip_grad_value"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"settings: {name} must be None or a positive number, not {value!r}")
        if not _is_number(self.norm_type) or not self.norm_type > 0:
            raise ValueError(f"settings: norm_type must be a positive number or inf, not {self.norm_type!r}")
        if self.non_finite not in NON_FINITE:
            raise ValueError(f"settings: non_finite must be one of {', '.join(NON_FINITE)}, not {self.non_finite!r}")
        if self.ema_decay is not None and not (_is_number(self.ema_decay) and 0 <= self.ema_decay <= 1):
            raise ValueError(f"settings: ema_decay must be None or between 0 and 1, not {self.ema_decay!r}")

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """Return them with some changed; ValueError names a setting that there is not, or its value."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"there is no setting {name!r}; there are {', '.join(known)}")
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return them by name."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
