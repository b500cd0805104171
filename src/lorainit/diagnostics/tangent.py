r"""What of a weight gradient G an adapter can follow: the tangent space of BA at (A, B).

The weights that a small change of A and B can reach form T = {BY + XA}. With P_B = BB⁺ (out×out) and P_A = A⁺A (in×in),
the orthogonal projectors on the columns of B and the rows of A,

    P_T(G) = P_B G + G P_A − P_B G P_A = G − (I − P_B) G (I − P_A).

The information loss of ABM-LoRA (arXiv:2511.19145, eq. 9) is the residual relative to G, ‖(I − P_B)G(I − P_A)‖/‖G‖.
What stochastic gradient descent does is not P_T but the update operator 𝒬(G) = BBᵀG + GAᵀA (times s² and the rate).

Any B ≠ 0 lowers the loss: isotropic G keeps (1 − r/out)(1 − r/in) of its energy at B ≠ 0, 1 − r/in at B = 0. A lower
value alone is no evidence of alignment; compare with `isotropic_loss` and `best_loss`.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .._typing import Float, Tensor
from ..numerics.linalg import squared_singular_values, to_double


@dataclasses.dataclass(frozen=True)
class Tangent:
    """Orthonormal bases of the rows of A and the columns of B: all that the projectors need.

    Attributes:
        U: out×k, of the columns of B; k = 0 where B = 0.
        V: in×k, of the rows of A.
    """

    U: Float[Tensor, "out kb"]
    V: Float[Tensor, "in ka"]

    @classmethod
    def at(cls, A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> Tangent:
        """Return the tangent space at (A, B); directions below rounding (of the factor's dtype) are none."""
        return cls(_orthonormal(B), _orthonormal(A.mT))

    @property
    def dimension(self) -> int:
        """Return dim T = r_B·in + r_A·out − r_B·r_A."""
        kb, ka = self.U.shape[1], self.V.shape[1]
        return kb * self.V.shape[0] + ka * self.U.shape[0] - kb * ka

    def project(self, G: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return P_T(G)."""
        return G - self.residual(G)

    def residual(self, G: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return (I − P_B) G (I − P_A)."""
        G = G - self.U @ (self.U.mT @ G)
        return G - (G @ self.V) @ self.V.mT

    def information_loss(self, G: Float[Tensor, "out in"]) -> float:
        """Return ‖(I − P_B)G(I − P_A)‖/‖G‖ ∈ [0, 1]; nan where G = 0."""
        norm = float(G.norm())
        return float(self.residual(G).norm()) / norm if norm > 0 else math.nan

    @property
    def isotropic_loss(self) -> float:
        """Return the root of the expected squared loss for white G: √((1 − r_B/out)(1 − r_A/in))."""
        return math.sqrt((1 - self.U.shape[1] / self.U.shape[0]) * (1 - self.V.shape[1] / self.V.shape[0]))


def best_loss(G: Float[Tensor, "out in"], rank: int) -> float:
    """Return the least information loss that any A and B of this rank can have: √(Σ_{i>2r} σ_i² / Σ σ_i²).

    The residual is G less a matrix of rank 2r at most, so that Eckart–Young bounds it; A and B on disjoint halves of
    the 2r leading singular directions reach the bound (as LoRA-GA's do). nan where G = 0.
    """
    energies = squared_singular_values(G)
    total = float(energies.sum())
    return math.sqrt(float(energies[2 * rank :].sum()) / total) if total > 0 else math.nan


def best_loss_of_A(G: Float[Tensor, "out in"], rank: int) -> float:
    """Return the least loss at B = 0, where A alone counts: √(Σ_{i>r} σ_i² / Σ σ_i²); nan where G = 0."""
    energies = squared_singular_values(G)
    total = float(energies.sum())
    return math.sqrt(float(energies[rank:].sum()) / total) if total > 0 else math.nan


def split(
    full: Float[Tensor, "out in"], adapted: Float[Tensor, "out in"], tangent: Tangent
) -> tuple[float, float, float]:
    """Return the parts of ‖G_full − P_T(G_LoRA)‖² (ABM-LoRA's eq. 13): the whole, the rank's part, the boundary's part.

        ‖G_full − P_T(G_LoRA)‖² = ‖G_full − P_T(G_full)‖² + ‖P_T(G_full − G_LoRA)‖²

    The first is lost to the rank whatever happens; the second, the "reducible" part, comes from the gradient of the
    started model differing from the base's. It is 0 where the start leaves the function unchanged.

    Args:
        full: G at the base's weights.
        adapted: G at the weights of the started model.
        tangent: of the start.
    """
    whole = full - tangent.project(adapted)
    return (
        float(whole.square().sum()),
        float(tangent.residual(full).square().sum()),
        float(tangent.project(full - adapted).square().sum()),
    )


def update_operator(
    G: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]
) -> Float[Tensor, "out in"]:
    """Return 𝒬(G) = BBᵀG + GAᵀA; gradient descent moves s·BA by −λs²𝒬(G) to first order in the rate λ."""
    return B @ (B.mT @ G) + (G @ A.mT) @ A


def sgd_step(
    G: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scaling: float, rate: float
) -> Float[Tensor, "out in"]:
    """Return the exact change of s·BA by one step of gradient descent: −λs²𝒬(G) + λ²s³ GAᵀBᵀG."""
    second = (G @ A.mT) @ (B.mT @ G)
    return rate**2 * scaling**3 * second - rate * scaling**2 * update_operator(G, A, B)


def alignment(G: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> tuple[float, float]:
    """Return (cos(G, 𝒬(G)), ‖𝒬(G)‖/‖G‖); nan where G = 0."""
    Q = update_operator(G, A, B)
    g, q = float(G.norm()), float(Q.norm())
    if g == 0 or q == 0:
        return math.nan, (q / g if g > 0 else math.nan)
    return float((G * Q).sum()) / (g * q), q / g


def condition(factor: Float[Tensor, "m n"]) -> float:
    """Return σ_max/σ_min of a factor; infinite where it has no full rank."""
    values = torch.linalg.svdvals(to_double(factor))
    top, least = float(values[0]), float(values[-1])
    return top / least if least > 0 else math.inf


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of some columns."""
    U, S, _ = torch.linalg.svd(to_double(columns), full_matrices=False)
    rounding = max(columns.shape) * torch.finfo(columns.dtype).eps
    kept = S > rounding * S[0] if S.numel() and float(S[0]) > 0 else torch.zeros_like(S, dtype=torch.bool)
    return U[:, kept].to(columns)
