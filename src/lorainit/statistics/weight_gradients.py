"""The weight gradient G = Σ g xᵀ, from inputs and output gradients: whole, of every second row, or as two sketches."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .._typing import Float, Tensor
from .layer import LayerStatistics


def add_weight_gradient(
    statistics: LayerStatistics,
    gradients: Float[Tensor, "tokens out"],
    inputs: Float[Tensor, "tokens in"],
    streams: Collection[str],
    *,
    odd: Tensor | None = None,
    projected: Float[Tensor, "tokens k"] | None = None,
    test_out: Float[Tensor, "out l"] | None = None,
    device: torch.device | None = None,
) -> None:
    """Add the share of some positions to a layer's weight gradient, or to its sketches: those never form G.

    Args:
        statistics: the sums.
        gradients: g, one a row, in the dtype of the sums.
        inputs: x at the same positions.
        streams: which sums.
        odd: which positions belong to the odd rows of the data, for ``"odd_weight_gradient"``.
        projected: x Ω, for ``"gradient_range"``: GΩ = Σ g (xᵀΩ).
        test_out: Ψᵀ, for ``"gradient_corange"``: ΨG = Σ (Ψg) xᵀ.
        device: where the sums live; default: where the gradients are.
    """
    if "weight_gradient" in streams:
        statistics.add_product("weight_gradient", gradients.mT, inputs, device)
    if "odd_weight_gradient" in streams:
        assert odd is not None
        statistics.add_product("odd_weight_gradient", gradients[odd].mT, inputs[odd], device)
    if "gradient_range" in streams:
        assert projected is not None
        statistics.add_product("gradient_range", gradients.mT, projected, device)
    if "gradient_corange" in streams:
        assert test_out is not None
        statistics.add_product("gradient_corange", (gradients @ test_out).mT, inputs, device)
