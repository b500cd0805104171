"""The statistics of one layer: sums over the calibration data, and the counts that turn them into means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from .._typing import Float, Tensor
from .storage import ON_DEVICE, Storage

Result = TypeVar("Result")


class Shared:
    """Cache of results computed from the sums of one input, for all layers with that input.

    It is freed with the statistics of the last of them.
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, object] = {}

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Return ``compute()``, or its earlier result under this key; the key names everything that it depends on."""
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]  # pyright: ignore[reportReturnType]


@dataclasses.dataclass
class LayerStatistics:
    """Sums over the calibration data for one layer, in float32 or float64; divide by the counts to get means.

    Sums, not means, so that shards of the data (batches, processes) add up whatever their sizes. A stream that was not
    requested is None. x is a layer input (a token, a patch), g the gradient of the summed loss with respect to the
    layer's output at the same position; a convolution's x is the unfolded patch.

    Attributes:
        sequences: rows of the data (n); of an expert those as well that sent it no token.
        tokens: positions that count: padding never does (M).
        labels: label terms of the loss, 0 without labels (M_lab).
        input_second_moment: Σ x xᵀ.
        input_sum: Σ x.
        input_magnitude: Σ |x|, entry by entry.
        input_sketch: Σ x (xᵀ Ω), Ω = `lorainit.numerics.sketches.test_matrix`.
        input_energy: Σ ‖x‖².
        cross_second_moment: Σ x x_fᵀ with x_f the input that x is paired with, see `lorainit.statistics.pairs`.
        output_gradient_squares: Σ g ⊙ g: the diagonal of Σ g gᵀ.
        output_gradient_second_moment: Σ g gᵀ.
        weight_gradient: G = Σ g xᵀ, the gradient of the summed loss with respect to the weight as out×in.
        odd_weight_gradient: the same over every second row of the data: a half to cross-fit against the rest.
        gradient_range: G Ω.
        gradient_corange: Ψ G, with Ψᵀ a test matrix of its own.
        sketch_seed: of the test matrices.
        shared: results that layers with this input compute only once.
    """

    sequences: int = 0
    tokens: int = 0
    labels: int = 0
    input_second_moment: Float[Tensor, "in in"] | None = None
    input_sum: Float[Tensor, " in"] | None = None
    input_magnitude: Float[Tensor, " in"] | None = None
    input_sketch: Float[Tensor, "in k"] | None = None
    input_energy: Float[Tensor, ""] | None = None
    cross_second_moment: Float[Tensor, "in in"] | None = None
    output_gradient_squares: Float[Tensor, " out"] | None = None
    output_gradient_second_moment: Float[Tensor, "out out"] | None = None
    weight_gradient: Float[Tensor, "out in"] | None = None
    odd_weight_gradient: Float[Tensor, "out in"] | None = None
    gradient_range: Float[Tensor, "out k"] | None = None
    gradient_corange: Float[Tensor, "l in"] | None = None
    sketch_seed: int = 0
    shared: Shared = dataclasses.field(default_factory=Shared, repr=False, compare=False)

    def add(self, stream: str, value: Tensor, storage: Storage = ON_DEVICE) -> None:
        """Add to a sum; the first value becomes the sum, where ``storage`` keeps it."""
        held = getattr(self, stream)
        setattr(self, stream, storage.keep(value) if held is None else held.add_(value.to(held.device)))

    def add_product(self, stream: str, left: Tensor, right: Tensor, storage: Storage = ON_DEVICE) -> None:
        """Add ``left @ right`` to a sum, without a temporary of its size where it lies on the same device."""
        held = getattr(self, stream)
        if held is None or held.device != left.device:
            self.add(stream, left @ right, storage)
        else:
            held.addmm_(left, right)


def merge(shards: Sequence[LayerStatistics]) -> LayerStatistics:
    """Return the sums over all shards of the data, of one layer: sums and counts add up.

    Raises:
        ValueError: no shard, or shards of different streams or sketches.
    """
    if not shards:
        raise ValueError("there are no shards to merge")
    result = LayerStatistics(sketch_seed=shards[0].sketch_seed)
    for field in dataclasses.fields(LayerStatistics):
        values = [getattr(shard, field.name) for shard in shards]
        if field.name in ("sequences", "tokens", "labels"):
            setattr(result, field.name, sum(values))
        elif field.name == "sketch_seed":
            if len(set(values)) > 1:
                raise ValueError("the shards were sketched with different seeds")
        elif isinstance(values[0], Tensor) or any(isinstance(v, Tensor) for v in values):
            shapes = {None if value is None else tuple(value.shape) for value in values}
            if len(shapes) > 1:
                raise ValueError(f"the shards differ in '{field.name}': {shapes}")
            setattr(result, field.name, torch.stack([v.to(values[0].device) for v in values]).sum(0))
    return result
