"""Sums weight gradients G = Σ g xᵀ from inputs and output gradients: whole, of every second row, or as two sketches."""

from __future__ import annotations

from collections.abc import Collection

from .._typing import Float, Tensor
from .layer import LayerStatistics
from .storage import ON_DEVICE, Storage


def add_weight_gradient(
    statistics: LayerStatistics,
    gradients: Float[Tensor, "tokens out"],
    inputs: Float[Tensor, "tokens in"],
    streams: Collection[str],
    *,
    odd: Tensor | None = None,
    projected: Float[Tensor, "tokens k"] | None = None,
    test_out: Float[Tensor, "out l"] | None = None,
    storage: Storage = ON_DEVICE,
) -> None:
    """Add the share of some positions to a layer's weight gradient, or to its sketches without forming G.

    Args:
        statistics: the sums.
        gradients: g, one a row, in the dtype of the sums.
        inputs: x at the same positions.
        streams: which sums.
        odd: which positions belong to the odd rows of the data, for ``"odd_weight_gradient"``.
        projected: x Ω, for ``"gradient_range"``: GΩ = Σ g (xᵀΩ).
        test_out: Ψᵀ, for ``"gradient_corange"``: ΨG = Σ (Ψg) xᵀ.
        storage: where the sums are kept.
    """
    if "weight_gradient" in streams:
        statistics.add_product("weight_gradient", gradients.mT, inputs, storage)
    if "odd_weight_gradient" in streams:
        assert odd is not None
        statistics.add_product("odd_weight_gradient", gradients[odd].mT, inputs[odd], storage)
    if "gradient_range" in streams:
        assert projected is not None
        statistics.add_product("gradient_range", gradients.mT, projected, storage)
    if "gradient_corange" in streams:
        assert test_out is not None
        statistics.add_product("gradient_corange", (gradients @ test_out).mT, inputs, storage)
