"""Sums over the gradients at a layer's output: Σ g⊙g, or Σ g gᵀ in full."""

from __future__ import annotations

from collections.abc import Collection

from .._typing import Float, Tensor
from .layer import LayerStatistics
from .second_moment import add_second_moment
from .storage import ON_DEVICE, Storage


def add_output_gradients(
    statistics: LayerStatistics,
    rows: Float[Tensor, "tokens out"],
    streams: Collection[str],
    storage: Storage = ON_DEVICE,
) -> None:
    """Add some output gradients, one a row in the dtype of the sums."""
    if "output_gradient_squares" in streams:
        statistics.add("output_gradient_squares", rows.square().sum(0), storage)
    if "output_gradient_second_moment" in streams:
        add_second_moment(statistics, "output_gradient_second_moment", rows, storage)
