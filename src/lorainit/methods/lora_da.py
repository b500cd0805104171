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
from ..numerics.iterative import damped_cholesky, spectral_norm
from ..numerics.linalg import SVD, canonical_signs, randomized_svd, require_rank
from ..statistics.batches import MaskKind
from ..statistics.collect import Request
from ..statistics.layer import LayerStatistics
from .method import Method, MethodInfo, require_choice, require_rank_at_most_min
from .parts.gradient import collected, naming, require_signal
from .parts.guidance import Factorize, Guidance, curvature, held_out_damping
from .parts.lora_da import Mode, Options, Solution
from .registry import register

_DOUBLE_UP_TO = 2048  # inputs; wider ones are solved in float32 where that is safe


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
    """Return LoRA-DA's start: the factors of `solve`, which has the arguments; further ones are those of `Options`."""
    names = {field.name for field in dataclasses.fields(Options)} & options.keys()
    chosen = Options(mode=mode, **{name: options.pop(name) for name in names})
    statistics = (gradient, input_second_moment, output_gradient_second_moment)
    return solve(*statistics, rank, chosen, num_samples=num_samples, **options).factors


def solve(
    gradient: Float[Tensor, "out in"],
    input_second_moment: Float[Tensor, "in in"],
    output_gradient_second_moment: Float[Tensor, " out"],
    rank: int,
    options: Options,
    *,
    num_samples: int,
    tokens_per_sample: float = 1.0,
    calibration_samples: int | None = None,
    halves: tuple[Tensor, Tensor] | None = None,
    sequence_gradients: Float[Tensor, "n out"] | None = None,
    generator: torch.Generator | None = None,
    factorize: Factorize = damped_cholesky,
    dense_up_to: int = 512,
    double_up_to: int = _DOUBLE_UP_TO,
) -> Solution:
    """Return LoRA-DA's start of one layer from its statistics.

    Args:
        gradient: G, the mean over sequences of the weight gradient, out×in.
        input_second_moment: Z, the mean over tokens of z zᵀ.
        output_gradient_second_moment: y, the mean over tokens of g⊙g. Both gradients are of the loss summed over a
            sequence's tokens (consistent), or averaged over them (official).
        rank: r, at most min(out, in).
        options: see `Options`.
        num_samples: N, the number of sequences to be fine-tuned on.
        tokens_per_sample: T; official does not use it.
        calibration_samples: n, the number of sequences behind G; for ``debias`` and ``noise_to_signal``.
        halves: G over two disjoint halves of the sequences; for ``cross_fit`` and ``damping="auto"``.
        sequence_gradients: the authors' switch for a full output factor, see `curvature`.
        generator: source of the search's start (default: a fresh one with seed 0); the result depends on it no further
            than the solver's tolerance.
        factorize: what factorizes Z, given it in the dtype of the solution and λ_z.
        dense_up_to: with that many inputs or fewer the eigenvectors come from a dense Ω, else from products alone.
        double_up_to: wider inputs are solved in the dtype of Z, at least float32, if λ_z is at least mean(diag Z)/1000;
            else in float64.

    Raises:
        NonFiniteError: NaN or infinity in a statistic.
        ValueError: a statistic is zero or missing, or the rank is out of range.
    """
    posed = pose(
        gradient,
        input_second_moment,
        output_gradient_second_moment,
        rank,
        options,
        num_samples=num_samples,
        tokens_per_sample=tokens_per_sample,
        calibration_samples=calibration_samples,
        halves=halves,
        sequence_gradients=sequence_gradients,
        generator=generator,
        factorize=factorize,
        double_up_to=double_up_to,
    )
    curved, delta, options = posed.guidance.curvature, posed.delta, posed.options
    found = posed.guidance.smallest(rank, posed.left, dense_up_to=dense_up_to)

    frame = canonical_signs(SVD(found.vectors, found.values, found.vectors.mT)).U
    B = delta.mT @ frame
    solved = curved.cholesky.solve(frame)
    kept = max(float(B.square().sum()), torch.finfo(delta.dtype).tiny)
    ratio = posed.variance_scale * float((frame * solved).sum()) / kept
    sampled = None if posed.noise is None else posed.noise * float((solved * (curved.moment @ solved)).sum()) / kept
    return Solution(
        factors=_scaled(frame.mT, B, options, torch.promote_types(gradient.dtype, torch.float32)),
        eigenvalues=found.values,
        sigma=posed.sigma,
        damping=curved.cholesky.damping,
        output_damping=curved.output_damping,
        retries=curved.cholesky.retries,
        residual=found.residual,
        variance_to_bias=ratio,
        break_even=num_samples * ratio,
        noise_to_signal=sampled,
    )


class Posed(NamedTuple):
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


def pose(
    gradient: Float[Tensor, "out in"],
    input_second_moment: Float[Tensor, "in in"],
    output_gradient_second_moment: Float[Tensor, " out"],
    rank: int,
    options: Options,
    *,
    num_samples: int,
    tokens_per_sample: float = 1.0,
    calibration_samples: int | None = None,
    halves: tuple[Tensor, Tensor] | None = None,
    sequence_gradients: Float[Tensor, "n out"] | None = None,
    generator: torch.Generator | None = None,
    factorize: Factorize = damped_cholesky,
    double_up_to: int = _DOUBLE_UP_TO,
) -> Posed:
    """Return the eigenproblem of a layer; arguments and errors are those of `solve`."""
    require_rank(gradient, rank)
    if not (num_samples >= 1 and tokens_per_sample > 0):
        raise ValueError(f"num_samples and tokens_per_sample must be positive, got {num_samples}, {tokens_per_sample}")
    if (options.halved and halves is None) or (options.debias and not calibration_samples):
        raise ValueError("cross_fit and damping='auto' need halves, debias needs calibration_samples")
    require_signal("weight gradient", gradient)
    require_signal("second moment of the inputs", input_second_moment)
    require_signal("second moment of the output gradients", output_gradient_second_moment)
    Z, y = input_second_moment, output_gradient_second_moment
    T = tokens_per_sample if options.mode == "consistent" else 1.0
    if halves is not None and options.damping == "auto":
        options = _with_damping(options, halves, Z, y, rank, num_samples=num_samples, tokens_per_sample=T)
    dampings = options.dampings(Z, y)
    safe = dampings[0] >= 1e-3 * float(Z.diagonal().mean())
    narrow = gradient.device.type == "mps" or (safe and len(Z) > double_up_to)
    dtype = torch.promote_types(Z.dtype, torch.float32) if narrow else torch.float64
    G, Z, y = gradient.to(dtype), Z.to(dtype), y.to(dtype)
    curved = curvature(Z, y, *dampings, tokens_per_sample=T, sequence_gradients=sequence_gradients, factorize=factorize)
    delta = curved.displacement(G)
    generator = generator or torch.Generator().manual_seed(0)
    left = randomized_svd(delta, min(2 * rank, *delta.shape), generator=generator).U
    sigma = spectral_norm(delta, left)
    unit = sigma**options.normalization * options.reference ** (1 - options.normalization)
    delta /= unit
    c = float(curved.output_inverse.sum()) / num_samples / unit**2
    noise = curved.noise(calibration_samples) / unit**2 if calibration_samples else None
    scale = options.bias_weight * float((delta.mT @ delta).norm()) / curved.inverse_norm() if options.match_norms else c
    pair = (delta, delta)
    if halves is not None and options.cross_fit:
        pair = (curved.displacement(halves[0].to(G)) / unit, curved.displacement(halves[1].to(G)) / unit)
    guidance = Guidance(
        curvature=curved,
        displacements=pair,
        variance=options.beta * scale,
        noise=noise if noise is not None and options.debias else 0.0,
        bias=options.bias_weight,
    )
    return Posed(guidance, delta, left, sigma, c, noise, options)


def _with_damping(
    options: Options, halves: tuple[Tensor, Tensor], Z: Tensor, y: Tensor, rank: int, **units: float
) -> Options:
    """Return the options with the damping of Z that suits held-out data best; that of y stays what it is."""
    output = 0.1 if options.output_damping is None else options.output_damping
    plain = dataclasses.replace(options, damping=0.0, output_damping=output, cross_fit=False, debias=False)

    def subspace(half: Tensor, damping: float) -> Tensor:
        return solve(half, Z, y, rank, dataclasses.replace(plain, damping=damping), **units).factors.A  # pyright: ignore[reportArgumentType]

    chosen = held_out_damping(halves, Z, y, subspace)
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
        """Return the start of the site, and how it came about."""
        require_rank_at_most_min(site)
        with naming(site):
            return solve(
                *self._means(site, statistics), site.rank, self, generator=generator, **self._counts(site, statistics)
            )

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics) -> Factors:
        """Return A and B for the site."""
        return self.solve(site, generator, statistics).factors

    def energies(self, site: LoraSite, statistics: LayerStatistics) -> Tensor:
        """Return what `lorainit.start.budget.allocate` pools: −ω of every eigenvalue of Ω that is below zero.

        It is the displacement that a direction keeps less the variance that fitting it costs, in the units of the loss
        but for σ², which differs from layer to layer.
        """
        with naming(site):
            posed = pose(*self._means(site, statistics), 1, self, **self._counts(site, statistics))
            return torch.linalg.eigvalsh(posed.guidance.dense()).neg().clamp_min(0)

    def _means(self, site: LoraSite, statistics: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """Return G = S_G/n, Z = S_zz/M and y = S_y/M on the layer's device; n sequences, M tokens."""
        sums = {name: v.to(site.device) for name, v in collected(statistics, self.streams).items()}
        n, M = statistics.sequences, statistics.tokens
        moments = (sums["input_second_moment"] / M, sums["output_gradient_squares"] / M)
        return sums["weight_gradient"] / n, *moments

    def workspace(self, site: LoraSite) -> int:
        """Return about how many bytes the start of a layer takes; `pose` says what is solved in float64."""
        double = site.in_features <= _DOUBLE_UP_TO or (isinstance(self.damping, float) and self.damping < 1e-3)  # noqa: PLR2004
        return super().workspace(site) * (2 if double else 1)

    def _counts(self, site: LoraSite, statistics: LayerStatistics) -> dict[str, Any]:
        """Return the numbers of samples, what factorizes Z, and the gradients of the halves where they are needed."""
        n, M = statistics.sequences, statistics.tokens
        counts: dict[str, Any] = {
            "num_samples": self.training_samples,
            "tokens_per_sample": M / n,
            "calibration_samples": n,
        }
        # one factorization for all layers with this input
        counts["factorize"] = lambda Z, damping: statistics.shared.once(
            ("lora-da", Z.dtype, damping), lambda: damped_cholesky(Z, damping)
        )
        if not self.halved:
            return counts
        if n < 2:  # noqa: PLR2004
            raise ValueError("cross_fit and damping='auto' need at least two sequences")
        sums = collected(statistics, ("odd_weight_gradient", "weight_gradient"))
        odd, every = (sums[name].to(site.device) for name in ("odd_weight_gradient", "weight_gradient"))
        return counts | {"halves": (odd / (n // 2), (every - odd) / (n - n // 2))}
