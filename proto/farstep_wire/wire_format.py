"""What becomes of float32 numbers on the way between a worker and its server. Plain data, no torch.

- ``bfloat16``, ``float16``: rounded to the nearest, ties to even. Nothing is kept of what rounding takes away.
- ``int8``: in blocks of ``INT8_BLOCK`` elements of one tensor, in the order of its memory. A block's scale is the greatest
  magnitude in it, divided by 127, as float32; an element x travels as round(x / scale), ties to even, and arrives as that times
  the scale. A block with an infinity or NaN arrives without a finite number in it, so that the server's guard sees it.
- ``topk``: of each tensor's n elements the k = max(``LEAST_KEPT``, ceil(density * n)) of greatest magnitude, as position and
  float32 value; the others arrive as zero. Where 2 k is n or more, the tensor travels as it is, in no more bytes.

For the last two the worker feeds the error back: it keeps what has not arrived and adds it to its next gradient (Seide et al.
2014, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech DNNs"; Lin et al.
2018, "Deep Gradient Compression", without its momentum correction, the momentum being the server's; Karimireddy et al. 2019,
"Error Feedback Fixes SignSGD and other Gradient Compression Schemes").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

    DTypeLike = str | torch.dtype

Narrow = Literal["bfloat16", "float16"]
Compressed = Literal["int8", "topk"]
NARROW: tuple[str, ...] = get_args(Narrow)
COMPRESSED: tuple[str, ...] = get_args(Compressed)

INT8_BLOCK = 64
"""Elements that share a scale."""

DENSITY = 0.02
"""The part of the elements that top-k sends where nothing else is said."""

LEAST_KEPT = 1024
"""Elements that top-k sends at least of a tensor: the small ones, biases and norms, are worth more than their bytes."""


@dataclass(frozen=True)
class Wire:
    """How float32 gradients and parameters are made smaller for the way; what has another dtype travels as it is.

    Args:
        gradients: ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"topk"``, or the torch dtype; None: as they are. int8 (blocks
            of 64 elements with a scale each, 27 % of the bytes) and top-k (2 * ``density`` of the bytes) are for slow links:
            what they leave out is added to the next gradient, for which the worker keeps a float32 copy of the parameters'
            size. They are not for optimizers that a closure drives.
        parameters: ``"bfloat16"`` or ``"float16"``; None: as they are. The server's own stay float32; the worker holds them
            rounded, from the moment when it attaches. An average that is pulled is rounded too.
        density: with ``gradients="topk"``, the part of each tensor's elements that is sent, 1,024 at least. A tensor of
            which half or more would be sent, so each of up to 2,048 elements, travels as it is.

    Sparse gradients keep their indices; of their values only bfloat16 and float16 make less. Parameters that were edited on the
    worker, a hosted optimizer's first parameters, and state travel as they are.

    ValueError names the field and the value that cannot be.
    """

    gradients: DTypeLike | None = None
    parameters: DTypeLike | None = None
    density: float = DENSITY

    def __post_init__(self) -> None:
        for name, possible in (("gradients", NARROW + COMPRESSED), ("parameters", NARROW)):
            value = getattr(self, name)
            format_name = None if value is None else str(value).removeprefix("torch.")
            if format_name is not None and format_name not in possible:
                raise ValueError(f"Wire: {name} must be None or one of {', '.join(possible)}, not {value!r}")
            object.__setattr__(self, name, format_name)
        number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
        if not number or not 0 < self.density <= 1:
            raise ValueError(f"Wire: density must be above 0 and at most 1, not {self.density!r}")

    @property
    def exact(self) -> bool:
        """Whether everything travels as it is."""
        return self.gradients is None and self.parameters is None

    @property
    def compresses(self) -> bool:
        """Whether gradients leave out what the next ones make up for."""
        return self.gradients in COMPRESSED


EXACT = Wire()
"""Everything travels as it is."""


def as_wire(value: Wire | DTypeLike | None) -> Wire:
    """Return what ``Remote(wire_dtype=...)`` means: a dtype stands for both directions, int8 and topk for gradients alone.

    ValueError quotes what means nothing.
    """
    if value is None:
        return EXACT
    if isinstance(value, Wire):
        return value
    name = str(value).removeprefix("torch.")
    if name in COMPRESSED:
        return Wire(gradients=name)
    if name not in NARROW:
        raise ValueError(f"{value!r} is none of {', '.join(NARROW + COMPRESSED)}, nor a farstep.Wire(...)")
    return Wire(gradients=name, parameters=name)


def kept(numel: int, density: float) -> int:
    """Return how many of a tensor's elements top-k sends; none where it travels as it is."""
    count = max(LEAST_KEPT, math.ceil(density * numel))
    return count if 2 * count < numel else 0
