r"""LoRA-DA's matrix Ω, whose smallest eigenvectors are its start; never formed where the input is large.

Ω = v Z_λ⁻¹ + κ Z_λ⁻¹ Z Z_λ⁻¹ − b·½(Δ̂₁Δ̂₂ᵀ + Δ̂₂Δ̂₁ᵀ)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..._typing import Float, Tensor
from ...numerics.iterative import Cholesky, Eigenpairs, damped_cholesky, dense_eigenpairs, smallest_eigenpairs

Factorize = Callable[[Tensor, float], Cholesky]

_BLOCK = 256  # columns of an inverse that are held at a time
_DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # candidates for ``damping="auto"``, relative


class Curvature(NamedTuple):
    """The Fisher information of a weight as Kronecker factors, damped: ``J ≈ T·(Z ⊗ diag y)`` for one sample.

    Attributes:
        moment: Z, the mean of z zᵀ over tokens.
        cholesky: of ``Z_λ = Z + λ_z I``.
        output_moment: T·y.
        output_inverse: u, the diagonal of the damped inverse of the output factor: ``1/(T(y + λ_y))``.
        output_damping: λ_y.
    """

    moment: Float[Tensor, "in in"]
    cholesky: Cholesky
    output_moment: Float[Tensor, " out"]
    output_inverse: Float[Tensor, " out"]
    output_damping: float

    def displacement(self, gradient: Float[Tensor, "out in"]) -> Float[Tensor, "in out"]:
        """Return the natural-gradient step ``Δ = −Z_λ⁻¹ Gᵀ diag(u)``."""
        return self.cholesky.solve(gradient.mT).mul_(-self.output_inverse)

    def noise(self, num_samples: int) -> float:
        """Return κ for σ = 1: ``E[ΔΔᵀ] = DDᵀ + κ Z_λ⁻¹ Z Z_λ⁻¹`` where Δ comes from so many samples."""
        return float((self.output_inverse.square() * self.output_moment).sum()) / num_samples

    def inverse_norm(self) -> float:
        """Return ``‖Z_λ⁻¹‖_F``, a block of columns at a time."""
        identity = torch.eye(len(self.moment), dtype=self.moment.dtype, device=self.moment.device)
        blocks = [self.cholesky.solve(block).norm() for block in identity.split(_BLOCK, dim=1)]
        return float(torch.stack(blocks).norm())


def curvature(
    input_second_moment: Float[Tensor, "in in"],
    output_gradient_second_moment: Float[Tensor, " out"],
    input_damping: float,
    output_damping: float,
    *,
    tokens_per_sample: float = 1.0,
    sequence_gradients: Float[Tensor, "n out"] | None = None,
    factorize: Factorize = damped_cholesky,
) -> Curvature:
    """Factorize Z with λ_z (more where that does not suffice, see `damped_cholesky`), and invert the output factor.

    Args:
        input_second_moment: Z, the mean of z zᵀ over tokens.
        output_gradient_second_moment: y, the mean of g⊙g over tokens.
        input_damping: λ_z.
        output_damping: λ_y.
        tokens_per_sample: T.
        sequence_gradients: S, the output gradient summed over each of n sequences; then u is the diagonal of
            ``(SᵀS/n + λ_y I)⁻¹`` and y is not used for it.
        factorize: what factorizes Z, given it and λ_z.

    Raises:
        ValueError: u would be infinite (some y = 0, undamped), or Z is no second moment.
    """
    damped = output_gradient_second_moment + output_damping
    if not bool((damped > 0).all()):
        raise ValueError("an output unit has no gradient and its second moment is not damped; raise output_damping")
    inverse = 1 / (tokens_per_sample * damped)
    if sequence_gradients is not None:
        if not output_damping > 0:
            raise ValueError("sequence_gradients give a singular output factor; raise output_damping")
        rows = sequence_gradients.to(damped) / len(sequence_gradients) ** 0.5
        # Woodbury: an n×n system in place of an out×out one
        gram = damped_cholesky(rows @ rows.mT, output_damping)
        inverse = (1 - (rows * gram.solve(rows)).sum(0)).clamp_min(0) / gram.damping
    return Curvature(
        moment=input_second_moment,
        cholesky=factorize(input_second_moment, input_damping),
        output_moment=tokens_per_sample * output_gradient_second_moment,
        output_inverse=inverse,
        output_damping=output_damping,
    )


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Ω as a linear operator.

    Attributes:
        curvature: of its first two terms.
        displacements: Δ̂ twice, or the two of a cross-fit.
        variance: v = βc.
        noise: κ in the units of Δ̂, or 0.
        bias: b.
    """

    curvature: Curvature
    displacements: tuple[Float[Tensor, "in out"], Float[Tensor, "in out"]]
    variance: float
    noise: float = 0.0
    bias: float = 1.0

    def apply(self, block: Float[Tensor, "in k"]) -> Float[Tensor, "in k"]:
        """Return Ω times some columns, from products with Δ̂ and solutions with Z_λ."""
        first, second = self.displacements
        result = first @ (second.mT @ block)
        if first is not second:
            result = (result + second @ (first.mT @ block)) / 2
        result = -self.bias * result
        if self.variance or self.noise:
            solved = self.curvature.cholesky.solve(block)
            result += self.variance * solved
            if self.noise:
                result += self.noise * self.curvature.cholesky.solve(self.curvature.moment @ solved)
        return result

    def dense(self) -> Float[Tensor, "in in"]:
        """Return Ω as a matrix."""
        first, second = self.displacements
        result = first @ (-self.bias * second).mT
        if self.variance or self.noise:
            inverse = torch.cholesky_inverse(self.curvature.cholesky.L)
            result += self.variance * inverse
            if self.noise:
                result += self.noise * (inverse @ self.curvature.moment @ inverse)
        return (result + result.mT) / 2

    def precondition(self, block: Float[Tensor, "in k"]) -> Float[Tensor, "in k"]:
        """Return Z_λ times some columns: the inverse of the variance term, up to scale."""
        return self.curvature.moment @ block + self.curvature.cholesky.damping * block

    def smallest(self, rank: int, start: Float[Tensor, "in k"], *, dense_up_to: int) -> Eigenpairs:
        """Return the ``rank`` smallest eigenpairs, ascending; ``start``: leading left singular vectors of Δ̂.

        Inputs up to ``dense_up_to``, or too small beside the rank for a search in a subspace, are decomposed as a
        dense matrix, and so is anything on which the search does not converge.
        """
        if len(start) > max(dense_up_to, 16 * (rank + 4)):
            # the largest eigenvalue of Z_λ⁻¹ is at most 1/λ_z, and Δ̂ has norm 1
            largest = (self.variance + self.noise) / max(self.curvature.cholesky.damping, 1e-30)
            precondition = self.precondition if largest else None
            found = smallest_eigenpairs(self.apply, start, rank, precondition=precondition, norm=largest)
            if found.converged:
                return found
        return dense_eigenpairs(self.dense(), rank)


def held_out_damping(
    halves: tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]],
    input_second_moment: Float[Tensor, "in in"],
    output_gradient_second_moment: Float[Tensor, " out"],
    subspace: Callable[[Tensor, float], Tensor],
) -> float:
    """Return the relative damping (0.01, 0.1, 1 or 10) whose subspace from one half of the data is best on the other.

    Best: with A fixed and B free, the quadratic model of the loss falls furthest along the other half's gradient, by
    ``Σ_i (A g_i)ᵀ (A Z Aᵀ)⁻¹ (A g_i) / y_i`` up to a factor, g_i the gradient of output i. The sampling noise of that
    gradient has the covariance ``Z ⊗ diag y`` and adds the same to the score of every subspace.

    Args:
        halves: the mean gradients of two disjoint halves of the sequences.
        input_second_moment: Z.
        output_gradient_second_moment: y; a tenth of its mean is added against outputs without gradient.
        subspace: A (r×in) from a gradient and a relative damping.
    """
    Z, y = input_second_moment, output_gradient_second_moment
    weight = 1 / (y + 0.1 * y.mean())
    scores = []
    for damping in _DAMPINGS:
        score = 0.0
        for train, test in (halves, halves[::-1]):
            A = subspace(train, damping).to(Z)
            seen = A @ test.to(Z).mT
            score += float((damped_cholesky(A @ Z @ A.mT, 0.0).solve(seen) * seen * weight).sum())
        scores.append(score)
    return _DAMPINGS[scores.index(max(scores))]
