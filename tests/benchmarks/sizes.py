"""What is stepped: so many tensors of so many float32 each, and how often.

``FARSTEP_BENCH`` holds words, separated by commas: ``quick`` measures small sizes a few times, to see that all runs; ``strict``
fails a test whose targets are missed; ``write`` renews ``RESULTS.md`` and the chart; ``only=TEXT`` leaves out farstep's ways
to travel whose names lack the text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_WORDS = {
    word.partition("=")[0]: word.partition("=")[2] for word in os.environ.get("FARSTEP_BENCH", "").split(",") if word
}
QUICK, STRICT, WRITE = ("quick" in _WORDS), ("strict" in _WORDS), ("write" in _WORDS)
ONLY = _WORDS.get("only", "")
if unknown := sorted(_WORDS.keys() - {"quick", "strict", "write", "only"}):
    raise ValueError(
        f"FARSTEP_BENCH={os.environ['FARSTEP_BENCH']}: {unknown} is none of quick, strict, write, only=TEXT"
    )


@dataclass(frozen=True)
class Size:
    """A model of equal tensors."""

    tensors: int
    elements: int

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return self.tensors * self.elements * 4

    def __str__(self) -> str:
        amount, unit = float(self.nbytes), "B"
        for unit in ("B", "KB", "MB", "GB"):
            if amount < 1000 or unit == "GB":
                break
            amount /= 1000
        return f"{amount:.3g} {unit}"


TINY = Size(4, 640)  # 10 KB
LARGE = Size(20, 25_600) if QUICK else Size(100, 256_000)  # 102 MB
HUGE = Size(20, 51_200) if QUICK else Size(100, 5_120_000)  # 2 GB
HALF_HUGE = Size(20, 25_600) if QUICK else Size(100, 2_560_000)  # 1 GB
MEDIUM = Size(20, 5_120) if QUICK else Size(100, 25_600)  # 10 MB
SWEEP = [TINY, Size(10, 2_560), Size(25, 10_240), *([] if QUICK else [Size(100, 25_600), Size(100, 256_000)])]

WARM = 1 if QUICK else 3
ROUNDS = 2 if QUICK else 15
FEW_ROUNDS = 2 if QUICK else 7
