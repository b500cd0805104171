"""What is summed over the gradients at a layer's output: Σ g⊙g, or Σ g gᵀ in full."""

from __future__ import annotations

from collections.abc import Collection

from .._typing import Float, Tensor
from .layer import LayerStatistics
from .place import COMPUTED, Place
from .second_moment import add_second_moment


def add_output_gradients(
    statistics: LayerStatistics,
    rows: Float[Tensor, "tokens out"],
    streams: Collection[str],
    place: Place = COMPUTED,
) -> None:
    """Add some output gradients, one a row in the dtype of the sums."""
    if "output_gradient_squares" in streams:
        statistics.add("output_gradient_squares", rows.square().sum(0), place)
    if "output_gradient_second_moment" in streams:
        add_second_moment(statistics, "output_gradient_second_moment", rows, place)
