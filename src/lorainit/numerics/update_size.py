r"""How large the first update of an adapter is, from A, B and s alone.

The weight changes by s(B₁A₁ − BA) = s(B δA + δB A + δB δA). With white G (independent entries of variance σ²) the mean
square over the entries, E ν[·], of its first-order part has a closed form:

    SGD   δA = −ηs BᵀG, δB = −ηs GAᵀ:   η²s⁴σ² (in·‖BᵀB‖² + out·‖AAᵀ‖² + 2‖A‖²‖B‖²) / (out·in)
    Adam  δA = −η sign(BᵀG), δB = −η sign(GAᵀ):   η²s² (in·k(BᵀB) + out·k(AAᵀ) + 2c(A, B)) / (out·in)

Norms are Frobenius norms. The first is the magnitude law of LoRAM (Zhang et al. 2025, arXiv:2507.06558, Prop. 2) before
its white-basis simplification and with the cross term that the paper drops; the second is its analogue for Adam, whose
first step is η·sign of the gradient. k and c come from the sign correlation of Gaussians,
E sign(x)sign(y) = (2/π) arcsin ρ (Sheppard 1899); for orthogonal rows, k(AAᵀ) = ‖A‖².
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from .._typing import Float, Tensor
from .linalg import to_double

Optimizer = Literal["adamw", "adam", "sgd"]

# arcsin x = Σ c_j x^(2j+1); the correlations of the cross term are far below 1 unless a factor has a one-entry column
_ARCSIN = [math.comb(2 * j, j) / (4**j * (2 * j + 1)) for j in range(8)]


def mean_square(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    scaling: float,
    *,
    optimizer: Optimizer = "adamw",
    learning_rate: float = 1.0,
    gradient_variance: float = 1.0,
) -> float:
    """Return E ν of the first update to first order, for a white Gaussian weight gradient.

    Args:
        A: r×in.
        B: out×r.
        scaling: s.
        optimizer: ``"sgd"``, or ``"adam"``/``"adamw"``: ε → 0, no clipping, no weight decay.
        learning_rate: η, of A and B alike.
        gradient_variance: σ² of the entries of G; Adam's step does not depend on it.
    """
    if optimizer == "sgd":
        return learning_rate**2 * scaling**4 * gradient_variance * _sgd_mean_square(A, B)
    return learning_rate**2 * scaling**2 * _adam_mean_square(A, B)


def vanilla_mean_square(
    out_features: int,
    in_features: int,
    rank: int,
    scaling: float,
    *,
    optimizer: Optimizer = "adamw",
    learning_rate: float = 1.0,
    gradient_variance: float = 1.0,
) -> float:
    """Return the expectation of `mean_square` over PEFT's default start, A ~ U(±1/√in), B = 0.

    SGD: exact, with Var A = v = 1/(3·in) and fourth moment 1/(5·in²). Adam: r·v(1 + (2/π)(r − 1)/in), which leaves out
    relative terms of order 1/in² and r/in^2.
    """
    n, v = in_features, 1 / (3 * in_features)
    if optimizer == "sgd":
        fourth = 1 / (5 * n) + (n - 1) * n * v**2  # E‖a‖⁴ of a row
        expected = (rank * fourth + rank * (rank - 1) * n * v**2) / n
        return learning_rate**2 * scaling**4 * gradient_variance * expected
    return learning_rate**2 * scaling**2 * rank * v * (1 + 2 / math.pi * (rank - 1) / n)


def first_update_ratio(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    scaling: float,
    *,
    optimizer: Optimizer = "adamw",
    vanilla_scaling: float | None = None,
) -> float:
    """Return √(ν_vanilla/ν): at this multiple of vanilla's learning rate, the first updates are equally large.

    Adam has ν ∝ η²s², SGD ν ∝ η²s⁴, so it does not depend on the rate.

    Args:
        A: r×in.
        B: out×r.
        scaling: s of this start.
        optimizer: see `mean_square`.
        vanilla_scaling: s of the vanilla start; default: the same.

    Raises:
        ValueError: A = B = 0, which never moves, or entries that are not finite.
    """
    size = mean_square(A, B, scaling, optimizer=optimizer)
    if not 0 < size < math.inf:
        raise ValueError(f"a start whose update has the mean square {size} has no rate to match")
    shape = (B.shape[0], A.shape[1], A.shape[0])
    return math.sqrt(vanilla_mean_square(*shape, vanilla_scaling or scaling, optimizer=optimizer) / size)


def rate_ratio(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    scaling: float,
    *,
    optimizer: Optimizer = "adamw",
    vanilla_scaling: float | None = None,
) -> float:
    """Return ρ, the multiple of vanilla's learning rate that suits this start: `first_update_ratio`, with two limits.

    Under Adam ρ ≤ 1: the second-order part s·δB·δA of the change is η²s·(sums of signs) whatever A and B are. It is
    what a start that is smaller than vanilla's lives on after some tens of steps, so that a higher rate would make it
    outgrow vanilla's. A start within the sampling noise of vanilla's own A (three standard deviations of ‖A‖²) gets 1.

    Arguments and errors as for `first_update_ratio`.
    """
    ratio = first_update_ratio(A, B, scaling, optimizer=optimizer, vanilla_scaling=vanilla_scaling)
    noise = math.sqrt(4 / 5 / A.numel())  # relative deviation of ‖A‖² for uniform entries
    if abs(ratio - 1) < 3 * noise * (1 if optimizer == "sgd" else 0.5):
        return 1.0
    return ratio if optimizer == "sgd" else min(1.0, ratio)


def _sgd_mean_square(A: Tensor, B: Tensor) -> float:
    A, B = to_double(A), to_double(B)
    out, n = B.shape[0], A.shape[1]
    from_A = n * (B.mT @ B).square().sum()
    from_B = out * (A @ A.mT).square().sum()
    cross = 2 * A.square().sum() * B.square().sum()
    return float(from_A + from_B + cross) / (out * n)


def _adam_mean_square(A: Tensor, B: Tensor) -> float:
    A, B = to_double(A), to_double(B)
    out, n = B.shape[0], A.shape[1]
    own = n * _sign_power(B.mT @ B) + out * _sign_power(A @ A.mT)
    return float(own + 2 * _sign_cross(A, B.mT)) / (out * n)


def _sign_power(gram: Float[Tensor, "r r"]) -> Tensor:
    """Return k = Σ_kl gram_kl (2/π) arcsin(corr_kl): E‖Xᵀ sign(Xg)‖² for a Gaussian vector g and gram = XXᵀ."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    correlation = gram / (norms[:, None] * norms).clamp_min(torch.finfo(gram.dtype).tiny)
    return (gram * correlation.clamp(-1, 1).arcsin()).sum() * (2 / math.pi)


def _sign_cross(A: Float[Tensor, "r in"], Bt: Float[Tensor, "r out"]) -> Tensor:
    """Return c = E tr((B sign(BᵀG))ᵀ sign(GAᵀ) A) = Σ B_ik A_lj (2/π) arcsin(B_ik A_lj / (‖B_k‖‖A_l‖)).

    The arcsine's series separates into sums over B and over A: O(r(out + in)) instead of r²·out·in terms.
    """

    def moments(X: Tensor) -> list[Tensor]:
        norms = X.norm(dim=1, keepdim=True)
        unit = X / norms.clamp_min(torch.finfo(X.dtype).tiny)
        return [(norms[:, 0] * unit.pow(2 * j + 2).sum(1)).sum() for j in range(len(_ARCSIN))]

    terms = [c * a * b for c, a, b in zip(_ARCSIN, moments(A), moments(Bt), strict=True)]
    return torch.stack(terms).sum() * (2 / math.pi)
