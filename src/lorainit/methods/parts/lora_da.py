"""LoRA-DA's options, the statistics of a layer that it takes, and the start that it gives with its diagnostics."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import torch

from ..._typing import Float, Tensor
from ...adapter.factors import Factors
from ...numerics.iterative import damped_cholesky
from ...numerics.linalg import require_rank
from ..method import require_choice
from .gradient import require_signal
from .guidance import Factorize

Mode = Literal["consistent", "official"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the mathematics. None: the mode's own value.

    Args:
        mode: ``"consistent"``, or ``"official"``, the arithmetic of the authors' code.
        damping: consistent: ρ of λ_z = ρ·mean(diag Z), default 1; ``"auto"`` takes the one whose subspace of one half
            of the data promises the largest loss decrease on the other. official: λ_z itself, default 1e-6.
        output_damping: consistent: ρ_y of λ_y = ρ_y·mean(y), default ρ (0.1 with auto); official: ratio of λ_y to the
            lower median of y, default λ_y = 1e-6.
        variance_weight: β, default 1 (official 0.03); 0: the leading singular space of Δ.
        gamma: γ; both factors are divided by √γ.
        debias: take the sampling noise out of Δ̂Δ̂ᵀ: Ω += κ Z_λ⁻¹ Z Z_λ⁻¹, κ = Σu²Ty/(n σ²), n calibration sequences.
        cross_fit: ½(Δ̂₁Δ̂₂ᵀ + Δ̂₂Δ̂₁ᵀ) from two halves of the data in place of Δ̂Δ̂ᵀ.
        zero_b: start with B = 0: the function does not move.
        bias_weight: multiplies Δ̂Δ̂ᵀ (the authors' α_b).
        normalization: p; Δ is divided by σᵖ·reference¹⁻ᵖ. 1: unit norm; 0 with reference 1: as it is.
        reference: see ``normalization``.
        match_norms: scale the variance term to the Frobenius norm of the other term before β.
        balance: move the singular values of B in equal parts to B and A.
    """

    mode: Mode = "consistent"
    damping: float | Literal["auto"] | None = None
    output_damping: float | None = None
    variance_weight: float | None = None
    gamma: float = 1024.0
    debias: bool = False
    cross_fit: bool = False
    zero_b: bool = False
    bias_weight: float = 1.0
    normalization: float = 1.0
    reference: float = 1.0
    match_norms: bool = False
    balance: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        require_choice("mode", self.mode, Mode)
        if isinstance(self.damping, str) and self.damping != "auto":
            raise ValueError(f"damping={self.damping!r} is neither a number nor 'auto'")
        for name in ("damping", "output_damping", "variance_weight", "bias_weight"):
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 <= (value or 0) < math.inf:
                raise ValueError(f"{name} must be ≥ 0, got {value}")
        if not (0 < self.gamma < math.inf and 0 < self.reference < math.inf):
            raise ValueError(f"gamma and reference must be positive, got {self.gamma} and {self.reference}")
        if self.mode == "official" and (self.halved or self.debias):
            raise ValueError("debias, cross_fit and damping='auto' need the units of mode='consistent'")
        if self.zero_b and self.balance:
            raise ValueError("zero_b leaves nothing to balance")

    @property
    def halved(self) -> bool:
        """Whether the gradients of two halves of the data are needed."""
        return self.cross_fit or self.damping == "auto"

    @property
    def beta(self) -> float:
        """β, the weight of the variance term."""
        default = 1.0 if self.mode == "consistent" else 0.03
        return default if self.variance_weight is None else self.variance_weight

    def dampings(self, Z: Float[Tensor, "in in"], y: Float[Tensor, " out"]) -> tuple[float, float]:
        """Return λ_z and λ_y for these second moments; ``damping`` is not "auto"."""
        assert not isinstance(self.damping, str)
        if self.mode == "official":
            absolute = 1e-6
            output = absolute if self.output_damping is None else self.output_damping * float(y.median())
            return absolute if self.damping is None else self.damping, output
        relative = 1.0 if self.damping is None else self.damping
        relative_y = relative if self.output_damping is None else self.output_damping
        return relative * float(Z.diagonal().mean()), relative_y * float(y.mean())


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of one layer: means over the calibration data, and the numbers of samples.

    Args:
        gradient: G, the mean over sequences of the weight gradient, out×in.
        input_second_moment: Z, the mean over tokens of z zᵀ.
        output_gradient_second_moment: y, the mean over tokens of g⊙g. Both gradients are of the loss summed over a
            sequence's tokens (consistent), or averaged over them (official).
        num_samples: N, the number of sequences to be fine-tuned on.
        tokens_per_sample: T; official does not use it.
        calibration_samples: n, the number of sequences behind G; for ``debias`` and ``noise_to_signal``.
        halves: G over two disjoint halves of the sequences; for ``cross_fit`` and ``damping="auto"``.
        sequence_gradients: the authors' switch for a full output factor, see `lorainit.methods.parts.guidance`.
    """

    gradient: Float[Tensor, "out in"]
    input_second_moment: Float[Tensor, "in in"]
    output_gradient_second_moment: Float[Tensor, " out"]
    num_samples: int
    tokens_per_sample: float = 1.0
    calibration_samples: int | None = None
    halves: tuple[Tensor, Tensor] | None = None
    sequence_gradients: Float[Tensor, "n out"] | None = None

    def require(self, rank: int, options: Options) -> None:
        """Raise unless a start of this rank can be computed with these options.

        Raises:
            NonFiniteError: NaN or infinity in a statistic.
            ValueError: a statistic is zero or missing, or the rank is out of range.
        """
        require_rank(self.gradient, rank)
        if not (self.num_samples >= 1 and self.tokens_per_sample > 0):
            raise ValueError(
                f"num_samples and tokens_per_sample must be positive, got {self.num_samples}, {self.tokens_per_sample}"
            )
        if (options.halved and self.halves is None) or (options.debias and not self.calibration_samples):
            raise ValueError("cross_fit and damping='auto' need halves, debias needs calibration_samples")
        require_signal("weight gradient", self.gradient)
        require_signal("second moment of the inputs", self.input_second_moment)
        require_signal("second moment of the output gradients", self.output_gradient_second_moment)

    def to(self, dtype: torch.dtype) -> Calibration:
        """Return the statistics with G, Z and y in another dtype."""
        names = ("gradient", "input_second_moment", "output_gradient_second_moment")
        return dataclasses.replace(self, **{name: getattr(self, name).to(dtype) for name in names})


@dataclasses.dataclass(frozen=True)
class Solver:
    """How the eigenproblem is solved.

    Args:
        generator: source of the search's start (default: a fresh one with seed 0); the result depends on it no further
            than the solver's tolerance.
        factorize: what factorizes Z, given it in the dtype of the solution and λ_z.
        dense_up_to: with that many inputs or fewer the eigenvectors come from a dense Ω, else from products alone.
        double_up_to: wider inputs are solved in the dtype of Z, at least float32, if λ_z is at least mean(diag Z)/1000;
            else in float64.
    """

    generator: torch.Generator | None = None
    factorize: Factorize = damped_cholesky
    dense_up_to: int = 512
    double_up_to: int = 2048

    def dtype(self, layer: Calibration, damping: float) -> torch.dtype:
        """Return the dtype in which a layer is solved whose λ_z is this."""
        Z = layer.input_second_moment
        safe = damping >= 1e-3 * float(Z.diagonal().mean())
        narrow = layer.gradient.device.type == "mps" or (safe and len(Z) > self.double_up_to)
        return torch.promote_types(Z.dtype, torch.float32) if narrow else torch.float64


class Solution(NamedTuple):
    """A start, and figures that explain it.

    Attributes:
        factors: A and B.
        eigenvalues: of Ω, the r smallest, ascending.
        sigma: σ = ‖Δ‖₂, which Δ was divided by (its norm alone, where ``normalization`` is not 1).
        damping: λ_z in the end.
        output_damping: λ_y.
        retries: how often λ_z had to be multiplied by 10 for Z + λ_z I to be factorized.
        residual: the largest ‖Ωa − λa‖ over the largest |λ|.
        variance_to_bias: tr(A₀ᵀ c Z_λ⁻¹ A₀) / tr(A₀ᵀ Δ̂Δ̂ᵀ A₀): variance of the fit on N samples (before β) to what the
            subspace keeps of the displacement.
        break_even: the N at which the two would be equal.
        noise_to_signal: tr(A₀ᵀ κ Z_λ⁻¹ Z Z_λ⁻¹ A₀) / tr(A₀ᵀ Δ̂Δ̂ᵀ A₀): how much of the displacement in the subspace is
            expected from the sampling of n calibration sequences alone; None where n is not given.
    """

    factors: Factors
    eigenvalues: Float[Tensor, " r"]
    sigma: float
    damping: float
    output_damping: float
    retries: int
    residual: float
    variance_to_bias: float
    break_even: float
    noise_to_signal: float | None
