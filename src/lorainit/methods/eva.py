"""EVA: A starts as the principal directions of the layer's inputs, B at zero."""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar

import torch

from .._typing import Float, Tensor
from ..linalg import SVD, canonical_signs, psd_eigh, require_rank
from ..sites import LoraSite
from ..statistics.layer import LayerStatistics
from .activations import centred, decompose, mean_of, rounding
from .method import Factors, Method, MethodInfo, require_rank_at_most_min


def factors(
    input_second_moment: Float[Tensor, "in in"],
    input_mean: Float[Tensor, " in"],
    rank: int,
    out_features: int,
    *,
    whiten: bool = False,
    tokens: int = 1,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return ``A`` = the r leading eigenvectors of the covariance ``C − μμᵀ`` as orthonormal rows, and ``B = 0``.

    Paischer et al. 2024, arXiv:2410.07170: a centred PCA of the inputs, here from their moments in one go instead of
    batch by batch. The entry of largest magnitude in each row is positive.

    Args:
        input_second_moment: C, in×in: mean of x xᵀ.
        input_mean: μ: mean of x.
        rank: r, at most in.
        out_features: rows of B.
        whiten: divide row i by √σ_i, with σ_i the singular value of the centred inputs, √(tokens·λ_i).
        tokens: how many inputs those singular values are of; with 1, σ_i is the standard deviation along row i.
        exact: full eigendecomposition instead of the randomized one.
        generator: source of the randomized one's test matrix (default: a fresh one with seed 0).

    Returns:
        The factors in the dtype of the moments. Rows beyond the rank of the covariance (fewer tokens than r) are unit
        vectors on which the data are constant, with a warning; they are not whitened.

    Raises:
        ValueError: the rank is out of range.
    """
    require_rank(input_second_moment, rank)
    covariance = centred(input_second_moment, input_mean, input_mean)
    if exact:
        values, vectors = psd_eigh(covariance)
        svd = canonical_signs(SVD(vectors[:, :rank], values[:rank], vectors[:, :rank].mT))
    else:
        svd = decompose(covariance, rank, exact=False, generator=generator)
    # what is left of a mean that was subtracted is rounding, not variance
    floor = rounding(covariance) * float(svd.S[0]) + torch.finfo(covariance.dtype).eps * float(input_mean @ input_mean)
    spanned = int((svd.S > floor).sum())
    if spanned < rank:
        warnings.warn(f"the data vary along {spanned} directions only, fewer than the rank {rank}", stacklevel=2)
    A = svd.U.mT.contiguous()
    if whiten:
        A[:spanned] /= (tokens * svd.S[:spanned, None]) ** 0.25
    return Factors(A, A.new_zeros(out_features, rank))


def energies(input_second_moment: Float[Tensor, "in in"], input_mean: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """Return the variance of the inputs along every principal direction, descending.

    Divided by their sum they are EVA's explained-variance ratios.
    """
    return torch.linalg.eigvalsh(centred(input_second_moment, input_mean, input_mean)).flip(0).clamp_min(0)


@dataclasses.dataclass(frozen=True)
class EVA(Method):
    """The principal directions of the layer's inputs in A; B = 0, so the base stays as it is.

    Args:
        whiten: divide each row of A by the root of its singular value.
        exact: full eigendecomposition (slow) instead of the seeded randomized one.
    """

    whiten: bool = False
    exact: bool = False

    info: ClassVar = MethodInfo(
        name="eva",
        summary="A = the r leading principal directions of the inputs, B = 0",
        paper="Paischer et al. 2024, arXiv:2410.07170",
        product="zero",
        needs=("forward",),
        variable_ranks=True,
    )
    streams: ClassVar[frozenset[str]] = frozenset({"input_second_moment", "input_sum"})

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the principal directions of the site's inputs."""
        require_rank_at_most_min(site)
        moment, mean = (mean_of(site, statistics, stream) for stream in ("input_second_moment", "input_sum"))
        return factors(
            moment,
            mean,
            site.rank,
            site.out_features,
            whiten=self.whiten,
            tokens=statistics.tokens,
            exact=self.exact,
            generator=generator,
        )

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.ranks.allocate` pools: the variances along the principal directions."""
        return energies(*(mean_of(site, statistics, stream) for stream in ("input_second_moment", "input_sum")))
