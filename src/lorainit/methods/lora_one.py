r"""LoRA-One: the adapter starts as one step of full fine-tuning, as well as rank r can hold it.

Zhang, Liu & Chen 2025, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models",
arXiv:2502.01235 (ICML 2025), in the form of the authors' code. With the gradient ``−G = U S Vᵀ``:

    A = √S_r V_rᵀ / √(γ S_1),   B = U_r √S_r / √(γ S_1),   BA = −G_r / (γ S_1)

G_r is the best rank-r approximation of G. ‖BA‖₂ = 1/γ whatever the scale of the loss.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import SVD, canonical_signs
from ..statistics import LayerStatistics
from .method import MethodInfo, require_rank_at_most_min
from .parts.activations import pad_to_rank, rounding, significant
from .parts.gradient import leading_triplets, naming
from .parts.triplets import TripletMethod, require_positive_gamma
from .registry import register


def factors(
    gradient: Float[Tensor, "out in"],
    rank: int,
    *,
    gamma: float = 128.0,
    exact: bool = False,
    oversample: int | None = None,
    iterations: int = 3,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return LoRA-One's start for a weight gradient: ``BA = −G_r / (γ‖G‖₂)``, with balanced factors.

    Args:
        gradient: G, the loss gradient with respect to the weight, out×in; its scale has no influence.
        rank: r, at most min(out, in).
        gamma: γ, the size of the step: ‖BA‖₂ = 1/γ.
        exact: full SVD instead of the seeded randomized one.
        oversample: extra columns of the randomized SVD (default: as many as the rank, at least 16).
        iterations: its power iterations.
        generator: source of its test matrix (default: a fresh one with seed 0).

    Raises:
        NonFiniteError: NaN or infinity in the gradient.
        ValueError: the gradient is zero, or an argument is out of range.

    Warns:
        UserWarning: the rank of the gradient is below r; where A = B = 0 would never train, A is random and B zero.
    """
    require_positive_gamma(gamma)
    svd = leading_triplets(
        gradient, rank, exact=exact, generator=generator, oversample=oversample, iterations=iterations
    )
    return from_triplets(svd, rank, gamma=gamma, generator=generator)


def from_triplets(svd: SVD, rank: int, *, gamma: float = 128.0, generator: torch.Generator | None = None) -> Factors:
    """Return LoRA-One's start from the r leading triplets of the gradient; arguments and warnings of `factors`."""
    svd = significant(canonical_signs(SVD(-svd.U, svd.S, svd.Vh)), rounding(svd.U) * float(svd.S[0]))
    root = (svd.S / svd.S[0]).sqrt() / math.sqrt(gamma)
    return pad_to_rank(Factors(root[:, None] * svd.Vh, svd.U * root), rank, generator)


@register
@dataclasses.dataclass(frozen=True)
class LoRAOne(TripletMethod):
    """The best rank-r part of one gradient step, kept as the first step.

    Args (beside those of `TripletMethod`):
        gamma: γ, the size of the step: ‖BA‖₂ = 1/γ.
    """

    gamma: float = 128.0

    info: ClassVar = MethodInfo(
        name="lora-one",
        summary="BA = −(r leading singular triplets of the gradient)/(γ·σ₁)",
        paper="Zhang et al. 2025, arXiv:2502.01235",
        product="step",
        needs=("forward", "backward"),
        variable_ranks=True,
    )

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive_gamma(self.gamma)
        super().__post_init__()

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the step for the site; the scale of the loss has no influence."""
        require_rank_at_most_min(site)
        with naming(site):
            svd = self.triplets(site, statistics, site.rank, generator)
            return from_triplets(svd, site.rank, gamma=self.gamma, generator=generator)
