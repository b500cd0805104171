"""CorDA: the adapter starts as the part of the weight that the layer's inputs excite most, or least."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import (
    SVD,
    exact_svd,
    require_rank,
    sketch_width,
    squared_singular_values,
    subspace_svd,
    to_double,
)
from ..statistics.layer import LayerStatistics
from .method import Method, MethodInfo, require_choice, require_rank_at_most_min
from .parts.activations import decompose, mean_of, pad_to_rank, projection, rounding, significant
from .registry import register

_PASSES = 8  # of a randomized SVD over its matrix

Mode = Literal["ipm", "kpm"]


def context(
    weight: Float[Tensor, "out in"], input_second_moment: Float[Tensor, "in in"], *, damping: float = 0.01
) -> Float[Tensor, "out in"]:
    """Return ``W C̃`` with ``C̃ = C + δ·mean(diag C)·I``, in the wider of the two dtypes.

    Args:
        weight: W, out×in.
        input_second_moment: C, in×in, in squared units of the input.
        damping: δ, without unit.
    """
    dtype = torch.promote_types(weight.dtype, input_second_moment.dtype)
    weight, moment = weight.to(dtype), input_second_moment.to(dtype)
    return weight @ moment + damping * moment.diagonal().mean() * weight


def factors(
    weight: Float[Tensor, "out in"],
    input_second_moment: Float[Tensor, "in in"],
    rank: int,
    scaling: float,
    *,
    mode: Mode = "ipm",
    damping: float = 0.01,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return the first (IPM) or last (KPM) r components of ``W = U S V̂ᵀ``, where ``W C̃ = U S Vᵀ``, ``V̂ᵀ = Vᵀ C̃⁻¹``.

    ``B = U_r √(S_r/s)``, ``A = √(S_r/s) V̂_rᵀ``. Yang et al. 2024, arXiv:2406.05223. As ``S V̂ᵀ = Uᵀ W``, C̃ is never
    inverted: ``s·BA = U_r U_rᵀ W``, whatever the condition of C. The unit of the inputs has no influence on BA, only on
    how it is split: inputs c times as large make B c times as large, and A 1/c.

    Args:
        weight: W, out×in.
        input_second_moment: C, in×in: mean of x xᵀ. The rank may be deficient (fewer tokens than inputs).
        rank: r, at most min(out, in).
        scaling: s.
        mode: ``"ipm"`` (instruction-previewed: learn the task that C was measured on) or ``"kpm"``
            (knowledge-preserving: leave alone what C was measured on).
        damping: δ in C̃ = C + δ·mean(diag C)·I.
        exact: full SVD instead of the randomized one; KPM always takes the full one, in float64.
        generator: source of the randomized SVD's test matrix and of padding (default: a fresh one with seed 0).

    Returns:
        The factors in the weight's dtype. Components that vanish (a rank-deficient weight) are replaced by those of a
        plain LoRA start, with a warning.

    Raises:
        ValueError: an unknown mode or a rank out of range.
    """
    require_choice("mode", mode, Mode)
    require_rank(weight, rank)
    if mode == "kpm":  # in float32 the trailing components would drown in the rounding of the leading ones
        product = context(to_double(weight), to_double(input_second_moment), damping=damping)
        svd, size = exact_svd(product, rank, smallest=True), float(product.norm())
    elif not exact and _PASSES * sketch_width(rank, weight.shape) < weight.shape[0]:
        svd = _unformed(weight, input_second_moment, rank, damping, generator or torch.Generator().manual_seed(0))
        size = float(svd.S.norm())  # all of it, if the components that are wanted go below rounding
    else:
        product = context(weight, input_second_moment, damping=damping)
        svd, size = decompose(product, rank, exact=exact, generator=generator), float(product.norm())
    svd = significant(svd, rounding(svd.S) * size)
    start = pad_to_rank(projection(weight.to(svd.S), svd, scaling), rank, generator)
    return Factors(*(factor.to(weight) for factor in start))


def _unformed(weight: Tensor, moment: Tensor, rank: int, damping: float, generator: torch.Generator) -> SVD:
    """Return the leading triplets of W C̃ from products with W and with C: for large layers W C̃ is most of the work."""
    dtype = torch.promote_types(weight.dtype, moment.dtype)
    W, C = weight.to(dtype), moment.to(dtype)
    shift = damping * C.diagonal().mean()

    def damped(block: Tensor) -> Tensor:
        return C @ block + shift * block

    test = torch.randn(W.shape[1], sketch_width(rank, W.shape), generator=generator, device=generator.device)
    return subspace_svd(lambda x: W @ damped(x), lambda x: damped(W.mT @ x), test.to(W), rank)


def energies(
    weight: Float[Tensor, "out in"], input_second_moment: Float[Tensor, "in in"], *, damping: float = 0.01
) -> Float[Tensor, " k"]:
    """Return the squared singular values of ``W C̃``, descending."""
    return squared_singular_values(context(weight, input_second_moment, damping=damping))


@register
@dataclasses.dataclass(frozen=True)
class CorDA(Method):
    """Principal (or minor) part of W in the metric of its inputs; the rest of W is what stays frozen.

    Args:
        mode: ``"ipm"``: the first components, calibrated on the task; ``"kpm"``: the last, calibrated on what is to be
            kept.
        damping: δ in C̃ = C + δ·mean(diag C)·I.
        input_scale: inputs are divided by this first; it moves norm between A and B and leaves BA as it is. 1 takes
            them as they are; the authors' code uses 256.
        exact: full SVD (slow) instead of the seeded randomized one; ``"kpm"`` always takes it.
    """

    mode: Mode = "ipm"
    damping: float = 0.01
    input_scale: float = 1.0
    exact: bool = False

    info: ClassVar = MethodInfo(
        name="corda",
        summary="s·BA = the first (or last) r components of W in the metric of its inputs",
        paper="Yang et al. 2024, arXiv:2406.05223",
        product="preserve",
        needs=("forward",),
        variable_ranks=True,
    )
    streams: ClassVar[frozenset[str]] = frozenset({"input_second_moment"})
    copies: ClassVar = (2.5, 1.5)

    def __post_init__(self) -> None:
        """Check the options."""
        require_choice("mode", self.mode, Mode)
        if not (self.damping >= 0 and self.input_scale > 0):
            raise ValueError(f"damping must be ≥ 0 and input_scale > 0, got {self.damping} and {self.input_scale}")
        if self.mode == "kpm":  # the components of least energy: shares of energy mean nothing for them
            object.__setattr__(self, "info", dataclasses.replace(type(self).info, variable_ranks=False))

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return the chosen part of the site's weight."""
        require_rank_at_most_min(site)
        return factors(
            site.weight(),
            self._moment(site, statistics),
            site.rank,
            site.scaling,
            mode=self.mode,
            damping=self.damping,
            exact=self.exact,
            generator=generator,
        )

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the squared singular values of W C̃. Not for ``"kpm"``."""
        return energies(site.weight(), self._moment(site, statistics), damping=self.damping)

    def workspace(self, site: LoraSite) -> int:
        """Return about how many bytes the start of a layer takes: in float64 for the last components."""
        return super().workspace(site) * (3 if self.mode == "kpm" or self.exact else 1)

    def _moment(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        mean = mean_of(site, statistics, "input_second_moment")
        return mean if self.input_scale == 1 else mean.div_(self.input_scale**2)
