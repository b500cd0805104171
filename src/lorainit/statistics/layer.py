"""What is known about one layer after the calibration batches: sums, and how much went into them."""

from __future__ import annotations

import dataclasses

from .._typing import Float, Tensor


@dataclasses.dataclass
class LayerStatistics:
    """Sums over the calibration data for one layer, in float32 or float64; divide by the counts to get means.

    Sums, not means, so that shards of the data (batches, processes) add up whatever their sizes. A stream that was not
    asked for is None. x is a layer input (a token, a patch), g the gradient of the summed loss with respect to the
    layer's output at the same position; a convolution's x is the unfolded patch.

    Attributes:
        sequences: rows of the data that reached the layer (n).
        tokens: positions that count: padding never does (M).
        labels: label terms of the loss, 0 without labels (M_lab).
        input_second_moment: Σ x xᵀ.
        input_sum: Σ x.
        input_magnitude: Σ |x|, entry by entry.
        output_gradient_squares: Σ g ⊙ g: the diagonal of Σ g gᵀ.
        weight_gradient: Σ g xᵀ, the gradient of the summed loss with respect to the weight as out×in.
        odd_weight_gradient: the same over every second row of the data: a half to cross-fit against the rest.
    """

    sequences: int = 0
    tokens: int = 0
    labels: int = 0
    input_second_moment: Float[Tensor, "in in"] | None = None
    input_sum: Float[Tensor, " in"] | None = None
    input_magnitude: Float[Tensor, " in"] | None = None
    output_gradient_squares: Float[Tensor, " out"] | None = None
    weight_gradient: Float[Tensor, "out in"] | None = None
    odd_weight_gradient: Float[Tensor, "out in"] | None = None
