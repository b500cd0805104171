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
from ..numerics.linalg import SVD, canonical_signs, require_sketch
from ..statistics import LayerStatistics, Request
from .method import Method, MethodInfo, require_rank_at_most_min
from .parts.activations import keep_alive, leading, rounding
from .parts.gradient import collected, gradient_energies, leading_triplets, naming
from .parts.sketching import SketchChoice, chosen_sketch, require_sketch_option, triplets_of_sketch
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
    _require_positive_gamma(gamma)
    svd = leading_triplets(
        gradient, rank, exact=exact, generator=generator, oversample=oversample, iterations=iterations
    )
    return from_triplets(svd, rank, gamma=gamma, generator=generator)


def from_triplets(svd: SVD, rank: int, *, gamma: float = 128.0, generator: torch.Generator | None = None) -> Factors:
    """Return LoRA-One's start from the r leading triplets of the gradient; arguments and warnings of `factors`."""
    svd = leading(canonical_signs(SVD(-svd.U, svd.S, svd.Vh)), rounding(svd.U) * float(svd.S[0]))
    root = (svd.S / svd.S[0]).sqrt() / math.sqrt(gamma)
    return keep_alive(Factors(root[:, None] * svd.Vh, svd.U * root), rank, generator)


def _require_positive_gamma(gamma: float) -> None:
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive, got {gamma}")


@register
@dataclasses.dataclass(frozen=True)
class LoRAOne(Method):
    """The best rank-r part of one gradient step, kept as the first step.

    Args:
        gamma: γ, the size of the step: ‖BA‖₂ = 1/γ.
        exact: full SVD (slow) instead of the seeded randomized one.
        oversample: extra columns of the randomized SVD (default: as many as the rank, at least 16).
        iterations: its power iterations.
        sketch: collect two seeded sketches of the gradient instead of all of it: True wherever they are smaller, "auto"
            where they have at most an eighth of its rows and columns. A layer gets a remark where they miss much.
        columns: of the first sketch, half as many as of the second; default 8 times the layer's rank and 20.
    """

    gamma: float = 128.0
    exact: bool = False
    oversample: int | None = None
    iterations: int = 3
    sketch: SketchChoice = False
    columns: int | None = None

    streams: ClassVar[frozenset[str]] = frozenset({"weight_gradient"})
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
        _require_positive_gamma(self.gamma)
        require_sketch(self.oversample, self.iterations)
        require_sketch_option(self.sketch, self.columns, exact=self.exact)

    @property
    def request(self) -> Request:
        """The weight gradient, or sketches that make out its r leading triplets."""
        return Request(self.streams, sketch=chosen_sketch(self.sketch, self.columns, per_rank=8, extra=20))

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the step for the site from the gradient of the summed loss, whose scale has no influence."""
        require_rank_at_most_min(site)
        with naming(site):
            if statistics.gradient_range is not None:
                svd = triplets_of_sketch(site, statistics, site.rank)
                return from_triplets(svd, site.rank, gamma=self.gamma, generator=generator)
            options = dataclasses.asdict(self)
            del options["sketch"], options["columns"]
            gradient = collected(statistics, self.streams)["weight_gradient"].to(site.device)
            return factors(gradient, site.rank, generator=generator, **options)

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the squared singular values of the gradient."""
        with naming(site):
            return gradient_energies(collected(statistics, self.streams)["weight_gradient"].to(site.device))
