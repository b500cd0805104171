"""Linear algebra shared by the methods: seeded randomized SVD, canonical signs, low-rank norms and truncation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._typing import Float, Tensor


class SVD(NamedTuple):
    """A (truncated) singular value decomposition ``U diag(S) Vh``, ``S`` descending."""

    U: Float[Tensor, "m k"]
    S: Float[Tensor, " k"]
    Vh: Float[Tensor, "k n"]


def canonical_signs(svd: SVD) -> SVD:
    """Flip each singular pair so that the entry of largest magnitude in every left vector is positive.

    Singular vectors are only defined up to a common sign; this rule makes two solvers agree.
    """
    pivot = svd.U.abs().argmax(dim=0)
    sign = torch.where(svd.U.gather(0, pivot[None])[0] < 0, -1.0, 1.0).to(svd.U.dtype)
    return SVD(svd.U * sign, svd.S, svd.Vh * sign[:, None])


def require_rank(matrix: Float[Tensor, "m n"], rank: int) -> None:
    """Raise ValueError unless 1 ≤ rank ≤ min(m, n): a slice would silently give fewer or other columns."""
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} is not between 1 and min{tuple(matrix.shape)} = {min(matrix.shape)}")


def exact_svd(matrix: Float[Tensor, "m n"], rank: int, *, smallest: bool = False) -> SVD:
    """Return the ``rank`` leading (or, with ``smallest``, trailing) singular triplets from a full SVD.

    Trailing triplets keep the descending order of ``S``.
    """
    require_rank(matrix, rank)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    part = slice(S.numel() - rank, S.numel()) if smallest else slice(0, rank)
    return canonical_signs(SVD(U[:, part].contiguous(), S[part], Vh[part].contiguous()))


def randomized_svd(
    matrix: Float[Tensor, "m n"],
    rank: int,
    *,
    generator: torch.Generator,
    oversample: int = 10,
    iterations: int = 4,
) -> SVD:
    """Return approximately the ``rank`` leading singular triplets by randomized subspace iteration.

    Range finder with ``rank + oversample`` columns and ``iterations`` power iterations, orthonormalized at each
    half step (Halko, Martinsson & Tropp 2011, algorithm 4.4 and section 5.1). It reads ``matrix``
    ``2 * iterations + 2`` times and allocates nothing of its size.

    Args:
        matrix: the matrix to decompose.
        rank: number of triplets, at most ``min(m, n)``.
        generator: source of the Gaussian test matrix. It is drawn on the generator's device and moved, so that a
            CPU generator gives the same start on every device.
        oversample: extra columns that sharpen the captured subspace.
        iterations: power iterations; the range finder sees the singular values to the power 2·iterations + 1.
    """
    require_rank(matrix, rank)
    m, n = matrix.shape
    width = min(rank + oversample, m, n)
    test = torch.randn(n, width, generator=generator, device=generator.device).to(matrix)
    Q = torch.linalg.qr(matrix @ test).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(matrix.mT @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    # (n, width): the tall orientation is the cheap one for LAPACK
    V, S, Uh = torch.linalg.svd(matrix.mT @ Q, full_matrices=False)
    return canonical_signs(SVD(Q @ Uh.mT[:, :rank], S[:rank], V.mT[:rank].contiguous()))


def product_norm(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> float:
    """Return the Frobenius norm of ``B @ A`` from the two r×r Gram matrices, in float64.

    ``‖BA‖² = tr((BᵀB)(AAᵀ))``; the m×n product is never formed.
    """
    A, B = A.double(), B.double()
    squared = ((B.mT @ B) * (A @ A.mT)).sum()
    return float(squared.clamp_min(0).sqrt())


def product_mean(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> float:
    """Return the mean entry of ``B @ A`` without forming it, in float64."""
    return float(B.double().mean(0) @ A.double().mean(1))


def truncate_product(
    A: Float[Tensor, "k n"], B: Float[Tensor, "m k"], rank: int
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"], float]:
    """Return the best rank-``rank`` approximation of ``B @ A`` as balanced factors, and its relative error.

    QR of both factors, then the SVD of the k×k core (Eckart–Young); the m×n product is never formed. Float64
    throughout, returned in the dtype of ``A``.

    Returns:
        ``A' = √S Vᵀ`` (rank×n), ``B' = U √S`` (m×rank) and ``‖BA − B'A'‖_F / ‖BA‖_F`` (0 where ``BA`` is 0).
    """
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().mT)
    core = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    svd = canonical_signs(SVD(Qb @ core.U, core.S, core.Vh @ Qa.mT))
    rank = min(rank, svd.S.numel())
    root = svd.S[:rank].sqrt()
    total = float(svd.S.norm())
    error = float(svd.S[rank:].norm()) / total if total > 0 else 0.0
    return (root[:, None] * svd.Vh[:rank]).to(A.dtype), (svd.U[:, :rank] * root).to(B.dtype), error
