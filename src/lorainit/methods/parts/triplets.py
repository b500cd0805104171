"""Shared by starts from leading singular triplets of the weight gradient: options, sketch, energies."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from ..._typing import Tensor
from ...adapter.sites import LoraSite
from ...numerics.linalg import SVD, require_sketch
from ...statistics import LayerStatistics, Request
from ..method import Method
from .gradient import collected, gradient_energies, leading_triplets, naming
from .sketching import SketchChoice, chosen_sketch, require_sketch_option, triplets_of_sketch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TripletMethod(Method):
    """Base of the starts from leading singular triplets of the gradient of the summed loss.

    Args:
        exact: full SVD (slow) instead of the seeded randomized one.
        oversample: extra columns of the randomized SVD (default: as many as it has to find, at least 16).
        iterations: its power iterations.
        sketch: collect two seeded sketches of the gradient instead of all of it: True wherever they are smaller, "auto"
            where they have at most an eighth of its rows and columns. A layer gets a remark where they miss much.
        columns: of the first sketch, half as many as of the second; default 8 times the layer's rank and 20.
    """

    exact: bool = False
    oversample: int | None = None
    iterations: int = 3
    sketch: SketchChoice = False
    columns: int | None = None

    streams: ClassVar[frozenset[str]] = frozenset({"weight_gradient"})

    def __post_init__(self) -> None:
        """Check the options."""
        require_sketch(self.oversample, self.iterations)
        require_sketch_option(self.sketch, self.columns, exact=self.exact)

    @property
    def request(self) -> Request:
        """The weight gradient, or sketches that make out its leading triplets."""
        return Request(self.streams, sketch=chosen_sketch(self.sketch, self.columns, per_rank=8, extra=20))

    def triplets(self, site: LoraSite, statistics: LayerStatistics, count: int, generator: torch.Generator) -> SVD:
        """Return the leading triplets of the site's gradient, from the gradient or from its sketches.

        Raises:
            NonFiniteError: NaN or infinity in the gradient.
            ValueError: the gradient is zero or was not collected, or has no such number of triplets.
        """
        if statistics.gradient_range is not None:
            return triplets_of_sketch(site, statistics, count)
        gradient = collected(statistics, self.streams)["weight_gradient"].to(site.device)
        options = {"exact": self.exact, "oversample": self.oversample, "iterations": self.iterations}
        return leading_triplets(gradient, count, generator=generator, **options)

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the squared singular values of the gradient."""
        with naming(site):
            return gradient_energies(collected(statistics, self.streams)["weight_gradient"].to(site.device))


def require_positive_gamma(gamma: float) -> None:
    """Raise ValueError unless γ, which divides the start, is positive and finite."""
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive, got {gamma}")
