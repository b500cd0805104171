"""EVA: A starts as the principal directions of the layer's inputs, B at zero."""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar, NamedTuple

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import SVD, canonical_signs, psd_eigh, require_rank
from ..numerics.sketches import column_rounding, nystrom
from ..statistics import LayerStatistics, Request
from .method import Method, MethodInfo, require_rank_at_most_min
from .parts.activations import centred, decompose, mean_of, rounding
from .parts.sketching import (
    SketchChoice,
    centred_sketch,
    chosen_sketch,
    input_sketch,
    require_sketch_option,
    warn_if_missed,
)
from .registry import register


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
    found = principal(input_second_moment, input_mean, rank, exact=exact, generator=generator)
    return _assemble(found, rank, out_features, whiten=whiten, tokens=tokens)


class Principal(NamedTuple):
    """The r leading principal directions.

    Attributes:
        directions: orthonormal rows.
        variances: along them, descending; what is only rounding is 0.
    """

    directions: Float[Tensor, "r in"]
    variances: Float[Tensor, " r"]


def principal(
    input_second_moment: Float[Tensor, "in in"],
    input_mean: Float[Tensor, " in"],
    rank: int,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Principal:
    """Return the leading eigenpairs of the covariance ``C − μμᵀ``; arguments as of `factors`."""
    require_rank(input_second_moment, rank)
    covariance = centred(input_second_moment, input_mean, input_mean)
    if exact:
        values, vectors = psd_eigh(covariance)
        svd = canonical_signs(SVD(vectors[:, :rank], values[:rank], vectors[:, :rank].mT))
    else:
        svd = decompose(covariance, rank, exact=False, generator=generator)
    # what is left of a mean that was subtracted is rounding, not variance
    floor = rounding(covariance) * float(svd.S[0]) + torch.finfo(covariance.dtype).eps * float(input_mean @ input_mean)
    return Principal(svd.U.mT.contiguous(), torch.where(svd.S > floor, svd.S, 0))


def principal_of_sketch(
    sketch: Float[Tensor, "in k"], test: Float[Tensor, "in k"], input_mean: Float[Tensor, " in"], rank: int
) -> Principal:
    """Return approximately the leading eigenpairs of the covariance ``C − μμᵀ`` from ``CΩ``, in its dtype.

    Warns:
        UserWarning: the sketch misses much, see `lorainit.methods.parts.sketching.warn_if_missed`.
    """
    require_rank(sketch, rank)
    rest = centred_sketch(sketch, test, input_mean)
    noise = column_rounding(sketch)  # a large mean is in it as well
    found = nystrom(rest, test, noise=noise)
    warn_if_missed(rest, found, rank)
    missing = max(0, rank - len(found.values))
    # a deficient sketch is completed by directions on which the data are constant
    vectors = torch.linalg.qr(torch.cat([found.vectors, test.double()[:, :missing]], dim=1)).Q[:, :rank]
    vectors[:, : rank - missing] = found.vectors[:, :rank]
    svd = canonical_signs(SVD(vectors, torch.nn.functional.pad(found.values[:rank], (0, missing)), vectors.mT))
    return Principal(svd.U.mT.contiguous().to(sketch), svd.S.to(sketch))


def _assemble(found: Principal, rank: int, out_features: int, *, whiten: bool, tokens: int) -> Factors:
    spanned = int((found.variances > 0).sum())
    if spanned < rank:
        warnings.warn(f"the data vary along {spanned} directions only, fewer than the rank {rank}", stacklevel=3)
    A = found.directions.clone()
    if whiten:
        A[:spanned] /= (tokens * found.variances[:spanned, None]) ** 0.25
    return Factors(A, A.new_zeros(out_features, rank))


def energies(input_second_moment: Float[Tensor, "in in"], input_mean: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """Return the variance of the inputs along every principal direction, descending.

    Divided by their sum they are EVA's explained-variance ratios.
    """
    return torch.linalg.eigvalsh(centred(input_second_moment, input_mean, input_mean)).flip(0).clamp_min(0)


@register
@dataclasses.dataclass(frozen=True)
class EVA(Method):
    """The principal directions of the layer's inputs in A; B = 0, so the base stays as it is.

    Args:
        whiten: divide each row of A by the root of its singular value.
        exact: full eigendecomposition (slow) instead of the seeded randomized one.
        sketch: collect a seeded sketch of the second moment instead of all of it: True wherever it is smaller, "auto"
            where it has at most an eighth of the columns (and not with ``exact``). A layer whose spectrum decays too
            slowly for it gets a remark.
        columns: of the sketch; default 10 times the layer's rank and 30, which held 99 % of the energy on MiniLM.
    """

    whiten: bool = False
    exact: bool = False
    sketch: SketchChoice = "auto"
    columns: int | None = None

    info: ClassVar = MethodInfo(
        name="eva",
        summary="A = the r leading principal directions of the inputs, B = 0",
        paper="Paischer et al. 2024, arXiv:2410.07170",
        product="zero",
        needs=("forward",),
        variable_ranks=True,
    )
    streams: ClassVar[frozenset[str]] = frozenset({"input_second_moment", "input_sum"})
    copies: ClassVar = (3.0, 1.0)

    def __post_init__(self) -> None:
        """Check the options."""
        require_sketch_option(self.sketch, self.columns, exact=self.exact)

    @property
    def request(self) -> Request:
        """The moments of the inputs, sketched where that pays."""
        choice = False if self.exact else self.sketch
        return Request(self.streams, sketch=chosen_sketch(choice, self.columns, per_rank=10, extra=30))

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the principal directions of the site's inputs, found once for all layers that share them."""
        require_rank_at_most_min(site)

        def find() -> Principal:
            if statistics.input_sketch is not None:
                sketch, test = input_sketch(site, statistics)
                return principal_of_sketch(sketch, test, mean_of(site, statistics, "input_sum"), site.rank)
            moment = mean_of(site, statistics, "input_second_moment")
            mean = mean_of(site, statistics, "input_sum")
            # no layer's own generator: which of those that share it comes first must not matter
            return principal(moment, mean, site.rank, exact=self.exact)

        found = statistics.shared.once(("eva", site.rank, self.exact), find)
        return _assemble(found, site.rank, site.out_features, whiten=self.whiten, tokens=statistics.tokens)

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the variances along the principal directions.

        A sketch tells as many as it has columns; the rest of the energy is spread over the rest of them.
        """
        mean = mean_of(site, statistics, "input_sum")
        if statistics.input_sketch is None:
            return energies(mean_of(site, statistics, "input_second_moment"), mean)
        sketch, test = input_sketch(site, statistics)
        values = nystrom(centred_sketch(sketch, test, mean), test, noise=column_rounding(sketch)).values
        total = float(mean_of(site, statistics, "input_energy")) - float(mean @ mean)
        rest = (total - values.cumsum(0)).clamp_min(0) / torch.arange(
            len(mean) - 1, len(mean) - 1 - len(values), -1, device=values.device
        )
        kept = len(values) - int((rest <= values).flip(0).int().argmax())  # the last value that is above the even rest
        return torch.cat([values[:kept], rest[kept - 1].expand(len(mean) - kept)])
