"""A start of one's own in one file: ``lorainit train --imports gradient_a --method gradient-a``; see docs/new_start.md.

The idea to test: with B = 0 the first steps move a layer along the rows of A alone, so let those be the directions
that the loss asks for.
"""

from __future__ import annotations

import dataclasses

import lorainit
from lorainit.methods.parts.gradient import leading_triplets, naming


@lorainit.register
@dataclasses.dataclass(frozen=True)
class GradientA(lorainit.Method):
    """A = the r leading right singular vectors of the weight's gradient as rows, B = 0.

    Args:
        gain: norm of A's rows; by default that of vanilla LoRA's rows.
    """

    gain: float = 3**-0.5

    info = lorainit.MethodInfo(
        name="gradient-a",
        summary="A = the gradient's r leading right singular vectors, B = 0",
        paper="yours",
        product="zero",
        needs=("backward",),
    )
    streams = frozenset({"weight_gradient"})

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.gain > 0:
            raise ValueError(f"gain={self.gain} is not positive")

    def start(self, site, generator, statistics) -> lorainit.Factors:
        """Return the start of one layer."""
        with naming(site):  # a zero gradient, a NaN in it, too high a rank: errors that name the layer
            found = leading_triplets(statistics.weight_gradient, site.rank, generator=generator)
        return lorainit.Factors(self.gain * found.Vh, found.Vh.new_zeros(site.out_features, site.rank))
