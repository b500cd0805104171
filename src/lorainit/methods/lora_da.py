r"""LoRA-DA: the subspace where the displacement that the data ask for outweighs the variance of fitting it.

Zhang et al. 2026, "LoRA-DA: Data-Aware Initialization for Low-Rank Adaptation via Asymptotic Analysis",
arXiv:2510.24561 (ICML 2026). G is the mean gradient of a weight (here out×in), Z = E[z zᵀ] the second moment of its
inputs, y the diagonal of that of its output gradients, N the number of fine-tuning samples:

    Δ = −Z_λ⁻¹ Gᵀ diag(u)  (in×out),   Z_λ = Z + λ_z I,   u = 1/(T(y + λ_y)),   Δ̂ = Δ/σ,   σ = ‖Δ‖₂
    Ω = β c Z_λ⁻¹ − Δ̂Δ̂ᵀ,   c = Σu/(N σ²);   A₀ = the r eigenvectors of the smallest eigenvalues of Ω
    A = A₀ᵀ/√γ,   B = Δ̂ᵀA₀/√γ

First term: variance of the fit on N samples; second: what of the displacement A₀ keeps. ``consistent`` has every factor
in units per sequence (T tokens a sequence) and damping relative to the mean diagonal; ``official`` is the arithmetic of
the authors' code: loss averaged over each sequence's tokens, T = 1, absolute damping, a small β.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.iterative import Cholesky, damped_cholesky, spectral_norm
from ..numerics.linalg import SVD, canonical_signs, randomized_svd
from ..statistics.batches import MaskKind
from ..statistics.collect import Request
from ..statistics.layer import LayerStatistics
from .method import Method, MethodInfo, require_choice, require_rank_at_most_min
from .parts.gradient import collected, naming
from .parts.guidance import Curvature, Guidance, curvature, held_out_damping
from .parts.lora_da import Calibration, Mode, Options, Solution, Solver
from .registry import register

_DEFAULT_SOLVER = Solver()


def factors(
    gradient: Float[Tensor, "out in"],
    input_second_moment: Float[Tensor, "in in"],
    output_gradient_second_moment: Float[Tensor, " out"],
    rank: int,
    *,
    num_samples: int,
    mode: Mode = "consistent",
    **options: Any,
) -> Factors:
    """Return LoRA-DA's start of one layer.

    Args:
        gradient: G, see `lorainit.methods.parts.lora_da.Calibration`.
        input_second_moment: Z.
        output_gradient_second_moment: y.
        rank: r, at most min(out, in).
        num_samples: N.
        mode: ``"consistent"`` or ``"official"``.
        **options: further fields of `Options`, of `Calibration` and of `Solver`.

    Raises:
        TypeError: an unknown option.
        NonFiniteError: NaN or infinity in a statistic.
        ValueError: a statistic is zero or missing, or an argument is out of range.
    """
    given = {"num_samples": num_samples, "mode": mode, **options}
    chosen, known, solver = (_take(kind, given) for kind in (Options, Calibration, Solver))
    if given:
        raise TypeError(f"unknown options {sorted(given)}")
    layer = Calibration(gradient, input_second_moment, output_gradient_second_moment, **known)
    return solve(layer, rank, Options(**chosen), Solver(**solver)).factors


def _take(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of a dataclass out of some keyword arguments."""
    return {field.name: given.pop(field.name) for field in dataclasses.fields(kind) if field.name in given}


def solve(layer: Calibration, rank: int, options: Options, solver: Solver = _DEFAULT_SOLVER) -> Solution:
    """Return LoRA-DA's start of one layer, and the figures that explain it.

    Args:
        layer: the statistics.
        rank: r, at most min(out, in).
        options: of the mathematics.
        solver: how the eigenproblem is solved.

    Raises:
        NonFiniteError: NaN or infinity in a statistic.
        ValueError: a statistic is zero or missing, or the rank is out of range.
    """
    posed = pose(layer, rank, options, solver)
    curved, delta, options = posed.guidance.curvature, posed.delta, posed.options
    found = posed.guidance.smallest(rank, posed.left, dense_up_to=solver.dense_up_to)
    frame = canonical_signs(SVD(found.vectors, found.values, found.vectors.mT)).U
    B = delta.mT @ frame
    solved = curved.cholesky.solve(frame)
    kept = max(float(B.square().sum()), torch.finfo(delta.dtype).tiny)
    ratio = posed.variance_scale * float((frame * solved).sum()) / kept
    sampled = None if posed.noise is None else posed.noise * float((solved * (curved.moment @ solved)).sum()) / kept
    return Solution(
        factors=_scaled(frame.mT, B, options, torch.promote_types(layer.gradient.dtype, torch.float32)),
        eigenvalues=found.values,
        sigma=posed.sigma,
        damping=curved.cholesky.damping,
        output_damping=curved.output_damping,
        retries=curved.cholesky.retries,
        residual=found.residual,
        variance_to_bias=ratio,
        break_even=layer.num_samples * ratio,
        noise_to_signal=sampled,
    )


class Eigenproblem(NamedTuple):
    """The eigenproblem of one layer.

    Attributes:
        guidance: Ω.
        delta: Δ̂.
        left: leading left singular vectors of Δ̂.
        sigma: ‖Δ‖₂.
        variance_scale: c.
        noise: κ in the units of Δ̂, where the number of calibration samples is known.
        options: the options, with the damping that the data chose.
    """

    guidance: Guidance
    delta: Float[Tensor, "in out"]
    left: Float[Tensor, "in k"]
    sigma: float
    variance_scale: float
    noise: float | None
    options: Options


def pose(layer: Calibration, rank: int, options: Options, solver: Solver = _DEFAULT_SOLVER) -> Eigenproblem:
    """Return the eigenproblem of a layer; arguments and errors are those of `solve`."""
    layer.require(rank, options)
    if options.mode == "official":
        layer = dataclasses.replace(layer, tokens_per_sample=1.0)
    if options.damping == "auto":
        options = _with_damping(layer, rank, options)
    curved, layer = _curvature(layer, options, solver)
    delta = curved.displacement(layer.gradient)
    generator = solver.generator or torch.Generator().manual_seed(0)
    left = randomized_svd(delta, min(2 * rank, *delta.shape), generator=generator).U
    sigma = spectral_norm(delta, left)
    unit = sigma**options.normalization * options.reference ** (1 - options.normalization)
    delta /= unit
    n = layer.calibration_samples
    c = float(curved.output_inverse.sum()) / layer.num_samples / unit**2
    noise = curved.noise(n) / unit**2 if n else None
    guidance = Guidance(
        curvature=curved,
        displacements=_displacements(layer, options, curved, delta, unit),
        variance=options.beta * (_matched_scale(options, curved, delta) if options.match_norms else c),
        noise=noise if noise is not None and options.debias else 0.0,
        bias=options.bias_weight,
    )
    return Eigenproblem(guidance, delta, left, sigma, c, noise, options)


def _curvature(layer: Calibration, options: Options, solver: Solver) -> tuple[Curvature, Calibration]:
    """Return the damped curvature, and the statistics in the dtype that it is solved in."""
    dampings = options.dampings(layer.input_second_moment, layer.output_gradient_second_moment)
    layer = layer.to(solver.dtype(layer, dampings[0]))
    curved = curvature(
        layer.input_second_moment,
        layer.output_gradient_second_moment,
        *dampings,
        tokens_per_sample=layer.tokens_per_sample,
        sequence_gradients=layer.sequence_gradients,
        factorize=solver.factorize,
    )
    return curved, layer


def _displacements(
    layer: Calibration, options: Options, curved: Curvature, delta: Tensor, unit: float
) -> tuple[Tensor, Tensor]:
    """Return the pair whose product is the bias term: Δ̂ twice, or those of the two halves of the data."""
    if layer.halves is None or not options.cross_fit:
        return delta, delta
    first, second = (curved.displacement(half.to(delta)) / unit for half in layer.halves)
    return first, second


def _matched_scale(options: Options, curved: Curvature, delta: Tensor) -> float:
    """Return the scale of Z_λ⁻¹ at which its Frobenius norm is that of the bias term."""
    return options.bias_weight * float((delta.mT @ delta).norm()) / curved.inverse_norm()


def _with_damping(layer: Calibration, rank: int, options: Options) -> Options:
    """Return the options with the damping of Z that suits held-out data best; that of y stays what it is."""
    assert layer.halves is not None
    output = 0.1 if options.output_damping is None else options.output_damping
    plain = dataclasses.replace(options, damping=0.0, output_damping=output, cross_fit=False, debias=False)
    whole = dataclasses.replace(layer, halves=None, calibration_samples=None, sequence_gradients=None)

    def subspace(half: Tensor, damping: float) -> Tensor:
        chosen = dataclasses.replace(plain, damping=damping)
        return solve(dataclasses.replace(whole, gradient=half), rank, chosen).factors.A

    chosen = held_out_damping(layer.halves, layer.input_second_moment, layer.output_gradient_second_moment, subspace)
    return dataclasses.replace(options, damping=chosen, output_damping=output)


def _scaled(A: Tensor, B: Tensor, options: Options, dtype: torch.dtype) -> Factors:
    """Return A₀ᵀ/√γ and B₀ᵀ/√γ, balanced or with B = 0 where that was asked for."""
    if options.balance:
        svd = canonical_signs(SVD(*torch.linalg.svd(B, full_matrices=False)))
        A, B = svd.S.sqrt()[:, None] * (svd.Vh @ A), svd.U * svd.S.sqrt()
    if options.zero_b:
        B = torch.zeros_like(B)
    root = math.sqrt(options.gamma)
    return Factors((A / root).to(dtype).contiguous(), (B / root).to(dtype).contiguous())


@register
@dataclasses.dataclass(frozen=True)
class LoRADA(Options, Method):
    """Eigenvectors that trade the displacement that the data ask for against the variance of fitting it.

    Args (beside those of `Options`):
        samples: sequences of calibration data to use, the first of them.
        training_samples: N, the number of sequences in the fine-tuning set (100 000 as published).
        mask: which tokens count in Z and y: all but padding, or only those whose output is scored.
    """

    samples: int = 256
    training_samples: int = 100_000
    mask: MaskKind = "attention"

    info: ClassVar = MethodInfo(
        name="lora-da",
        summary="A = directions where the natural gradient outweighs the variance of the fit, B = its part there",
        paper="Zhang et al. 2026, arXiv:2510.24561",
        product="step",
        needs=("forward", "backward"),
        variable_ranks=True,
    )

    streams: ClassVar[frozenset[str]] = frozenset({"input_second_moment", "output_gradient_squares", "weight_gradient"})
    copies: ClassVar = (4.5, 6.0)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.samples < 1 or self.training_samples < 1:
            raise ValueError(f"samples and training_samples must be ≥ 1, got {self.samples}, {self.training_samples}")
        require_choice("mask", self.mask, MaskKind)

    @property
    def request(self) -> Request:
        """The sums that are needed; official: of the loss averaged over each sequence's label terms."""
        needed = self.streams | {"odd_weight_gradient"} if self.halved else self.streams
        loss = "sequence_mean" if self.mode == "official" else "sum"
        return Request(needed, loss=loss, mask=self.mask, samples=self.samples)

    def solve(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Solution:
        """Return the start of the site, and the figures that explain it."""
        require_rank_at_most_min(site)
        with naming(site):
            return solve(self._layer(site, statistics), site.rank, self, _solver(statistics, generator))

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return A and B for the site."""
        return self.solve(site, generator, statistics).factors

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: −ω of every eigenvalue of Ω that is below zero.

        It is the displacement that a direction keeps less the variance that fitting it costs, in the units of the loss
        but for σ², which differs from layer to layer.
        """
        with naming(site):
            posed = pose(self._layer(site, statistics), 1, self, _solver(statistics))
            return torch.linalg.eigvalsh(posed.guidance.dense()).neg().clamp_min(0)

    def workspace(self, site: LoraSite) -> int:
        """Return about how many bytes the start of a layer takes; `Solver` says what is solved in float64."""
        double = site.in_features <= _DEFAULT_SOLVER.double_up_to or (
            isinstance(self.damping, float) and self.damping < 1e-3
        )  # noqa: PLR2004
        return super().workspace(site) * (2 if double else 1)

    def _layer(self, site: LoraSite, statistics: LayerStatistics) -> Calibration:
        """Return the means on the layer's device: G = S_G/n, Z = S_zz/M and y = S_y/M; n sequences, M tokens."""
        sums = {name: v.to(site.device) for name, v in collected(statistics, self.streams).items()}
        n, M = statistics.sequences, statistics.tokens
        return Calibration(
            sums["weight_gradient"] / n,
            sums["input_second_moment"] / M,
            sums["output_gradient_squares"] / M,
            num_samples=self.training_samples,
            tokens_per_sample=M / n,
            calibration_samples=n,
            halves=_halves(site, statistics) if self.halved else None,
        )


def _halves(site: LoraSite, statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Return the mean gradients of every second sequence and of the others."""
    n = statistics.sequences
    if n < 2:  # noqa: PLR2004
        raise ValueError("cross_fit and damping='auto' need at least two sequences")
    sums = collected(statistics, ("odd_weight_gradient", "weight_gradient"))
    odd, every = (sums[name].to(site.device) for name in ("odd_weight_gradient", "weight_gradient"))
    return odd / (n // 2), (every - odd) / (n - n // 2)


def _solver(statistics: LayerStatistics, generator: torch.Generator | None = None) -> Solver:
    """Return a solver that factorizes Z once for all layers with this input."""

    def factorize(Z: Tensor, damping: float) -> Cholesky:
        return statistics.shared.once(("lora-da", Z.dtype, damping), lambda: damped_cholesky(Z, damping))

    return Solver(generator, factorize)
