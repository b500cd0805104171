"""PiSSA: the adapter starts as the principal singular part of the weight."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import SVD, exact_svd, randomized_svd, require_sketch, squared_singular_values
from .method import Method, MethodInfo, require_rank_at_most_min
from .registry import register


def split_evenly(svd: SVD, scaling: float) -> Factors:
    """Return ``A = √(S/s)·Vᵀ``, ``B = U·√(S/s)``, so that ``s·BA = U S Vᵀ``."""
    root = (svd.S / scaling).sqrt()
    return Factors(root[:, None] * svd.Vh, svd.U * root)


def factors(
    weight: Float[Tensor, "out in"],
    rank: int,
    scaling: float,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
    oversample: int | None = None,
    iterations: int = 3,
) -> Factors:
    """Return the factors of the best rank-r approximation of the weight: ``s·BA = U_r S_r V_rᵀ``.

    Meng, Wang & Zhang 2024, arXiv:2404.02948, eqs. 2-3, divided by the scaling as in PEFT.

    Args:
        weight: W, out×in.
        rank: r, at most min(out, in).
        scaling: s, so that s·BA is the principal part whatever lora_alpha is.
        exact: full SVD instead of the randomized one.
        generator: source of the randomized SVD's test matrix (default: a fresh one with seed 0).
        oversample: extra columns of the randomized SVD (default: as many as the rank, at least 16).
        iterations: its power iterations.
    """
    if exact:
        return split_evenly(exact_svd(weight, rank), scaling)
    generator = generator or torch.Generator().manual_seed(0)
    svd = randomized_svd(weight, rank, generator=generator, oversample=oversample, iterations=iterations)
    return split_evenly(svd, scaling)


@register
@dataclasses.dataclass(frozen=True)
class PiSSA(Method):
    """The r leading singular triplets of W; the rest of W is what stays frozen.

    Args:
        exact: full SVD (slow) instead of the seeded randomized one.
        oversample: extra columns of the randomized SVD (default: as many as the rank, at least 16).
        iterations: its power iterations.
    """

    exact: bool = False
    oversample: int | None = None
    iterations: int = 3

    info: ClassVar = MethodInfo(
        name="pissa",
        summary="s·BA = the r leading singular triplets of W",
        paper="Meng et al. 2024, arXiv:2404.02948",
        product="preserve",
        variable_ranks=True,
    )

    def __post_init__(self) -> None:
        """Check the options."""
        require_sketch(self.oversample, self.iterations)

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the principal part of the site's weight."""
        require_rank_at_most_min(site)
        return factors(site.weight(), site.rank, site.scaling, generator=generator, **dataclasses.asdict(self))

    def energies(self, site: LoraSite) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the squared singular values of W."""
        return squared_singular_values(site.weight())
