"""Sums over a layer's inputs: Σxxᵀ or its sketch, Σx, Σ|x|."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .._typing import Float, Tensor
from .layer import LayerStatistics
from .second_moment import add_second_moment
from .storage import ON_DEVICE, Storage


def add_inputs(
    statistics: LayerStatistics,
    rows: Float[Tensor, "tokens in"],
    streams: Collection[str],
    test: Float[Tensor, "in k"] | None = None,
    storage: Storage = ON_DEVICE,
) -> None:
    """Add some inputs to a layer's sums.

    Args:
        statistics: the sums.
        rows: x, one a row, in the dtype of the sums.
        streams: which sums.
        test: Ω, for ``"input_sketch"``.
        storage: where the sums are kept.
    """
    statistics.tokens += rows.shape[0]
    if "input_second_moment" in streams:
        add_second_moment(statistics, "input_second_moment", rows, storage)
    if "input_sum" in streams:
        statistics.add("input_sum", rows.sum(0), storage)
    if "input_magnitude" in streams:
        statistics.add("input_magnitude", rows.abs().sum(0), storage)
    if "input_energy" in streams:
        statistics.add("input_energy", torch.linalg.vector_norm(rows).square(), storage)
    if "input_sketch" in streams:
        assert test is not None
        statistics.add_product("input_sketch", rows.mT, rows @ test, storage)
