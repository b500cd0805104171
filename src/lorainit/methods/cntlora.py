"""CNTLoRA (reconstruction): a closed-form ΔW from a domain-shift constraint on activations, cut into two factors.

Das et al. 2025, "ConsNoTrainLoRA", arXiv:2507.08044. Only title, abstract and the caption of figure 1 are known: the
initialization is posed as a domain shift, constraints relate pre-training to fine-tuning activations, and a closed form
in the weights and the fine-tuning activations is decomposed into the factors. Every formula, default and rule here is a
reconstruction that does this; results obtained with it are not the paper's.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import require_rank, squared_singular_values
from ..numerics.sketches import column_rounding, nystrom
from ..statistics import LayerStatistics, Request
from . import kaiming
from .method import Comparison, Method, MethodInfo, Product, require_choice, require_rank_at_most_min
from .parts.activations import decompose, mean_of, pad_to_rank, rounding, significant
from .parts.gradient import naming
from .parts.shift import Moment, Moments, Shift, ShiftOptions, Spectrum, solve, sort_options, spectrum
from .parts.sketching import (
    SketchChoice,
    centred_sketch,
    chosen_sketch,
    input_sketch,
    require_sketch_option,
    warn_if_missed,
)
from .registry import register

Metric = Literal["data", "frobenius"]
Energy = Callable[[Tensor], float]


def delta(
    weight: Float[Tensor, "out in"], input_second_moment: Float[Tensor, "in in"], **options: Any
) -> Float[Tensor, "out in"]:
    """Return the estimate ΔW of a constraint. All of them are reconstructions.

    C̃ = C + εI with ε = δ·tr(C)/n; a proxy moment C_p is damped alike by its own mean eigenvalue.

    - ``"F1"``: ``(W0+ΔW) C̃ (W0+ΔW)ᵀ = σ² W0 W0ᵀ``, ``ΔW = W0 (σ C̃^{-1/2} − I)``, σ² = tr(C̃)/n: the outputs have the
      second moment that white inputs of the same power would give.
    - ``"F1p"``: ``(W0+ΔW) C̃ (W0+ΔW)ᵀ = W0 C̃_p W0ᵀ``, ``ΔW = W0 (M − I)``: that of proxy inputs. M is the Gaussian
      optimal transport, or ``C̃_p^{1/2} C̃^{-1/2}`` (coral).
    - ``"F2"``: ``ΔW = W0 (C_pf − C)(C + εI)⁻¹``: paired outputs, ridge κ = ε. Without pairs C_pf = 0.
    - ``"F3"``: ``ΔW = W0 C (C + εI)⁻¹``: W0 on the span of the data, nothing off it.
    - ``"F4"``: F1's equation solved on the output side, ``ΔW = G W0``.
    - ``"F5"``: ``ΔW = W0 (μ_p − μ) μᵀ/‖μ‖²``: mean outputs. Without a proxy μ_p = 0.

    Args:
        weight: W0, out×in.
        input_second_moment: C, in×in: mean of x xᵀ over fine-tuning inputs.
        **options: the constraint (default ``"F1"``), damping, proxies, ...: the fields of
            `lorainit.methods.parts.shift.ShiftOptions` and of `lorainit.methods.parts.shift.Moments`.
            The damping is raised, with a warning, where the constraint needs the inverse of a singular moment.

    Returns:
        ΔW in the weight's dtype, computed in the wider dtype of weight and moment.

    Raises:
        TypeError: an unknown option.
        ValueError: an unknown constraint, moment or map, inputs that are zero or do not vary, a NaN, a mean or a proxy
            that is missing.
    """
    shift = _estimate(weight, _widened(input_second_moment, weight), *sort_options(options))
    return (shift.plain @ shift.vectors.mT).to(weight.dtype)


def factors(
    weight: Float[Tensor, "out in"],
    input_second_moment: Float[Tensor, "in in"],
    rank: int,
    scaling: float,
    *,
    metric: Metric = "data",
    drift: float | None = None,
    exact: bool = False,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Factors:
    """Return the best rank-r factors of ΔW, in the metric of the inputs or in the Frobenius norm.

    ``metric="data"``: ``ΔW C̃^{1/2} = U S Vᵀ``, ``B = U_r √(S_r/s)``, ``A = √(S_r/s) V_rᵀ C̃^{-1/2}``: the least output
    error tr(E C̃ Eᵀ), E = ΔW − s·BA, and ``BᵀB = A C̃ Aᵀ = diag(S_r)/s``. For F1 the matrix that is decomposed is
    ``W0 (σI − C̃^{1/2})``, bounded where C̃ is small. ``metric="frobenius"``: the plain SVD of ΔW, ``A = √(S_r/s) V_rᵀ``.

    Args:
        weight: W0, out×in.
        input_second_moment: C, in×in: mean of x xᵀ over fine-tuning inputs.
        rank: r, at most min(out, in).
        scaling: s.
        metric: of the truncation.
        drift: τ: both factors are shrunk alike until the step's output energy tr(D C Dᵀ), D = s·BA, is at most τ times
            tr(W0 C W0ᵀ), with C as measured. None: no bound.
        exact: full SVD instead of the randomized one.
        generator: source of the randomized SVD's test matrix and of padding (default: a fresh one with seed 0).
        **options: as for `delta`.

    Returns:
        The factors in the weight's dtype. Components at the level of rounding are replaced by those of a plain LoRA
        start, with a warning; where there is no shift, that is all of them.

    Raises:
        TypeError, ValueError: as `delta`, or a rank or drift out of range.
    """
    require_rank(weight, rank)
    _require_cut(metric, drift)
    chosen, moments = sort_options(options)
    moment = _widened(input_second_moment, weight)
    shift = _estimate(weight, moment, chosen, moments)
    _warn_of_wasted_rank(metric, chosen)
    start = _cut(shift, weight, rank, scaling, metric=metric, exact=exact, generator=generator)
    if drift is not None:
        start = _bounded(start, weight, lambda matrix: _energy(matrix, moment), scaling, drift)
    return _finished(start, weight, rank, generator)


def energies(
    weight: Float[Tensor, "out in"],
    input_second_moment: Float[Tensor, "in in"],
    *,
    metric: Metric = "data",
    **options: Any,
) -> Float[Tensor, " k"]:
    """Return the squared singular values of the matrix that `factors` truncates, descending."""
    _require_cut(metric, None)
    chosen, moments = sort_options(options)
    shift = _estimate(weight, _widened(input_second_moment, weight), chosen, moments)
    _warn_of_wasted_rank(metric, chosen)
    return squared_singular_values(_matrix(shift, metric))


def _widened(moment: Tensor, weight: Tensor) -> Tensor:
    return moment.to(torch.promote_types(weight.dtype, moment.dtype))


def _estimate(weight: Tensor, moment: Tensor, options: ShiftOptions, moments: Moments) -> Shift:
    """Return the estimate from a layer's second moment."""
    return solve(weight, spectrum(moment, options, moments), options, moments)


def _require_cut(metric: Metric, drift: float | None) -> None:
    """Raise ValueError unless the options of the truncation are valid."""
    require_choice("metric", metric, Metric)
    if drift is not None and not drift > 0:
        raise ValueError(f"drift must be > 0 or None, got {drift}")


def _warn_of_wasted_rank(metric: Metric, options: ShiftOptions) -> None:
    if metric == "frobenius" and options.constraint == "F1" and options.top_k is None:
        warnings.warn(
            "constraint 'F1' with metric='frobenius' and no top_k spends the rank on directions that the data lack",
            stacklevel=3,
        )


def _matrix(shift: Shift, metric: Metric) -> Float[Tensor, "out k"]:
    """Return the matrix that is cut to the rank: ΔW C̃^{1/2} or ΔW, in the eigenbasis of C."""
    return shift.half if metric == "data" else shift.plain


def _cut(
    shift: Shift,
    weight: Tensor,
    rank: int,
    scaling: float,
    *,
    metric: Metric,
    exact: bool,
    generator: torch.Generator | None,
) -> Factors:
    """Return the best factors of ΔW in a metric, at most ``rank`` components: those above rounding."""
    matrix = _matrix(shift, metric)
    size = shift.weighted_norm if metric == "data" else float(weight.norm())
    svd = decompose(matrix, min(rank, *matrix.shape), exact=exact, generator=generator)
    svd = significant(svd, rounding(matrix) * size)
    root = (svd.S / scaling).sqrt()
    right = svd.Vh * shift.inverse_roots if metric == "data" else svd.Vh
    return Factors((root[:, None] * right) @ shift.vectors.mT, svd.U * root)


def _finished(start: Factors, weight: Tensor, rank: int, generator: torch.Generator | None) -> Factors:
    """Return a start of the full rank in the weight's dtype."""
    return Factors(*(factor.to(weight.dtype) for factor in pad_to_rank(start, rank, generator)))


def _energy(matrix: Tensor, moment: Tensor) -> float:
    """Return tr(M C Mᵀ)."""
    return float(((matrix @ moment) * matrix).sum())


def _bounded(start: Factors, weight: Tensor, energy: Energy, scaling: float, drift: float) -> Factors:
    """Shrink both factors by √g, g = min(1, √(τ·tr(W0 C W0ᵀ)/tr(D C Dᵀ)))."""
    before = energy(weight.to(start.B.dtype))
    after = scaling**2 * energy(torch.linalg.qr(start.B).R @ start.A)  # B = QR: tr(B M Bᵀ) = tr(R M Rᵀ)
    gain = math.sqrt(drift * before / after) if after > drift * before else 1.0
    return Factors(*(math.sqrt(gain) * factor for factor in start))


@register
@dataclasses.dataclass(frozen=True)
class CNTLoRA(ShiftOptions, Method):
    """Reconstruction: a closed-form step that undoes a shift of the layer's inputs, cut to the rank.

    With constraint ``"F3"`` the function is preserved (``base="auto"`` gives the offset form); with the others the step
    is kept. Centred moments are better at their best rate: benchmarks/results/choices.md.

    Args (beside those of `ShiftOptions`):
        metric: of the truncation, ``"data"`` or ``"frobenius"``.
        drift: largest output energy of the step relative to that of the layer, None for no bound. Not for ``"F3"``.
        paired: of ``"F2"``: every batch of the data has one of ``proxy_data`` to be paired with; else C_pf = 0.
        exact: full SVD (slow) instead of the seeded randomized one.
        sketch: with ``top_k`` and constraint F1, F2 or F3, collect a seeded sketch of the second moment instead of all
            of it: True wherever it is smaller, "auto" where it has at most an eighth of the columns. A layer whose
            spectrum decays too slowly for it gets a remark.
        columns: of the sketch; default 4·top_k + 30.
    """

    moment: Moment = "centred"
    metric: Metric = "data"
    drift: float | None = 0.01
    paired: bool = False
    exact: bool = False
    sketch: SketchChoice = "auto"
    columns: int | None = None

    info: ClassVar = MethodInfo(
        name="cntlora",
        summary="s·BA = the best rank-r step that undoes a shift of the layer's inputs",
        paper="Das et al. 2025, arXiv:2507.08044",
        product="step",
        needs=("forward",),
        status="reconstruction",
        variable_ranks=True,
    )
    streams: ClassVar[frozenset[str]] = frozenset({"input_second_moment", "input_sum"})
    copies: ClassVar = (5.0, 6.0)

    def __post_init__(self) -> None:
        """Check the options."""
        bounded = (self.top_k is None or self.top_k >= 1) and (self.drift is None or self.drift > 0)
        if not (self.damping >= 0 and bounded):
            raise ValueError(
                "damping must be ≥ 0, top_k ≥ 1 or None, drift > 0 or None, "
                f"got {self.damping}, {self.top_k} and {self.drift}"
            )
        super().__post_init__()
        require_choice("metric", self.metric, Metric)
        require_sketch_option(self.sketch, self.columns)
        if self.sketch is True and not self._low_rank:
            raise ValueError("sketch=True needs top_k, and constraint F1, F2 or F3")
        if self.paired and self.constraint != "F2":
            raise ValueError(f"paired belongs to constraint 'F2', not to '{self.constraint}'")

    @property
    def product(self) -> Product:
        """F3 is W0 itself on the data, which only makes sense beside W0 − s·BA; the others are steps to be kept."""
        return "preserve" if self.constraint == "F3" else self.info.product

    @property
    def _low_rank(self) -> bool:
        """Whether the ``top_k`` leading eigenpairs of the moment are all that the constraint needs."""
        return self.top_k is not None and self.constraint in ("F1", "F2", "F3") and not self.paired

    @property
    def comparison(self) -> Comparison | None:
        """Proxy pre-training data for F1p and F5, pairs for F2 if that was asked for."""
        return "pairs" if self.paired else "proxy" if self.constraint in ("F1p", "F5") else None

    @property
    def request(self) -> Request:
        """The moments of the inputs; sketched where that pays and the leading eigenpairs are enough."""
        choice = self.sketch if self._low_rank else False
        extra = 4 * (self.top_k or 0) + 30
        return Request(self.streams, sketch=chosen_sketch(choice, self.columns, per_rank=0, extra=extra))

    def start(
        self,
        site: LoraSite,
        generator: torch.Generator,
        statistics: LayerStatistics,
        proxy: LayerStatistics | None = None,
    ) -> Factors:
        """Return the factors of the site's step; ``proxy`` holds the same sums over pre-training-like data."""
        require_rank_at_most_min(site)
        known, energy, moments = self._known(site, statistics, proxy)
        if self.moment == "centred" and not known.varies:
            warnings.warn("its inputs do not vary in the data: no shift to see, a plain LoRA start", stacklevel=2)
            return kaiming.factors(site.out_features, site.in_features, site.rank, generator=generator)
        weight = site.weight()
        with naming(site):
            shift = solve(weight, known, self, moments)
            _warn_of_wasted_rank(self.metric, self)
            cut = {"metric": self.metric, "exact": self.exact, "generator": generator}
            start = _cut(shift, weight, site.rank, site.scaling, **cut)
            if self.drift is not None and self.constraint != "F3":
                start = _bounded(start, weight, energy, site.scaling, self.drift)
            return _finished(start, weight, site.rank, generator)

    def energies(self, site: LoraSite, statistics: LayerStatistics, proxy: LayerStatistics | None = None) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: the squared singular values of the site's step."""
        known, _, moments = self._known(site, statistics, proxy)
        if self.moment == "centred" and not known.varies:
            return known.values.new_zeros(min(site.in_features, site.out_features))
        with naming(site):
            _warn_of_wasted_rank(self.metric, self)
            return squared_singular_values(_matrix(solve(site.weight(), known, self, moments), self.metric))

    def _known(
        self, site: LoraSite, statistics: LayerStatistics, proxy: LayerStatistics | None
    ) -> tuple[Spectrum, Energy, Moments]:
        """Return the eigenpairs of C and tr(M C Mᵀ), computed once for layers that share their input; other moments."""
        mean = mean_of(site, statistics, "input_sum")
        moments = Moments(mean) if proxy is None or self._low_rank else _proxy_moments(site, mean, proxy)
        dtype = torch.promote_types(site.weight().dtype, mean.dtype)
        find = self._from_moment if statistics.input_sketch is None else self._from_sketch
        key = ("cntlora", dtype, self.moment, None if statistics.input_sketch is None else self.top_k)
        with naming(site):
            known, energy = statistics.shared.once(key, lambda: find(site, statistics, dtype, moments))
        return known, energy, moments

    def _from_moment(
        self, site: LoraSite, statistics: LayerStatistics, dtype: torch.dtype, moments: Moments
    ) -> tuple[Spectrum, Energy]:
        moment = mean_of(site, statistics, "input_second_moment").to(dtype)
        return spectrum(moment, self, moments), lambda matrix: _energy(matrix, moment)

    def _from_sketch(
        self, site: LoraSite, statistics: LayerStatistics, dtype: torch.dtype, moments: Moments
    ) -> tuple[Spectrum, Energy]:
        """Approximate C from its sketch, for the eigenpairs and for the energies."""
        assert self.top_k is not None
        assert moments.input_mean is not None
        sketch, test = input_sketch(site, statistics)
        mean = moments.input_mean
        power = float(mean_of(site, statistics, "input_energy"))
        noise = column_rounding(sketch)
        plain = nystrom(sketch.double(), test, noise=noise)
        found, total = plain, power
        if self.moment == "centred":
            found, total = nystrom(centred_sketch(sketch, test, mean), test, noise=noise), power - float(mean @ mean)
        warn_if_missed(sketch, plain, self.top_k)
        n, k = len(sketch), self.top_k
        values, vectors = found.values[:k].to(dtype), found.vectors[:, :k].to(dtype)
        root = (plain.vectors * plain.values.sqrt()).to(dtype)
        known = Spectrum(values, vectors, total / n, power / n, rounding(sketch))
        return known, lambda matrix: float((matrix @ root).square().sum())


def _proxy_moments(site: LoraSite, mean: Tensor, proxy: LayerStatistics) -> Moments:
    """Return the mean of a layer's inputs with the moments of its proxy inputs."""
    cross = proxy.cross_second_moment
    return Moments(
        mean,
        mean_of(site, proxy, "input_second_moment"),
        mean_of(site, proxy, "input_sum"),
        None if cross is None else (cross / proxy.tokens).to(site.device),
    )
