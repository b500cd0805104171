"""A mean over verdicts of which some are missing: what it is, and what it could have been."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of the verdicts that there are.

    Attributes:
        value: the mean; None without a verdict.
        standard_error: of the mean over the questions; None below two verdicts.
        lower: the mean if every missing verdict were the worst possible one.
        upper: the same with the best one.
        verdicts: how many there are.
        questions: how many there should be.
    """

    value: float | None
    standard_error: float | None
    lower: float
    upper: float
    verdicts: int
    questions: int

    def __str__(self) -> str:
        if self.value is None:
            return f"no score: none of {self.questions} verdicts could be read"
        text = f"{self.value:.3f}" + (f" ± {self.standard_error:.3f}" if self.standard_error is not None else "")
        if self.verdicts == self.questions:
            return f"{text} (n = {self.questions})"
        bounds = f"between {self.lower:.3f} and {self.upper:.3f} with the missing ones"
        return f"{text} ({self.verdicts} of {self.questions} verdicts; {bounds})"


def mean(values: Sequence[float | None], worst: float, best: float) -> Mean:
    """Return the mean of the values that are there, and its bounds if the others were ``worst`` or ``best``."""
    there = [value for value in values if value is not None]
    count, total = len(there), math.fsum(there)
    average = total / count if count else None
    error = None
    if average is not None and count > 1:
        error = math.sqrt(math.fsum((value - average) ** 2 for value in there) / (count - 1) / count)
    lower, upper = ((total + (len(values) - count) * end) / len(values) for end in (worst, best))
    return Mean(average, error, lower, upper, count, len(values))
