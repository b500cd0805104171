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
from ..numerics.linalg import SVD, exact_svd, randomized_svd, require_sketch
from ..statistics import LayerStatistics, Request
from .method import Method, MethodInfo, require_choice
from .parts.activations import rounding
from .parts.gradient import collected, gradient_energies, leading_triplets, naming
from .parts.sketching import SketchChoice, chosen_sketch, require_sketch_option, triplets_of_sketch
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
    _require_options(gamma, direction, scale, oversample, iterations)
    _require_directions(rank, *gradient.shape)
    generator = generator or torch.Generator().manual_seed(0)
    options = {"generator": generator, "oversample": oversample, "iterations": iterations, "exact": exact}
    svd = leading_triplets(gradient, 2 * rank, **options)
    chosen = {"gamma": gamma, "direction": direction, "scale": scale, "scaling": scaling, "clip": clip}
    return from_triplets(svd, rank, weight=weight, **chosen, **options)


def from_triplets(
    svd: SVD,
    rank: int,
    *,
    gamma: float = 16.0,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    scaling: float = 1.0,
    weight: Float[Tensor, "out in"] | None = None,
    clip: bool = False,
    generator: torch.Generator | None = None,
    exact: bool = False,
    oversample: int | None = None,
    iterations: int = 3,
) -> Factors:
    """Return LoRA-GA's start from the 2r leading triplets of the gradient; arguments, errors, warnings of `factors`."""
    if weight is None and (clip or scale == "weightS"):
        raise ValueError("clip and scale='weightS' need the weight")
    generator = generator or torch.Generator().manual_seed(0)
    present = int((svd.S > rounding(svd.U) * svd.S[0]).sum())
    if present < 2 * rank:
        warnings.warn(
            f"the weight gradient has rank {present}, so that {2 * rank - present} of the {2 * rank} directions that "
            "LoRA-GA takes from it are arbitrary; give more data, or lower r",
            stacklevel=3,
        )
    of_A, of_B = (part.to(svd.U.device) for part in _split(rank, direction, generator))
    factor = {"stable": len(svd.U) ** 0.25 / math.sqrt(gamma), "gd": 1 / scaling}.get(scale, 1.0)
    if weight is not None and scale == "weightS":
        sketch = {"generator": generator, "oversample": oversample, "iterations": iterations}
        values = (exact_svd(weight, rank) if exact else randomized_svd(weight, rank, **sketch)).S
        factor = float((values / scaling).sqrt().mean())
    A, B = factor * svd.Vh[of_A], factor * svd.U[:, of_B]
    if weight is not None and clip:
        ratio = float(weight.abs().max()) / (scaling * float((B @ A).abs().max()))
        A, B = (min(1.0, math.sqrt(ratio)) * part for part in (A, B))
    return Factors(A, B)


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


def _require_options(gamma: float, direction: Direction, scale: Scale, oversample: int | None, iterations: int) -> None:
    require_choice("direction", direction, Direction)
    require_choice("scale", scale, Scale)
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive, got {gamma}")
    require_sketch(oversample, iterations)


@register
@dataclasses.dataclass(frozen=True)
class LoRAGA(Method):
    """Singular vectors of the gradient: A and B take disjoint halves of its 2r leading triplets.

    Args:
        gamma: γ of the scale ``"stable"``: both factors are multiplied by out^¼/√γ.
        direction: which triplets go where: ``"ArB2r"``, ``"A2rBr"``, ``"ArBr"`` or ``"random"``, see `factors`.
        scale: ``"stable"``, ``"gd"``, ``"unit"`` or ``"weightS"``, see `factors`.
        clip: shrink the start where max|s·BA| would exceed max|W|.
        exact: full SVD (slow) instead of the seeded randomized one.
        oversample: extra columns of the randomized SVD (default: as many as it has to find, at least 16).
        iterations: its power iterations.
        sketch: collect two seeded sketches of the gradient instead of all of it: True wherever they are smaller, "auto"
            where they have at most an eighth of its rows and columns. A layer gets a remark where they miss much.
        columns: of the first sketch, half as many as of the second; default 8 times the layer's rank and 20.
    """

    gamma: float = 16.0
    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    clip: bool = False
    exact: bool = False
    oversample: int | None = None
    iterations: int = 3
    sketch: SketchChoice = False
    columns: int | None = None

    streams: ClassVar[frozenset[str]] = frozenset({"weight_gradient"})
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
        _require_options(self.gamma, self.direction, self.scale, self.oversample, self.iterations)
        require_sketch_option(self.sketch, self.columns, exact=self.exact)

    @property
    def request(self) -> Request:
        """The weight gradient, or sketches that make out its 2r leading triplets."""
        return Request(self.streams, sketch=chosen_sketch(self.sketch, self.columns, per_rank=8, extra=20))

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the start for the site from the gradient of the summed loss, whose scale has no influence."""
        weight = site.weight() if self.clip or self.scale == "weightS" else None
        with naming(site):
            options = dataclasses.asdict(self)
            del options["sketch"], options["columns"]
            options |= {"scaling": site.scaling, "weight": weight, "generator": generator}
            if statistics.gradient_range is not None:
                _require_directions(site.rank, site.out_features, site.in_features)
                return from_triplets(triplets_of_sketch(site, statistics, 2 * site.rank), site.rank, **options)
            gradient = collected(statistics, self.streams)["weight_gradient"].to(site.device)
            return factors(gradient, site.rank, **options)

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the squared singular values of the gradient."""
        with naming(site):
            return gradient_energies(collected(statistics, self.streams)["weight_gradient"].to(site.device))

    def rank_limit(self, site: LoraSite) -> int:
        """Return half of min(in, out): A and B take disjoint sets of triplets."""
        return min(site.in_features, site.out_features) // 2
