"""AG-LoRA (reconstruction): the principal part of the weight with its columns weighted by activation magnitude.

Wang & Shen 2025, "Activation-Guided Low-Rank Parameter Adaptation for Efficient Model Fine-Tuning", IEEE Access, doi
10.1109/ACCESS.2025.3533701. Only the abstract is known, and no code: an SVD of weights with activation weighting. The
exponent, the floor, the split and the treatment of the base are reconstructed, not the publication's.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import require_rank, squared_singular_values
from ..statistics.layer import LayerStatistics
from .method import Method, MethodInfo, require_rank_at_most_min
from .parts.activations import decompose, mean_of, pad_to_rank, projection, rounding, significant
from .registry import register


def column_weights(
    input_magnitude_mean: Float[Tensor, " in"], *, exponent: float = 0.5, floor: float = 1e-4
) -> Float[Tensor, " in"]:
    """Return ``d_j = max((mean |x_j|)^a, floor · max_i (mean |x_i|)^a)``, an entry for each input.

    Raises:
        ValueError: all magnitudes are zero, or one is negative or not finite.
    """
    d = input_magnitude_mean**exponent
    largest = float(d.max())
    if not (0 < largest < float("inf") and bool((input_magnitude_mean >= 0).all())):
        raise ValueError("mean input magnitudes must be finite and ≥ 0, and not all zero")
    return d.clamp_min(floor * largest)


def factors(
    weight: Float[Tensor, "out in"],
    input_magnitude_mean: Float[Tensor, " in"],
    rank: int,
    scaling: float,
    *,
    exponent: float = 0.5,
    floor: float = 1e-4,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return ``B = U_r √(S_r/s)``, ``A = √(S_r/s) V_rᵀ diag(d)⁻¹`` with ``W diag(d) = U S Vᵀ``. A reconstruction.

    ``s·BA = U_r U_rᵀ W``. The unit of the inputs has no influence on BA, only on how it is split between A and B.

    Args:
        weight: W, out×in.
        input_magnitude_mean: mean |x_j| of every input, ≥ 0.
        rank: r, at most min(out, in).
        scaling: s.
        exponent: a; 0 gives PiSSA.
        floor: smallest d, relative to the largest.
        exact: full SVD instead of the randomized one.
        generator: source of the randomized SVD's test matrix and of padding (default: a fresh one with seed 0).

    Returns:
        The factors in the weight's dtype. Components that vanish (a rank-deficient weight) are replaced by those of a
        plain LoRA start, with a warning.

    Raises:
        ValueError: a rank out of range, or magnitudes that are all zero, negative or not finite.
    """
    require_rank(weight, rank)
    product = _weighted(weight, input_magnitude_mean, exponent, floor)
    svd = decompose(product, rank, exact=exact, generator=generator)
    svd = significant(svd, rounding(product) * float(product.norm()))
    start = pad_to_rank(projection(weight.to(product.dtype), svd, scaling), rank, generator)
    return Factors(*(factor.to(weight.dtype) for factor in start))


def energies(
    weight: Float[Tensor, "out in"],
    input_magnitude_mean: Float[Tensor, " in"],
    *,
    exponent: float = 0.5,
    floor: float = 1e-4,
) -> Float[Tensor, " k"]:
    """Return the squared singular values of ``W diag(d)``, descending."""
    return squared_singular_values(_weighted(weight, input_magnitude_mean, exponent, floor))


def _weighted(weight: Tensor, magnitudes: Tensor, exponent: float, floor: float) -> Tensor:
    return weight * column_weights(magnitudes, exponent=exponent, floor=floor)


@register
@dataclasses.dataclass(frozen=True)
class AGLoRA(Method):
    """Reconstruction: the leading triplets of W with its columns weighted by the magnitude of their inputs.

    Args:
        exponent: a in d_j = (mean |x_j|)^a; 0 gives PiSSA.
        floor: smallest d, relative to the largest.
        exact: full SVD (slow) instead of the seeded randomized one.
    """

    exponent: float = 0.5
    floor: float = 1e-4
    exact: bool = False

    info: ClassVar = MethodInfo(
        name="ag-lora",
        aliases=("aglora",),
        summary="s·BA = the r leading components of W weighted by input magnitudes",
        paper="Wang & Shen 2025, doi:10.1109/ACCESS.2025.3533701",
        product="preserve",
        needs=("forward",),
        status="reconstruction",
        variable_ranks=True,
    )
    streams: ClassVar[frozenset[str]] = frozenset({"input_magnitude"})

    def __post_init__(self) -> None:
        """Check the options."""
        if not (self.exponent >= 0 and 0 < self.floor <= 1):
            raise ValueError(
                f"exponent must be ≥ 0 and floor between 0 (excluded) and 1, got {self.exponent} and {self.floor}"
            )

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the weighted principal part of the site's weight."""
        require_rank_at_most_min(site)
        magnitudes = mean_of(site, statistics, "input_magnitude")
        options = dataclasses.asdict(self)
        return factors(site.weight(), magnitudes, site.rank, site.scaling, generator=generator, **options)

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the squared singular values of W diag(d)."""
        magnitudes = mean_of(site, statistics, "input_magnitude")
        return energies(site.weight(), magnitudes, exponent=self.exponent, floor=self.floor)
