r"""LoRAM: deterministic orthogonal bases scaled by the magnitude of the weight.

Zhang et al. 2025, "The Primacy of Magnitude in Low-Rank Adaptation", arXiv:2507.06558 (NeurIPS 2025). For W (n×m):

    A⁰ = β Φ_mᵀ,   B⁰ = β Φ_n,   β⁴ = Q · mag(W) / mag(Φ_n Φ_mᵀ),   Q = ln r / ln min(n, m)

Φ_d: the r lowest frequencies of the orthonormal type-I discrete sine transform; mag: the mean square (the paper) or the
variance (the authors' code). Every singular value of B⁰A⁰ is β², and with the mean square ‖B⁰A⁰‖_F = √Q·‖W‖_F. β
depends neither on the scaling nor on the data. One read of W (two for the variance), and 2(n + m) sines.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import UnsupportedLayerError
from ..numerics.linalg import frobenius_norm, product_mean, product_norm, require_rank, total
from ..statistics import LayerStatistics, Request
from .method import Method, MethodInfo, require_choice, require_rank_at_most_min, start_layer
from .registry import register

Statistic = Literal["mean_square", "variance"]
Gain = Literal["log", "log_half", "svd"]
Basis = Literal["dst", "orthogonal", "gaussian"]
RankOne = Literal["error", "as_two"]


def dst_basis(size: int, rank: int, *, device: torch.device | None = None) -> Float[Tensor, "size rank"]:
    """Return the first ``rank`` columns of the orthonormal type-I DST, in float64.

    Entry (i, k) is ``√(2/(d+1)) sin((i+1)(k+1)π/(d+1))``, 0-based. The phase is reduced in integers, modulo its period
    2(d+1): a float32 phase would lose digits in large layers, and one period of sines serves all columns.
    """
    if device is not None and device.type == "mps":
        device = None  # no float64 there
    period = 2 * (size + 1)
    sines = (torch.arange(period, dtype=torch.float64, device=device) * (2 * math.pi / period)).sin_()
    row = torch.arange(1, size + 1, device=device)[:, None]
    column = torch.arange(1, rank + 1, device=device)
    return sines.mul_(math.sqrt(2 / (size + 1))).take((row * column).remainder_(period))


def dst_column_sums(size: int, rank: int) -> Float[Tensor, " rank"]:
    """Return the column sums of `dst_basis` in closed form, float64.

    √(2/(d+1))·cot((k+1)π/(2(d+1))) for even 0-based k, and 0 for odd k.
    """
    k = torch.arange(rank, dtype=torch.float64)
    sums = math.sqrt(2 / (size + 1)) / torch.tan((k + 1) * math.pi / (2 * (size + 1)))
    return torch.where(k % 2 == 0, sums, 0.0)


def basis_power(out_features: int, in_features: int, rank: int, statistic: Statistic) -> float:
    """Return mag(Φ_n Φ_mᵀ) in O(r): its mean square r/(nm), or its unbiased variance (r − nmμ²)/(nm − 1).

    nmμ² = (Σ_k c_n(k)·c_m(k))²/(nm) with the column sums c of the two bases: the product's mean μ is not zero.
    """
    entries = out_features * in_features
    if statistic == "mean_square":
        return rank / entries
    total = float(dst_column_sums(out_features, rank) @ dst_column_sums(in_features, rank))
    return _variance(rank, total, entries)


def weight_power(weight: Float[Tensor, "out in"], statistic: Statistic, *, norm: float | None = None) -> float:
    """Return mag(W): the mean square or the unbiased variance. ``norm``: ‖W‖_F where it is known, to save a read."""
    squares = (frobenius_norm(weight) if norm is None else norm) ** 2
    if statistic == "mean_square":
        return squares / weight.numel()
    entries = total(weight)
    if 2 * entries**2 > squares * weight.numel():  # the mean dominates, and most digits cancel
        squares, entries = frobenius_norm(weight, exact=True) ** 2, total(weight, exact=True)
    return _variance(squares, entries, weight.numel())


def product_power(start: Factors, statistic: Statistic) -> float:
    """Return mag(BA) of another method's start, from r×r products."""
    entries = start.A.shape[1] * start.B.shape[0]
    squares = product_norm(*start) ** 2
    if statistic == "mean_square":
        return squares / entries
    return _variance(squares, entries * product_mean(*start), entries)


def _variance(squares: float, total: float, entries: int) -> float:
    """Return the unbiased variance from Σx² and Σx; exactly 0 where only rounding is left (all entries equal)."""
    deviation = squares - total**2 / entries
    return deviation / (entries - 1) if deviation > 1e-12 * squares else 0.0


def spectral_gain(out_features: int, in_features: int, rank: int, gain: Literal["log", "log_half"] = "log") -> float:
    """Return the gain Q = ln r / ln min(n, m) (Algorithm 1), or ln(r/2) / ln min(n, m) (the paper's ablation).

    min(n, m) = 1 counts as 2, so that the gain is defined (and 1 for a rank counted as two).
    """
    numerator = rank / 2 if gain == "log_half" else rank
    return math.log(numerator) / math.log(max(min(out_features, in_features), 2))


def svd_gain(weight: Float[Tensor, "out in"], rank: int) -> float:
    """Return the gain that PiSSA has, ``(Σ_{i≤r} σ_i)² / (r Σ_i σ_i²)`` ∈ [0, 1], by a full SVD of W."""
    values = torch.linalg.svdvals(weight if weight.dtype == torch.float64 else weight.float())
    return float(values[:rank].sum() ** 2 / (rank * values.square().sum()))


def _beta(power: float, bases: float, source: str) -> float:
    if not (power > 0 and bases > 0):
        raise ValueError(
            f"LoRAM would start dead (A = B = 0) or unbounded: the magnitude of {source} is {power:.3g}, "
            f"that of the bases' product {bases:.3g}"
        )
    return (power / bases) ** 0.25


def _scaled(bases: Factors, beta: float) -> Factors:
    return Factors(*((beta * basis).float().contiguous() for basis in bases))


def basis_pair(
    out_features: int,
    in_features: int,
    rank: int,
    *,
    basis: Basis = "dst",
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Factors:
    """Return the start for β = 1, ``A = Φ_mᵀ`` and ``B = Φ_n``, in float64.

    ``basis`` chooses the columns of Φ_d: the lowest frequencies of the DST, a random orthonormal frame, or independent
    normal entries of variance 1/d (the paper's ablations; the random ones need ``generator``).
    """

    def columns(size: int) -> Tensor:
        if basis == "dst":
            return dst_basis(size, rank, device=device)
        if generator is None:
            raise ValueError(f"basis '{basis}' is random and needs a generator")
        normal = torch.randn(size, rank, generator=generator, device=generator.device, dtype=torch.float64)
        return torch.linalg.qr(normal).Q if basis == "orthogonal" else normal / math.sqrt(size)

    right = columns(in_features)
    shared = basis == "dst" and in_features == out_features
    return Factors(right.mT, right if shared else columns(out_features))


def factors(
    weight: Float[Tensor, "out in"], rank: int, *, statistic: Statistic = "mean_square", gain: Gain = "log"
) -> Factors:
    """Return LoRAM's start for a weight, float32.

    Args:
        weight: W, out×in, any floating dtype.
        rank: r with 2 ≤ r ≤ min(out, in).
        statistic: what "magnitude" is: the mean square (paper) or the unbiased variance (the authors' code).
        gain: Q, see `spectral_gain` and `svd_gain`.

    Raises:
        ValueError: an unknown statistic or gain, the rank is out of range, or the start would be dead (W = 0, or Q ≤ 0
            as for r = 1).
    """
    require_choice("statistic", statistic, Statistic)
    require_choice("gain", gain, Gain)
    require_rank(weight, rank)
    n, m = weight.shape
    Q = svd_gain(weight, rank) if gain == "svd" else spectral_gain(n, m, rank, gain)
    power = Q * weight_power(weight, statistic)
    beta = _beta(power, basis_power(n, m, rank, statistic), f"the weight, times the gain {Q:.3g} at rank {rank},")
    return _scaled(basis_pair(n, m, rank, device=weight.device), beta)


@register
@dataclasses.dataclass(frozen=True)
class LoRAM(Method):
    """DST bases scaled so that the adapter's updates are as large as a spectral start's, without an SVD.

    Args:
        statistic: ``"mean_square"`` (the paper) or ``"variance"`` (parity with the authors' code).
        gain: ``"log"`` (the paper), ``"log_half"`` (its ablation) or ``"svd"`` (PiSSA's own gain, by a full SVD).
        reference: tracking mode: take the magnitude ‖BA‖ of this method's start instead of gain × weight.
        basis: ``"dst"``, or the ablations ``"orthogonal"`` and ``"gaussian"`` (random, seeded). With ``reference`` they
            are the magnitude-matched random controls.
        rank_one: the gain is ln 1 = 0 at r = 1 and the start would be dead: ``"error"``, or ``"as_two"`` uses ln 2.
    """

    statistic: Statistic = "mean_square"
    gain: Gain = "log"
    reference: Method | None = None
    basis: Basis = "dst"
    rank_one: RankOne = "error"

    info: ClassVar = MethodInfo(
        name="loram",
        summary="A, B = β × discrete sine bases, β from the magnitude of W",
        paper="Zhang et al. 2025, arXiv:2507.06558",
        product="preserve",
        deterministic=True,
    )

    def __post_init__(self) -> None:
        """Check the options."""
        for name, literal in (("statistic", Statistic), ("gain", Gain), ("basis", Basis), ("rank_one", RankOne)):
            require_choice(name, getattr(self, name), literal)
        if self.reference is not None and not isinstance(self.reference, Method):
            raise TypeError(f"reference must be a method object such as lorainit.PiSSA(), got {self.reference!r}")
        if self.reference is not None and self.reference.info.product == "zero":
            raise ValueError(f"reference '{self.reference.info.name}' starts with BA = 0: it has no magnitude to match")

    @property
    def request(self) -> Request | None:
        """What the reference needs, if there is one."""
        return self.reference.request if self.reference is not None else None

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics | None = None) -> Factors:
        """Return the scaled bases for the site."""
        require_rank_at_most_min(site)
        n, m, r = site.out_features, site.in_features, site.rank
        power = self._power(site, generator, statistics)
        bases = basis_pair(n, m, r, basis=self.basis, generator=generator, device=site.device)
        # random bases are measured as drawn, so that they match the magnitude as exactly as the DST does
        known = self.basis == "dst"
        size = basis_power(n, m, r, self.statistic) if known else product_power(bases, self.statistic)
        try:
            beta = _beta(power, size, "the weight, times the gain," if self.reference is None else "the reference")
        except ValueError as error:
            raise UnsupportedLayerError(f"layer '{site.name}': {error}") from error
        return _scaled(bases, beta)

    def _power(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics | None) -> float:
        """Return the magnitude that BA is to have: gain × weight, or the reference's."""
        if self.reference is not None:
            return product_power(start_layer(self.reference, site, generator, statistics), self.statistic)
        return self._gain(site) * weight_power(site.stored_weight(), self.statistic, norm=site.weight_norm)

    def _gain(self, site: LoraSite) -> float:
        if self.gain == "svd":
            return svd_gain(site.weight(), site.rank)
        dead = 2 if self.gain == "log_half" else 1
        if site.rank <= dead and self.rank_one == "error":
            raise UnsupportedLayerError(
                f"layer '{site.name}': LoRAM's gain is zero at rank {site.rank} (gain='{self.gain}') and the start "
                "would be dead; raise r, or use rank_one='as_two'"
            )
        rank = site.rank if site.rank > dead else dead * 2
        return spectral_gain(site.out_features, site.in_features, rank, self.gain)
