"""Solvers that say how well they did: Cholesky with as much damping as it takes, smallest eigenpairs of an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .._typing import Float, Tensor

Operator = Callable[[Tensor], Tensor]


class Cholesky(NamedTuple):
    """The factorization ``M + damping·I = L Lᵀ``.

    Attributes:
        L: lower triangular.
        damping: what was added to the diagonal in the end.
        retries: how often the damping had to be raised.
    """

    L: Float[Tensor, "n n"]
    damping: float
    retries: int

    def solve(self, right: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return ``(M + damping·I)⁻¹ right``."""
        # `torch.cholesky_solve` copies L at every call: four times as long for a few columns
        half = torch.linalg.solve_triangular(self.L, right, upper=False)
        return torch.linalg.solve_triangular(self.L.mT, half, upper=True)


def damped_cholesky(matrix: Float[Tensor, "n n"], damping: float) -> Cholesky:
    """Factorize a positive semidefinite matrix with damping, ten times more at each failure.

    A failure is also a pivot that is no larger than its own rounding errors: LAPACK goes on with it, and solutions are
    finite garbage. One copy of the matrix and its factor are held.

    Args:
        matrix: M, symmetric; its lower triangle is read.
        damping: λ ≥ 0, the first value that is tried.

    Raises:
        ValueError: the matrix is zero, not finite, or far from positive semidefinite.
    """
    mean = float(matrix.diagonal().mean())
    if not (0 < mean < math.inf):
        raise ValueError(f"the mean of the diagonal is {mean:.3g}, which no second moment has")
    rounding = torch.finfo(matrix.dtype).eps * math.sqrt(len(matrix))
    retries = 0
    while damping < 1e3 * mean or retries == 0:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        L, failed = torch.linalg.cholesky_ex(damped)
        # a pivot's rounding error goes with its own diagonal entry: scaling rows and columns changes nothing
        if not int(failed) and float((L.diagonal().square() / damped.diagonal()).min()) > 8 * rounding:
            return Cholesky(L, damping, retries)
        damping, retries = max(10 * damping, rounding * mean), retries + 1
    raise ValueError("the matrix is not positive semidefinite, however much it is damped")


class Eigenpairs(NamedTuple):
    """Eigenvalues in ascending order, eigenvectors (columns) and how well they fit.

    Attributes:
        values: r.
        vectors: n×r, orthonormal.
        residual: the largest ``‖Mv − λv‖`` relative to the largest ``|λ|`` among them.
        iterations: 0 where the start was good enough.
        converged: the residual is as small as was asked for, or as rounding errors let it be.
    """

    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "n r"]
    residual: float
    iterations: int
    converged: bool


def smallest_eigenpairs(
    apply: Operator,
    start: Float[Tensor, "n k"],
    rank: int,
    *,
    precondition: Operator | None = None,
    tolerance: float | None = None,
    norm: float = 0.0,
    iterations: int = 60,
) -> Eigenpairs:
    """Return approximately the eigenpairs of the ``rank`` smallest eigenvalues of a symmetric operator.

    Block Davidson with thick restarts: Rayleigh–Ritz in a growing orthonormal basis, which takes in the residuals and,
    as directions of their own, the preconditioned residuals, so that a preconditioner that fits only a part of the
    spectrum does not slow down the rest. Memory: the basis and its image, up to 12·(rank + 4) + k columns each.

    Args:
        apply: M v for a block of columns.
        start: k ≥ rank columns to begin with, linearly independent.
        rank: how many pairs.
        precondition: a rough M⁻¹ v, symmetric positive definite, of any scale.
        tolerance: the residual (see `Eigenpairs`) to stop at. Default: 1e-9 in float64, else 1e-5.
        norm: about ``‖M‖``: below the rounding errors of its products no residual is asked for.
        iterations: give up after so many; the residual tells.
    """
    eps = torch.finfo(start.dtype).eps
    tolerance = tolerance if tolerance is not None else 1e-9 if start.dtype == torch.float64 else 1e-5
    width = min(rank + 4, start.shape[1])  # a few pairs beyond the wanted ones widen the gap that sets the pace
    limit = 10 * width + start.shape[1]
    basis = torch.linalg.qr(start).Q
    image = apply(basis)
    done = 0
    while True:
        ritz = basis.mT @ image
        values, rotation = torch.linalg.eigh((ritz + ritz.mT) / 2)
        kept = rotation[:, :width]
        vectors = basis @ kept
        residuals = image @ kept - vectors * values[:width]
        size = float(values[:rank].abs().max())
        residual = float(residuals[:, :rank].norm(dim=0).max())
        converged = residual <= max(tolerance * size, 10 * eps * norm)
        if converged or done == iterations:
            relative = residual / size if size > 0 else residual
            return Eigenpairs(values[:rank], vectors[:, :rank], relative, done, converged)
        if basis.shape[1] > limit:
            kept = rotation[:, : 4 * width]
            basis, image = basis @ kept, image @ kept
        fresh = residuals if precondition is None else torch.cat([residuals, precondition(residuals)], dim=1)
        fresh = fresh[:, : len(basis) - basis.shape[1]]
        fresh = fresh / fresh.norm(dim=0).clamp_min(torch.finfo(start.dtype).tiny)
        for _ in range(2):  # once leaves rounding errors of the old basis behind
            fresh = torch.linalg.qr(fresh - basis @ (basis.mT @ fresh)).Q
        basis, image = torch.cat([basis, fresh], dim=1), torch.cat([image, apply(fresh)], dim=1)
        done += 1


def dense_eigenpairs(matrix: Float[Tensor, "n n"], rank: int) -> Eigenpairs:
    """Return the eigenpairs of the ``rank`` smallest eigenvalues of a symmetric matrix from a full decomposition."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values[:rank].clone(), vectors[:, :rank].clone()
    size = float(values.abs().max())
    residual = float((matrix @ vectors - vectors * values).norm(dim=0).max())
    return Eigenpairs(values, vectors, residual / size if size > 0 else residual, 0, True)


def spectral_norm(matrix: Float[Tensor, "m n"], start: Float[Tensor, "m k"]) -> float:
    """Return ``‖matrix‖₂``; ``start`` holds approximate left singular vectors, the leading one among them."""
    scale = float(matrix.abs().max()) or 1.0  # squares of small entries would underflow
    found = smallest_eigenpairs(lambda block: matrix @ (matrix.mT @ (block / scale)) / -scale, start, 1)
    return scale * math.sqrt(max(0.0, -float(found.values[0])))
