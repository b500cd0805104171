"""What LoRA-DA's mathematics takes and gives: its options, and a start with the figures that explain it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

from ..._typing import Float, Tensor
from ...adapter.factors import Factors
from ..method import require_choice

Mode = Literal["consistent", "official"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen about the mathematics. None: the mode's own value.

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


class Solution(NamedTuple):
    """A start, and how it came about.

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
