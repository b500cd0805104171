r"""LoRA-GA: the adapter's first update follows the gradient of full fine-tuning.

Wang, Yu & Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000 (NeurIPS 2024), in the
form of the authors' code. With the gradient ``G = U S Vᵀ`` and two disjoint sets I, J of r of its 2r leading triplets:

    A = c V_Iᵀ,   B = c U_J

so that the updates of B (along G·V_I) and of A (along U_Jᵀ·G) together cover the 2r leading directions of G. The
singular values enter neither factor: the scale of the loss has no influence.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import ClassVar, Literal

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import SVD, exact_svd, randomized_svd
from ..statistics import LayerStatistics
from .method import MethodInfo, require_choice
from .parts.activations import rounding
from .parts.gradient import leading_triplets, naming
from .parts.triplets import TripletMethod, require_positive_gamma
from .registry import register

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "gd", "unit", "weightS"]


def factors(
    gradient: Float[Tensor, "out in"],
    rank: int,
    *,
    gamma: float = 16.0,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    scaling: float = 1.0,
    weight: Float[Tensor, "out in"] | None = None,
    clip: bool = False,
    exact: bool = False,
    oversample: int | None = None,
    iterations: int = 3,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return LoRA-GA's start for a weight gradient.

    Args:
        gradient: G, the loss gradient with respect to the weight, out×in; its scale has no influence.
        rank: r, with 2r at most min(out, in).
        gamma: γ of the scale ``"stable"``.
        direction: which of the 2r leading triplets go where, counted from 0: ``"ArB2r"`` A the first r, B the next;
            ``"A2rBr"`` the other way round; ``"ArBr"`` A the odd ones, B the even ones; ``"random"`` random halves.
        scale: c: ``"stable"`` out^¼/√γ; ``"gd"`` 1/s; ``"unit"`` 1; ``"weightS"`` the mean of √(σ_i(W)/s) over the r
            leading singular values of the weight.
        scaling: s, the multiplier of BA; for ``"gd"``, ``"weightS"`` and ``clip``.
        weight: W, out×in; for ``"weightS"`` and ``clip``.
        clip: shrink both factors alike where max|s·BA| would exceed max|W|, so that they are equal.
        exact: full SVD instead of the seeded randomized one.
        oversample: extra columns of the randomized SVD (default: as many as it has to find, at least 16).
        iterations: its power iterations.
        generator: source of its test matrix and of the random halves (default: a fresh one with seed 0).

    Raises:
        NonFiniteError: NaN or infinity in the gradient.
        ValueError: the gradient is zero, an argument is out of range, or the weight is missing.

    Warns:
        UserWarning: the rank of the gradient is below 2r, and some directions are arbitrary.
    """
    options = LoRAGA(gamma, direction, scale, clip, exact=exact, oversample=oversample, iterations=iterations)
    _require_directions(rank, *gradient.shape)
    generator = generator or torch.Generator().manual_seed(0)
    randomized = {"generator": generator, "oversample": oversample, "iterations": iterations}
    svd = leading_triplets(gradient, 2 * rank, exact=exact, **randomized)
    return from_triplets(svd, rank, options, generator, scaling=scaling, weight=weight)


def from_triplets(
    svd: SVD,
    rank: int,
    options: LoRAGA,
    generator: torch.Generator,
    *,
    scaling: float,
    weight: Float[Tensor, "out in"] | None = None,
) -> Factors:
    """Return LoRA-GA's start from the 2r leading triplets of the gradient; errors and warnings are those of `factors`.

    Args:
        svd: the triplets, at least 2r of them.
        rank: r.
        options: which triplets go where, and the scale c.
        generator: of the random halves, and of the randomized SVD of the weight.
        scaling: s.
        weight: W, where the scale or ``clip`` needs it.
    """
    if weight is None and options.needs_weight:
        raise ValueError("clip and scale='weightS' need the weight")
    present = int((svd.S > rounding(svd.U) * svd.S[0]).sum())
    if present < 2 * rank:
        warnings.warn(
            f"the weight gradient has rank {present}, so that {2 * rank - present} of the {2 * rank} directions that "
            "LoRA-GA takes from it are arbitrary; give more data, or lower r",
            stacklevel=3,
        )
    of_A, of_B = (part.to(svd.U.device) for part in _split(rank, options.direction, generator))
    c = _scale(len(svd.U), rank, options, generator, scaling, weight)
    A, B = c * svd.Vh[of_A], c * svd.U[:, of_B]
    if weight is not None and options.clip:
        ratio = float(weight.abs().max()) / (scaling * float((B @ A).abs().max()))
        A, B = (min(1.0, math.sqrt(ratio)) * part for part in (A, B))
    return Factors(A, B)


def _scale(
    out_features: int, rank: int, options: LoRAGA, generator: torch.Generator, scaling: float, weight: Tensor | None
) -> float:
    """Return c, by which both factors are multiplied."""
    if options.scale == "weightS":
        assert weight is not None
        sketch = {"generator": generator, "oversample": options.oversample, "iterations": options.iterations}
        svd = exact_svd(weight, rank) if options.exact else randomized_svd(weight, rank, **sketch)
        return float((svd.S / scaling).sqrt().mean())
    known = {"stable": out_features**0.25 / math.sqrt(options.gamma), "gd": 1 / scaling, "unit": 1.0}
    return known[options.scale]


def _require_directions(rank: int, out_features: int, in_features: int) -> None:
    if not 1 <= 2 * rank <= min(out_features, in_features):
        raise ValueError(
            f"LoRA-GA takes 2r = {2 * rank} directions from the {out_features}×{in_features} gradient, "
            f"which has {min(out_features, in_features)}; lower r, or give this layer its own in rank_pattern"
        )


def _split(rank: int, direction: Direction, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the triplets that A takes and those that B takes: disjoint halves of the first 2r."""
    order = torch.arange(2 * rank)
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "random":
        order = torch.randperm(2 * rank, generator=generator, device=generator.device)
    first, second = order[:rank], order[rank:]
    return (second, first) if direction == "A2rBr" else (first, second)


@register
@dataclasses.dataclass(frozen=True)
class LoRAGA(TripletMethod):
    """Singular vectors of the gradient: A and B take disjoint halves of its 2r leading triplets.

    Args (beside those of `TripletMethod`):
        gamma: γ of the scale ``"stable"``: both factors are multiplied by out^¼/√γ.
        direction: which triplets go where: ``"ArB2r"``, ``"A2rBr"``, ``"ArBr"`` or ``"random"``, see `factors`.
        scale: ``"stable"``, ``"gd"``, ``"unit"`` or ``"weightS"``, see `factors`.
        clip: shrink the start where max|s·BA| would exceed max|W|.
    """

    gamma: float = 16.0
    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    clip: bool = False

    info: ClassVar = MethodInfo(
        name="lora-ga",
        summary="A, B = disjoint halves of the 2r leading singular vectors of the gradient",
        paper="Wang et al. 2024, arXiv:2407.05000",
        product="preserve",
        needs=("forward", "backward"),
        variable_ranks=True,
    )

    def __post_init__(self) -> None:
        """Check the options."""
        require_choice("direction", self.direction, Direction)
        require_choice("scale", self.scale, Scale)
        require_positive_gamma(self.gamma)
        super().__post_init__()

    @property
    def needs_weight(self) -> bool:
        """Whether the start depends on the layer's weight."""
        return self.clip or self.scale == "weightS"

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the start for the site; the scale of the loss has no influence."""
        weight = site.weight() if self.needs_weight else None
        with naming(site):
            _require_directions(site.rank, site.out_features, site.in_features)
            svd = self.triplets(site, statistics, 2 * site.rank, generator)
            return from_triplets(svd, site.rank, self, generator, scaling=site.scaling, weight=weight)

    def rank_limit(self, site: LoraSite) -> int:
        """Return half of min(in, out): A and B take disjoint sets of triplets."""
        return min(site.in_features, site.out_features) // 2
